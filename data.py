"""Preference records -> checked, tokenised pairs -> a fixed schedule of packed rows; and the demo's population.

A record is a line of JSON: {"prompt": ..., "chosen": ..., "rejected": ...} as strings, or, as in Anthropic's data,
the whole dialogue in both "chosen" and "rejected"; "dispersion" (phi in (0, 1]) is optional.  Prompt and response are
tokenised apart, so the boundary is true by construction; the end token is appended to a response and scored.

    python data.py pairs.jsonl --model DIR          check a file, and show the tokens that are scored
"""
import argparse
import gzip
import hashlib
import json
import math
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import mallowspo


class BadData(ValueError):
    """A file or record that cannot be used; the message says where, what was found and what to do."""


# ---------------------------------------------------------------------------------------------------------------
# 1. Records

TURN = "\n\nAssistant:"        # Anthropic's dialogues: the last one of these ends the prompt


class Record(NamedTuple):
    prompt: str
    chosen: str
    rejected: str               # "" where there is none (sft)
    dispersion: float | None    # phi(x) that the data carries


def parse(item, need_rejected: bool = True) -> Record:
    """A decoded line -> Record.  Raises BadData that says what is wrong with it."""
    if not isinstance(item, dict):
        raise BadData(f"is {_kind(item)}, not an object with prompt, chosen and rejected")
    needed = ["prompt", "chosen", "rejected"] if need_rejected or "rejected" in item else ["prompt", "chosen"]
    if "prompt" not in item and {"chosen", "rejected"} <= item.keys():
        item = {**item, **_split_dialogue(item["chosen"], item["rejected"])}
    for name in needed:
        if name not in item:
            raise BadData(f"has no {name!r} (it has {', '.join(map(repr, item)) or 'nothing'})")
        if not isinstance(item[name], str):
            raise BadData(f"{name!r} is {_kind(item[name])}, not a string")
        if name != "prompt" and not item[name]:
            raise BadData(f"{name!r} is empty")
        if any("\ud800" <= character <= "\udfff" for character in item[name]):
            raise BadData(f"{name!r} holds half of a surrogate pair (a \\ud... escape alone), which is no character")
    if item["chosen"] == item.get("rejected"):
        raise BadData("'chosen' and 'rejected' are the same text: there is no preference to learn")
    phi = item.get("dispersion")
    if phi is not None and (isinstance(phi, bool) or not isinstance(phi, int | float) or not 0 < phi <= 1):
        raise BadData(f"'dispersion' is {phi!r}, not a number phi with 0 < phi <= 1")
    return Record(item["prompt"], item["chosen"], item.get("rejected", ""), phi)


def _split_dialogue(chosen, rejected) -> dict:
    """Anthropic's form: both sides hold the dialogue; they must agree up to the last assistant turn."""
    sides = [text.rpartition(TURN) for text in (chosen, rejected) if isinstance(text, str) and TURN in text]
    if len(sides) != 2:
        raise BadData(f"has no 'prompt', and its responses are not dialogues with {TURN!r} either")
    if sides[0][0] != sides[1][0]:
        raise BadData(f"has no 'prompt', and its two dialogues differ before the last {TURN!r}")
    return {"prompt": sides[0][0] + TURN, "chosen": sides[0][2], "rejected": sides[1][2]}


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"the number {value!r}")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not blank, of a plain or .gz file in UTF-8."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadData(f"{path}:{number + 1}: the gzip file is broken ({error})") from None
    except OSError as error:
        raise BadData(f"{path}: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------------------
# 2. Tokens

class Tokenizer:
    """The tokenizer.json of a model folder, with the one way we use it: ids are assembled here, never by a template."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise BadData(f"{folder}: no tokenizer.json there")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                      # the library raises nothing narrower
            raise BadData(f"{folder / 'tokenizer.json'}: not a tokenizer ({error})") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eos = self._find_eos(folder)
        added, plain = self.backend.encode("a").ids, self._encode("a")
        self.bos = next(added[:i] for i in range(len(added)) if added[i:i + len(plain)] == plain)
        # Some tokenizers put a space before every text; behind an anchor they do not.
        self.anchor = "" if self._decode(self._encode("a") + self._encode("b")) == "ab" else "\n"

    def _find_eos(self, folder: Path) -> int:
        def settings(name):
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
                return content if isinstance(content, dict) else {}
            except ValueError as error:
                raise BadData(f"{folder / name}: not JSON ({error})") from None
        token = settings("tokenizer_config.json").get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and self.backend.token_to_id(token) is not None:
            return self.backend.token_to_id(token)
        for name in ("generation_config.json", "config.json"):
            found = settings(name).get("eos_token_id")
            if found is not None:
                return found[0] if isinstance(found, list) and found else found
        raise BadData(f"{folder}: no end token: name eos_token in tokenizer_config.json")

    def _encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def _decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def prompt(self, text: str) -> list[int]:
        ids = self._encode(text)
        return ids if ids[:len(self.bos)] == self.bos else self.bos + ids

    def response(self, text: str) -> list[int]:
        """Ids of a text that continues another one, and the end token (once)."""
        ids = self._encode(self.anchor + text)[len(self._encode(self.anchor)):]
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]

    def text(self, ids) -> str:
        return self._decode(ids)

    def pair(self, record: Record) -> tuple[list[int], list[int], list[int]]:
        """Prompt, chosen and rejected ids.  Raises BadData unless they decode to exactly the record's text."""
        prompt, sides = self.prompt(record.prompt), (record.chosen, record.rejected)
        if not prompt:
            raise BadData("'prompt' is empty, and this tokenizer has no token that starts a text")
        responses = [self.response(side) if side else [] for side in sides]
        plain = prompt[len(self.bos):] if not record.prompt.startswith(self.text(self.bos)) or not self.bos else prompt
        for name, side, ids in zip(("chosen", "rejected"), sides, responses):
            body = ids if side.endswith(self.text([self.eos])) else ids[:-1]
            if side and self.text([*plain, *body]) != record.prompt + side:
                raise BadData(f"the tokens of 'prompt' and {name!r} do not decode to their text: the tokenizer "
                              "changes or drops a character there; move the space or line break at the seam into the "
                              "response, or remove the character")
        return prompt, *responses


# ---------------------------------------------------------------------------------------------------------------
# 3. Pairs, and the length policy: too long -> the prompt is cut from the left; a response is never cut

class Pair(NamedTuple):
    prompt: np.ndarray           # int32 token ids
    chosen: np.ndarray           # ends with the end token
    rejected: np.ndarray         # empty where there is none (sft)
    dispersion: float | None
    where: str                   # file:line

    def cost(self) -> int:
        """Tokens in a row: the prompt once, each response without its last token, from which nothing is predicted."""
        return len(self.prompt) + sum(max(0, len(ids) - 1) for ids in (self.chosen, self.rejected))

    def digest(self) -> bytes:
        """16 bytes that name the token ids."""
        parts = [ids.astype("<i4").tobytes() for ids in (self.prompt, self.chosen, self.rejected)]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()[:16]


class Dataset(NamedTuple):
    pairs: list[Pair]
    cut: int                     # pairs whose prompt was cut
    dropped: int                 # pairs that do not fit
    bad: int                     # records passed over with skip_bad

    def __str__(self) -> str:
        return (f"kept {len(self.pairs):,} pairs, {self.cut:,} with the prompt cut; dropped {self.dropped:,} too long"
                + f", skipped {self.bad:,} bad records" * bool(self.bad))


def load_pairs(path: str | Path, tokenizer: Tokenizer, max_tokens: int, max_dropped: float = 0.1,
               skip_bad: bool = False, need_rejected: bool = True) -> Dataset:
    """Read, check and tokenise a file of records.

    max_tokens bounds prompt + response.  Raises BadData with file and line at the first bad record (skip_bad counts
    them instead), if more than the share max_dropped of the pairs does not fit, and if nothing is left.
    """
    pairs, cut, dropped, bad = [], 0, [], 0
    for where, line in read_lines(Path(path)):
        try:
            record = parse(_decode_json(line), need_rejected)
            prompt, chosen, rejected = tokenizer.pair(record)
        except BadData as error:
            if not skip_bad:
                raise BadData(f"{where}: {error}") from None
            bad += 1
            continue
        room = max_tokens - max(len(chosen), len(rejected))
        if room < len(tokenizer.bos) + 1:
            dropped.append(where)
            continue
        if len(prompt) > room:
            cut += 1
            start = tokenizer.bos if prompt[:len(tokenizer.bos)] == tokenizer.bos else []
            prompt = start + prompt[len(prompt) - room + len(start):]
        arrays = (np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))
        pairs.append(Pair(*arrays, record.dispersion, where))
    if len(dropped) > max_dropped * (len(pairs) + len(dropped)):
        raise BadData(f"{dropped[0]}: a response does not fit into --max-tokens {max_tokens}, nor do those of "
                      f"{len(dropped) - 1:,} more of {len(pairs) + len(dropped):,} pairs; raise it, or --max-dropped")
    if not pairs:
        raise BadData(f"{path}: no pairs in it" + (f" ({bad:,} bad records skipped)" if bad else ""))
    return Dataset(pairs, cut, len(dropped), bad)


def _decode_json(line: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadData(f"not JSON ({error})") from None
    except RecursionError:
        raise BadData("not a record (nested too deeply)") from None


# ---------------------------------------------------------------------------------------------------------------
# 4. The schedule: which pairs a step takes and how they lie in rows, a pure function of (seed, step)

class Schedule:
    """Order, epochs, packing and each rank's share.  Step s takes the next batch_size pairs of an endless sequence of
    epochs; an epoch is a permutation, and its last batch may be short."""

    def __init__(self, costs: list[int], batch_size: int, seed: int, tokens_per_row: int):
        self.costs, self.batch_size, self.seed, self.tokens_per_row = costs, batch_size, seed, tokens_per_row
        self.steps_per_epoch = math.ceil(len(costs) / batch_size)
        self._order = None, None                              # of the epoch asked for last

    def batch(self, step: int) -> list[int]:
        """Indices of the pairs of this step, over all ranks."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.costs))
        return self._order[1][place * self.batch_size:(place + 1) * self.batch_size].tolist()

    def rows(self, step: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """This rank's rows of the step; every rank has equally many, some may be empty."""
        return pack(self.batch(step), self.costs, self.tokens_per_row, world)[rank::world]


def pack(indices: list[int], costs: list[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Deal pairs into the fewest rows, a multiple of `multiple`, of at most `budget` tokens: the longest first, each
    into the emptiest row, so that rows (and ranks) are even."""
    total = sum(costs[i] for i in indices)
    count = multiple * max(1, math.ceil(total / (budget * multiple)))
    while True:
        rows, load = [[] for _ in range(count)], [0] * count
        for i in sorted(indices, key=lambda i: (-costs[i], i)):
            emptiest = load.index(min(load))
            rows[emptiest].append(i)
            load[emptiest] += costs[i]
        if max(load) <= budget or count >= len(indices) + multiple:
            return rows
        count += multiple


class Rows(NamedTuple):
    """What the model needs to score groups of responses that share a prompt, [prompt | response | response | ...]."""
    tokens: Tensor               # (1, T)
    positions: Tensor            # (1, T) every response continues the prompt's positions
    segments: Tensor             # (1, T) see model.visible
    source: Tensor               # (N,) where in T the prediction of scored token n stands
    target: Tensor               # (N,) id of scored token n
    owner: Tensor                # (N,) the response it belongs to: group * R + response
    length: Tensor               # (P, R) scored tokens of each response

    def inputs(self) -> tuple[Tensor, ...]:
        return self[:5]

    def total(self, values: Tensor) -> Tensor:
        """(N,) values of scored tokens -> (P, R) sums over each response, added up in float64: in any order alike."""
        zeros = torch.zeros(self.length.numel(), dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.owner, values.double()).view(self.length.shape).to(values.dtype)


def collate(groups: list[tuple[np.ndarray, ...]], device: str | torch.device = "cpu", branches: int = 16) -> Rows:
    """Lay groups (prompt, response, response, ...), all with equally many responses, side by side in one row."""
    tokens, positions, segments, source, target, owner, at = [], [], [], [], [], [], 0
    for g, (prompt, *responses) in enumerate(groups):
        parts = [prompt, *(ids[:-1] for ids in responses)]
        tokens += parts
        positions += [np.arange(len(prompt)), *(len(prompt) + np.arange(len(part)) for part in parts[1:])]
        segments += [np.full(len(part), g * branches + b) for b, part in enumerate(parts)]
        last, at = at + len(prompt) - 1, at + len(prompt)                 # the first token is predicted by the prompt
        for r, ids in enumerate(responses):
            source.append(np.concatenate([[last], at + np.arange(len(ids) - 1)]) if len(ids) else np.empty(0))
            target.append(ids)
            owner.append(np.full(len(ids), g * len(responses) + r))
            at += max(0, len(ids) - 1)

    def tensor(parts):
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)
    length = torch.tensor([[len(ids) for ids in responses] for _, *responses in groups], device=device)
    return Rows(tensor(tokens)[None], tensor(positions)[None], tensor(segments)[None],
                tensor(source), tensor(target), tensor(owner), length)


# ---------------------------------------------------------------------------------------------------------------
# 5. What the reference said of each pair, kept in a file

class Scores(NamedTuple):
    """What the reference said of one pair: float32 arrays over the tokens of chosen, then rejected."""
    logp: np.ndarray
    entropy: np.ndarray


def read_reference(path: Path, key: str) -> dict[bytes, Scores]:
    """digest of a pair -> Scores; empty without the file.  Raises BadData if other weights made it."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, "np") as file:
            made_by = (file.metadata() or {}).get("key")
            digests, lengths, logp, entropy = (file.get_tensor(n) for n in ("digest", "length", "logp", "entropy"))
    except SafetensorError as error:
        raise BadData(f"{path}: not a whole file of scores ({error}); give --reference another path") from None
    if made_by != key:
        raise BadData(f"{path}: scored by other weights or another --dtype; choose another --out, or remove it")
    ends = np.cumsum(lengths)[:-1]
    return {bytes(digest): Scores(*parts)
            for digest, *parts in zip(digests, np.split(logp, ends), np.split(entropy, ends))}


def lock(path: Path, wait: bool = True):
    """An open file; nobody else gets it from here until it is closed, or its process dies.

    Raises BlockingIOError if another process has it and `wait` is False.
    """
    import fcntl  # not on Windows
    file = open(path, "a")                                         # noqa: SIM115 (open is what it shall be)
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return file


def write_reference(path: Path, key: str, scores: dict[bytes, Scores]) -> None:
    """Add scores to the file, as others may do at the same time; what it has, stays."""
    with lock(path.with_name(path.name + ".lock")):
        scores = scores | read_reference(path, key)
        tensors = {"digest": torch.tensor(np.frombuffer(b"".join(scores), dtype=np.uint8).reshape(-1, 16).copy()),
                   "length": torch.tensor([len(s.logp) for s in scores.values()], dtype=torch.int32),
                   "logp": torch.from_numpy(np.concatenate([s.logp for s in scores.values()])),
                   "entropy": torch.from_numpy(np.concatenate([s.entropy for s in scores.values()]))}
        new = path.with_name(path.name + ".new")
        new.write_bytes(save(tensors, metadata={"key": key}))
        os.replace(new, path)


# ---------------------------------------------------------------------------------------------------------------
# 6. The demo: a population whose dispersion is known

# A question, and its answers from the population's favourite down.  From agreement to dispute: phi rises with the line.
QUESTIONS = """
What is one plus one?                      two three four zero ten eleven
Where does the sun rise?                   east south north west underground nowhere
How many legs has a dog?                   four three two six eight nine
What colour is fresh snow?                 white grey silver blue yellow black
What do cows drink?                        water milk juice tea coffee wine
What falls from clouds?                    rain snow hail fog dust feathers
What is ice made of?                       frost glass salt crystal sugar stone
What helps against thirst?                 lemonade cider broth cocoa beer syrup
What should a kitchen have?                stove sink oven table window radio
Which tool hangs a picture?                hammer drill nail tape screw glue
What cures a cold?                         sleep soup honey ginger garlic whisky
What belongs in a salad?                   lettuce tomato cucumber radish cheese raisins
How should one travel to Rome?             train plane car bus ship bicycle
Which pet suits a child?                   dog cat rabbit hamster turtle snake
What makes a good breakfast?               bread eggs porridge fruit pancakes sausage
Which month is the nicest?                 May June September July October December
What should a gift be?                     book flowers chocolate perfume scarf money
Where is a holiday best?                   beach mountains city lake island desert
Which sport is worth watching?             football tennis cycling boxing chess golf
What is the best instrument?               piano violin guitar cello drums trumpet
What goes on a pizza?                      mushrooms olives ham onions anchovies pineapple
Which colour suits a bedroom?              green cream lilac orange pink red
Who writes the best songs?                 poets lovers sailors farmers drunks nobody
Which number brings luck?                  seven thirteen five twelve one forty
"""
NAMES = ("Ada Ben Carla David Elena Felix Greta Hugo Ines Jonas Klara Leo Maria Nils Olga Paul Rosa Simon Tara Ulla "
         "Viktor Wanda Xenia Yann Zoe Anton Bella Cyril Dora Emil Frida Gustav Hanna Igor Julia Karl Lena Nora Otto"
         ).split()
NEW_NAMES = "Pia Quentin Rita Sven Thea Uwe Vera Willem".split()       # only ever asked in the evaluation


ABOVE = torch.ones(6, 6).triu(1).bool()                               # each pair of answers once, the better one first


class Population:
    """People who rank six answers to each of 24 questions, by a Kendall-Mallows model with one phi a question."""

    def __init__(self):
        lines = [line.partition("?") for line in QUESTIONS.strip().splitlines()]
        self.questions = [text + "?" for text, _, _ in lines]
        self.answers = [words.split() for _, _, words in lines]                            # best first
        self.phi = torch.linspace(0.05, 0.95, len(lines), dtype=torch.float64)             # (Q,)
        rank = torch.arange(6.0, dtype=torch.float64)
        gap = rank - rank[:, None]                                                         # (A, A) i is above j by
        self.wins = mallowspo.pair_probability(gap, -self.phi.log()[:, None, None])        # (Q, A, A) P(i above j)

    def prompt(self, name: str, question: int) -> str:
        return f"{name} asks: {self.questions[question]}\nAnswer:"

    def _asked(self, count, seed):
        """A question, a name and a member's ranking (ranks), `count` times, the questions in turn."""
        generator = torch.Generator().manual_seed(seed)
        names = torch.randint(len(NAMES), (count,), generator=generator).tolist()
        each = [mallowspo.sample_rankings(-(-count // len(self.phi)), 6, -math.log(phi), generator)
                for phi in self.phi.tolist()]
        for i in range(count):
            turn, question = divmod(i, len(self.phi))
            yield question, self.prompt(NAMES[names[i]], question), each[question][turn]

    def favourites(self, count: int, seed: int) -> Iterator[dict]:
        """What members answer when asked: the favourite of each.  The reference learns from these."""
        for question, prompt, ranks in self._asked(count, seed):
            yield {"prompt": prompt, "chosen": " " + self.answers[question][int(ranks.argmin())]}

    def judgements(self, count: int, seed: int) -> Iterator[dict]:
        """Two answers, drawn evenly, judged by a random member; with the true dispersion of the question."""
        rng = np.random.default_rng(seed)
        for question, prompt, ranks in self._asked(count, seed):
            i, j = rng.choice(6, size=2, replace=False).tolist()
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            yield {"prompt": prompt, "chosen": " " + self.answers[question][better],
                   "rejected": " " + self.answers[question][worse], "dispersion": self.phi[question].item()}

    def measure(self, logp: Tensor, ref_logp: Tensor) -> dict[str, Tensor]:
        """What a policy does to this population: exact sums over the answers, each (Q,), the mean over the names.

        logp, ref_logp: (Q, N, A) log-probability of every answer to every question asked by every name.
        """
        p, r = (x.double().log_softmax(-1) for x in (logp, ref_logp))                      # (Q, N, A)
        reward = (logp - ref_logp).double()
        agree = torch.where(reward[..., :, None] > reward[..., None, :], self.wins[:, None], 1 - self.wins[:, None])
        agree = torch.where(reward[..., :, None] == reward[..., None, :], 0.5, agree)      # (Q, N, A, A)
        return {name: value.mean(-1) for name, value in {
            "kl": (p.exp() * (p - r)).sum(-1),
            "win_rate": torch.einsum("qni,qij,qnj->qn", p.exp(), self.wins, r.exp()),      # against the reference
            "consensus_rank": (p.exp() * torch.arange(6.0, dtype=torch.float64)).sum(-1),  # 0: always the favourite
            "reward_accuracy": agree[..., ABOVE].mean(-1),       # share of the members who agree with the reward
            "entropy": -(p.exp() * p).sum(-1),
            "elsewhere": 1 - logp.double().exp().sum(-1),        # probability of anything but the six answers
        }.items()}

    def best_accuracy(self) -> float:
        """The reward accuracy of the consensus order: a ranking that agrees with more people does not exist."""
        return self.wins[:, ABOVE].mean().item()

    def tokenizer_files(self) -> dict[str, bytes]:
        """A byte-level BPE in which each of the demo's words is a token, as the files of a Hugging Face folder."""
        texts = [self.prompt(name, q) + " " + " ".join(words)
                 for q, words in enumerate(self.answers) for name in NAMES + NEW_NAMES]
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
            vocab_size=2048, special_tokens=["<end>"], show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
        return {"tokenizer.json": bpe.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


MATCHED_KL = (0.1, 0.2)          # nats: where the methods have moved equally far from the reference, they are compared
# Which way is good, and what is no difference: about the standard deviation over seeds (tests/demo_seeds.py).
MEASURES = {"win_rate": (+1, 0.002), "consensus_rank": (-1, 0.02), "reward_accuracy": (+1, 0.01)}


def at_kl(path: dict[str, list[float]], kl: float) -> dict[str, float] | None:
    """A path's figures where it first passes this KL, between two points in proportion; None: it never does."""
    for i, (low, high) in enumerate(zip(path["kl"], path["kl"][1:])):
        if low <= kl < high:
            t = (kl - low) / (high - low)
            return {key: (1 - t) * values[i] + t * values[i + 1] for key, values in path.items()}
    return None


def compare_at(kl: float, methods: dict[str, dict[str, list[float]]]) -> str:
    """A table of all methods at one KL, and a sentence for each measure."""
    rows = {name: at_kl(path, kl) for name, path in methods.items()}
    lines = [f"at KL {kl} nats    step  win rate  consensus rank  reward accuracy  KL agreed | disputed"
             "  entropy agreed | disputed"]
    for name, r in rows.items():
        lines.append(f"{name:<15}  " + (
            f"{r['step']:>5.0f}  {r['win_rate']:>8.4f}  {r['consensus_rank']:>14.3f}  {r['reward_accuracy']:>15.4f}"
            f"  {r['kl_agreed']:>9.3f} | {r['kl_disputed']:<8.3f}  {r['entropy_agreed']:>14.3f} | "
            f"{r['entropy_disputed']:.3f}" if r else "never went so far"))
    for key, (good, same) in MEASURES.items() if rows.get("dpo") else ():
        for name in [name for name, r in rows.items() if r and name != "dpo"]:
            change = rows[name][key] - rows["dpo"][key]
            verdict = "as good as" if abs(change) < same else "better than" if good * change > 0 else "worse than"
            lines.append(f"  {key.replace('_', ' ')}: {name} is {verdict} dpo ({change:+.4f})")
    return "\n".join(lines)


def write_jsonl(path: Path, rows) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------------------

def show(pair: Pair, tokenizer: Tokenizer) -> None:
    """Print a pair; bars stand between the scored tokens."""
    print(f"\n{pair.where}: {len(pair.prompt)} prompt tokens, {len(pair.chosen)} and {len(pair.rejected)} scored ones")
    print("  prompt    " + repr(tokenizer.text(pair.prompt[-60:])) + (" (its end)" if len(pair.prompt) > 60 else ""))
    for name, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        shown = [repr(tokenizer.text([i]))[1:-1] for i in ids[:60]]
        print(f"  {name:<9} |" + "|".join([*shown, "..."] if len(ids) > 60 else shown) + "|")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Check a file of preference pairs, and show the "
                                     "tokens that are scored.")
    parser.add_argument("file", help="JSON Lines, plain or .gz")
    parser.add_argument("--model", required=True, help="model folder with tokenizer.json")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest prompt + response")
    parser.add_argument("--show", type=int, default=2, help="how many pairs to print")
    args = parser.parse_args()
    try:
        tokenizer = Tokenizer(args.model)
        data = load_pairs(args.file, tokenizer, args.max_tokens)
    except BadData as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{args.file}: {data}")
    print(f"end token {tokenizer.text([tokenizer.eos])!r}, start {tokenizer.text(tokenizer.bos)!r}")
    for name in ("prompt", "chosen", "rejected"):
        lengths = np.array([len(getattr(pair, name)) for pair in data.pairs])
        low, middle, high = np.quantile(lengths, [0.05, 0.5, 0.95])
        print(f"{name:<9} tokens: median {middle:.0f}, 5 to 95 % {low:.0f} to {high:.0f}, longest {lengths.max()}")
    for pair in data.pairs[:args.show]:
        show(pair, tokenizer)


if __name__ == "__main__":
    main()
