"""Preference-train a language model with MallowsPO, DPO and their kin.

    python train.py                                                  the demo, made on the spot, minutes on a CPU
    python train.py --model DIR --data pairs.jsonl                   a Hugging Face folder, on your own pairs
    torchrun --standalone --nproc-per-node=8 train.py --model ...    the same steps on eight GPUs

The reference is the model before its first step: it scores every pair once, into a file, and from its entropies comes
the dispersion index; no second model is in memory.  Read `fit` for the job, `train` for the loop, `demo` for the demo.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import types
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw

import mallowspo
from bandit import NEW_ASKERS, Population, report
from data import (
    BadData,
    Dataset,
    Pair,
    Schedule,
    Scores,
    Tokenizer,
    collate,
    find_model,
    load_pairs,
    lock_file,
    read_reference,
    to_device,
    write_jsonl,
    write_reference,
)
from mallowspo import LOSSES, Method, Outcome
from model import (
    BRANCHES,
    CHUNK,
    KEPT,
    TARGETS,
    BadModel,
    Transformer,
    add_lora,
    fsync,
    read_json,
    save_adapter,
    to_cpu,
    to_shard,
)


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
    data: tuple[str, ...] | None = flag(None, "preference pairs: files (.jsonl, .jsonl.gz, .json), hf://datasets/...")
    eval_data: tuple[str, ...] | None = flag(None, "held-out pairs")
    eval_pairs: float = flag(0, "without --eval-data: hold out this many pairs of --data; below 1: this share")
    out: str = flag("out", "folder for the model and all records")
    reference: str | None = flag(None, "file for the reference's scores (default: OUT/reference.safetensors)")
    loss: Literal[tuple(LOSSES)] = flag("mallows-theta", "row of mallowspo.LOSSES; flags up to --sft change it")
    dispersion: Literal["constant", "entropy", "field", "votes"] | None = flag(None, "source of a prompt's weight")
    beta: float | None = flag(None, "pull to the reference")
    alpha: float | None = flag(None, "share of the reference in the reward")
    eta: float | None = flag(None, "1: log-ratios a token")
    margin: float | None = flag(None, "lead that the chosen response must have")
    sft: float | None = flag(None, "weight of the chosen response's negative log-likelihood")
    phi_star: float | None = flag(None, "scale of the dispersion weight (default: so that its mean is 1)")
    dispersion_power: float = flag(1.0, "1: the paper; less shrinks the index towards DPO, which is 0")
    lora_rank: int = flag(0, "train updates of this rank beside frozen weights; 0: train all weights")
    lora_alpha: float | None = flag(None, "scale of the updates, times their rank (default: twice the rank)")
    lora_targets: tuple[Literal[TARGETS], ...] | None = flag(None, "projections that get an update (default: all)")
    merge: bool = flag(False, "with --lora-rank: save the whole model too, the updates added to its weights")
    lr: float = flag(1e-6, "peak learning rate of AdamW; LoRA wants 10 to 50 times more")
    warmup: float = flag(0.1, "share of the steps in which the rate rises")
    decay: Literal[tuple(DECAYS)] = flag("cosine", "how the rate falls afterwards")
    clip: float = flag(1.0, "largest gradient norm")
    batch_size: int = flag(64, "pairs a step, over all GPUs")
    epochs: int | None = flag(None, "passes over the data (default: 1)")
    steps: int | None = flag(None, "stop after this many steps instead")
    max_tokens: int | None = flag(None, "longest prompt + response, longer prompts are cut from the left (default: "
                                  "1024, or what the model was made for)")
    tokens_per_row: int | None = flag(None, "tokens in memory at once (default: 16384 on a GPU, 2048 on a CPU)")
    checkpoint_activations: bool = flag(False, "a third more arithmetic for far less memory a token")
    compile: bool = flag(False, "compile the model's blocks (needs a C compiler), and use flex_attention on a GPU")
    max_dropped: float = flag(0.1, "share of the pairs that may be too long before it is an error")
    skip_bad: bool = flag(False, "pass over bad records, and count them, instead of stopping")
    eval_every: int = flag(100, "steps between evaluations of the held-out pairs")
    log_every: int = flag(1, "steps between progress lines (metrics.jsonl has every step)")
    save_every: int | None = flag(None, "steps between checkpoints, 0: none at all (default: every half an hour)")
    resume: bool = flag(False, "continue the run in --out from its newest checkpoint")
    on_nonfinite: Literal["stop", "skip"] = flag("stop", "what becomes of a step whose loss or gradient is not finite")
    samples: int = flag(2, "prompts to answer before and after")
    sample_tokens: int = flag(64, "longest sample")
    seed: int = flag(0, "order of the data, and sampling")
    shard: bool = flag(False, "share the model out over the processes of torchrun (FSDP2), instead of a copy each")
    param_dtype: Literal["float32", "bfloat16"] = flag("float32", "of the weights; bfloat16: updates rounded at random")
    dry_run: bool = flag(False, "say what the run would take, and stop")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to run")
    dtype: Literal[("auto", *DTYPES)] = flag("auto", "of the arithmetic; auto: bfloat16 on a GPU, float32 on a CPU")

    def __post_init__(self):
        for name in ("data", "eval_data"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for names, fits, what in [
                ("model out reference", lambda v: v and v.isprintable(), "not be empty, nor hold control characters"),
                ("data eval_data", lambda v: all(name and name.isprintable() for name in v), "name files"),
                ("lr clip batch_size epochs steps max_tokens tokens_per_row eval_every log_every beta phi_star "
                 "lora_alpha", lambda v: 0 < v < math.inf, "be a number above 0"),
                ("eval_pairs save_every samples sample_tokens sft lora_rank",
                 lambda v: 0 <= v < math.inf, "be a number, 0 or above"),
                ("warmup dispersion_power alpha eta max_dropped", lambda v: 0 <= v <= 1, "be from 0 to 1"),
                ("margin", math.isfinite, "be a number"), ("seed", lambda v: 0 <= v < 2 ** 32, "be 0 to below 2^32")]:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise BadConfig(f"--{name.replace('_', '-')} is {value!r}, it must {what}")
        if self.eval_pairs > 1 and self.eval_pairs % 1:
            raise BadConfig(f"--eval-pairs is {self.eval_pairs}, it must be a share below 1 or a whole number")
        small = [name for name in ("shard", "lora_rank", "param_dtype") if getattr(self, name) not in (0, "float32")]
        if small[1:]:
            raise BadConfig(f"--{' and --'.join(small).replace('_', '-')} do not go together; give one of them")
        if not self.lora_rank and (self.merge or self.lora_alpha or self.lora_targets):
            raise BadConfig("--lora-alpha, --lora-targets and --merge are for --lora-rank, which is 0")
        if self.eval_data and self.eval_pairs:
            raise BadConfig("--eval-pairs is for runs without --eval-data; give one of them")
        if self.epochs and self.steps:
            raise BadConfig("--epochs and --steps both say when to stop; give one of them (the demo takes --steps)")
        if self.resume and self.model is None:
            raise BadConfig("--resume is for runs with --model; the demo takes minutes, and starts afresh")
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
        text = f.metadata["help"] + ("" if f.default is None or f.default is False else f" (default: {f.default})")
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {}
        if typing.get_origin(kind) is tuple:
            kind, how = typing.get_args(kind)[0], {"nargs": "+"}
        if kind is not bool:
            how |= {"choices": typing.get_args(kind)} if typing.get_origin(kind) is Literal else {"type": kind}
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
        settings = read_json(Path(path))
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
        elif isinstance(value, list):
            flags += [dashed, *map(str, value)]
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
    shard: bool = False                 # ranks share the parameters out

    def say(self, text: str = "") -> None:
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def on_rank0(self, job: Callable):
        """What job() returns on rank 0, or raises there, on all ranks."""
        result = [None]
        if self.rank == 0:
            try:
                result = [job()]
            except Exception as error:
                result = [error]
        if self.size > 1:
            dist.broadcast_object_list(result)
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]


def keep_freed_memory() -> None:
    """Let the C library of Linux keep what is freed: else it returns large tensors to the kernel and fetches them again
    in every step, page by page, up to a tenth of a step's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):                   # another C library
        return
    mallopt(-4, 0)                                                 # M_MMAP_MAX: nothing apart from the heap
    mallopt(-1, -1)                                                # M_TRIM_THRESHOLD: never given back
    mallopt(1, 0)                                                  # M_MXFAST: small gaps join large ones at once


def join_world(cfg: Config) -> World:
    """This process's place among those that torchrun started, if it did."""
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise BadConfig("--device cuda: torch finds no CUDA device here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    best = ("bfloat16" if native else "float16") if cuda else "float32"
    dtype = DTYPES[best if cfg.dtype == "auto" else cfg.dtype]
    if dtype == torch.float16 and not cuda:
        raise BadConfig("--dtype float16 needs a GPU; on a CPU use float32 or bfloat16")
    if cfg.param_dtype == "bfloat16" and dtype != torch.bfloat16:
        raise BadConfig(f"--param-dtype bfloat16 wants --dtype bfloat16, not {str(dtype)[6:]}")
    if cfg.shard and dtype == torch.float16:
        raise BadConfig("--shard wants --dtype bfloat16 or float32, not float16")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, size = next(dist.rendezvous("env://"))        # after a restart: with the addresses of dead ranks
        store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        return World(dist.get_rank(), dist.get_world_size(), device, dtype, cfg.shard)
    if cfg.shard:
        raise BadConfig("--shard shares a model out over processes; start them with torchrun --nproc-per-node=...")
    return World(0, 1, device, dtype)


def apply_fsdp(model: Transformer, world: World) -> None:
    """FSDP2: each rank keeps a share of every parameter; a block's are gathered when it runs."""
    from torch.distributed.device_mesh import init_device_mesh  # seconds, for those who need them
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(world.dtype, torch.float32, cast_forward_inputs=False)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(model, "predict")


def gradient_sync(policy, world: World, now: bool):
    """The ranks add up their gradients in the backward pass inside; or later, with those of the rows that follow."""
    if world.shard:
        policy.set_requires_gradient_sync(now)
    return contextlib.nullcontext() if now or world.shard or world.size == 1 else policy.no_sync()


# ---------------------------------------------------------------------------------------------------------------
# 3. The reference pass: the model before step 1 scores each pair once, into a file

def fingerprint(model: Transformer, world: World) -> str:
    """A hash of all weights and of how they are computed with."""
    how = f"{world.device.type} {world.dtype} {model.config}" + " compiled" * model.compiled
    digest = hashlib.sha256(how.encode())
    for name, _ in model.named_parameters():
        if not name.endswith((".A", ".B")):                          # LoRA's: they change nothing yet
            digest.update(name.encode())
            digest.update(model.merged_weight(name).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def score_reference(model: Transformer, path: Path, key: str, rows: list[list[Pair]],
                    world: World) -> dict[bytes, Scores]:
    """Score the pairs that the file lacks, each in the first row that has it; every rank gets all scores.

    `rows` are those of all ranks, this one's are rows[rank::size], and those of training: what is scored here, the
    policy's first step scores alike to the last bit.  A pass that is interrupted goes on from what is in the file.
    """
    known, fresh, first = read_reference(path, key), {}, {}
    for i, row in enumerate(rows):
        for pair in row:
            first.setdefault(pair.digest(), i)
    todo = sorted({i for digest, i in first.items() if digest not in known and i % world.size == world.rank})
    if world.shard:                                                  # all ranks run equally often
        most = Counter(i % world.size for i in {i for d, i in first.items() if d not in known}).most_common(1)
        todo += [0] * (most[0][1] - len(todo) if most else 0)
    count = len(first.keys() - known.keys())
    world.say(f"reference   {f'scoring {count:,} pairs into' if count else 'all scores reused from'} {path}")
    start = saved = time.perf_counter()
    try:
        for i in todo:
            row = collate([pair[:3] for pair in rows[i]], BRANCHES, world.device)
            with world.autocast():
                scores = torch.stack(model(*row.inputs(), entropy=True)).cpu().numpy()    # (2, N): waits for a GPU
            if not np.isfinite(scores[0]).all():
                raise RunFailed("the reference's scores are not finite; are the weights of --model sound? The pairs: "
                                + ", ".join(pair.where for pair in rows[i][:8]))
            ends = np.cumsum([len(pair.chosen) + len(pair.rejected) for pair in rows[i]])
            for pair, both in zip(rows[i], np.split(scores, ends[:-1], axis=1)):
                if first[pair.digest()] == i:                      # of a repeated pair, what the first step will meet
                    fresh.setdefault(pair.digest(), Scores(*both))
            if time.perf_counter() - saved > SCORES_SECONDS:
                write_reference(path, key, fresh)
                fresh, saved = {}, time.perf_counter()
    finally:
        if fresh:
            write_reference(path, key, fresh)
    world.barrier()                                                # now the file has the scores of all ranks
    scores = read_reference(path, key)
    if not first.keys() <= scores.keys():
        raise RunFailed(f"{path}: lacks scores of another process; on several machines it must be the same file")
    if count:
        world.say(f"            {count / (time.perf_counter() - start):.1f} pairs/s")
    return scores


# ---------------------------------------------------------------------------------------------------------------
# 4. Pairs, with all that the loss wants to know of them

@dataclass
class Split:
    """The training pairs, or the held-out ones."""
    pairs: list[Pair]
    schedule: Schedule
    steps: int                          # of the schedule that are run
    ref_logp: Tensor                    # (P, 2) the reference's log-probability of both responses
    index: Tensor                       # (P,) dispersion index H(x), or the record's own phi; nan: not visited
    weight: Tensor                      # (P,)

    @classmethod
    def plan(cls, pairs: list[Pair], cfg: Config, world: World, steps: int | None) -> "Split":
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

    def digest(self) -> str:
        """A hash of all that a run takes from the records."""
        parts = (pair.digest() + f"{pair.dispersion} {pair.votes}".encode() for pair in self.pairs)
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def first_epoch(self) -> range:
        """The steps that visit each pair that is ever visited."""
        return range(min(self.steps, self.schedule.steps_per_epoch))

    def rows(self, world: World) -> list[list[Pair]]:
        """All ranks' rows of the first epoch: those of rank r are [r::size]."""
        return [[self.pairs[i] for i in row] for s in self.first_epoch()
                for rows in zip(*(self.schedule.rows(s, rank, world.size) for rank in range(world.size)))
                for row in rows]

    def visited(self) -> list[int]:
        return sorted(i for s in self.first_epoch() for i in self.schedule.batch(s))

    def attach(self, scores: dict[bytes, Scores], vocab_size: int) -> None:
        """Take over the reference's scores of the pairs that are visited."""
        logp = torch.zeros(len(self.pairs), 2, dtype=torch.float64)
        entropy = torch.full_like(logp, torch.nan)
        for i in self.visited():
            score, n = scores[self.pairs[i].digest()], len(self.pairs[i].chosen)
            if len(score.logp) != n + len(self.pairs[i].rejected):
                raise BadData(f"{self.pairs[i].where}: has more or fewer tokens than the reference's scores of it")
            logp[i] = torch.tensor([half.sum(dtype=np.float64) for half in np.split(score.logp, [n])])
            entropy[i] = torch.tensor([half.mean(dtype=np.float64) for half in np.split(score.entropy, [n])])
        self.ref_logp = logp.to(self.ref_logp)                                            # (P, 2)
        self.index = mallowspo.dispersion_index(entropy, vocab_size).float()              # (P,)


SHORT = 8                                       # tokens of a response, in the estimate of memory


def kept(model: Transformer, groups: list, world: World) -> int:
    """Bytes that the forward pass keeps for the backward pass, the parameters apart."""
    found = {}

    def note(tensor):
        if not isinstance(tensor._base if tensor._is_view() else tensor, torch.nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), world.autocast():
        scores = model(*collate(groups, BRANCHES, world.device).inputs())        # as long as it lives, all that it keeps does
    del scores
    return sum(found.values())


def activations(model: Transformer, part: Split, row: list[int], scored: int, world: World) -> tuple[int, int, int]:
    """Bytes that the forward pass of a row keeps for the backward pass, what that makes of one block at a time, and
    a GPU's masks for the row.  The first two grow with its tokens, and are measured on a pair cut short, with as large
    a share of scored tokens as the row has."""
    tokens, (prompt, *both), found = sum(part.schedule.costs[i] for i in row), part.pairs[row[0]][:3], []
    unscored = min(16 * SHORT, round(2 * SHORT * (tokens - scored) / scored))
    pair = Pair(prompt[:max(1, unscored)], *(ids[:SHORT] for ids in both), None, "")
    for checkpointed in sorted({False, model.checkpointed}):         # as it is again in the end
        model.checkpointed = checkpointed
        one, two = (kept(model, [pair[:3]] * count, world) for count in (1, 2))
        found.append(one + (two - one) * (tokens - pair.cost()) // pair.cost())
    masks = (world.device.type == "cuda" and not model.flex) * (1 + bool(model.config.sliding))
    return found[-1], found[0] // model.config.layers, masks * tokens ** 2 * world.dtype.itemsize


def memory(model: Transformer, part: Split, world: World) -> dict[str, int]:
    """Bytes that the steps will take in each process, beside the program itself."""
    def size(parameters):
        return sum(p.numel() * p.itemsize for p in parameters)
    steps = [part.schedule.rows(step, world.rank, world.size) for step in part.first_epoch()]
    row = max((row for rows in steps for row in rows), key=lambda row: sum(part.schedule.costs[i] for i in row))
    scored = sum(len(part.pairs[i].chosen) + len(part.pairs[i].rejected) for i in row)
    trained, table = [p for p in model.parameters() if p.requires_grad], model.head.weight
    whole, own = size(model.parameters()), world.size if world.shard else 1
    several = max(map(len, steps)) > 1                             # rows a step: FSDP2 shares out the sum of gradients
    gradients = size(trained) // (1 if several else own)
    gathered = whole - size(model.blocks.parameters()) + 2 * size(model.blocks[0].parameters())
    forward, block, masks = activations(model, part, row, scored, world)
    forward += size([table] * table.requires_grad)                 # its gradient, beside that of earlier rows
    if world.device.type == "cuda" and not several and (world.shard or world.size == 1):
        forward = max(0, forward - gradients)  # there are none: they come as activations go (a CPU's heap keeps both)
    head = 8 * max(CHUNK[world.device.type], 256 * scored)             # a slice of the logits, and its exponentials
    head += 4 * min(KEPT, scored * len(table))                         # those that the backward pass finds
    return {"parameters": whole // own + world.shard * gathered,
            "gradients": gradients,
            "optimiser": sum(p.numel() * 8 for p in trained) // own,
            "activations": forward + block + masks,
            "head": max(0, head - block)}                              # it is done before a block's turn comes


def score_pairs(policy, method: Method, part: Split, indices: list[int], world: World) -> Outcome:
    """The policy's scores of one row of pairs against the reference's: what training and evaluation both do."""
    row = collate([part.pairs[i][:3] for i in indices], BRANCHES, world.device)
    at = to_device(indices, world.device)
    with world.autocast():
        logp, _ = policy(*row.inputs())
    return mallowspo.objective(method, row.sum_by_response(logp), part.ref_logp[at], row.length, part.weight[at])


def sums(outcome: Outcome) -> Tensor:
    return torch.stack([value.detach().sum() for value in outcome])


@torch.no_grad()
def evaluate(model: Transformer, method: Method, part: Split, world: World) -> dict[str, float]:
    """Means over all held-out pairs, on all ranks."""
    total = torch.zeros(len(Outcome._fields), device=world.device)
    for step in range(part.steps):
        for row in part.schedule.rows(step, world.rank, world.size):
            if row or world.shard:                                   # then all ranks run equally often
                total += bool(row) * sums(score_pairs(model, method, part, row or part.schedule.batch(0)[:1], world))
    means = (world.sum_over_ranks(total) / len(part.pairs)).tolist()
    return dict(zip(Outcome._fields, means))


# ---------------------------------------------------------------------------------------------------------------
# 5. The optimiser

class AdamW:
    """AdamW without decay of weights, by torch's kernel (torch.optim's class would import a compiler: a second).

    Weights in bfloat16 take each step in float32 and are rounded up or down at random, in proportion: rounded to the
    nearest, 99 in 100 do not move at a learning rate of 5e-7; so, they do on average.  The noise follows from the
    number of the step alone.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float):
        self.param_groups = [{"params": params, "lr": lr}]           # where a GradScaler looks for gradients
        self.state = {p: {"step": torch.zeros((), device=p.device),
                          "exp_avg": torch.zeros_like(p, dtype=torch.float32, requires_grad=False),
                          "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32, requires_grad=False)} for p in params}

    @torch.no_grad()
    def step(self, shrink: Tensor) -> None:
        """One step with the gradients divided by `shrink` (), which clips them in passing; then they are gone."""
        [group], generator = self.param_groups, None
        exact = all(p.dtype == torch.float32 for p in group["params"])
        for params in [group["params"]] if exact else [[p] for p in group["params"]]:     # one float32 copy at a time
            values, grads = ([x.float() for x in xs] for xs in (params, [p.grad for p in params]))
            kept = [[self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step")]
            adamw(values, grads, *kept[:2], [], kept[2], fused=True, grad_scale=shrink, lr=group["lr"], beta1=0.9,
                  beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)
            for p, value in zip(params, values):
                if p.dtype == torch.bfloat16:                        # which is the upper half of float32
                    generator = generator or torch.Generator(p.device).manual_seed(int(self.state[p]["step"]))
                    noise = torch.randint(1 << 16, p.shape, generator=generator, device=p.device, dtype=torch.int32)
                    p.copy_(((value.view(torch.int32) + noise) & (-1 << 16)).view(torch.float32))


# ---------------------------------------------------------------------------------------------------------------
# 6. Checkpoints: OUT/checkpoint/step-N holds all that the steps change

SCORES_SECONDS, SAVE_SECONDS = 120, 1800        # between writes of the reference's scores; of checkpoints, by default
IN_A_ROW = 10                                   # so many steps that are not finite are not skipped
MAY_CHANGE = ("out reference max_dropped skip_bad tokens_per_row eval_every log_every save_every on_nonfinite samples "
              "sample_tokens shard checkpoint_activations").split()           # in a run that is resumed


STATE = {"step": int, "seconds": float, "skipped": list, "scaler": dict, "run": dict, "sha256": dict}


def checkpoints(out: Path) -> list[Path]:
    """The newest first."""
    return sorted(out.glob("checkpoint/step-*"), reverse=True)


def checkpoint_size(cfg: Config, model: Transformer) -> int:
    """Bytes: what was trained and AdamW's two moments of it, in float32, and the model's folder."""
    size = max(dtype.itemsize for _, dtype in model.origin.tensors.values()) * (cfg.merge or not cfg.lora_rank)
    return sum((12 + 4 * bool(cfg.lora_rank)) * p.requires_grad * p.numel() + size * p.numel()
               for p in model.parameters())


def save_checkpoint(cfg: Config, state: dict, model: Transformer, optimizer: AdamW,
                    world: World) -> None:
    """The model's folder, in state.safetensors the weights as trained and what AdamW keeps of each, `state` as JSON.

    Written beside its place, forced to the disk, renamed; only then the one before is removed.
    """
    out, tensors = Path(cfg.out), {}
    new = out / "checkpoint" / "new"
    for name, p in model.named_parameters():
        for kind, value in {"weight": p, **optimizer.state[p]}.items() if p.requires_grad else ():
            value = to_cpu(value)
            if world.rank == 0:
                tensors[f"{kind}.{name}"] = value
    if world.rank:
        return save_weights(cfg, model, new / "model", world)
    try:
        shutil.rmtree(new, ignore_errors=True)
        save_weights(cfg, model, new / "model", world)
        save_file(tensors, new / "state.safetensors")
        files = {str(path.relative_to(new)): sha256(path) for path in sorted(new.rglob("*")) if path.is_file()}
        write_json(new / "state.json", {**state, "sha256": files})
        for path in [*new.rglob("*"), new, *out.glob("*.jsonl")]:
            fsync(path)
        os.replace(new, out / "checkpoint" / f"step-{state['step']:08}")
        fsync(out / "checkpoint")
        remove(checkpoints(out)[1:])
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise RunFailed(f"the checkpoint of step {state['step']} cannot be written ({error}); it takes "
                        f"{checkpoint_size(cfg, model):,} bytes, {shutil.disk_usage(out).free:,} are free") from None


def remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder.parent / "new", ignore_errors=True)   # what a run that was killed here left
        os.replace(folder, folder.parent / "new")                  # what has the name of a checkpoint is whole
        shutil.rmtree(folder.parent / "new")


def load_checkpoint(folder: Path, model: Transformer, optimizer: AdamW) -> None:
    places = dict(model.named_parameters())
    with safe_open(folder / "state.safetensors", "pt") as file:
        for key in file.keys():                                    # noqa: SIM118 (it is not a dict)
            kind, _, name = key.partition(".")
            p = places.get(name)
            if p is None or file.get_slice(key).get_shape() not in ([], list(p.shape)):
                raise BadConfig(f"--resume: {folder}: state.safetensors has {key!r:.300}, which is not of this model")
            tensor = file.get_tensor(key).to(p.device, copy=True)      # the file goes soon
            if kind == "weight":
                p.data.copy_(to_shard(tensor, p))
            else:
                optimizer.state[p][kind] = to_shard(tensor, p) if tensor.dim() else tensor


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_or_resume(cfg: Config, record: dict) -> dict | None:
    """What the steps start from: nothing, or with --resume the newest checkpoint; None if the run is finished.

    Raises BadConfig if that is of another run, or damaged, or there and not to be resumed.
    """
    out, found = Path(cfg.out), checkpoints(Path(cfg.out))
    where = found[0] / "state.json" if found else out / "run.json"
    state = read_json(where) if where.exists() else {}
    if found and not cfg.resume:
        raise BadConfig(f"{found[0]}: of a run that was interrupted; --resume continues it; to start afresh choose "
                        f"another --out, or remove {out / 'checkpoint'}")
    if not found and not (cfg.resume and state.get("finished")):
        print("start       at step 0" + ", there is no checkpoint" * cfg.resume
              + ", in place of the finished run" * state.get("finished", False))
        write_json(out / "run.json", record)                       # from now on the folder is this run's
        return {"step": 0, "seconds": 0.0, "skipped": [], "run": record}
    wrong = [name for name, kind in STATE.items() if found and type(state.get(name)) is not kind]
    if wrong or state.get("step", 0) < 0:
        raise BadConfig(f"--resume: {where} says nothing usable of {', '.join(wrong) or 'step'}; remove the folder")
    old, new = must_match(state.get("run", state)), must_match(record)
    changed = ", ".join(f"{name} ({old.get(name)!s:.12}, now {value!s:.12})" for name, value in new.items()
                        if old.get(name) != value)
    if changed:
        raise BadConfig(f"--resume: {where} is of a run with other settings: {changed}; choose another --out")
    if not found:
        print(f"finished    {out}: there is nothing to do")
        return None
    there = {str(path.relative_to(found[0])): path for path in found[0].rglob("*") if path.is_file() and path != where}
    for name in there | state["sha256"]:                           # what is there, and nothing else
        if name not in there or sha256(there[name]) != state["sha256"].get(name):
            raise BadConfig(f"--resume: {found[0] / name} is not as it was written; remove the folder {found[0]}")
    print(f"start       at step {state['step']}, from {found[0]}")
    return {**state, "run": record}


def must_match(record: dict) -> dict:
    """What must be alike in a run that is resumed: settings, as JSON has them, and the contents behind some."""
    config, defaults = record.get("config"), {f.name: f.default for f in dataclasses.fields(Config)}
    known = {**defaults, **config} if isinstance(config, dict) else {}       # a run older than a flag had its default
    settings = {"schema": record.get("schema"), **known}
    return nan_to_null({name: record.get(f"{name}_sha256", settings[name])
                        for name in settings if name not in MAY_CHANGE})


@contextlib.contextmanager
def deferred_signals():
    """A list that takes SIGINT and SIGTERM, which end nothing meanwhile; only a second ctrl-C does."""
    signals = []

    def note(number, frame):
        signals.append(number)
        if signals.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt(number)
    former = [(number, signal.signal(number, note)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield signals
    finally:
        for each in former:
            signal.signal(*each)


# ---------------------------------------------------------------------------------------------------------------
# 7. The loop

def train(cfg: Config, model: Transformer, part: Split, held: Split | None, world: World, state: dict, signals: list,
          metrics, evaluations, on_step=None) -> None:
    """Run the steps of `part` that `state` has not behind it; `metrics` and `evaluations` take dicts,
    `on_step(step, model)` is called before each step and after the last."""
    ddp = {"device_ids": [world.device.index]} if world.device.type == "cuda" else {}
    policy = DistributedDataParallel(model, gradient_as_bucket_view=True, **ddp) \
        if world.size > 1 and not world.shard else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, cfg.lr)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    out, saved = Path(cfg.out), time.perf_counter()
    start = saved - state["seconds"]
    if state["step"]:
        load_checkpoint(checkpoints(out)[0], model, optimizer)
        scaler.load_state_dict(state["scaler"])
    for step in range(state["step"], part.steps + 1):
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
        means, bad, stop = train_step(policy, scaler, cfg.method, part, step, world, signals)
        if step == 0 and cfg.method.link and cfg.method.alpha:
            world.say(f"check       the first loss is {means['loss']:.6f}; of a policy that equals its reference it is "
                      f"{loss_at_start(cfg.method, part):.6f}")
        scaler.unscale_(optimizer)
        norm = to_cpu(torch.nn.utils.get_total_norm([p.grad for p in trained]))
        lr = optimizer.param_groups[0]["lr"] = learning_rate(cfg, step, part.steps)
        if bad or (not math.isfinite(norm.item()) and scaler.get_scale() <= 1):   # above 1 it is float16's doing
            world.say(skip(cfg, part, step, bad, state["skipped"]))
        else:
            scaler.step(optimizer, ((norm + 1e-6) / cfg.clip).clamp(min=1))
        scaler.update()
        model.zero_grad()

        now, batch = time.perf_counter(), part.schedule.batch(step)
        row = {"step": step, **means, "lr": lr, "grad_norm": norm.item(), "weight": part.weight[batch].mean().item(),
               "pairs_per_second": len(batch) / (now - began),
               "tokens_per_second": sum(part.schedule.costs[i] for i in batch) / (now - began),
               "memory_gib": peak_memory(world), "seconds": now - start}
        metrics(row)
        if step % cfg.log_every == 0 or step + 1 == part.steps:
            world.say(progress(row, part.steps, cfg.method.link is not None))
        every, done = cfg.save_every, step + 1
        due = now - saved > SAVE_SECONDS if every is None else every and done % every == 0
        if world.shard:
            due, = world.on_rank0(lambda due=due: [due])
        if (world.rank == 0 or world.shard) and every != 0 and (due or stop or done == part.steps):
            state.update(step=done, seconds=now - start, scaler=scaler.state_dict())
            save_checkpoint(cfg, state, model, optimizer, world)
            saved = time.perf_counter()
        if stop:
            world.barrier()                                        # torchrun ends all when one ends
            raise KeyboardInterrupt((signals or [signal.SIGTERM])[0])


def skip(cfg: Config, part: Split, step: int, bad: list[int], skipped: list[int]) -> str:
    """Note a step whose loss (of the pairs in `bad`) or gradient is not finite, or raise RunFailed."""
    where = [part.pairs[i].where for i in bad or part.schedule.batch(step)]
    what = (f"the {'loss' if bad else 'gradient'} is not finite; look at --lr, --beta, and "
            f"{', '.join(where[:8])}{', ...' * (len(where) > 8)}")
    skipped.append(step)
    if cfg.on_nonfinite == "stop" or skipped[-IN_A_ROW:] == list(range(step - IN_A_ROW + 1, step + 1)):
        raise RunFailed(f"step {step}: {what}")
    return f"step {step:>5}  skipped: {what}"


def train_step(policy, scaler, method: Method, part: Split, step: int, world: World,
             signals: list) -> tuple[dict[str, float], list[int], bool]:
    """Accumulate the gradient of the mean loss over all pairs of the step.

    Returns the means of the outcome, the pairs whose loss is not finite, and whether a rank had a signal.
    Sums are divided by the number of pairs on all ranks, so neither GPUs nor rows change the step.
    """
    batch, rows = part.schedule.batch(step), part.schedule.rows(step, world.rank, world.size)
    n, outcomes = len(Outcome._fields), []
    places = to_device([n + 1 + batch.index(i) for row in rows for i in row], world.device)       # in `total` below
    for i, row in enumerate(rows):
        with gradient_sync(policy, world, now=i + 1 == len(rows)):
            # --- the method: everything else in this loop is bookkeeping ------------------------------------
            outcome = score_pairs(policy, method, part, row or batch[:1], world)
            counts = bool(row)                                     # an empty row takes part, and counts for nothing
            loss = counts * outcome.loss.sum() / len(batch)
            # ------------------------------------------------------------------------------------------------
            scaler.scale(loss * world.size).backward()             # DDP takes the mean over ranks, we want the sum
        outcomes.append(torch.stack(outcome).detach()[:, :len(row)])
        del outcome, loss                                          # or the next row's logits are kept beside this one's
    outcomes = torch.cat(outcomes, 1)                              # (n, pairs of this rank)
    total = torch.zeros(n + 1 + len(batch), device=world.device)   # the outcome, signals, pairs with no finite loss
    total[:n] = outcomes.sum(1)
    total[n:n + 1] = bool(signals)                                 # all ranks stop alike (total[n] waits for a GPU)
    total[places] = (~torch.isfinite(outcomes[0])).float()
    values = world.sum_over_ranks(total).tolist()                           # until here nothing has waited for a GPU
    means = {name: value / len(batch) for name, value in zip(Outcome._fields, values)}
    return means, [i for i, x in zip(batch, values[n + 1:]) if x], bool(values[n])


def loss_at_start(method: Method, part: Split) -> float:
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
# 8. The job

def fit(cfg: Config, world: World, on_step: Callable | None = None) -> None:
    """Everything from a folder and a file to a trained folder."""
    out = Path(cfg.out)
    torch.manual_seed(cfg.seed)
    folder = world.on_rank0(lambda: str(find_model(cfg.model)))       # the first rank fetches what is on the hub
    kind = world.dtype if cfg.lora_rank and world.device.type == "cuda" else DTYPES[cfg.param_dtype]
    shard = (lambda model: apply_fsdp(model, world)) if world.shard else None
    model, tokenizer = Transformer.from_pretrained(folder, world.device, kind, shard), Tokenizer(folder)
    model.checkpointed = cfg.checkpoint_activations
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha or 2 * cfg.lora_rank, cfg.lora_targets or TARGETS, cfg.seed)
    if cfg.compile:
        try:
            model.compile_blocks()
        except (RuntimeError, OSError) as error:
            raise BadConfig("--compile: torch has no compiler that works (C++ on a CPU; Triton and C on a GPU): "
                            f"{' '.join(str(error).split()):.300}; install it, or go without") from None
    for note in model.notes:
        world.say(f"note        {note}")
    others = {p.name for p in out.glob("model*.safetensors")} - {file for file, _ in model.origin.tensors.values()}
    if others:
        raise BadConfig(f"--out {out} holds weights of another model ({min(others)}); choose another folder")
    if cfg.reference and Path(cfg.reference).is_dir():
        raise BadConfig(f"--reference {cfg.reference}: a folder, it should be a file for the reference's scores")
    part, held = load_parts(cfg, model, tokenizer, world)
    size, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= which) for which in (0, 1))
    world.say(f"model       {cfg.model}: {size / 1e6:,.1f}M parameters, {trained / 1e6:,.1f}M of them trained, "
              f"{str(world.dtype)[6:]} on {world.size} x {world.device.type}; a response ends with "
              f"{tokenizer.text([int(part.pairs[0].chosen[-1])])!r}")
    settings = ", ".join(f"{k} {v}" for k, v in cfg.method._asdict().items() if k != "link")
    world.say(f"method      {cfg.loss}: {settings}")
    sizes = memory(model, part, world)
    world.say(f"memory      {sum(sizes.values()) / 2 ** 30:.2f} GiB a process: "
              + ", ".join(f"{name} {size / 2 ** 30:.2f}" for name, size in sizes.items()))
    if cfg.dry_run:
        return
    if cfg.reference:
        world.on_rank0(lambda: lock_folder(Path(cfg.reference + ".lock"), wait=True).close())
    with contextlib.ExitStack() as mine:
        need = checkpoint_size(cfg, model) * (1 if cfg.save_every == 0 else 2)
        world.on_rank0(lambda: mine.enter_context(lock_folder(out / "lock", need)).name)
        run(cfg, model, tokenizer, part, held, world, on_step)


def run(cfg: Config, model: Transformer, tokenizer: Tokenizer, part: Split, held: Split | None, world: World,
        on_step: Callable | None) -> None:
    """In a folder that is this run's alone, from the reference pass to what is left of a finished run."""
    out, key = Path(cfg.out), fingerprint(model, world)
    record = {"schema": 1, "config": {**dataclasses.asdict(cfg), "resume": False}, "finished": False, "phi_star": None,
              "steps": part.steps, "pairs": len(part.pairs), "held_out": len(held.pairs) if held else 0,
              "model_sha256": key, "data_sha256": part.digest(), "eval_data_sha256": held.digest() if held else None,
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    state = world.on_rank0(lambda: start_or_resume(cfg, record))
    if state is None:
        return
    record["phi_star"] = prompt_weights(cfg, model, key, part, held, world)
    world.say(f"plan        {part.steps} steps of {min(cfg.batch_size, len(part.pairs))} pairs, "
              f"{part.steps / part.schedule.steps_per_epoch:.2f} epochs; rows of at most "
              f"{part.schedule.tokens_per_row} tokens")
    write_records(out, cfg, part, record, world)
    asked = (held or part).pairs[:cfg.samples]
    before = answer(cfg, model, tokenizer, asked, world)           # resumed or not: the model is the reference here

    first = state["step"]
    with log(out / "metrics.jsonl", first, world) as metrics, \
            log(out / "evaluations.jsonl", first, world) as evaluations, deferred_signals() as signals:
        train(cfg, model, part, held, world, state, signals, metrics, evaluations, on_step)
    after = answer(cfg, model, tokenizer, asked, world)
    if world.rank == 0:
        texts = [{"prompt": tokenizer.text(pair.prompt), "chosen": tokenizer.text(pair.chosen),
                  "rejected": tokenizer.text(pair.rejected), "before": b, "after": a}
                 for pair, b, a in zip(asked, before, after)]
        write_jsonl(out / "samples.jsonl", texts)
    save_weights(cfg, model, out, world)
    if world.rank == 0:
        write_json(out / "run.json", {**record, "finished": True, "skipped": state["skipped"]})
        remove(checkpoints(out))
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    world.barrier()                                                # nobody reads the folder before it is whole
    saved = "the model" if not cfg.lora_rank else "adapter/" + " and the model it makes" * cfg.merge
    world.say(f"saved       {out}: {saved}, and run.json, metrics.jsonl, dispersion.jsonl, samples.jsonl"
              + f"; {len(state['skipped'])} steps were skipped" * bool(state["skipped"]))


@contextlib.contextmanager
def log(path: Path, first: int, world: World):
    """A function that appends a dict to a file of JSON Lines, at once; on rank 0.

    What an interrupted run left of step `first` and later, or half of a row, is cut off.
    """
    if world.rank:
        yield lambda row: None
        return
    with open(path, "a+b") as file:
        file.seek(0)
        end = 0
        while (row := re.fullmatch(rb'\{"step": (\d+).*\}\n', file.readline())) and int(row[1]) < first:
            end = file.tell()
        file.truncate(end)

        def append(row):
            file.write(json.dumps(nan_to_null(row)).encode() + b"\n")
            file.flush()
        yield append


def nan_to_null(content):
    """JSON has no nan and no infinity: null stands for them."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


RECORD_HAS = {"field": "dispersion", "votes": "votes"}     # what --dispersion takes from each record


def load_parts(cfg: Config, model: Transformer, tokenizer: Tokenizer, world: World) -> tuple[Split, Split | None]:
    """The training pairs and the held-out ones, planned."""
    limit = model.config.positions
    if cfg.max_tokens is not None and cfg.max_tokens > limit:
        raise BadConfig(f"--max-tokens {cfg.max_tokens}: the model was made for {limit} positions")
    if max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) >= model.config.vocab_size:
        raise BadConfig(f"{cfg.model}: the tokenizer has more tokens than the model's {model.config.vocab_size}")

    def load(paths):
        data: Dataset = load_pairs(paths, tokenizer, cfg.max_tokens or min(1024, limit), cfg.max_dropped, cfg.skip_bad,
                                   need_rejected=cfg.method.link is not None)
        world.say(f"data        {' '.join(paths)}: {data}")
        name = RECORD_HAS.get(cfg.method.dispersion)
        lacking = [pair.where for pair in data.pairs if name and getattr(pair, name) is None]
        if lacking:
            raise BadData(f"{lacking[0]}: no {name!r}; --dispersion {cfg.method.dispersion} needs it in every record")
        return data.pairs

    pairs, held = load(cfg.data), load(cfg.eval_data) if cfg.eval_data else []
    both = len({pair.digest() for pair in pairs} & {pair.digest() for pair in held})
    if both:
        world.say(f"            {both:,} of the held-out pairs are trained on too")
    if cfg.eval_pairs:
        count = math.ceil(cfg.eval_pairs * len(pairs)) if cfg.eval_pairs < 1 else int(cfg.eval_pairs)
        if count >= len(pairs):
            raise BadConfig(f"--eval-pairs {cfg.eval_pairs} leaves none of the {len(pairs)} pairs to train on")
        order = np.random.default_rng(cfg.seed).permutation(len(pairs))
        held, pairs = ([pairs[i] for i in sorted(part)] for part in np.split(order, [count]))
    part = Split.plan(pairs, cfg, world, cfg.steps or (cfg.epochs or 1) * math.ceil(len(pairs) / cfg.batch_size))
    return part, Split.plan(held, cfg, world, None) if held else None


def prompt_weights(cfg: Config, model: Transformer, key: str, part: Split, held: Split | None,
                   world: World) -> float | None:
    """The reference pass, and from it the weight of every prompt; returns phi_star."""
    method, parts = cfg.method, [part, held] if held else [part]
    if method.link and (method.alpha or method.dispersion == "entropy"):
        path = Path(cfg.reference or Path(cfg.out) / "reference.safetensors")
        scores = score_reference(model, path, key, [row for each in parts for row in each.rows(world)], world)
        for each in parts:
            each.attach(scores, model.config.vocab_size)
    if method.dispersion == "constant":
        return None
    for each in parts:
        if method.dispersion == "field":
            each.index = torch.tensor([pair.dispersion for pair in each.pairs])
        if method.dispersion == "votes":
            votes = torch.tensor([pair.votes for pair in each.pairs])                     # (P, 2)
            each.index = mallowspo.lam_of_votes(votes).neg().exp().float()
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

def lock_folder(path: Path, need: int = 0, wait: bool = False):
    """Make a folder and take its lock, until that is closed.  Raises BadConfig if there is no lock, or no room."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine = lock_file(path, wait)
    except BlockingIOError:
        raise BadConfig(f"{folder}: another run is writing there; choose another --out") from None
    except OSError as error:
        raise BadConfig(f"{folder}: cannot be written ({error.strerror})") from None
    room = shutil.disk_usage(folder).free + sum(p.stat().st_size for p in folder.glob("checkpoint/**/*.safetensors"))
    if room < need:
        raise BadConfig(f"{folder}: {need:,} bytes are needed there, {room:,} are free; make room, choose another "
                        "--out, or do without checkpoints (--save-every 0)")
    return mine


def write_json(path: Path, content: dict) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(nan_to_null(content), indent=2) + "\n", encoding="utf-8")
    fsync(new)
    os.replace(new, path)


def write_records(out: Path, cfg: Config, part: Split, record: dict, world: World) -> None:
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


def save_weights(cfg: Config, model: Transformer, out: Path, world: World) -> None:
    """What was trained: the model's folder, or with LoRA adapter/ in it, as PEFT reads it, or both.  Rank 0 writes, the
    others give their shares."""
    if world.rank:
        for name in model.origin.tensors if world.shard else ():
            model.to_hf(name)
        return
    if cfg.lora_rank:
        save_adapter(model, out / "adapter", cfg.model)
    if cfg.merge or not cfg.lora_rank:
        save_model(model, out)


def answer(cfg: Config, model: Transformer, tokenizer: Tokenizer, pairs: list[Pair], world: World) -> list[str]:
    """A sampled response to each prompt; on rank 0 only, the others wait at the next exchange."""
    if world.rank and not world.shard:
        return []
    texts, stop = [], {tokenizer.eos, *model.stop_tokens, *(int(pair.chosen[-1]) for pair in pairs)}
    for start in range(0, len(pairs), 16):                         # so many keep their keys and values in memory
        prompts = [pair.prompt.tolist() for pair in pairs[start:start + 16]]
        generators = [torch.Generator().manual_seed(cfg.seed + start + i) for i in range(len(prompts))]
        with world.autocast():
            steps = list(model.generate(prompts, cfg.sample_tokens, 0.7, 0.95, tuple(stop), generators))
        texts += [tokenizer.text([step[i] for step in steps if step[i] is not None]) for i in range(len(prompts))]
    return texts


# ---------------------------------------------------------------------------------------------------------------
# 9. The demo: a population whose dispersion is known

DEMO = {"lr": 8e-4, "steps": 220, "batch_size": 128, "log_every": 100, "max_tokens": 64, "tokens_per_row": 1024,
        "samples": 3, "sample_tokens": 8, "save_every": 0}
DEMO_MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "intermediate_size": 192, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": False, "hidden_act": "silu"}


def demo(cfg: Config, chosen: bool, world: World) -> None:
    """Make a population, a reference that answers as its members do, and train on what members prefer."""
    out, population = Path(cfg.out), Population()
    folder = out / "demo"
    torch.set_num_threads(1)                         # matrices so small are slower on two cores than on one
    world.on_rank0(lambda: lock_folder(out / "lock").close())
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
    start = Config(**{**DEMO, "model": str(folder / "untrained"), "data": [str(folder / "favourites.jsonl")],
                      "out": str(folder / "reference"), "loss": "sft", "lr": 4e-3, "steps": 400, "batch_size": 64,
                      "seed": cfg.seed, "device": cfg.device, "dtype": cfg.dtype})
    fit(start, world)
    methods = {}
    for loss in [cfg.loss] if chosen else ["dpo", "mallows-theta", "mallows-phi"]:
        world.say(f"\n--- {loss}: the policy learns what the members prefer")
        path = []
        job = dataclasses.replace(cfg, model=start.out, data=[str(folder / "pairs.jsonl")], loss=loss,
                                  out=str(out / loss), reference=str(folder / "reference.safetensors"))
        every = max(1, (cfg.steps or 50) // 50)

        def watch(step, model, path=path, every=every):
            if step % every == 0 and world.rank == 0:
                path.append((step, answer_logp(model, population, Tokenizer(start.out), world)))
        fit(job, world, watch)
        methods[loss] = [(step, population.measure(logp, path[0][1])) for step, logp in path]
    if world.rank == 0:
        lines = (out / next(iter(methods)) / "dispersion.jsonl").read_text().splitlines()
        content, text = report(population, methods, [json.loads(line) for line in lines])
        write_json(out / "report.json", content)
        print(f"\n{text}\n\nwritten to {out / 'report.json'}, along the whole path of steps")


@torch.no_grad()
def answer_logp(model: Transformer, population: Population, tokenizer: Tokenizer, world: World) -> Tensor:
    """(Q, N, A) log-probability of every answer to every question, asked by names that no training pair has.

    An answer is its word: how surely the model stops after it is no opinion of the population.
    """
    logp = []
    for q, answers in enumerate(population.answers):
        sides = [np.array(tokenizer.response(" " + answer)[:-1]) for answer in answers]
        groups = [(np.array(tokenizer.prompt(population.prompt(name, q))), *sides) for name in NEW_ASKERS]
        row = collate(groups, BRANCHES, world.device)
        with world.autocast():
            logp.append(row.sum_by_response(model(*row.inputs())[0]).cpu())                         # (N, A)
    return torch.stack(logp)


# ---------------------------------------------------------------------------------------------------------------
# 10. The command line

def main(argv: list[str] | None = None) -> None:
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    cfg, given = parse_flags(sys.argv[1:] if argv is None else argv, DEMO)
    if cfg.model and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):       # torchrun --max-restarts
        cfg = dataclasses.replace(cfg, resume=True)

    def saved():
        found = checkpoints(Path(cfg.out))
        return f"--resume continues from {found[0]}" if found else "nothing was saved"
    try:
        world = join_world(cfg)
        if cfg.model:
            fit(cfg, world)
        else:
            demo(cfg, "loss" in given, world)
    except (BadConfig, BadData, BadModel) as error:
        stop(2, error)
    except (RunFailed, OSError, SafetensorError) as error:
        stop(1, f"{error}; {saved()}")
    except torch.OutOfMemoryError as error:
        stop(1, f"out of GPU memory: lower --tokens-per-row, or --max-tokens ({str(error).splitlines()[0]}); {saved()}")
    except KeyboardInterrupt as error:
        stop(128 + error.args[0], f"ended by {signal.Signals(error.args[0]).name}; {saved()}")
    leave(0)


def stop(status: int, why) -> None:
    rank = int(os.environ.get("RANK", 0))
    print(f"train.py: error: {why!s:.2000}" + f" (rank {rank})" * (rank > 0), file=sys.stderr, flush=True)
    leave(status)
    sys.exit(status)


def leave(status: int) -> None:
    """One of many processes ends here.  Gloo's threads live on after destroy_process_group, since DDP and FSDP2 keep
    the group; one that lets go of a tensor while Python shuts down aborts the process, and torchrun calls it failed."""
    if dist.is_initialized():
        if status == 0:                                            # else it might wait for ranks that wait for this one
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
