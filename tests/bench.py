"""Compare this trainer with TRL's DPOTrainer, in processes that take turns: speed, memory, start, losses.

    python tests/bench.py --peer TRL_VENV/bin/python                        random Llama, made-up pairs
    python tests/bench.py --model DIR DIR --data pairs.jsonl --rounds 3     your own models and pairs
    python tests/bench.py --sweep --steps 3 --rounds 1 --picture sweep.png  vocabulary, length, prompt share, batch
    python tests/bench.py --memory                                          bytes per token, by vocabulary
    python tests/bench.py --processes 1 2 --batch 8                         one process and two, whole and sharded
    python tests/bench.py --profile                                         where the time of our step goes

On a machine with a GPU: a Llama of 1.2 billion parameters in bfloat16, then where the time of its step goes:

    python tests/bench.py --shape 1b --batch 8 --steps 12 --peer TRL_VENV/bin/python --liger --compile
    python tests/bench.py --shape 1b --batch 8 --steps 6 --profile --compile

A peer is PYTHON or PYTHON:PYTHONPATH, a Python with trl; several are allowed.  Without one, only ours runs.
Both sides get the same model, the same token ids in the same order, AdamW at a constant rate, clipping at 1
and beta 0.1, and score the reference before step 1.  Ours calls train.py's own score_reference and train.
"""
import argparse
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT, END, PAD = Path(__file__).resolve().parent.parent, "<end>", "<pad>"
KINDS = {                         # kind of each profiled operation: the first whose pattern is in its name
    "attention": "attention|flash|flex|fmha", "matrix products": "mm|gemm|nvjet|cutlass|linear",
    "optimiser": "adam", "copies": "copy|memcpy|memset|cat|clone|fill|zero|empty",
    "element-wise": "^aten|elementwise|reduce|triton|softmax|norm|index", "the rest": ""}
SHAPES = {                        # config of a random Llama; default flags; longest pair / shortest pair
    "small": ({"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
               "intermediate_size": 704}, {"vocab": [32000], "length": [512], "dtype": "float32"}, 1.4),
    "1b": ({"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 8192}, {"vocab": [128256], "length": [2048], "dtype": "bfloat16"}, 4)}
GRIDS = {                         # defaults of --vocab, --length, --share and --batch
    "plain": {"share": [0.5], "batch": [4]},
    "sweep": {"vocab": [32000, 128256], "length": [256, 1024, 4096], "share": [0.5, 0.2, 0.8], "batch": [4, 2, 8, 32]},
    "memory": {"vocab": [32000, 128256], "length": [256], "share": [0.5], "batch": [2, 4, 8, 16, 24]}}
FACTORS = {"vocab": ("vocabulary", ","), "length": ("tokens of prompt + response, at most", ","),
           "share": ("share of the prompt", ".0%"), "batch": ("pairs a step", ",")}
FIGURES = {"pairs_s": "pairs a second", "peak_mb": "peak MB above idle", "first_s": "s until the first step's end"}
FIELDS = {                        # columns of the table: heading and format
    "pairs_s": ("pairs/s", ".2f"), "tokens_s": ("tokens/s", ",.0f"), "mfu": ("of ceiling", ".1%"),
    "cpu_s": ("CPU s/step", ".2f"), "peak_mb": ("peak MB", ",.0f"), "first_s": ("1st step s", ".1f"),
    "loss_gap": ("loss differs", ".1e")}


# ---------------------------------------------------------------------------------------------------------------
# 1. What is trained: a model folder and a file of pairs

def make_folder(folder: Path, vocab: int, shape: str) -> None:
    """Save a random Llama with the words w0, w1, ...: any token ids can be written as text and read back."""
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
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, **SHAPES[shape][0],
         "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
         "eos_token_id": vocab - 2},
        {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()},
    ).save_pretrained(folder)


def make_pairs(count: int, length: int, share: float, vocab: int, spread: float):
    """Yield random pairs of length / spread to `length` tokens, a `share` of which is the prompt."""
    draw = random.Random(0)

    def words(n):
        return "".join(f" w{draw.randrange(vocab - 2)}" for _ in range(max(1, int(n))))
    for _ in range(count):
        whole = draw.uniform(length / spread, length)
        prompt, *both = whole * share, *(whole * (1 - share) * draw.uniform(0.6, 1) - 1 for _ in range(2))
        yield dict(zip(("prompt", "chosen", "rejected"), (words(prompt)[1:], *map(words, both))))


def encoder(folder: Path):
    """Return pair -> token ids of prompt, chosen, rejected, as TRL encodes plain text: it adds the end token,
    encodes prompt + response as one text, and splits where one of the two departs from the prompt's ids."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    end = end["content"] if isinstance(end, dict) else end

    def encode(pair):
        texts = [pair[side] + end * (not pair[side].endswith(end)) for side in ("chosen", "rejected")]
        prompt, *both = (tokenizer.encode(pair["prompt"] + text).ids for text in ("", *texts))
        shared = 0
        while shared < min(map(len, (prompt, *both))) and prompt[shared] == both[0][shared] == both[1][shared]:
            shared += 1
        return prompt[:shared], both[0][shared:], both[1][shared:]
    return encode


def prepare(job: dict) -> None:
    """Make the model folder if there is none, and two files of the same pairs: one for our trainer, and one
    for the peer, in the order in which our trainer visits them."""
    sys.path.insert(0, str(ROOT))
    from data import Schedule, read_lines
    folder, count = Path(job["model"]), job["steps"] * job["batch"]
    if not folder.exists():
        make_folder(folder, job["vocab"], job["shape"])
    if job["data"]:
        encode, every = encoder(folder), (json.loads(line) for _, line in read_lines(job["data"]))
        fits = ({k: p[k] for k in ("prompt", "chosen", "rejected")} for p in every for prompt, *both in [encode(p)]
                if prompt and len(prompt) + max(map(len, both)) <= job["length"])
        pairs = list(itertools.islice(fits, count))
        if len(pairs) < count:
            sys.exit(f"{job['data']}: {len(pairs)} pairs of at most {job['length']} tokens, {count} are needed")
    else:
        pairs = list(make_pairs(count, job["length"], job["share"], job["vocab"], SHAPES[job["shape"]][2]))
    schedule = Schedule([1] * count, job["batch"], 0, count)
    order = [i for step in range(job["steps"]) for i in schedule.batch(step)]
    for name, rows in (("pairs", pairs), ("ordered", [pairs[i] for i in order])):
        Path(job["work"], name + ".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------
# 2. The workers: each runs in its own process and returns a dict

def resident(kind: str) -> float:
    """Memory of this process in MB: kind VmRSS is the current size, VmHWM the peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(kind))


class Clock:
    """Records seconds since the process started, when each step ended, and memory."""

    def __init__(self, job, torch):
        self.born, self.cuda, self.torch = job["born"], torch.cuda.is_available() and not job["cpu"], torch
        self.idle, self.ends, self.cpu = resident("VmRSS"), [], []
        if not self.cuda and job["limit_gb"]:                       # (a GPU's driver maps more than it uses)
            resource.setrlimit(resource.RLIMIT_DATA, (int(job["limit_gb"] * 2 ** 30),) * 2)

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
    from data import Pair, Split
    from model import Transformer
    clock = Clock(job, torch)
    cfg = train.Config(model=job["model"], data="pairs", loss="dpo", lr=job["lr"], warmup=0.0, decay="constant",
                       batch_size=job["batch"], steps=job["steps"], out=job["work"], reference=None, save_every=0,
                       dtype=job["dtype"], device="cuda" if clock.cuda else "cpu", shard=job["shard"],
                       tokens_per_row=2 * job["batch"] * job["length"] if job["memory"] else job["row"])
    world = train.join_world(cfg)
    torch.manual_seed(cfg.seed)
    model = Transformer.from_pretrained(cfg.model, world.device,
                                        shard=(lambda model: train.apply_fsdp(model, world)) if cfg.shard else None)
    if job["compile"]:
        model.compile_blocks()
    encode, lines = encoder(Path(cfg.model)), Path(job["work"], "pairs.jsonl").read_text().splitlines()
    pairs = [Pair(*(np.array(ids, dtype=np.int32) for ids in encode(json.loads(line))), None, str(i))
             for i, line in enumerate(lines)]
    default = train.ROW_TOKENS[world.device.type, cfg.compile]
    part = Split.plan(pairs, cfg.batch_size, cfg.seed, cfg.tokens_per_row, default, world.device)
    part.steps = cfg.steps
    scores, before = Path(job["work"], f"reference{job['born']}.safetensors"), clock.now()
    known = train.score_reference(model, scores, train.fingerprint(model, world), [part], world)
    part.set_reference(known, model.config.vocab_size)
    reference, sizes = clock.now() - before, []
    profiler = torch.profiler.profile() if job["profile"] else None

    def on_step(step, model):
        if step:
            clock.step_ended()
        if profiler and step >= cfg.steps - 1:
            profiler.start() if step < cfg.steps else profiler.stop()
    model.register_forward_pre_hook(lambda model, inputs: sizes.append(inputs[0].numel()))
    state = {"step": 0, "seconds": 0.0, "skipped": [], "agrees": [], "run": {"dispersion_power": 0.0}}
    run = train.Run(cfg, model, world, state, [], on_step)
    train.train(run, [part])
    written = Path(job["work"], "metrics.jsonl").read_text().splitlines() if world.rank == 0 else []
    dynamo = sys.modules.get("torch._dynamo.utils")
    found = clock.result([json.loads(line)["loss"] for line in written], reference_s=reference, torch=torch.__version__,
                         graphs=dynamo.counters["stats"]["unique_graphs"] if dynamo else 0, **facts(model, part))
    ranks = torch.zeros(world.size + 2, device=world.device)
    ranks[world.rank], ranks[-2], ranks[-1] = found["peak_mb"], sum(sizes), len(sizes)
    *peaks, positions, rows = world.sum_over_ranks(ranks).tolist()
    return {**found, "peak_mb": max(peaks), "peaks_mb": peaks, "positions": positions, "rows": rows,
            "operations": operations(profiler, clock.cuda) if profiler else []}


def facts(model, part) -> dict:
    """Counts per step; also how many positions right-padded batches of 4 pairs would take.  Useful FLOPs:
    forward and backward, shared prompt once, attention only to visible tokens, head only at scored tokens."""
    c, matrices = model.config, sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)

    def flops(pair):
        prompt, *both = map(len, pair[:3])
        seen = prompt ** 2 / 2 + sum(n * prompt + n ** 2 / 2 for n in both)
        return 3 * (2 * matrices * pair.cost() + 4 * c.layers * c.heads * c.head_dim * seen
                    + 2 * c.vocab_size * c.dim * sum(both))
    figures = {"flops": flops, "tokens": lambda p: 2 * len(p.prompt) + len(p.chosen) + len(p.rejected),
               "computed": lambda p: p.cost(), "scored": lambda p: len(p.chosen) + len(p.rejected)}
    steps = [[part.pairs[i] for i in part.schedule.batch(step)] for step in range(part.steps)]
    padded = [2 * len(four) * max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in four)
              for pairs in steps for four in (pairs[i:i + 4] for i in range(0, len(pairs), 4))]
    return {"row": part.schedule.tokens_per_row, "right_padded": sum(padded),
            **{name: [sum(map(of, pairs)) for pairs in steps] for name, of in figures.items()}}


def operations(profiler, cuda: bool) -> list[tuple]:
    """(name, kind, own ms, calls) of the operations of one step, slowest first; on a GPU, of its kernels."""
    events = [event for event in profiler.key_averages()
              if not cuda or (event.device_type.name == "CUDA" and "#" not in event.key)]           # (ranges have a #)
    found = [(event.key, next(kind for kind, names in KINDS.items() if re.search(names, event.key, re.IGNORECASE)),
              (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000, event.count)
             for event in events]
    return sorted(found, key=lambda row: -row[2])


def trl(job: dict) -> dict:
    """A plain DPOTrainer with its reference scores computed first, the pairs in the file's order."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(Path(job["work"], f"cache{time.time()}")),
                      TRL_EXPERIMENTAL_SILENCE="1")
    import torch
    import transformers
    import trl as library
    from datasets import load_dataset
    known, base = library.DPOConfig.__dataclass_fields__, library.DPOTrainer      # (loaded now, before memory counts)
    clock, losses, bf16 = Clock(job, torch), [], job["dtype"] == "bfloat16"

    class InOrder(base):
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
                  gradient_checkpointing=job["checkpoint"], loss_type="sigmoid",
                  precompute_ref_log_probs=not (job["liger"] and hasattr(InOrder, "_compute_loss_liger")),
                  use_logits_to_keep=True, use_liger_kernel=job["liger"],
                  model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"})
    trainer = InOrder(model=job["model"], args=library.DPOConfig(**{k: v for k, v in wanted.items() if k in known}),
                      train_dataset=load_dataset("json", data_files=str(Path(job["work"], "ordered.jsonl")),
                                                 split="train"),
                      processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]), callbacks=[Watch()])
    trainer.train()
    return clock.result([float(loss) for loss in losses], torch=torch.__version__,
                        note="with gradient checkpointing" * job["checkpoint"])


def ceiling(job: dict) -> dict:
    """Measure FLOP/s by two seconds of large square matrix products."""
    import torch
    from torch.utils.benchmark import Timer
    device, size = ("cuda", 8192) if torch.cuda.is_available() and not job["cpu"] else ("cpu", 2048)
    a = torch.randn(size, size, device=device, dtype=getattr(torch, job["dtype"]))
    timer = Timer("torch.mm(a, a, out=b)", globals={"torch": torch, "a": a, "b": a.clone()},
                  num_threads=torch.get_num_threads())
    return {"flops_s": 2 * size ** 3 / timer.blocked_autorange(min_run_time=2).median}


WORKERS = {"prepare": prepare, "ours": ours, "trl": trl, "ceiling": ceiling}


class Side(NamedTuple):
    name: str
    worker: str
    changes: dict                 # to the job's settings
    command: tuple = (sys.executable,)


def all_sides(args) -> list[Side]:
    """Our trainer (--processes: once per number, whole and sharded), then the peers (--liger: twice)."""
    sides = [Side(f"{count} x {'shard' if shard else 'whole'}", "ours", {"shard": shard},
                  ("env", "OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={count}")) for count in args.processes or [] for shard in (False, True)]
    sides = sides or [Side("ours", "ours", {})]
    for peer in [] if args.memory or args.profile else args.peer:
        python, _, path = peer.partition(":")
        command = ("env", f"PYTHONPATH={path or os.environ.get('PYTHONPATH', '')}", python)
        asked = subprocess.run([*command, "-c", "from importlib.metadata import version; print(version('trl'))"],
                               capture_output=True, text=True)
        if asked.returncode:
            sys.exit(f"--peer {peer}: {asked.stderr.splitlines()[-1]}")
        sides += [Side(f"trl {asked.stdout.strip()}" + " liger" * liger, "trl", {"liger": liger}, command)
                  for liger in (False, True)[:1 + args.liger]]
    return sides


def spawn(side: Side, job: dict) -> dict:
    """Run a worker -> its result, the last line of its standard output.  For a failed peer: the reason; one
    that ran out of GPU memory is first tried again with gradient checkpointing."""
    content = {**job, "liger": False, "shard": False, "checkpoint": False, **side.changes, "born": time.time()}
    done = subprocess.run([*side.command, __file__, "--worker", side.worker, json.dumps(content)],
                          capture_output=True, text=True)
    if not done.returncode:
        return json.loads(done.stdout.splitlines()[-1])
    if side.worker != "trl":
        sys.exit(f"{side.name} failed, status {done.returncode}:\n{done.stderr[-3000:]}")
    errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    why = (errors or done.stderr.splitlines() or [""])[-1] if done.returncode > 0 else f"signal {-done.returncode}"
    if "CUDA out of memory" in why and not content["checkpoint"]:
        return spawn(side._replace(changes={**side.changes, "checkpoint": True}), job)
    return {"failed": why}


# ---------------------------------------------------------------------------------------------------------------
# 3. The table, the picture, the command line

def compare(job: dict, sides: list[Side], rounds: int) -> list[dict]:
    """Run all sides in turn, `rounds` times -> a row per side; times and memory are medians over rounds."""
    spawn(Side("the pairs", "prepare", {}), job)
    runs, peaks, rows = {side.name: [] for side in sides}, [], []
    for _ in range(rounds):
        peaks.append(spawn(Side("the ceiling", "ceiling", {}), job)["flops_s"])
        for side in sides:
            if not any("failed" in run for run in runs[side.name]):
                runs[side.name].append(found := spawn(side, job))
                print(f"    {side.name:<18} {sum(found.get('steps_s', [])):7.2f} s   load {os.getloadavg()[0]:.1f}",
                      file=sys.stderr)
    top, facts, median = statistics.median(peaks), runs[sides[0].name][0], statistics.median
    for name, found in runs.items():
        rows.append({"name": name, "job": job, **found[-1]})
        if "failed" not in rows[-1]:
            step, cpu = ([median(times) for times in zip(*(run[k] for run in found))] for k in ("steps_s", "cpu_s"))
            gaps = [abs(a - b) for run in found for a, b in zip(run["losses"], facts["losses"], strict=True)]
            rows[-1].update(
                pairs_s=job["batch"] * len(step) / sum(step), step_s=step, cpu_s=statistics.fmean(cpu), ceiling=top,
                tokens_s=sum(facts["tokens"][1:]) / sum(step), mfu=sum(facts["flops"][1:]) / sum(step) / top,
                loss_gap=max(gaps), **{k: median(run.get(k, 0) for run in found)
                                       for k in ("peak_mb", "idle_mb", "first_s", "reference_s")})
    return rows


def table(rows: list[dict]) -> str:
    ours, theirs = rows[0], [row for row in rows if row["name"][:3] == "trl" and "failed" not in row]
    laid, row, computed, scored = (ours[key] for key in ("positions", "row", "computed", "scored"))
    said = [f"{title(ours['job'])}: {statistics.fmean(computed):,.0f} tokens, {statistics.fmean(scored):,.0f} scored; "
            f"ceiling {ours['ceiling'] / 1e9:,.0f} GFLOP/s; ours needed {ours['reference_s']:.1f} s for the reference",
            f"    rows of {row:,} are {laid / ours['rows'] / row:.0%} full, {1 - sum(computed) / laid:.1%} "
            f"of it padding; right-padded batches of 4 pairs have {ours['right_padded'] / laid:.2f} times the positions"
            + f"; {ours['graphs']} graphs compiled" * bool(ours["graphs"]),
            " " * 22 + "".join(f"{name:>14}" for name, _ in FIELDS.values())]
    said += [f"    {row['name']:<18}" + (f"  failed: {row['failed']}" if "failed" in row else "".join(
        f"{row[key]:>14{form}}" for key, (_, form) in FIELDS.items()) + row.get("note", "")) for row in rows]
    if theirs:
        best = {k: pick(row[k] for row in theirs) for k, pick in (("pairs_s", max), ("peak_mb", min), ("first_s", min))}
        said.append(f"    against the best of TRL in each: {ours['pairs_s'] / best['pairs_s']:.1f} times the pairs/s, "
                    f"{ours['peak_mb'] / best['peak_mb']:.2f} of the memory, first step after "
                    f"{ours['first_s'] / best['first_s']:.2f} of the time")
    spent = {kind: sum(ms for _, of, ms, _ in ours["operations"] if of == kind) for kind in KINDS}
    if total := sum(spent.values()):
        said += [f"    {ms:9.1f} ms {ms / total:6.1%} {calls:6} x  {kind:<17}{name[:60]}"
                 for name, kind, ms, calls in ours["operations"][:15]]
        said.append(f"    of {total:,.0f} ms: " + ", ".join(f"{kind} {ms / total:.1%}" for kind, ms in spent.items()))
    return "\n".join(said)


def slopes(rows: list[dict]) -> str:
    """For each vocabulary, fit a line: peak memory by tokens per step, all of them in a single row."""
    said = []
    for vocab, group in itertools.groupby(rows, lambda row: row["job"]["vocab"]):
        x, y = zip(*((max(row["computed"]), row["peak_mb"]) for row in group))
        slope, start = statistics.linear_regression(x, y)
        off = max(abs(b - start - slope * a) for a, b in zip(x, y))
        said.append(f"{vocab:,} words: {slope * 1024:.0f} KB per token, where vocabulary x 4 bytes would be "
                    f"{vocab / 256:.0f} KB; {start:,.0f} MB at none; R^2 {statistics.correlation(x, y) ** 2:.5f}, "
                    f"off the line by at most {off:.0f} MB")
    return "\n".join(said)


def title(job: dict) -> str:
    made = "" if job["data"] else f", {job['share']:.0%} prompt"
    return f"{Path(job['model']).name}, at most {job['length']} tokens{made}, {job['batch']} pairs a step"


def draw_bars(cells: list[list[dict]], path: str) -> None:
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(11, 1.4 + 0.5 * sum(map(len, cells))), sharey=True, layout="constrained")
    labels = [(title(row["job"]) + "\n") * (row is cell[0]) + row["name"] for cell in cells for row in cell]
    for axis, (key, what) in zip(axes, FIGURES.items()):
        axis.barh(range(len(labels)), [row.get(key, 0) for cell in cells for row in cell],
                  color=[f"C{i}" for cell in cells for i in range(len(cell))])
        axis.set(title=what, yticks=range(len(labels)), yticklabels=labels)
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)


def draw_lines(cells: list[list[dict]], path: str) -> None:
    """One column per factor; in it, the other factors stay as in the first cell."""
    import matplotlib.pyplot as plt
    base = cells[0][0]["job"]
    figure, axes = plt.subplots(2, len(FACTORS), figsize=(12, 6), sharey="row", sharex="col", layout="constrained")
    for column, (factor, (what, form)) in zip(axes.T, FACTORS.items()):
        along = [cell for cell in cells if all(cell[0]["job"][k] == base[k] for k in FACTORS if k != factor)]
        along.sort(key=lambda cell: cell[0]["job"][factor])
        for axis, (key, label) in zip(column, FIGURES.items()):
            for i, side in enumerate(cells[0]):
                axis.plot([cell[i].get(key, float("nan")) for cell in along], "o-", label=side["name"])
                for x in (x for x, cell in enumerate(along) if "failed" in cell[i]):
                    axis.text(x, 0.02 + i / 16, "failed", c=f"C{i}", ha="center", transform=axis.get_xaxis_transform())
            axis.set(yscale="log", xmargin=0.12, ylabel=label * (factor == "vocab"))
            axis.yaxis.set(major_locator=plt.LogLocator(subs=(1, 2, 5)), minor_locator=plt.NullLocator(),
                           major_formatter="{x:,g}")
            axis.grid(alpha=0.3)
        values = [cell[0]["job"][factor] for cell in along]
        column[1].set(xlabel=what, xticks=range(len(values)), xticklabels=[f"{value:{form}}" for value in values])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(cells[0]),
                  title=f"{title(base)}; from there, one thing changes in each column")
    figure.savefig(path, dpi=120)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peer", nargs="*", default=[sys.executable] * bool(importlib.util.find_spec("trl")),
        help="PYTHON[:PYTHONPATH] with trl (default: this Python, if it has trl)")
    add("--model", nargs="*", help="Hugging Face folders (default: a random Llama for each --vocab)")
    add("--shape", choices=list(SHAPES), default="small", help="size of that Llama")
    add("--data", help="JSON Lines of prompt, chosen, rejected; needs --model (default: random pairs)")
    add("--vocab", type=int, nargs="+")
    add("--length", type=int, nargs="+", help="longest prompt + response, in tokens")
    add("--share", type=float, nargs="+", help="share of the prompt in that length")
    add("--batch", type=int, nargs="+", help="pairs per step")
    add("--sweep", action="store_true", help="vary one of these four, others at their first value (else: combine all)")
    add("--memory", action="store_true", help="ours only, all pairs of a step in one row: memory by tokens")
    add("--profile", action="store_true", help="ours only: where the last step spends its time")
    add("--processes", type=int, nargs="+", help="numbers of processes for ours under torchrun, 1 thread each")
    add("--steps", type=int, default=6, help="steps; the first is left out of the rates")
    add("--rounds", type=int, default=3)
    add("--dtype", choices=["float32", "bfloat16"])
    add("--lr", type=float, default=1e-4)
    add("--row", type=int, help="--tokens-per-row of train.py, for ours")
    add("--compile", action="store_true", help="--compile of train.py, for ours")
    add("--cpu", action="store_true")
    add("--liger", action="store_true", help="also run TRL with Liger's kernels")
    add("--limit-gb", type=float, default=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.75 / 2 ** 30,
        help="memory limit of a process on a CPU (default: 3/4 of the machine's; 0: no limit)")
    add("--timeout", type=int, default=1800, help="seconds per process; then signal 14 ends it")
    add("--json", default="bench.json", help="file for all figures")
    add("--picture", help="file for a picture of them, such as figures/bench.png")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    grid = GRIDS["sweep" if args.sweep else "memory" if args.memory else "plain"]
    for name, value in {**SHAPES[args.shape][1], **grid}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for wrong, what in ((args.data and not args.model, "--data needs --model, whose tokenizer reads it"),
                        (args.picture and not importlib.util.find_spec("matplotlib"), "--picture needs matplotlib"),
                        (args.steps < 2, "--steps must be 2 or more, the first is left out of the rates"),
                        (args.memory and len(args.length) * len(args.batch) < 2, "--memory needs more of --batch")):
        if wrong:
            parser.error(what)
    return args


def all_jobs(args, work: str):
    """A job per combination of the four lists; with --sweep, only those that differ from the first in one."""
    models = [(model, 0) for model in args.model or []] or [(f"{work}/llama-{v}", v) for v in args.vocab]
    lists = models, args.length, args.share[:1] if args.data else args.share, args.batch
    first = tuple(values[0] for values in lists)
    swept = dict.fromkeys((*first[:i], v, *first[i + 1:]) for i, values in enumerate(lists) for v in values)
    keys = "steps dtype lr cpu data shape row compile memory profile limit_gb timeout".split()
    for (model, vocab), length, share, batch in swept if args.sweep else itertools.product(*lists):
        yield {**{k: vars(args)[k] for k in keys}, "work": work, "model": str(Path(model).resolve()),
               "vocab": vocab or json.loads(Path(model, "config.json").read_text())["vocab_size"],
               "length": length, "share": share, "batch": batch}


def main():
    args = arguments()
    if args.worker:
        name, job = args.worker[0], json.loads(args.worker[1])
        out, sys.stdout = sys.stdout, sys.stderr                    # only the result goes to standard output
        signal.alarm(job["timeout"])
        result = WORKERS[name](job)
        if not int(os.environ.get("RANK", 0)):
            print(json.dumps(result), file=out)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sides, cells = all_sides(args), []
    with tempfile.TemporaryDirectory() as work:
        for job in all_jobs(args, work):
            cells.append(compare(job, sides, args.rounds))
            print(table(cells[-1]), flush=True)
            Path(args.json).write_text(json.dumps(cells, indent=1) + "\n")
    if args.memory:
        print(slopes([row for cell in cells for row in cell]))
    if args.picture:
        (draw_lines if args.sweep else draw_bars)(cells, args.picture)
    gap = max(row.get("loss_gap", 0) for cell in cells for row in cell)
    if gap > 1e-3 and args.dtype == "float32":
        sys.exit(f"the losses differ by up to {gap:.1e}")


if __name__ == "__main__":
    main()
