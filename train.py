"""Preference-train a language model with MallowsPO, DPO and their kin.

    python train.py                                                  the demo, made on the spot, minutes on a CPU
    python train.py --model DIR --data pairs.jsonl                   a Hugging Face folder, on your own pairs
    torchrun --standalone --nproc-per-node=8 train.py --model ...    the same steps on eight GPUs

The reference is the model before its first step: it scores every pair once, into a file, and from its entropies comes
the dispersion index; no second model is in memory.  Read `fit` for the job, `train` for the loop, `demo` for the demo.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import sys
import time
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import mallowspo
from data import (
    MATCHED_KL,
    NEW_NAMES,
    BadData,
    Dataset,
    Pair,
    Population,
    Schedule,
    Scores,
    Tokenizer,
    collate,
    compare_at,
    load_pairs,
    read_reference,
    write_jsonl,
    write_reference,
)
from mallowspo import LOSSES, Method, Outcome
from model import BadModel, Transformer


class BadConfig(ValueError):
    """Settings that cannot be run; the message says which, and what to do."""


class RunFailed(RuntimeError):
    """What went wrong in the middle of a run."""


# ---------------------------------------------------------------------------------------------------------------
# 1. Settings: one dataclass; the flags, their types, help and errors come from it

def flag(default, text):
    return field(default=default, metadata={"help": text})


DECAYS = {"cosine": lambda t: (1 + math.cos(math.pi * t)) / 2, "linear": lambda t: 1 - t, "constant": lambda t: 1.0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Config:
    """Preference-train a language model (without --model: the demo)."""
    model: str | None = flag(None, "Hugging Face folder: config.json, safetensors, tokenizer.json")
    data: str | None = flag(None, "preference pairs, JSON Lines, plain or .gz")
    eval_data: str | None = flag(None, "held-out pairs")
    eval_pairs: int = flag(0, "without --eval-data: hold out this many pairs of --data")
    out: str = flag("out", "folder for the model and all records")
    reference: str | None = flag(None, "file for the reference's scores (default: OUT/reference.safetensors)")
    loss: Literal[tuple(LOSSES)] = flag("mallows-theta", "row of mallowspo.LOSSES; flags up to --sft change it")
    dispersion: Literal["constant", "entropy", "field"] | None = flag(None, "where the weight of a prompt comes from")
    beta: float | None = flag(None, "pull to the reference")
    alpha: float | None = flag(None, "share of the reference in the reward")
    eta: float | None = flag(None, "1: log-ratios a token")
    margin: float | None = flag(None, "lead that the chosen response must have")
    sft: float | None = flag(None, "weight of the chosen response's negative log-likelihood")
    phi_star: float | None = flag(None, "scale of the dispersion weight (default: so that its mean is 1)")
    dispersion_power: float = flag(1.0, "1: the paper; less shrinks the index towards DPO, which is 0")
    lr: float = flag(1e-6, "peak learning rate of AdamW")
    warmup: float = flag(0.1, "share of the steps in which the rate rises")
    decay: Literal[tuple(DECAYS)] = flag("cosine", "how the rate falls afterwards")
    clip: float = flag(1.0, "largest gradient norm")
    batch_size: int = flag(64, "pairs a step, over all GPUs")
    epochs: int = flag(1, "passes over the data")
    steps: int | None = flag(None, "stop after this many steps instead")
    max_tokens: int | None = flag(None, "longest prompt + response, longer prompts are cut from the left (default: "
                                  "1024, or what the model was made for)")
    tokens_per_row: int | None = flag(None, "tokens in memory at once (default: 16384 on a GPU, 2048 on a CPU)")
    checkpoint_activations: bool = flag(False, "a third more arithmetic for far less memory a token")
    max_dropped: float = flag(0.1, "share of the pairs that may be too long before it is an error")
    skip_bad: bool = flag(False, "pass over bad records, and count them, instead of stopping")
    eval_every: int = flag(100, "steps between evaluations of the held-out pairs")
    log_every: int = flag(1, "steps between progress lines (metrics.jsonl has every step)")
    samples: int = flag(2, "prompts to answer before and after")
    sample_tokens: int = flag(64, "longest sample")
    seed: int = flag(0, "order of the data, and sampling")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to run")
    dtype: Literal[("auto", *DTYPES)] = flag("auto", "of the arithmetic (default: bfloat16 on a GPU, float32 on a CPU)")

    def __post_init__(self):
        for names, fits, what in [
                ("model data eval_data out reference", lambda v: v != "", "not be empty"),
                ("lr batch_size epochs steps max_tokens tokens_per_row eval_every log_every beta phi_star",
                 lambda v: 0 < v < math.inf, "be a number above 0"), ("clip", lambda v: v > 0, "be above 0"),
                ("eval_pairs samples sample_tokens sft", lambda v: 0 <= v < math.inf, "be a number, 0 or above"),
                ("warmup dispersion_power alpha eta max_dropped", lambda v: 0 <= v <= 1, "be from 0 to 1"),
                ("margin", math.isfinite, "be a number"), ("seed", lambda v: 0 <= v < 2 ** 32, "be 0 to below 2^32")]:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise BadConfig(f"--{name.replace('_', '-')} is {value!r}, it must {what}")
        if self.eval_data and self.eval_pairs:
            raise BadConfig("--eval-pairs is for runs without --eval-data; give one of them")
        if self.method.link is None and self.method.dispersion != "constant":
            raise BadConfig(f"--dispersion {self.method.dispersion} has no meaning for --loss {self.loss}")
        if self.model is not None and Path(self.model).resolve() == Path(self.out).resolve():
            raise BadConfig(f"--out {self.out} is the folder of --model; choose another one, this would overwrite it")
        if self.model is not None and self.data is None:
            raise BadConfig("--data is missing: a file of preference pairs")
        if self.model is None and self.data is not None:
            raise BadConfig("--model is missing: a Hugging Face folder (without both, the demo runs)")

    @property
    def method(self) -> Method:
        """The row of LOSSES, changed by the flags that were given."""
        changes = {name: getattr(self, name) for name in Method._fields[1:] if getattr(self, name) is not None}
        return LOSSES[self.loss]._replace(**changes)


def parse_flags(argv: list[str], defaults: dict) -> tuple[Config, dict]:
    """Flags -> Config, and which of them were given.  `--config FILE` goes in front: the flags win."""
    parser = argparse.ArgumentParser(prog="train.py", description=Config.__doc__, allow_abbrev=False,
                                     usage="train.py [--model DIR --data FILE] [flags]    (--help lists them)",
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help="settings from a JSON file, such as OUT/run.json; other flags win")
    for f in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[f.name]
        options = [t for t in typing.get_args(kind) if t is not types.NoneType]
        kind = options[0] if typing.get_origin(kind) in (types.UnionType, typing.Union) else kind   # X | None -> X
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default not in (None, False) else "")
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else \
            {"choices": typing.get_args(kind)} if typing.get_origin(kind) is Literal else {"type": kind}
        parser.add_argument("--" + f.name.replace("_", "-"), help=text.replace("%", "%%"), **how)
    first, _ = parser.parse_known_args(argv)
    try:
        given = vars(parser.parse_args(config_flags(first.config) + argv if "config" in first else argv))
        given.pop("config", None)
        return Config(**{**(defaults if "model" not in given else {}), **given}), given
    except BadConfig as error:
        parser.error(str(error))


def config_flags(path: str) -> list[str]:
    """A JSON file of settings as flags, so that both meet the same checks."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = settings.get("config", settings)
        items = settings.items()
    except (OSError, ValueError, AttributeError) as error:
        why = getattr(error, "strerror", None) or f"not a JSON object ({error})"
        raise BadConfig(f"--config {path}: {why}") from None
    flags = []
    for name, value in items:
        dashed = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(dashed if value else "--no-" + dashed[2:])
        elif value is not None:
            flags.append(f"{dashed}={value}")
    return flags


# ---------------------------------------------------------------------------------------------------------------
# 2. One process or many

class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    def say(self, text: str = "") -> None:
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world(cfg: Config) -> World:
    """This process's place among those that torchrun started, if it did."""
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise BadConfig("--device cuda: torch finds no CUDA device here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    best = ("bfloat16" if torch.cuda.is_bf16_supported() else "float16") if cuda else "float32"
    dtype = DTYPES[best if cfg.dtype == "auto" else cfg.dtype]
    if dtype == torch.float16 and not cuda:
        raise BadConfig("--dtype float16 needs a GPU; on a CPU use float32 or bfloat16")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
        return World(dist.get_rank(), dist.get_world_size(), device, dtype)
    return World(0, 1, device, dtype)


# ---------------------------------------------------------------------------------------------------------------
# 3. The reference pass: the model before step 1 scores each pair once, into a file

def fingerprint(model: Transformer, world: World) -> str:
    """A hash of all weights and of how they are computed with."""
    digest = hashlib.sha256(f"{world.device.type} {world.dtype} {model.config}".encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@torch.inference_mode()
def score_reference(model: Transformer, path: Path, rows: list[list[Pair]], world: World) -> dict[bytes, Scores]:
    """Score the pairs of this rank's rows that the file lacks; every rank gets all scores, rank 0 writes them.

    The rows are those of training: what is scored here, the policy's first step scores alike to the last bit.
    """
    key, fresh, start = fingerprint(model, world), {}, time.perf_counter()
    known = read_reference(path, key)
    todo = [row for row in rows if any(pair.digest() not in known for pair in row)]
    count = int(world.total(torch.tensor(sum(len(row) for row in todo), device=world.device)))
    world.say(f"reference   {f'scoring {count:,} pairs into' if count else 'all scores reused from'} {path}")
    for row in todo:
        packed = collate([pair[:3] for pair in row], world.device)
        with world.autocast():
            logp, entropy = model(*packed.inputs(), entropy=True)
        if not torch.isfinite(logp).all():
            raise RunFailed("the reference's scores are not finite; are the weights of --model sound? The pairs: "
                            + ", ".join(pair.where for pair in row[:8]))
        ends = packed.length.sum(1).cumsum(0).tolist()[:-1]
        parts = (np.split(values.cpu().numpy(), ends) for values in (logp, entropy))
        for pair, *both in zip(row, *parts):
            fresh.setdefault(pair.digest(), Scores(*both))         # of a repeated pair, what the first step will meet
    if world.size > 1:
        everyone = [None] * world.size
        dist.all_gather_object(everyone, fresh)
        fresh = {digest: scores for part in everyone for digest, scores in part.items()}
    if fresh and world.rank == 0:
        write_reference(path, key, fresh | known)
    if count:
        world.say(f"            {count / (time.perf_counter() - start):.1f} pairs/s")
    return fresh | known


# ---------------------------------------------------------------------------------------------------------------
# 4. Pairs, with all that the loss wants to know of them

@dataclass
class Part:
    """The training pairs, or the held-out ones."""
    pairs: list[Pair]
    schedule: Schedule
    steps: int                          # of the schedule that are run
    ref_logp: Tensor                    # (P, 2) the reference's log-probability of both responses
    index: Tensor                       # (P,) dispersion index H(x), or the record's own phi; nan: not visited
    weight: Tensor                      # (P,)

    @classmethod
    def plan(cls, pairs: list[Pair], cfg: Config, world: World, steps: int | None) -> "Part":
        costs = [pair.cost() for pair in pairs]
        longest = max(range(len(pairs)), key=costs.__getitem__)
        budget = cfg.tokens_per_row or max(costs[longest], 16384 if world.device.type == "cuda" else 2048)
        if costs[longest] > budget:
            raise BadConfig(f"--tokens-per-row {budget} is too small for {pairs[longest].where}, which takes "
                            f"{costs[longest]} tokens; raise it, or lower --max-tokens")
        schedule = Schedule(costs, cfg.batch_size, cfg.seed, budget)
        zeros = torch.zeros(len(pairs), 2, device=world.device)
        return cls(pairs, schedule, steps or schedule.steps_per_epoch, zeros,
                   torch.full((len(pairs),), torch.nan), torch.ones(len(pairs), device=world.device))

    def first_epoch(self) -> range:
        """The steps that visit each pair that is ever visited."""
        return range(min(self.steps, self.schedule.steps_per_epoch))

    def rows(self, world: World) -> list[list[Pair]]:
        """This rank's rows of the first epoch."""
        return [[self.pairs[i] for i in row] for s in self.first_epoch()
                for row in self.schedule.rows(s, world.rank, world.size)]

    def visited(self) -> list[int]:
        return sorted(i for s in self.first_epoch() for i in self.schedule.batch(s))

    def attach(self, scores: dict[bytes, Scores], vocab_size: int) -> None:
        """Take over the reference's scores of the pairs that are visited."""
        logp = torch.zeros(len(self.pairs), 2, dtype=torch.float64)
        entropy = torch.full_like(logp, torch.nan)
        for i in self.visited():
            score, n = scores[self.pairs[i].digest()], len(self.pairs[i].chosen)
            logp[i] = torch.tensor([half.sum(dtype=np.float64) for half in np.split(score.logp, [n])])
            entropy[i] = torch.tensor([half.mean(dtype=np.float64) for half in np.split(score.entropy, [n])])
        self.ref_logp = logp.to(self.ref_logp)                                            # (P, 2)
        self.index = mallowspo.dispersion_index(entropy, vocab_size).float()              # (P,)


def judge(policy, method: Method, part: Part, indices: list[int], world: World) -> Outcome:
    """The policy's scores of one row of pairs against the reference's: what training and evaluation both do."""
    row = collate([part.pairs[i][:3] for i in indices], world.device)
    with world.autocast():
        logp, _ = policy(*row.inputs())
    return mallowspo.objective(method, row.total(logp), part.ref_logp[indices], row.length, part.weight[indices])


def sums(outcome: Outcome) -> Tensor:
    return torch.stack([value.detach().sum() for value in outcome])


@torch.inference_mode()
def evaluate(model: Transformer, method: Method, part: Part, world: World) -> dict[str, float]:
    """Means over all held-out pairs, on all ranks."""
    total = torch.zeros(len(Outcome._fields), device=world.device)
    for step in range(part.steps):
        for row in filter(None, part.schedule.rows(step, world.rank, world.size)):
            total += sums(judge(model, method, part, row, world))
    means = (world.total(total) / len(part.pairs)).tolist()
    return dict(zip(Outcome._fields, means))


# ---------------------------------------------------------------------------------------------------------------
# 5. The loop

def train(cfg: Config, model: Transformer, part: Part, held: Part | None, world: World, metrics, evaluations,
          on_step=None) -> None:
    """Run the steps of `part`; `metrics` and `evaluations` take dicts, `on_step(step, model)` is called before each
    step and after the last."""
    ddp = {"device_ids": [world.device.index]} if world.device.type == "cuda" else {}
    policy = DistributedDataParallel(model, **ddp) if world.size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    start = time.perf_counter()
    for step in range(part.steps + 1):
        if on_step:
            on_step(step, model)
        if held and (step % cfg.eval_every == 0 or step == part.steps):
            results = evaluate(model, cfg.method, held, world)
            evaluations({"step": step, **results})
            world.say(f"step {step:>5}  held out: loss {results['loss']:.4f}  accuracy {results['accuracy']:.3f}  "
                      f"margin {results['margin']:+.4f}")
        if step == part.steps:
            break
        began = time.perf_counter()
        means = gradient(policy, scaler, cfg.method, part, step, world)
        if step == 0 and cfg.method.link and cfg.method.alpha:
            world.say(f"check       the first loss is {means['loss']:.6f}; of a policy that equals its reference it is "
                      f"{loss_at_start(cfg.method, part):.6f}")
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip).item()
        if not math.isfinite(norm) and not scaler.is_enabled():
            pairs = ", ".join(part.pairs[i].where for i in part.schedule.batch(step)[:8])
            raise RunFailed(f"step {step}: the gradient is not finite ({norm}), though the loss is; nothing was saved; "
                            f"look at --lr, --beta, and the step's pairs: {pairs}, ...")
        lr = optimizer.param_groups[0]["lr"] = learning_rate(cfg, step, part.steps)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        now, batch = time.perf_counter(), part.schedule.batch(step)
        row = {"step": step, **means, "lr": lr, "grad_norm": norm, "weight": part.weight[batch].mean().item(),
               "pairs_per_second": len(batch) / (now - began),
               "tokens_per_second": sum(part.schedule.costs[i] for i in batch) / (now - began),
               "memory_gib": peak_memory(world), "seconds": now - start}
        metrics(row)
        if step % cfg.log_every == 0 or step + 1 == part.steps:
            world.say(progress(row, part.steps, cfg.method.link is not None))


def gradient(policy, scaler, method: Method, part: Part, step: int, world: World) -> dict[str, float]:
    """Accumulate the gradient of the mean loss over all pairs of the step; return the means of the outcome.

    Sums are divided by the number of pairs on all ranks, so neither GPUs nor rows change the step.
    """
    batch, rows = part.schedule.batch(step), part.schedule.rows(step, world.rank, world.size)
    total, losses = torch.zeros(len(Outcome._fields), device=world.device), []
    for i, row in enumerate(rows):
        wait = world.size > 1 and i + 1 < len(rows)                # ranks exchange gradients with the last row only
        with policy.no_sync() if wait else contextlib.nullcontext():
            # --- the method: everything else in this loop is bookkeeping ------------------------------------
            outcome = judge(policy, method, part, row or batch[:1], world)
            counts = bool(row)                                     # an empty row takes part, and counts for nothing
            loss = counts * outcome.loss.sum() / len(batch)
            # ------------------------------------------------------------------------------------------------
            scaler.scale(loss * world.size).backward()             # DDP takes the mean over ranks, we want the sum
        total += counts * sums(outcome)
        losses.append(outcome.loss.detach())
    means = dict(zip(Outcome._fields, (world.total(total) / len(batch)).tolist()))
    if not math.isfinite(means["loss"]):
        bad = [part.pairs[i].where for row, loss in zip(rows, losses) for i, x in zip(row, loss.tolist())
               if not math.isfinite(x)]
        raise RunFailed(f"step {step}: the loss is not finite; nothing was saved; the pairs: {', '.join(bad) or '-'}")
    return means


def loss_at_start(method: Method, part: Part) -> float:
    """The first step's loss if the policy's scores are the reference's: ln 2 for the logistic links."""
    batch = part.schedule.batch(0)
    length = torch.tensor([[len(part.pairs[i].chosen), len(part.pairs[i].rejected)] for i in batch])
    ref = part.ref_logp[batch].cpu()
    return mallowspo.objective(method, ref, ref, length, part.weight[batch].cpu()).loss.mean().item()


def learning_rate(cfg: Config, step: int, steps: int) -> float:
    """Linear rise over the share `warmup` of the steps, then the decay."""
    rise = math.ceil(cfg.warmup * steps)
    if step < rise:
        return cfg.lr * (step + 1) / (rise + 1)
    return cfg.lr * DECAYS[cfg.decay]((step - rise) / max(1, steps - rise))


def peak_memory(world: World) -> float:
    """GiB: the most that torch held on a GPU, the largest resident set of this process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def progress(row: dict, steps: int, preferences: bool) -> str:
    left = int(row["seconds"] / (row["step"] + 1) * (steps - row["step"] - 1))
    shown = f"accuracy {row['accuracy']:.3f}  margin {row['margin']:+.4f}  " if preferences else ""
    return (f"step {row['step']:>5}/{steps}  loss {row['loss']:.4f}  {shown}lr {row['lr']:.1e}  "
            f"{row['pairs_per_second']:.1f} pairs/s  {row['tokens_per_second']:,.0f} tok/s  "
            f"{row['memory_gib']:.1f} GiB  left {left // 60}:{left % 60:02}")


# ---------------------------------------------------------------------------------------------------------------
# 6. The job

def fit(cfg: Config, world: World, on_step: Callable | None = None) -> Transformer:
    """Everything from a folder and a file to a trained folder."""
    out, method = Path(cfg.out), cfg.method
    torch.manual_seed(cfg.seed)
    model, tokenizer = Transformer.from_pretrained(cfg.model, world.device), Tokenizer(cfg.model)
    model.checkpointed = cfg.checkpoint_activations
    others = {p.name for p in out.glob("model*.safetensors")} - {file for file, _ in model.origin.tensors.values()}
    if others:
        raise BadConfig(f"--out {out} holds weights of another model ({min(others)}); choose another folder")
    if cfg.reference and Path(cfg.reference).is_dir():
        raise BadConfig(f"--reference {cfg.reference}: a folder, it should be a file for the reference's scores")
    part, held = load_parts(cfg, model, tokenizer, world)
    make_folder(out, world)
    if cfg.reference:
        make_folder(Path(cfg.reference).parent, world)
    size = sum(p.numel() for p in model.parameters())
    world.say(f"model       {cfg.model}: {size / 1e6:,.1f}M parameters, {str(world.dtype)[6:]} on "
              f"{world.size} x {world.device.type}; a response ends with {tokenizer.text([tokenizer.eos])!r}")
    settings = ", ".join(f"{k} {v}" for k, v in method._asdict().items() if k != "link")
    world.say(f"method      {cfg.loss}: {settings}")
    phi_star = weigh(cfg, model, part, held, world)
    world.say(f"plan        {part.steps} steps of {min(cfg.batch_size, len(part.pairs))} pairs, "
              f"{part.steps / part.schedule.steps_per_epoch:.2f} epochs; rows of at most "
              f"{part.schedule.tokens_per_row} tokens")
    record = {"config": dataclasses.asdict(cfg), "phi_star": phi_star, "steps": part.steps, "finished": False,
              "pairs": len(part.pairs), "held_out": len(held.pairs) if held else 0,
              "data_sha256": hashlib.sha256(b"".join(pair.digest() for pair in part.pairs)).hexdigest(),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    write_records(out, cfg, part, record, world)
    asked = (held or part).pairs[:cfg.samples]
    before = answer(cfg, model, tokenizer, asked, world)

    with log(out / "metrics.jsonl", world) as metrics, log(out / "evaluations.jsonl", world) as evaluations:
        train(cfg, model, part, held, world, metrics, evaluations, on_step)
    after = answer(cfg, model, tokenizer, asked, world)
    if world.rank == 0:
        texts = [{"prompt": tokenizer.text(pair.prompt), "chosen": tokenizer.text(pair.chosen),
                  "rejected": tokenizer.text(pair.rejected), "before": b, "after": a}
                 for pair, b, a in zip(asked, before, after)]
        write_jsonl(out / "samples.jsonl", texts)
        save_model(model, out)
        write_json(out / "run.json", {**record, "finished": True})
    world.barrier()                                                # nobody reads the folder before it is whole
    world.say(f"saved       {out}: the model, and run.json, metrics.jsonl, dispersion.jsonl, samples.jsonl")
    return model


@contextlib.contextmanager
def log(path: Path, world: World):
    """A function that appends a dict to a new file of JSON Lines, at once; on rank 0."""
    if world.rank:
        yield lambda row: None
        return
    with open(path, "w", encoding="utf-8") as file:
        def append(row):
            file.write(json.dumps(row) + "\n")
            file.flush()
        yield append


def load_parts(cfg: Config, model: Transformer, tokenizer: Tokenizer, world: World) -> tuple[Part, Part | None]:
    """The training pairs and the held-out ones, planned."""
    limit = model.config.positions
    if cfg.max_tokens is not None and cfg.max_tokens > limit:
        raise BadConfig(f"--max-tokens {cfg.max_tokens}: the model was made for {limit} positions")
    if max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) >= model.config.vocab_size:
        raise BadConfig(f"{cfg.model}: the tokenizer has more tokens than the model's {model.config.vocab_size}")

    def load(path):
        data: Dataset = load_pairs(path, tokenizer, cfg.max_tokens or min(1024, limit), cfg.max_dropped, cfg.skip_bad,
                                   need_rejected=cfg.method.link is not None)
        world.say(f"data        {path}: {data}")
        lacking = [pair.where for pair in data.pairs if pair.dispersion is None]
        if cfg.method.dispersion == "field" and lacking:
            raise BadData(f"{lacking[0]}: no 'dispersion', which --dispersion field needs in every record")
        return data.pairs

    pairs, held = load(cfg.data), load(cfg.eval_data) if cfg.eval_data else []
    both = len({pair.digest() for pair in pairs} & {pair.digest() for pair in held})
    if both:
        world.say(f"            {both:,} of the held-out pairs are trained on too")
    if cfg.eval_pairs and not held:
        if cfg.eval_pairs >= len(pairs):
            raise BadConfig(f"--eval-pairs {cfg.eval_pairs} leaves none of the {len(pairs)} pairs to train on")
        order = np.random.default_rng(cfg.seed).permutation(len(pairs))
        held, pairs = ([pairs[i] for i in sorted(part)] for part in np.split(order, [cfg.eval_pairs]))
    part = Part.plan(pairs, cfg, world, cfg.steps or cfg.epochs * math.ceil(len(pairs) / cfg.batch_size))
    return part, Part.plan(held, cfg, world, None) if held else None


def weigh(cfg: Config, model: Transformer, part: Part, held: Part | None, world: World) -> float | None:
    """The reference pass, and from it the weight of every prompt; returns phi_star."""
    method, parts = cfg.method, [part, held] if held else [part]
    if method.link and (method.alpha or method.dispersion == "entropy"):
        path = Path(cfg.reference or Path(cfg.out) / "reference.safetensors")
        scores = score_reference(model, path, [row for each in parts for row in each.rows(world)], world)
        for each in parts:
            each.attach(scores, model.config.vocab_size)
    if method.dispersion == "constant":
        return None
    if method.dispersion == "field":
        for each in parts:
            each.index = torch.tensor([pair.dispersion for pair in each.pairs])
    seen = part.index[part.visited()]
    phi_star = cfg.phi_star or mallowspo.calibrate_phi_star(seen, cfg.dispersion_power)
    for each in parts:
        each.weight = mallowspo.dispersion_weight(each.index, phi_star, cfg.dispersion_power).to(world.device)
    weight = mallowspo.dispersion_weight(seen, phi_star, cfg.dispersion_power)
    world.say(f"dispersion  phi_star {phi_star:.4f} ({'given' if cfg.phi_star else 'calibrated'}), weights "
              f"{weight.min():.2f} to {weight.max():.2f}, mean {weight.mean():.3f}, sd {weight.std(correction=0):.3f}; "
              f"{mallowspo.count_clamped(seen)} of {len(seen):,} indices clamped")
    return phi_star


# --- the run's folder ---------------------------------------------------------------------------------------

def make_folder(out: Path, world: World) -> None:
    problem = [None]
    if world.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ".writable").touch()
            (out / ".writable").unlink()
        except OSError as error:
            problem = [f"{out}: cannot be written ({error.strerror})"]
    if world.size > 1:
        dist.broadcast_object_list(problem)                        # all stop, or none
    if problem[0]:
        raise BadConfig(problem[0])


def write_json(path: Path, content: dict) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)


def write_records(out: Path, cfg: Config, part: Part, record: dict, world: World) -> None:
    """run.json, and what became of the dispersion of every pair that is visited: dispersion.jsonl."""
    if world.rank == 0:
        phi = torch.exp(-mallowspo.lam_of(cfg.method, part.weight)).tolist()
        entropy, weight = part.index.tolist(), part.weight.tolist()
        write_jsonl(out / "dispersion.jsonl", (
            {"index": i, "entropy": entropy[i], "weight": weight[i], "phi": phi[i], "where": part.pairs[i].where}
            for i in part.visited() if not math.isnan(entropy[i])))
        write_json(out / "run.json", record)


def save_model(model: Transformer, out: Path) -> None:
    """The Hugging Face folder.  An index keeps loaders that take every *.safetensors off reference.safetensors."""
    names = {name: file for name, (file, _) in model.origin.tensors.items()}
    size = sum(p.numel() for p in model.parameters())
    files = model.origin.files
    if json.loads(files.get("model.safetensors.index.json", b"{}")).get("weight_map") != names:
        index = {"metadata": {"total_parameters": size}, "weight_map": names}
        files["model.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    model.save_pretrained(out)


def answer(cfg: Config, model: Transformer, tokenizer: Tokenizer, pairs: list[Pair], world: World) -> list[str]:
    """A sampled response to each prompt; on rank 0 only, the others wait at the next exchange."""
    if world.rank:
        return []
    generator, stop = torch.Generator().manual_seed(cfg.seed), (tokenizer.eos, *model.stop_tokens)
    return [tokenizer.text(model.generate(pair.prompt.tolist(), cfg.sample_tokens, 0.7, 0.95, stop, generator))
            for pair in pairs]


# ---------------------------------------------------------------------------------------------------------------
# 7. The demo: a population whose dispersion is known

DEMO = {"lr": 8e-4, "steps": 220, "batch_size": 128, "log_every": 100, "max_tokens": 64, "tokens_per_row": 1024,
        "samples": 3, "sample_tokens": 8}
DEMO_MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "intermediate_size": 192, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": False, "hidden_act": "silu"}


def demo(cfg: Config, chosen: bool, world: World) -> None:
    """Make a population, a reference that answers as its members do, and train on what members prefer."""
    out, population = Path(cfg.out), Population()
    folder = out / "demo"
    torch.set_num_threads(1)                         # matrices so small are slower on two cores than on one
    make_folder(out, world)
    if world.rank == 0:
        files = population.tokenizer_files()
        vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
        settings = {**DEMO_MODEL, "vocab_size": len(vocabulary), "eos_token_id": vocabulary["<end>"]}
        torch.manual_seed(cfg.seed)
        Transformer.from_config(settings, files).save_pretrained(folder / "untrained")
        write_jsonl(folder / "favourites.jsonl", population.favourites(9600, cfg.seed))
        write_jsonl(folder / "pairs.jsonl", population.judgements(19200, cfg.seed + 1))
        (folder / "reference.safetensors").unlink(missing_ok=True)
    world.barrier()
    world.say("--- the reference: a small model learns what the members of the population answer")
    start = Config(**{**DEMO, "model": str(folder / "untrained"), "data": str(folder / "favourites.jsonl"),
                      "out": str(folder / "reference"), "loss": "sft", "lr": 4e-3, "steps": 400, "batch_size": 64,
                      "seed": cfg.seed, "device": cfg.device, "dtype": cfg.dtype})
    fit(start, world)
    methods = {}
    for loss in [cfg.loss] if chosen else ["dpo", "mallows-theta", "mallows-phi"]:
        world.say(f"\n--- {loss}: the policy learns what the members prefer")
        path = []
        job = dataclasses.replace(cfg, model=start.out, data=str(folder / "pairs.jsonl"), loss=loss,
                                  out=str(out / loss), reference=str(folder / "reference.safetensors"))
        every = max(1, (cfg.steps or 50) // 50)

        def watch(step, model, path=path, every=every):
            if step % every == 0 and world.rank == 0:
                path.append((step, answer_logp(model, population, Tokenizer(start.out), world)))
        fit(job, world, watch)
        methods[loss] = [(step, population.measure(logp, path[0][1])) for step, logp in path]
    if world.rank == 0:
        report(out, population, methods)


@torch.inference_mode()
def answer_logp(model: Transformer, population: Population, tokenizer: Tokenizer, world: World) -> Tensor:
    """(Q, N, A) log-probability of every answer to every question, asked by names that no training pair has.

    An answer is its word: how surely the model stops after it is no opinion of the population.
    """
    logp = []
    for q, answers in enumerate(population.answers):
        sides = [np.array(tokenizer.response(" " + answer)[:-1]) for answer in answers]
        groups = [(np.array(tokenizer.prompt(population.prompt(name, q))), *sides) for name in NEW_NAMES]
        row = collate(groups, world.device)
        with world.autocast():
            logp.append(row.total(model(*row.inputs())[0]).cpu())                         # (N, A)
    return torch.stack(logp)


def report(out: Path, population: Population, methods: dict) -> None:
    """Compare the methods where they have moved equally far from the reference; write report.json."""
    half, content = len(population.phi) // 2, {}
    for loss, path in methods.items():
        rows = [{"step": step, **{k: v.mean().item() for k, v in m.items()},
                 **{f"{k}_{name}": m[k][side].mean().item() for k in ("kl", "entropy")
                    for name, side in (("agreed", slice(half)), ("disputed", slice(half, None)))}} for step, m in path]
        content[loss] = {key: [row[key] for row in rows] for key in rows[0]}
    index = [[] for _ in population.phi]
    for line in (out / next(iter(methods)) / "dispersion.jsonl").read_text().splitlines():
        row = json.loads(line)
        line = int(row["where"].rpartition(":")[2]) - 1            # the file asks the questions in turn
        index[line % len(index)].append(row["entropy"])
    index = [float(np.mean(each)) for each in index]
    ranks = [np.argsort(np.argsort(values)) for values in (index, population.phi.tolist())]
    correlation = float(np.corrcoef(ranks)[0, 1])                  # Spearman's
    write_json(out / "report.json", {"dispersion_rank_correlation": correlation, "true_phi": population.phi.tolist(),
                                     "index": index, "questions": population.questions, "methods": content})
    print(f"\n--- report: {len(population.questions)} questions, asked by {len(NEW_NAMES)} names never trained on; all "
          f"figures are exact sums\nrank correlation of the dispersion index with the true phi: {correlation:.3f}\n"
          f"reward accuracy that nobody can pass, as people disagree: {population.best_accuracy():.4f}")
    for kl in MATCHED_KL:
        print("\n" + compare_at(kl, content))
    print(f"\nwritten to {out / 'report.json'}, along the whole path of steps")


# ---------------------------------------------------------------------------------------------------------------
# 8. The command line

def main(argv: list[str] | None = None) -> None:
    try:
        cfg, given = parse_flags(sys.argv[1:] if argv is None else argv, DEMO)
        world = join_world(cfg)
        if cfg.model:
            fit(cfg, world)
        else:
            demo(cfg, "loss" in given, world)
    except (BadConfig, BadData, BadModel) as error:
        stop(2, error)
    except (RunFailed, OSError, SafetensorError) as error:
        stop(1, error)
    except torch.OutOfMemoryError as error:
        stop(1, f"out of GPU memory: lower --tokens-per-row, or --max-tokens ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        stop(130, "interrupted; the model was not saved")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def stop(status: int, why) -> None:
    rank = int(os.environ.get("RANK", 0))
    print(f"train.py: error: {why}" + f" (rank {rank})" * (rank > 0), file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
