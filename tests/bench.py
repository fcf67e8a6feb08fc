"""This trainer and TRL's DPOTrainer side by side, in processes that take turns: speed, memory, start, and the losses.

    python tests/bench.py --peer TRL_VENV/bin/python                        random Llama, made-up pairs
    python tests/bench.py --model DIR DIR --data pairs.jsonl --rounds 3     your own models and pairs
    python tests/bench.py --vocab 32000 128256 --length 256 1024 4096 --share .2 .5 .8 --batch 2 4 8 32

A peer is PYTHON or PYTHON:PYTHONPATH, a Python that has trl; several may be given.  Without one, only ours is measured.
Both sides get the same folder, the same token ids in the same order, AdamW at a constant rate, clipping at 1, beta 0.1,
and compute the reference's scores before the first step.  Ours is train.py's own score_reference and train.
"""
import argparse
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT, END, PAD = Path(__file__).resolve().parent.parent, "<end>", "<pad>"
FIELDS = {                        # a column of the table: how it is called, and its format
    "pairs_s": ("pairs/s", ".2f"), "tokens_s": ("tokens/s", ",.0f"), "mfu": ("of ceiling", ".1%"),
    "cpu_s": ("CPU s/step", ".2f"), "peak_mb": ("peak MB", ",.0f"), "first_s": ("1st step s", ".1f"),
    "loss_gap": ("loss differs", ".1e")}


# ---------------------------------------------------------------------------------------------------------------
# 1. What is trained: a folder and a file

def make_folder(folder: Path, vocab: int) -> None:
    """A random Llama whose words are w0, w1, ...: any row of token ids is a text, and any text these ids again."""
    sys.path.insert(0, str(ROOT))
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    from model import Transformer
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab - 2)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(PAD, special=True)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    torch.manual_seed(0)
    Transformer.from_config(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": 256,
         "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 704,
         "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
         "eos_token_id": vocab - 2},
        {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()},
    ).save_pretrained(folder)


def make_pairs(count: int, length: int, share: float, vocab: int) -> list[dict]:
    """Pairs of about `length` tokens a side, `share` of them the prompt's."""
    import random
    draw = random.Random(0)

    def words(n):
        return "".join(f" w{draw.randrange(vocab - 2)}" for _ in range(max(1, n)))
    pairs = []
    for _ in range(count):
        prompt = round(length * share * draw.uniform(0.7, 1))
        pairs.append({"prompt": words(prompt)[1:], **{side: words(round((length - prompt) * draw.uniform(0.5, 0.98)))
                                                      for side in ("chosen", "rejected")}})
    return pairs


def encode(tokenizer, pair: dict, end: str) -> tuple[list[int], list[int], list[int]]:
    """As TRL does it with plain text: the end token is added to both responses, prompt and response are tokenised
    as one text, and the responses begin where one of the two leaves the tokens of the prompt alone."""
    def ids(text):
        return tokenizer.encode(text).ids
    prompt, *both = ids(pair["prompt"]), *(ids(pair["prompt"] + pair[side] + end * (not pair[side].endswith(end)))
                                           for side in ("chosen", "rejected"))
    shared = 0
    while shared < min(map(len, (prompt, *both))) and prompt[shared] == both[0][shared] == both[1][shared]:
        shared += 1
    return prompt[:shared], both[0][shared:], both[1][shared:]


def open_tokenizer(folder: Path):
    from tokenizers import Tokenizer
    end = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    return Tokenizer.from_file(str(folder / "tokenizer.json")), end["content"] if isinstance(end, dict) else end


def prepare(job: dict) -> None:
    """The folder if there is none, and two files of the same pairs: as ours takes them, and in the order in which it
    visits them, for the peer."""
    sys.path.insert(0, str(ROOT))
    from data import Schedule
    folder, count = Path(job["model"]), job["steps"] * job["batch"]
    if not folder.exists():
        make_folder(folder, job["vocab"])
    if job["data"]:
        tokenizer, end = open_tokenizer(folder)
        read = gzip.open if job["data"].endswith(".gz") else open
        with read(job["data"], "rt", encoding="utf-8") as file:
            every = (json.loads(line) for line in file)
            fits = (p for p in every if all(0 < len(a) + len(b) <= job["length"] for prompt, *both in
                                            [encode(tokenizer, p, end)] for a, b in itertools.product([prompt], both)))
            pairs = [{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in itertools.islice(fits, count)]
        if len(pairs) < count:
            sys.exit(f"{job['data']}: {len(pairs)} pairs of at most {job['length']} tokens, {count} are needed")
    else:
        pairs = make_pairs(count, job["length"], job["share"], job["vocab"])
    schedule = Schedule([1] * count, job["batch"], 0, count)
    order = [i for step in range(job["steps"]) for i in schedule.batch(step)]
    for name, rows in (("pairs", pairs), ("ordered", [pairs[i] for i in order])):
        Path(job["work"], name + ".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------
# 2. The workers: each is a process of its own, and gives a dict

def resident(kind: str) -> float:
    """MB of this process: VmRSS, now, or VmHWM, at most."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(kind))


class Clock:
    """Seconds since the process was started; the ends of the steps; memory."""

    def __init__(self, job, torch):
        self.born, self.cuda, self.torch = job["born"], torch.cuda.is_available() and not job["cpu"], torch
        self.idle, self.ends, self.cpu = resident("VmRSS"), [], []

    def now(self) -> float:
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.time() - self.born

    def step_ended(self) -> None:
        self.ends.append(self.now())
        self.cpu.append(time.process_time())

    def result(self, losses, **more) -> dict:
        peak = self.torch.cuda.max_memory_allocated() / 2 ** 20 if self.cuda else resident("VmHWM") - self.idle
        steps, cpu = ([b - a for a, b in itertools.pairwise(times)] for times in (self.ends, self.cpu))  # from the 2nd
        return {"steps_s": steps, "cpu_s": cpu, "first_s": self.ends[0], "peak_mb": peak, "idle_mb": self.idle,
                "losses": losses, **more}


def ours(job: dict) -> dict:
    """train.py's own reference pass and loop, on pairs that are tokenised as TRL tokenises them."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    import train
    from data import Pair
    from model import Transformer
    clock = Clock(job, torch)
    cfg = train.Config(model=job["model"], data="pairs", loss="dpo", lr=job["lr"], warmup=0.0, decay="constant",
                       batch_size=job["batch"], steps=job["steps"], out=job["work"], reference=None,
                       save_every=0, dtype=job["dtype"], device="cuda" if clock.cuda else "cpu")
    world = train.join_world(cfg)
    torch.manual_seed(cfg.seed)
    model = Transformer.from_pretrained(cfg.model, world.device)
    tokenizer, end = open_tokenizer(Path(cfg.model))
    pairs = [Pair(*(np.array(ids, dtype=np.int32) for ids in encode(tokenizer, json.loads(line), end)), None, str(i))
             for i, line in enumerate(Path(job["work"], "pairs.jsonl").read_text().splitlines())]
    part = train.Part.plan(pairs, cfg, world, cfg.steps)
    scores = Path(job["work"], "reference.safetensors")
    scores.unlink(missing_ok=True)
    before = clock.now()
    known = train.score_reference(model, scores, train.fingerprint(model, world), part.rows(world), world)
    part.attach(known, model.config.vocab_size)
    reference, rows = clock.now() - before, []

    def on_step(step, model):
        if step:
            clock.step_ended()
    state = {"step": 0, "seconds": 0.0, "skipped": []}
    train.train(cfg, model, part, None, world, state, [], rows.append, None, on_step)
    batches = [[pairs[i] for i in part.schedule.batch(step)] for step in range(cfg.steps)]
    return clock.result([row["loss"] for row in rows], reference_s=reference, name="ours", torch=torch.__version__,
                        flops=[useful_flops(model, batch) for batch in batches],
                        tokens=[sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in b) for b in batches],
                        computed=[sum(p.cost() for p in b) for b in batches],
                        scored=[sum(len(p.chosen) + len(p.rejected) for p in b) for b in batches])


def useful_flops(model, pairs) -> float:
    """Of a step, forward and backward: a shared prompt once, attention where it sees, the head where it scores."""
    c, flops = model.config, 0
    matrices = sum(p.numel() for name, p in model.blocks.named_parameters() if p.dim() == 2)
    for pair in pairs:
        prompt, *both = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        seen = prompt ** 2 / 2 + sum(n * prompt + n ** 2 / 2 for n in both)
        flops += 2 * matrices * pair.cost() + 4 * c.layers * c.heads * c.head_dim * seen
        flops += 2 * c.vocab_size * c.dim * sum(both)
    return 3 * flops


def trl(job: dict) -> dict:
    """A plain DPOTrainer with its reference scores computed first, the pairs in the file's order."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(Path(job["work"], f"cache{time.time()}")),
                      TRL_EXPERIMENTAL_SILENCE="1")
    import torch
    import transformers
    import trl as library
    from datasets import load_dataset
    clock, losses, bf16 = Clock(job, torch), [], job["dtype"] == "bfloat16"

    class InOrder(library.DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            losses.append((found[0] if isinstance(found, tuple) else found).detach())
            return found

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.step_ended()

    wanted = dict(output_dir=str(Path(job["work"], "trl")), max_steps=job["steps"], learning_rate=job["lr"],
                  per_device_train_batch_size=job["batch"], lr_scheduler_type="constant", warmup_steps=0, beta=0.1,
                  weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", logging_steps=1, report_to="none",
                  save_strategy="no", disable_tqdm=True, use_cpu=not clock.cuda, bf16=bf16, max_length=job["length"],
                  gradient_checkpointing=False, loss_type="sigmoid", precompute_ref_log_probs=True,
                  use_liger_kernel=job["liger"], model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"})
    known = library.DPOConfig.__dataclass_fields__
    trainer = InOrder(model=job["model"], args=library.DPOConfig(**{k: v for k, v in wanted.items() if k in known}),
                      train_dataset=load_dataset("json", data_files=str(Path(job["work"], "ordered.jsonl")),
                                                 split="train"),
                      processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]), callbacks=[Watch()])
    trainer.train()
    return clock.result([float(loss) for loss in losses], name=f"trl {library.__version__}", torch=torch.__version__)


def ceiling(job: dict) -> dict:
    """Matrix products of 2,048 x 2,048, for a second: FLOP/s."""
    import torch
    cuda = torch.cuda.is_available() and not job["cpu"]
    a = torch.randn(2048, 2048, device="cuda" if cuda else "cpu", dtype=getattr(torch, job["dtype"]))
    count, start = 0, time.perf_counter()
    for repeat in itertools.count():
        if repeat == 3:                                             # those before were to get warm
            count, start = 0, time.perf_counter()
        a @ a
        if cuda and repeat % 50 == 0:
            torch.cuda.synchronize()
        count += 1
        if repeat > 5 and time.perf_counter() - start > 1:
            break
    if cuda:
        torch.cuda.synchronize()
    return {"flops_s": 2 * 2048 ** 3 * count / (time.perf_counter() - start)}


WORKERS = {"prepare": prepare, "ours": ours, "trl": trl, "ceiling": ceiling}


def spawn(worker: str, job: dict, python: str = sys.executable, path: str = "") -> dict:
    """Run a worker; its result is the last line of its standard output."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **({"PYTHONPATH": path} if path else {})}
    command = [python, __file__, "--worker", worker, json.dumps({**job, "born": time.time()})]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{worker} ({python}) failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------
# 3. The table

def compare(job: dict, peers: list[str], rounds: int) -> list[dict]:
    """All sides in turn, `rounds` times; a side's figure for each step is its median over the rounds."""
    spawn("prepare", job)
    runs, peaks = {}, []
    for _ in range(rounds):
        peaks.append(spawn("ceiling", job)["flops_s"])
        for worker, *where in [("ours",), *(("trl", *peer.partition(":")[::2]) for peer in peers)]:
            found = spawn(worker, job, *where)
            runs.setdefault(found["name"], []).append(found)
            print(f"    {found['name']:<12} {sum(found['steps_s']):7.2f} s   load {os.getloadavg()[0]:.1f}",
                  file=sys.stderr)
    top, (facts, *_), rows = statistics.median(peaks), runs["ours"], []
    for name, found in runs.items():
        step, cpu = ([statistics.median(times) for times in zip(*(run[k] for run in found))]
                     for k in ("steps_s", "cpu_s"))
        losses = [run["losses"] for run in found]
        gap = max(abs(a - b) for run in losses for a, b in zip(run, facts["losses"], strict=True))
        rows.append({"name": name, "pairs_s": job["batch"] * len(step) / sum(step), "step_s": step, "cpu_s": mean(cpu),
                     "tokens_s": sum(facts["tokens"][1:]) / sum(step), "mfu": sum(facts["flops"][1:]) / sum(step) / top,
                     **{k: statistics.median(run[k] for run in found) for k in ("peak_mb", "idle_mb", "first_s")},
                     "reference_s": statistics.median(run.get("reference_s", 0) for run in found),
                     "loss_gap": gap, "losses": losses[0], "ceiling": top, "job": job,
                     **{k: facts[k] for k in ("tokens", "computed", "scored")}})
    return rows


def table(rows: list[dict]) -> str:
    job, ours, theirs = rows[0]["job"], rows[0], rows[1:]
    said = [f"{title(job)}; ceiling {ours['ceiling'] / 1e9:,.0f} GFLOP/s; a step computes "
            f"{mean(ours['computed']):,.0f} tokens, scores {mean(ours['scored']):,.0f}; "
            f"ours needed {ours['reference_s']:.1f} s for the reference",
            "    " + " " * 12 + "".join(f"{name:>14}" for name, _ in FIELDS.values())]
    said += ["    " + f"{row['name']:<12}" + "".join(f"{row[key]:>14{form}}" for key, (_, form) in FIELDS.items())
             for row in rows]
    if theirs:
        best = {k: pick(row[k] for row in theirs) for k, pick in (("pairs_s", max), ("peak_mb", min), ("first_s", min))}
        said.append(f"    against the best of TRL in each: {ours['pairs_s'] / best['pairs_s']:.1f} times the pairs/s, "
                    f"{ours['peak_mb'] / best['peak_mb']:.2f} of the memory, first step after "
                    f"{ours['first_s'] / best['first_s']:.2f} of the time")
    return "\n".join(said)


def mean(values) -> float:
    return sum(values) / len(values)


def title(job: dict) -> str:
    made = "" if job["data"] else f", {job['share']:.0%} prompt"
    return f"{Path(job['model']).name}, at most {job['length']} tokens{made}, {job['batch']} pairs a step"


def draw(cells: list[list[dict]], path: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(11, 1.4 + 0.5 * sum(map(len, cells))), sharey=True)
    flat = [row for cell in cells for row in cell]
    labels = [(title(row["job"]) + "\n") * (row["name"] == "ours") + row["name"] for row in flat]
    names = list(dict.fromkeys(row["name"] for row in flat))
    for axis, (key, what) in zip(axes, [("pairs_s", "pairs a second"), ("peak_mb", "peak MB above idle"),
                                        ("first_s", "s until the first step's end")]):
        axis.barh(range(len(flat)), [row[key] for row in flat], color=[f"C{names.index(row['name'])}" for row in flat])
        axis.set(title=what, yticks=range(len(flat)), yticklabels=labels)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peer", nargs="*", help="PYTHON[:PYTHONPATH] with trl (default: this Python, if it has trl)")
    add("--model", nargs="*", help="Hugging Face folders (default: a random Llama of each --vocab)")
    add("--data", help="JSON Lines of prompt, chosen, rejected, with --model (default: made up)")
    add("--vocab", type=int, nargs="+", default=[32000])
    add("--length", type=int, nargs="+", default=[512], help="tokens of prompt + response, at most")
    add("--share", type=float, nargs="+", default=[0.5], help="of the prompt in it")
    add("--batch", type=int, nargs="+", default=[4])
    add("--steps", type=int, default=6, help="the first is left out of the rates")
    add("--rounds", type=int, default=3)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--lr", type=float, default=1e-4)
    add("--cpu", action="store_true")
    add("--liger", action="store_true", help="TRL with Liger's kernels")
    add("--json", default="bench.json", help="where all figures go")
    add("--picture", help="where to draw them, such as figures/bench.png")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, job = args.worker
        out, sys.stdout = sys.stdout, sys.stderr                    # the result is all that goes to standard output
        print(json.dumps(WORKERS[name](json.loads(job))), file=out)
        return
    if args.peer is None:
        args.peer = [sys.executable] if not subprocess.run([sys.executable, "-c", "import trl"],
                                                           capture_output=True).returncode else []
    if args.data and not args.model:
        parser.error("--data needs --model, whose tokenizer reads it")
    keys = ("steps", "dtype", "lr", "cpu", "liger", "data")
    cells = []
    with tempfile.TemporaryDirectory() as work:
        models = [(model, 0) for model in args.model or []] or [(f"{work}/llama-{v}", v) for v in args.vocab]
        for (model, vocab), length, share, batch in itertools.product(
                models, args.length, args.share[:1] if args.data else args.share, args.batch):
            job = {**{k: vars(args)[k] for k in keys}, "work": work, "model": str(Path(model).resolve()),
                   "vocab": vocab or json.loads(Path(model, "config.json").read_text())["vocab_size"],
                   "length": length, "share": share, "batch": batch}
            cells.append(compare(job, args.peer, args.rounds))
            print(table(cells[-1]), flush=True)
            Path(args.json).write_text(json.dumps(cells, indent=1) + "\n")
    if args.picture:
        draw(cells, args.picture)
    gap = max(row["loss_gap"] for cell in cells for row in cell)
    if gap > 1e-3 and args.dtype == "float32":
        sys.exit(f"the losses differ by up to {gap:.1e}")


if __name__ == "__main__":
    main()
