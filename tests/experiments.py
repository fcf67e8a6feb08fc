"""The paper's tasks on a real language model: controllable generation, dialogue, and what the dispersion index knows.

    python tests/experiments.py sft --model DIR                     OUT/sft/model: it continues reviews
    python tests/experiments.py sentiment --model DIR               continuations of openings, ranked by a panel
    python tests/experiments.py dialogue --model DIR --data hh-harmless.jsonl.gz --votes pandalm.jsonl.gz
    python tests/experiments.py index --model DIR                   after the other two: readings of the index
    python tests/experiments.py people --model DIR --votes pandalm.jsonl.gz     votes of real people as weights
    python tests/experiments.py report                              all tables and pictures, from the rows

DIR: a Hugging Face folder or name (HuggingFaceTB/SmolLM2-135M-Instruct).  --data: pairs (such as
hf://datasets/Anthropic/hh-rlhf/harmless-base/test.jsonl.gz).  --votes: PandaLM's human test set: lines with
instruction, input, response1, response2, annotator1, annotator2 and annotator3 (1, 2, or 0 for a tie).
Each training run adds a line to OUT/sentiment.jsonl, OUT/dialogue.jsonl or OUT/people.jsonl.  Runs with a line
are not repeated, so a killed command continues where it stopped.  --part 1/4 to 4/4: four processes share the work.
--quick runs all of it with a tiny random model and a few openings or pairs, in a minute, just to test it.
"""
import argparse
import contextlib
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from bandit import Panel, Population, at_kl, draw  # noqa: E402
from data import BadData, Pair, Tokenizer, collate, find_model, load_pairs, read_lines  # noqa: E402
from mallowspo import dispersion_index  # noqa: E402
from model import BRANCHES, BadModel, Transformer  # noqa: E402

# The methods that are compared: settings of train.Config.  Those from "phi, votes" on know more than one
# annotator's word and are for sentiment alone.  "labels" is the file of pairs: by default one annotator
# decides; "majority": most of three do; "unanimous": only pairs on which all three agree are kept.
METHODS = {
    "dpo": {"loss": "dpo"},
    "ipo": {"loss": "ipo"},
    "theta": {"loss": "mallows-theta"},
    "phi": {"loss": "mallows-phi"},
    "theta, learned": {"loss": "mallows-theta", "dispersion_power": "learn"},
    "phi, learned": {"loss": "mallows-phi", "dispersion_power": "learn"},
    "phi, votes": {"loss": "mallows-phi", "dispersion": "votes"},
    "phi, true": {"loss": "mallows-phi", "dispersion": "field"},
    "dpo, majority": {"loss": "dpo", "labels": "majority"},
    "dpo, unanimous": {"loss": "dpo", "labels": "unanimous"},
    "phi, majority": {"loss": "mallows-phi", "labels": "majority"},
    "phi, majority and votes": {"loss": "mallows-phi", "dispersion": "votes", "labels": "majority"},
    "votes, learned": {"loss": "mallows-phi", "dispersion": "votes", "labels": "majority", "dispersion_power": "learn"},
    "votes, power 3": {"loss": "mallows-phi", "dispersion": "votes", "labels": "majority", "dispersion_power": 3.0},
}
DIALOGUE = ("dpo", "ipo", "theta", "phi", "phi, learned")
PEOPLE = ("dpo, majority", "phi, majority", "phi, majority and votes", "votes, power 3", "dpo, unanimous")
BETAS, SCALE = (0.05, 0.1, 0.3), {"ipo": 10.0}  # of sentiment; ipo's times 10, as its log-ratios are per token
DRAWN = ("dpo", "phi", "dpo, majority", "votes, power 3", "dpo, unanimous")
RATES = (5e-6, 1.5e-5, 5e-5, 1.5e-4)           # dpo selects one for all methods, on other pairs than those reported
TASK = "Go on with this review where it stops, in one or two sentences, and write nothing else:\n\n"      # of sft


# ---------------------------------------------------------------------------------------------------------------
# 1. What both tasks share: rows kept in a file, training on a file of pairs, scores, samples and their KL

class Task:
    """The options, the reference, and the file of rows of one experiment."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.args, self.name, self.folder = args, name, args.out / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows_file = args.out / f"{name}.jsonl"
        self.world = train.join_world(train.Config(device=args.device))
        if args.quick:
            torch.set_num_threads(1)
            with train.lock_folder(args.out / "tiny.lock"):        # other processes want it too
                args.model = args.model or make_tiny(args.out / "tiny")
        where = find_model(args.model)
        self.tokenizer = Tokenizer(where)
        self.reference = Transformer.from_pretrained(where, self.world.device)

    def rows(self) -> list[dict]:
        return read_rows(self.rows_file)

    def add(self, row: dict) -> None:
        """Append a row in a single write, as other processes append, too.  A killed one may have left half
        a line, so each row begins with a line break."""
        with open(self.rows_file, "ab", buffering=0) as file:
            file.write(f"\n{json.dumps(row)}\n".encode())

    def pairs(self, path: Path) -> list[Pair]:
        return load_pairs(path, self.tokenizer, self.args.max_tokens).pairs

    def fit(self, data: Path, **settings) -> tuple[Transformer, Path]:
        """Train a policy as `python train.py` would -> the policy and its output folder."""
        out = self.folder / f"run-{self.args.part[0]}"
        shutil.rmtree(out, ignore_errors=True)
        cfg = train.Config(**{"model": str(self.args.model), "data": str(data), "out": str(out), "samples": 0,
                              "save_every": 0, "device": self.args.device, "max_tokens": self.args.max_tokens,
                              "reference": str(data.with_suffix(".safetensors")), "batch_size": 32, **settings})
        with contextlib.redirect_stdout(None):
            train.fit(cfg, self.world)
        return Transformer.from_pretrained(out, self.world.device), out

    def learning_rate(self, data: Path, held_out: Path, **settings) -> float:
        """The rate at which dpo has the lowest loss on held-out pairs; chosen once, for all methods."""
        with train.lock_folder(self.folder / "lock"):              # one process looks for it, the others wait
            for rate in self.args.rates:
                if not any(row.get("tried") == rate for row in self.rows()):
                    _, out = self.fit(data, loss="dpo", lr=rate, eval_data=str(held_out), **settings)
                    last = read_rows(out / "evaluations.jsonl")[-1]
                    self.add({"tried": rate, "loss": last["loss"], "accuracy": last["accuracy"]})
            tried = {row["tried"]: row["loss"] for row in self.rows() if "tried" in row}
            return min(tried, key=tried.get)


def read_rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):                      # half a line of a killed process
            rows.append(json.loads(line))
    return rows


def make_tiny(folder: Path) -> Path:
    """A random model that knows every byte, for --quick."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        settings = {**train.DEMO_MODEL, "hidden_size": 32, "max_position_embeddings": 1024, "vocab_size": 2048}
        Transformer.from_config(settings, Population().tokenizer_files()).save_pretrained(folder)
    return folder


@torch.no_grad()
def score(model: Transformer, pairs: list[Pair]) -> list[train.Scores]:
    """Log-probability of each token of both responses, and the entropy there."""
    found = []
    for start in range(0, len(pairs), 32):
        some = pairs[start:start + 32]
        row = collate([pair[:3] for pair in some], BRANCHES, model.embed.weight.device)
        scores = torch.stack(model(*row.inputs(), entropy=True)).cpu().numpy()                      # (2, N)
        ends = np.cumsum([len(pair.chosen) + len(pair.rejected) for pair in some])[:-1]
        found += [train.Scores(*part) for part in np.split(scores, ends, axis=1)]
    return found


def sums(scores: list[train.Scores], pairs: list[Pair]) -> np.ndarray:
    """(P, 2) log-probabilities of the responses."""
    return np.array([[each.logp[:len(pair.chosen)].sum(), each.logp[len(pair.chosen):].sum()]
                     for each, pair in zip(scores, pairs)])


def sample(model: Transformer, prompts: list[list[int]], tokens: int, end: int, seed: int, temperature: float = 1.0,
           top_p: float = 1.0) -> list[list[int]]:
    """Draw a response to each prompt; by default from the model's unchanged distribution."""
    responses = []
    for start in range(0, len(prompts), 256):
        some = prompts[start:start + 256]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(some))]
        steps = list(model.generate(some, tokens, temperature, top_p, (end,), generators))
        responses += [[step[i] for step in steps if step[i] is not None] for i in range(len(some))]
    return responses


@torch.no_grad()
def kl_of_samples(policy: Transformer, reference: Transformer, prompts: list[list[int]], responses: list[list[int]],
                  tokens: int) -> np.ndarray:
    """(n,) nats: KL of the next-token distributions, summed along responses that the policy drew.  The mean
    estimates the KL of whole responses of at most `tokens` tokens, with less noise than their log-ratios."""
    device, found = policy.embed.weight.device, []
    size = max(1, 2048 // (max(map(len, prompts)) + tokens))       # so that the logits fit in memory
    for start in range(0, len(prompts), size):
        both = list(zip(prompts[start:start + size], responses[start:start + size]))
        longest = max(len(prompt) + len(response) for prompt, response in both)
        ids = torch.zeros(len(both), longest, dtype=torch.int64, device=device)      # padding, which no token sees
        for i, (prompt, response) in enumerate(both):
            ids[i, :len(prompt) + len(response)] = torch.tensor(prompt + response)
        ours, theirs = (model.logits(ids).log_softmax(-1) for model in (policy, reference))         # (B, T, V)
        kl = (ours.exp() * (ours - theirs)).sum(-1).cpu()                                           # (B, T)
        for i, (prompt, response) in enumerate(both):
            drawn = min(len(response) + 1, tokens)                 # the end token was drawn too
            found.append(kl[i, len(prompt) - 1:][:drawn].sum().item())
    return np.array(found)


# ---------------------------------------------------------------------------------------------------------------
# 2. Sentiment: continue the openings of reviews, as positively as possible

# Twenty kinds of things, from those that everybody judges alike to those on which judgements differ most.
KINDS = (
    ("kitchen scale", "tape measure", "thermometer", "wall clock", "pocket calculator"),
    ("bike lock", "door handle", "smoke alarm", "fire extinguisher", "first-aid kit"),
    ("phone battery", "charging cable", "memory card", "desk lamp", "extension cord"),
    ("washing machine", "fridge", "kettle", "vacuum cleaner", "toaster"),
    ("printer", "router", "keyboard", "laptop screen", "webcam"),
    ("parcel service", "train line", "car rental", "airport shuttle", "taxi company"),
    ("tent", "rain jacket", "backpack", "sleeping bag", "pair of hiking boots"),
    ("dentist", "plumber", "car mechanic", "tax adviser", "vet"),
    ("language course", "driving school", "cooking class", "online lecture", "swimming lesson"),
    ("hotel room", "camp site", "guest house", "hostel", "holiday flat"),
    ("office chair", "mattress", "sofa", "pillow", "standing desk"),
    ("pair of headphones", "record player", "electric guitar", "piano", "loudspeaker"),
    ("coffee shop", "pizza place", "bakery", "noodle bar", "steak house"),
    ("video game", "board game", "card game", "puzzle", "chess app"),
    ("crime novel", "fantasy series", "poetry book", "biography", "comic book"),
    ("action film", "romantic comedy", "horror film", "musical", "documentary"),
    ("pop album", "jazz concert", "opera", "techno club", "folk festival"),
    ("perfume", "haircut", "pair of sunglasses", "winter coat", "wedding dress"),
    ("modern painting", "abstract sculpture", "dance performance", "street mural", "art exhibition"),
    ("political talk show", "gossip magazine", "celebrity podcast", "reality show", "opinion column"),
)
FRAMES = ("My review of the {}: I used it for a month and", "I have to say something about this {}. It",
          "Three of us tried the {} last week, and we all")
NOISE = np.geomspace(0.1, 3.0, len(KINDS))     # noise of a judgement, by kind; scores go from -1 to 1


def openings() -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(number of the kind, opening): 200 to train on and 100 held out; every kind is in both parts."""
    parts = [], []
    for kind, things in enumerate(KINDS):
        for i, thing in enumerate(things):
            for j, frame in enumerate(FRAMES):
                parts[(i + j) % 3 == 0].append((kind, frame.format(thing)))
    return parts


def compound(texts: list[str]) -> np.ndarray:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # for this experiment alone
    analyser = SentimentIntensityAnalyzer()
    return np.array([analyser.polarity_scores(text)["compound"] for text in texts])


def judged_pairs(items: list[dict], seed: int) -> list[dict]:
    """Pairs of continuations of one opening.  Three annotators see score + Gumbel noise, so each prefers a
    to b with probability sigmoid((a - b) / noise).  The first one decides which is chosen; all three vote."""
    rng, records = np.random.default_rng(seed), []
    for item in items:
        noise, score = NOISE[item["kind"]], np.array(item["scores"])
        order = rng.permutation(len(score))
        for a, b in zip(order[::2], order[1::2]):
            if item["texts"][a] == item["texts"][b]:
                continue
            seen = score[[a, b]] + noise * rng.gumbel(size=(3, 2))                                  # (3, 2)
            first = seen[:, 0] > seen[:, 1]
            chosen, rejected = (a, b) if first[0] else (b, a)
            alike = int((first == first[0]).sum())
            records.append({"prompt": item["prompt"], "chosen": item["texts"][chosen],
                            "rejected": item["texts"][rejected], "kind": item["kind"], "votes": [alike, 3 - alike],
                            "dispersion": math.exp(-NOISE[0] / noise)})         # -log phi = NOISE[0] / noise
    return records


def by_majority(record: dict) -> dict:
    """The pair as most of the three see it."""
    if record["votes"][0] > record["votes"][1]:
        return record
    return {**record, "chosen": record["rejected"], "rejected": record["chosen"], "votes": record["votes"][::-1]}


def write_pairs(task: Task, training: list[tuple[int, str]], tokens: int, copies: int) -> None:
    """Write files of pairs: per seed, as one annotator, the majority or all label them; and for tuning."""
    made = task.folder / "continuations.jsonl"
    if not made.exists():
        prompts, end = [task.tokenizer.prompt(text) for _, text in training], task.tokenizer.eos
        texts = [[task.tokenizer.text(ids) for ids in sample(task.reference, prompts, tokens, end, seed)]
                 for seed in range(copies)]
        items = []
        for (kind, text), *answers in zip(training, *texts):
            answers = [answer for answer in answers if answer.strip()]
            items.append({"kind": kind, "prompt": text, "texts": answers, "scores": compound(answers).tolist()})
        train.write_jsonl(made, items)
    items = read_rows(made)
    for seed in range(task.args.seeds):
        records = judged_pairs(items, seed + 1)
        train.write_jsonl(task.folder / f"pairs{seed}.jsonl", records)
        train.write_jsonl(task.folder / f"majority{seed}.jsonl", map(by_majority, records))
        unanimous = [record for record in records if record["votes"] == [3, 0]]
        train.write_jsonl(task.folder / f"unanimous{seed}.jsonl", unanimous)
    records, asked = judged_pairs(items, 0), {item["prompt"] for item in items[::5]}     # by other judges
    train.write_jsonl(task.folder / "tune-train.jsonl", (each for each in records if each["prompt"] not in asked))
    train.write_jsonl(task.folder / "tune-held-out.jsonl", (each for each in records if each["prompt"] in asked))


def sft(args: argparse.Namespace) -> None:
    """Make a reference of another kind: ask the chat model to continue reviews, sampled as users do; then
    teach it, by train.py --loss sft, to write such continuations without being asked."""
    task, (training, _) = Task(args, "sft"), openings()
    texts, chat, tokens, copies = [text for _, text in training], task.tokenizer.template, 48, 4
    if args.quick:
        texts, tokens, copies = texts[:10], 8, 2
    prompts = [task.tokenizer.prompt([{"role": "user", "content": TASK + text}] if chat else text) for text in texts]
    records = []
    for seed in range(copies):
        for text, ids in zip(texts, sample(task.reference, prompts, tokens, task.tokenizer.eos, seed, 0.7, 0.95)):
            answer = task.tokenizer.text(ids).strip().removeprefix(text).strip()
            if answer:
                records.append({"prompt": text, "chosen": f" {answer}"})
    train.write_jsonl(task.folder / "reviews.jsonl", records)
    began = time.perf_counter()
    _, out = task.fit(task.folder / "reviews.jsonl", loss="sft", lr=args.rates[0])
    shutil.rmtree(task.folder / "model", ignore_errors=True)
    out.replace(task.folder / "model")
    print(f"sft: {len(records)} reviews in {time.perf_counter() - began:.0f} s -> {task.folder / 'model'}")


def sentiment(args: argparse.Namespace) -> None:
    task = Task(args, "sentiment")
    tokens, copies, end = (4, 4, task.tokenizer.eos) if args.quick else (32, args.copies, task.tokenizer.eos)
    training, held_out = openings()
    if args.quick:
        training, held_out = training[::20], held_out[::10]
    with train.lock_folder(task.folder / "lock"):
        write_pairs(task, training, tokens, copies)
    rate = task.learning_rate(task.folder / "tune-train.jsonl", task.folder / "tune-held-out.jsonl", beta=0.1)
    prompts = [task.tokenizer.prompt(text) for _, text in held_out]
    for job in jobs(args, args.methods or METHODS, args.betas or BETAS):
        if any(job.items() <= row.items() for row in task.rows()):
            continue
        began = time.perf_counter()
        settings = {"labels": "pairs", **METHODS[job["method"]], "seed": job["seed"], "beta": job["beta"], "lr": rate}
        policy, out = task.fit(task.folder / f"{settings.pop('labels')}{job['seed']}.jsonl", **settings)
        figures = measure_sentiment(task, policy, prompts, tokens, end)
        task.add({**job, **learned(out), **figures, "seconds": time.perf_counter() - began})
        print(f"sentiment: {job}, {time.perf_counter() - began:.0f} s", flush=True)
    if not any(row.get("method") == "reference" for row in task.rows()) and args.part[0] == 1:
        task.add({"method": "reference", **measure_sentiment(task, task.reference, prompts, tokens, end)})


def jobs(args: argparse.Namespace, methods, betas) -> list[dict]:
    """The runs that this process does, seed by seed."""
    every = [{"method": method, "beta": beta * SCALE.get(method, 1.0), "seed": seed} for seed in range(args.seeds)
             for beta in betas for method in methods]
    part, parts = args.part
    return every[part - 1::parts]


def learned(out: Path) -> dict:
    """What the run learned about its index."""
    record = json.loads((out / "run.json").read_text())
    trust = record["trust"] or {"kappa": math.nan, "se": math.nan}
    return {"power": record["dispersion_power"], "trust": trust["kappa"], "trust_se": trust["se"]}


def measure_sentiment(task: Task, policy: Transformer, prompts: list[list[int]], tokens: int, end: int) -> dict:
    """Mean score of several continuations of each held-out opening, and their KL."""
    prompts = prompts * task.args.samples
    responses = sample(policy, prompts, tokens, end, 99)
    scores = compound([task.tokenizer.text(ids) for ids in responses])
    kl = kl_of_samples(policy, task.reference, prompts, responses, tokens)
    return {"score": scores.mean(), "score_se": scores.std() / len(scores) ** 0.5, "kl": kl.mean(),
            "kl_se": kl.std() / len(kl) ** 0.5}


# ---------------------------------------------------------------------------------------------------------------
# 3. Dialogue: Anthropic's pairs; out of distribution: longer prompts, and PandaLM's questions

def split_records(task: Task) -> None:
    """Split the records into files: the longest prompts, then held-out pairs, then pairs to train on."""
    args, sizes = task.args, (1300, 400, 80)
    records = [json.loads(line) for _, line in read_lines(args.data)]
    if args.quick:
        records, sizes = records[:20], (12, 4, 4)
    found, kept = [], []
    for where, record in enumerate(records):                      # one at a time, to know which are usable
        path = task.folder / "one.jsonl"
        train.write_jsonl(path, [record])
        with contextlib.suppress(BadData):
            found += task.pairs(path)
            kept.append(where)
    order = sorted(range(len(kept)), key=lambda i: len(found[i].prompt), reverse=True)
    longer, rest = order[:sizes[2]], np.random.default_rng(0).permutation(order[sizes[2]:]).tolist()
    training = rest[sizes[1]:][:sizes[0]]
    parts = {"longer": longer, "held-out": rest[:sizes[1]], "train": training,
             "tune-train": training[len(training) // 4:], "tune-held-out": training[:len(training) // 4]}
    for name, chosen in parts.items():
        train.write_jsonl(task.folder / f"{name}.jsonl", [records[kept[i]] for i in chosen])
    train.write_jsonl(task.folder / "votes.jsonl", pandalm(args.votes, 20 if args.quick else None))


def pandalm(path: str, count: int | None) -> list[dict]:
    """PandaLM's items as dialogues: the answer with more of three people's votes is chosen; no ties."""
    records = []
    for _, line in read_lines(path):
        item = json.loads(line)
        marks = [str(item[f"annotator{i}"]) for i in (1, 2, 3)]
        votes, sides = [marks.count("1"), marks.count("2")], [item["response1"], item["response2"]]
        if votes[0] == votes[1] or sides[0] == sides[1] or not all(sides):
            continue
        chosen, rejected = (1, 2) if votes[0] > votes[1] else (2, 1)
        question = "\n\n".join(filter(None, [item["instruction"], item["input"]]))
        records.append({"prompt": f"\n\nHuman: {question}\n\nAssistant:", "chosen": f" {item[f'response{chosen}']}",
                        "rejected": f" {item[f'response{rejected}']}", "votes": sorted(votes, reverse=True),
                        "marks": marks, "task": item["instruction"]})
    return records[::max(1, len(records) // count)] if count else records


def dialogue(args: argparse.Namespace) -> None:
    task = Task(args, "dialogue")
    with train.lock_folder(task.folder / "lock"):
        if not (task.folder / "votes.jsonl").exists():
            split_records(task)
    rate = task.learning_rate(task.folder / "tune-train.jsonl", task.folder / "tune-held-out.jsonl", beta=0.1)
    sets = {name: task.pairs(task.folder / f"{name}.jsonl") for name in ("held-out", "longer", "votes")}
    scores = {name: score(task.reference, pairs) for name, pairs in sets.items()}
    before = {name: sums(scores[name], pairs) for name, pairs in sets.items()}
    tokens, end = 8 if args.quick else 48, task.tokenizer.eos
    asked = [pair.prompt.tolist() for pair in sets["held-out"][:200]]
    if not any("index" in row for row in task.rows()) and args.part[0] == 1:
        size = task.reference.config.vocab_size
        task.add({"index": {name: paper_index(scores[name], pairs, size) for name, pairs in sets.items()}})
    for job in jobs(args, DIALOGUE, (0.1,)):
        if any(job.items() <= row.items() for row in task.rows()):
            continue
        policy, out = task.fit(task.folder / "train.jsonl", lr=rate, beta=job["beta"], seed=job["seed"],
                               **METHODS[job["method"]])
        ratios = {}
        for name, pairs in sets.items():
            change = sums(score(policy, pairs), pairs) - before[name]                               # (P, 2)
            ratios[name] = (change[:, 0] - change[:, 1]).round(4).tolist()
        responses = sample(policy, asked, tokens, end, 99)
        kl = kl_of_samples(policy, task.reference, asked, responses, tokens)
        first = {line["where"].rpartition(":")[2]: line.get("agrees") for line in read_rows(out / "dispersion.jsonl")}
        task.add({**job, **learned(out), "rate": rate, "log_ratios": ratios, "kl": kl.mean(),
                  "kls": kl.round(4).tolist(), "agrees": first})
        print(f"dialogue: {job}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# 4. The index: how well each reading of it predicts where people agree

def mean_of(each: train.Scores, pair: Pair, name: str, tokens: int | None = None) -> np.ndarray:
    """(2,) mean log-probability or entropy of the first tokens (None: of all), for chosen and rejected."""
    values, cut = getattr(each, name), len(pair.chosen)
    return np.array([values[:cut][:tokens].mean(), values[cut:][:tokens].mean()])


def where_they_part(each: train.Scores, pair: Pair) -> float:
    """The entropy at the first token at which the responses differ."""
    shortest = min(len(pair.chosen), len(pair.rejected))
    same = np.flatnonzero(pair.chosen[:shortest] != pair.rejected[:shortest])
    return each.entropy[same[0] if len(same) else shortest - 1]


def paper_index(scores: list[train.Scores], pairs: list[Pair], vocab_size: int) -> list[float]:
    """H(x) of each pair."""
    entropies = np.array([mean_of(each, pair, "entropy") for each, pair in zip(scores, pairs)])     # (P, 2)
    return dispersion_index(torch.from_numpy(entropies), vocab_size).tolist()


# Each is larger where more agreement is expected.
READINGS = {
    "the paper's: mean entropy of both": lambda each, pair: -mean_of(each, pair, "entropy").mean(),
    "of the first token": lambda each, pair: -mean_of(each, pair, "entropy", 1).mean(),
    "of the first five tokens": lambda each, pair: -mean_of(each, pair, "entropy", 5).mean(),
    "where the responses part": lambda each, pair: -where_they_part(each, pair),
    "of the surer side": lambda each, pair: -mean_of(each, pair, "entropy").min(),
    "difference of the entropies": lambda each, pair: np.abs(np.diff(mean_of(each, pair, "entropy")))[0],
    "difference of mean log-probabilities": lambda each, pair: np.abs(np.diff(mean_of(each, pair, "logp")))[0],
    "difference of lengths": lambda each, pair: abs(len(pair.chosen) - len(pair.rejected)),
}


def area(reading: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve: how often the reading is larger for label 1 than for label 0; ties: 1/2."""
    values, place = np.unique(reading, return_inverse=True)
    ones, zeros = (np.bincount(place[label == side], minlength=len(values)) for side in (1, 0))
    if not ones.sum() or not zeros.sum():
        return math.nan
    below = np.cumsum(zeros) - zeros / 2
    return float((ones * below).sum() / ones.sum() / zeros.sum())


def area_se(reading: np.ndarray, label: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """The area and its standard error, by 300 bootstrap draws of whole groups (of pairs that are related)."""
    rng, names = np.random.default_rng(0), np.unique(group)
    members = [np.flatnonzero(group == name) for name in names]
    drawn = []
    for _ in range(300):
        picked = np.concatenate([members[i] for i in rng.integers(0, len(names), len(names))])
        drawn.append(area(reading[picked], label[picked]))
    return area(reading, label), float(np.nanstd(drawn))


def index(args: argparse.Namespace) -> None:
    """Needs the files that sentiment and dialogue write."""
    task, scored = Task(args, "index"), {}
    for name, (path, label) in truths(args.out).items():
        if any(row["against"] == name for row in task.rows()):
            continue
        if path not in scored:
            pairs = task.pairs(path)
            scored[path] = pairs, score(task.reference, pairs)
        pairs, scores = scored[path]
        label = [label[int(pair.where.rpartition(":")[2]) - 1] for pair in pairs]
        sure = np.array([i for i, each in enumerate(label) if each is not None], dtype=int)
        if not len(sure):
            print(f"index: {name}: no pair has an answer to that yet")
            continue
        label = np.array([label[i] for i in sure], dtype=int)
        group = groups(path, pairs)[sure]
        values = {reading: np.array([f(each, pair) for each, pair in zip(scores, pairs)])
                  for reading, f in READINGS.items()}
        for reading, value in (values | more_readings(values, pairs)).items():
            found, se = area_se(value[sure], label, group)
            task.add({"against": name, "reading": reading, "area": found, "se": se, "pairs": len(sure),
                      "ones": int(label.sum()), "groups": len(set(group))})
        print(f"index: {name}, {len(sure)} pairs", flush=True)


def truths(out: Path) -> dict[str, tuple[Path, list]]:
    """Name -> a file of pairs and, for each pair, whether people agree on it (None: not known)."""
    runs = [row for row in read_rows(out / "dialogue.jsonl") if row.get("method") == "dpo"]
    met, split, panel = out / "dialogue/train.jsonl", out / "dialogue/votes.jsonl", out / "sentiment/pairs0.jsonl"
    found = {}
    if runs:
        # did dpo's runs get the sign right when they first met the pair: in more than half of them, or not
        right = [[row["agrees"].get(str(i + 1)) for row in runs] for i in range(len(read_rows(met)))]
        known = [[x for x in each if x is not None] for each in right]
        found["HH: dpo's sign right at first sight"] = met, [np.mean(each) > 0.5 if each else None for each in known]
    if split.exists():
        records = read_rows(split)
        found["PandaLM: all three say the same"] = split, [len(set(row["marks"])) == 1 for row in records]
        found["PandaLM: nobody prefers the other"] = split, [min(row["votes"]) == 0 for row in records]
    if panel.exists():
        found["sentiment: the surer half of the kinds"] = panel, [row["kind"] < len(KINDS) / 2
                                                                  for row in read_rows(panel)]
    return found


def groups(path: Path, pairs: list[Pair]) -> np.ndarray:
    """(P,) the group of each pair: the kind of its opening if it has one, else its prompt."""
    records = read_rows(path)
    kinds = [records[int(pair.where.rpartition(":")[2]) - 1].get("kind") for pair in pairs]
    prompts = [pair.prompt.tobytes() for pair in pairs]
    return np.unique(prompts if kinds[0] is None else kinds, return_inverse=True)[1]


def more_readings(values: dict, pairs: list[Pair]) -> dict:
    """The paper's reading less what the length explains, and its mean over the pairs of a prompt."""
    paper = values["the paper's: mean entropy of both"]
    length = np.log([len(pair.chosen) + len(pair.rejected) for pair in pairs])
    slope, start = np.polyfit(length, paper, 1)
    prompts = [pair.prompt.tobytes() for pair in pairs]
    _, place = np.unique(prompts, return_inverse=True)
    mean = np.bincount(place, paper) / np.bincount(place)
    return {"the paper's, length-corrected": paper - slope * length - start,
            "the paper's, mean over a prompt's pairs": mean[place]}


# ---------------------------------------------------------------------------------------------------------------
# 5. People: what the votes of three people on a pair of PandaLM are worth

FOLDS = 6                                      # the last one decides on the learning rate, the others are reported


def split_by_task(task: Task) -> None:
    """Write the pairs of each fold, and those of all other folds to train on.  No instruction is in two folds."""
    records = pandalm(task.args.votes, 20 if task.args.quick else None)
    names = sorted({record["task"] for record in records})
    order = np.random.default_rng(0).permutation(len(names))
    fold = {names[name]: place % FOLDS for place, name in enumerate(order)}
    for held_out in range(FOLDS):
        others = [record for record in records if fold[record["task"]] != held_out]
        parts = {"held-out": [record for record in records if fold[record["task"]] == held_out],
                 "majority": others, "unanimous": [record for record in others if record["votes"] == [3, 0]]}
        for name, chosen in parts.items():
            train.write_jsonl(task.folder / f"{name}{held_out}.jsonl", chosen)


def people(args: argparse.Namespace) -> None:
    """Train on the votes of some instructions; then does the policy agree with most people on the others?"""
    task, last = Task(args, "people"), FOLDS - 1
    with train.lock_folder(task.folder / "lock"):
        if not (task.folder / f"unanimous{last}.jsonl").exists():
            split_by_task(task)
    rate = task.learning_rate(task.folder / f"majority{last}.jsonl", task.folder / f"held-out{last}.jsonl", beta=0.1)
    tokens, end = 8 if args.quick else 48, task.tokenizer.eos
    for fold in range(last):
        path = task.folder / f"held-out{fold}.jsonl"
        pairs, records = task.pairs(path), read_rows(path)
        records = [records[int(pair.where.rpartition(":")[2]) - 1] for pair in pairs]
        about = {"tasks": [record["task"] for record in records], "votes": [record["votes"] for record in records],
                 "longer": [len(pair.chosen) > len(pair.rejected) for pair in pairs]}
        prompts, before = [pair.prompt.tolist() for pair in pairs[:100]], sums(score(task.reference, pairs), pairs)
        for job in jobs(args, args.methods or PEOPLE, (0.1,)):
            job["fold"] = fold
            if any(job.items() <= row.items() for row in task.rows()):
                continue
            began = time.perf_counter()
            settings = {**METHODS[job["method"]], "seed": job["seed"], "beta": job["beta"], "lr": rate}
            policy, out = task.fit(task.folder / f"{settings.pop('labels')}{fold}.jsonl", **settings)
            change = sums(score(policy, pairs), pairs) - before                                     # (P, 2)
            kl = kl_of_samples(policy, task.reference, prompts, sample(policy, prompts, tokens, end, 99), tokens)
            task.add({**job, **learned(out), **about, "rate": rate, "kl": kl.mean(),
                      "log_ratios": (change[:, 0] - change[:, 1]).round(4).tolist(),
                      "seconds": time.perf_counter() - began})
            print(f"people: {job}, {time.perf_counter() - began:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# 6. The report

def mean_se(values) -> str:
    values = np.array(values, dtype=float)
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    return f"{values.mean():+.3f} +- {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def report(args: argparse.Namespace) -> None:
    """Print what the rows say, and draw the frontier."""
    if not any(read_rows(args.out / f"{name}.jsonl") for name in EXPERIMENTS):
        print(f"{args.out}: no rows there yet; run sentiment, dialogue and index first")
    report_sentiment(args)
    report_dialogue(args)
    report_people(args)
    rows = read_rows(args.out / "index.jsonl")
    for against in dict.fromkeys(row["against"] for row in rows):
        here = [row for row in rows if row["against"] == against]
        print("\nindex against {against}: {ones} of {pairs} pairs, {groups} groups; chance: .5".format(**here[0]))
        for row in here:
            print(f"  {row['reading']:<42}{row['area']:.3f} +- {row['se']:.3f}")


def report_sentiment(args: argparse.Namespace) -> None:
    rows = [row for row in read_rows(args.out / "sentiment.jsonl") if "score" in row]
    runs, means = [row for row in rows if "beta" in row], []
    if not runs:
        return
    print("sentiment: mean score of continuations of held-out openings, against KL; errors of the samples\n"
          f"{'method':<24}{'beta':>5}{'seeds':>7}{'KL':>16}{'score':>18}{'power':>7}{'trust':>16}")
    for method, beta in itertools.product(METHODS, sorted({row["beta"] for row in runs})):
        here = [row for row in runs if row["method"] == method and row["beta"] == beta]
        if not here:
            continue
        mean = {key: float(np.mean([row[key] for row in here])) for key in ("kl", "score", "power", "trust")}
        for key in ("kl_se", "score_se", "trust_se"):
            mean[key] = math.sqrt(sum(row[key] ** 2 for row in here)) / len(here)
        means.append({"method": method, **mean})
        print("{:<24}{:>5}{:>7}{kl:>9.2f} +- {kl_se:.2f}{score:>10.3f} +- {score_se:.3f}{power:>7.2f}{trust:>+8.2f} +- "
              "{trust_se:.2f}".format(method, beta, len(here), **mean))
    for row in rows:
        if row["method"] == "reference":
            print(f"reference{row['score']:>53.3f} +- {row['score_se']:.3f}")
    seeds = sorted({row["seed"] for row in runs})
    print("\nscore minus dpo's at equal KL, between two betas; error of the samples; of each seed")
    for kl, method in itertools.product(args.kl, list(METHODS)[1:]):
        both = [compare_at(runs, method, "dpo", kl, seed) for seed in seeds]
        both = [difference for difference in both if difference]
        if both:
            error = math.sqrt(sum(se ** 2 for _, se in both)) / len(both)
            each = " ".join(f"{change:+.3f}" for change, _ in both)
            print(f"at KL {kl}  {method:<24}{np.mean([change for change, _ in both]):+.3f} +- {error:.3f}    ({each})")
    print("\nscore minus that of a dpo with the same labels, at equal KL, in the middle of the range that both reach; "
          "error over seeds (of each seed)")
    for method in [method for method in METHODS if method not in ("dpo", PEOPLE[0])]:
        rival = PEOPLE[0] if "labels" in METHODS[method] else "dpo"
        both = [compare_at(runs, method, rival, middle(runs, method, rival, seed), seed) for seed in seeds]
        both = [difference[0] for difference in both if difference]
        of_seeds = " ".join(f"{change:+.3f}" for change in both)
        if both:
            print(f"  {method:<24}minus {rival:<15}{mean_se(both)}    ({of_seeds})")
    draw(sorted(means, key=lambda row: row["kl"]),
         Panel("kl", "score", "method", "KL from the reference (nats)", "mean sentiment", lines=DRAWN),
         args.out / "sentiment.png")


def compare_at(runs: list[dict], method: str, rival: str, kl: float, seed: int) -> tuple[float, float] | None:
    """Score minus the rival's at this KL, between two betas, and its error; None: one of them never got there."""
    paths = [{key: row[key] for key in ("method", "kl", "score", "score_se")} for row in runs if row["seed"] == seed]
    mine, other = at_kl(paths, method, kl), at_kl(paths, rival, kl)
    if not mine or not other:
        return None
    return mine["score"] - other["score"], math.hypot(mine["score_se"], other["score_se"])


def middle(runs: list[dict], method: str, rival: str, seed: int) -> float:
    """The KL in the middle of those that both reach with this seed; nan: there are none."""
    kls = [[row["kl"] for row in runs if (row["method"], row["seed"]) == (name, seed)] for name in (method, rival)]
    low, high = max(min(kl, default=math.inf) for kl in kls), min(max(kl, default=-math.inf) for kl in kls)
    return (low + high) / 2 if low < high else math.nan


def report_dialogue(args: argparse.Namespace) -> None:
    runs = [row for row in read_rows(args.out / "dialogue.jsonl") if "log_ratios" in row]
    if not runs:
        return
    seeds = sorted({row["seed"] for row in runs})
    for name in runs[0]["log_ratios"]:
        print(f"\ndialogue, {name}: {len(runs[0]['log_ratios'][name])} pairs, {len(seeds)} seeds, learning rate "
              f"{runs[0]['rate']}; differences pair by pair: mean, error of the pairs (of each seed)")
        right = {(row["method"], row["seed"]): np.array(row["log_ratios"][name]) > 0 for row in runs}       # (P,)
        for method in METHODS:
            here = [row for row in runs if row["method"] == method]
            if not here:
                continue
            accuracy = [right[method, row["seed"]].mean() for row in here]
            change = np.array([right[method, row["seed"]] * 1.0 - right["dpo", row["seed"]] for row in here
                               if ("dpo", row["seed"]) in right])                                  # (S, P)
            of_seeds = " ".join(f"{each.mean():+.3f}" for each in change)
            ratio = np.mean([row["log_ratios"][name] for row in here], axis=0)                      # (P,)
            print(f"  {method:<16} accuracy {np.mean(accuracy):.3f}, minus dpo's {mean_se(change.mean(0))} ({of_seeds})"
                  f"; log-ratio {mean_se(ratio)}; KL {mean_se([row['kl'] for row in here])}")
    report_quartiles(args, runs)
    for row in runs:
        if row["method"] == "dpo":
            print(f"  trust in the index, dpo, seed {row['seed']}: {row['trust']:+.2f} +- {row['trust_se']:.2f}")


def report_quartiles(args: argparse.Namespace, runs: list[dict]) -> None:
    """Print held-out accuracy, log-ratio and KL for each quarter of the pairs by the paper's index."""
    index = next(row["index"]["held-out"] for row in read_rows(args.out / "dialogue.jsonl") if "index" in row)
    quarters = np.array_split(np.argsort(index)[::-1], 4)
    print("\nheld-out by quarter of the index, least agreement expected first: accuracy | log-ratio | KL")
    for method in METHODS:
        here = [row for row in runs if row["method"] == method]
        if not here:
            continue
        ratio = np.mean([row["log_ratios"]["held-out"] for row in here], axis=0)                    # (P,)
        right = np.mean([np.array(row["log_ratios"]["held-out"]) > 0 for row in here], axis=0)
        kl = np.mean([row["kls"] for row in here], axis=0)                              # of the first 200
        cells = []
        for values in (right, ratio, kl):
            cells.append([f"{values[part[part < len(values)]].mean():.3f}" for part in quarters])
        print(f"  {method:<18}" + " | ".join(" ".join(cell) for cell in cells))


def report_people(args: argparse.Namespace) -> None:
    """Print the share of held-out pairs on which a policy agrees with most people, minus dpo's with the same labels."""
    rows = [row for row in read_rows(args.out / "people.jsonl") if "log_ratios" in row]
    dpo = {(row["seed"], row["fold"]): row for row in rows if row["method"] == PEOPLE[0]}
    if dpo:
        print(f"\npeople: learning rate {rows[0]['rate']}; agreement with most people on held-out pairs, minus that of "
              f"\"{PEOPLE[0]}\" pair by pair: mean, error over instructions (of each seed)")
    for method in METHODS:
        here = [row for row in rows if row["method"] == method and (row["seed"], row["fold"]) in dpo]
        if not here:
            continue
        right = right_of(here)                                                                      # (P,)
        change = right - right_of([dpo[row["seed"], row["fold"]] for row in here])
        votes, longer, tasks = (np.concatenate([row[key] for row in here]) for key in ("votes", "longer", "tasks"))
        seed = np.concatenate([np.full(len(row["votes"]), row["seed"]) for row in here])
        group = np.unique(tasks, return_inverse=True)[1]
        parts = {"all": np.full(len(right), True), "3 : 0": (votes == [3, 0]).all(1), "chosen longer": longer,
                 "chosen not longer": ~longer}
        for name, part in parts.items():
            of_seeds = " ".join(f"{change[part & (seed == each)].mean():+.3f}" for each in np.unique(seed))
            print(f"  {method:<24}{name:<18}{part.sum():>6} pairs, {len(here)} runs: {right[part].mean():.3f}, minus "
                  f"dpo's {mean_se_of_groups(change[part], group[part])} ({of_seeds})")
        kl, trust = (np.mean([row[key] for row in here]) for key in ("kl", "trust"))
        print(f"  {method:<24}KL {kl:.1f}; trust in its index {trust:+.2f}")


def right_of(rows: list[dict]) -> np.ndarray:
    """1 for each held-out pair of these runs on which the policy agrees with most people, else 0."""
    return np.concatenate([np.array(row["log_ratios"]) > 0 for row in rows]).astype(float)


def mean_se_of_groups(values: np.ndarray, group: np.ndarray) -> str:
    """Mean and standard error of values that are independent between groups only."""
    of_group = np.bincount(group, values - values.mean())
    return f"{values.mean():+.3f} +- {np.linalg.norm(of_group) / len(values):.3f}"


EXPERIMENTS = {"sft": sft, "sentiment": sentiment, "dialogue": dialogue, "index": index, "people": people,
               "report": report}


def share(text: str) -> tuple[int, int]:
    """An argparse type: 1/4 -> (1, 4)."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1/4, 2/4, ...")
    return int(part), int(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", help="Hugging Face folder or name")
    parser.add_argument("--data", help="for dialogue: a file of preference pairs")
    parser.add_argument("--votes", help="for dialogue and people: PandaLM's human test set")
    parser.add_argument("--out", type=Path, default=Path("out/experiments"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="for sentiment and people: only these methods")
    parser.add_argument("--betas", type=float, nargs="+", help="for sentiment: these betas instead")
    parser.add_argument("--copies", type=int, default=16, help="for sentiment: continuations per opening")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    parser.add_argument("--samples", type=int, default=4, help="for sentiment: samples per held-out opening")
    parser.add_argument("--kl", type=float, nargs="+", default=[3.0, 4.5, 5.0], help="report at these KLs")
    parser.add_argument("--part", type=share, default=(1, 1), metavar="I/N", help="this process's share of the work")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a tiny random model, a few openings or pairs")
    args = parser.parse_args(argv)
    if args.experiment != "report" and not (args.model or args.quick):
        parser.error("--model is missing: a Hugging Face folder or name (or --quick)")
    if args.experiment == "dialogue" and not (args.data and args.votes):
        parser.error("--data and --votes are missing: see above")
    if args.experiment == "people" and not args.votes:
        parser.error("--votes is missing: see above")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        EXPERIMENTS[args.experiment](args)
    except (BadData, BadModel, train.BadConfig, train.RunFailed, OSError) as error:
        parser.exit(2, f"experiments.py: error: {error}\n")


if __name__ == "__main__":
    main()
