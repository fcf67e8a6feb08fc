"""Preference-train a language model with MallowsPO, DPO and their kin.

    python train.py                                                  demo on made-up data: 3 minutes on a CPU
    python train.py --model DIR --data pairs.jsonl                   a Hugging Face folder, on your own pairs
    torchrun --standalone --nproc-per-node=8 train.py --model ...    the same steps on eight GPUs

The reference is the model before its first step.  It scores every pair once, into a file, and its entropies
give the dispersion index; so there are never two models in memory.  The file reads from the method outwards:

    1. the method and the loop          score_pairs, train_step, train, evaluate, learning_rate
    2. the reference and the weights    score_reference, prompt_weights, verdict
    3. settings and flags               Config, parse_flags
    4. the job                          fit: from a model folder and a file of pairs to a trained folder
    5. processes                        World: one, or many under torchrun
    6. the optimiser                    AdamW
    7. the run's folder                 lock, JSON and logs, reference file, checkpoints, resuming, final save
    8. the demo, 9. the command line
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw

import mallowspo
from bandit import MEASURES, NEW_ASKERS, Panel, Population, draw, report
from data import BadData, Pair, Split, Tokenizer, cached_pairs, collate, fetch, find_model, hold_out, to_device
from mallowspo import LOSSES, TOKEN_WEIGHTS, Method, Outcome
from model import BRANCHES, TARGETS, BadModel, Transformer, add_lora, fsync, read_json, save_adapter, to_cpu, to_shard

# ---------------------------------------------------------------------------------------------------------------
# 1. The method and the loop.  Split: pairs, and what the loss needs of each (data.py).  Run: the model, its
#    optimiser, and state, which a checkpoint keeps (section 4).  World: this process among all (section 5).

def score_pairs(policy, method: Method, split: Split, indices: list[int], step: int, world: World) -> Outcome:
    """Run the policy on these pairs, packed into one row of tokens -> their losses and the rest of Outcome.
    `step` only seeds the random draw of tokens, in methods that draw some (token_weights "sample")."""
    packed = collate([split.pairs[i][:3] for i in indices], BRANCHES, world.device)     # prompt, chosen, rejected
    at = to_device(indices, world.device)
    with world.autocast():
        logp, _ = policy(*packed.inputs())                              # (N,) of all response tokens; no entropies
    plain = packed.sum_by_response(logp)                                # (B, 2)
    weighted, ref_logp = plain, split.ref_logp[at]
    if method.token_weights != "equal":
        ref_tokens, mask = split.token_inputs(method.token_weights, indices, step)      # (N,)
        a = mallowspo.token_weights(method, logp, packed.place, mask)
        weighted, ref_logp = packed.sum_by_response(a * logp), packed.sum_by_response(a * ref_tokens)
    return mallowspo.objective(method, weighted, ref_logp, packed.length, split.weight[at], plain, split.advantage[at])


def train_step(run: Run, split: Split, step: int) -> tuple[dict[str, float], list[float]]:
    """One step of the optimiser -> its figures, and the accuracy on each pair of the batch before it."""
    batch, world = split.schedule.batch(step), run.world                # pair numbers, of all ranks
    rows = split.schedule.rows(step, world.rank, world.size)            # this rank's; all have equally many
    outcomes = []
    for indices in rows:
        with gradient_sync(run.policy, world, last=indices is rows[-1]):
            # --- the method: everything else in this file is bookkeeping ------------------------------------
            outcome = score_pairs(run.policy, run.cfg.method, split, indices, step, world)
            loss = outcome.loss.sum() / len(batch)                      # same for any number of ranks, rows
            # ------------------------------------------------------------------------------------------------
            run.scaler.scale(loss * world.size).backward()              # DDP takes the mean over ranks, not the sum
        outcomes.append(torch.stack(outcome).detach())                  # (7, pairs of this row)
        del outcome, loss                                               # or two rows' graphs are in memory
    outcomes = torch.cat(outcomes, 1)                                   # (7, pairs of this rank), in the rows' order
    places = to_device([batch.index(i) for indices in rows for i in indices], world.device)
    of_pairs = torch.zeros(2, len(batch), device=world.device)
    of_pairs[:, places] = outcomes[:2]                                  # the loss and the accuracy
    losses, accuracy = world.sum_over_ranks(of_pairs)                   # (pairs of all ranks), in the batch's order
    sums = world.sum_over_ranks(outcomes.sum(1)).tolist()               # one per field of Outcome
    bad = [i for i, sound in zip(batch, losses.isfinite().tolist()) if not sound]
    norm = run.optimizer_step(split, step, bad)                         # the optimiser's step; frees the gradients
    figures = {name: total / len(batch) for name, total in zip(Outcome._fields, sums)}
    return {**figures, "lr": run.optimizer.lr, "grad_norm": norm}, accuracy.nan_to_num(0.5).tolist()


def train(run: Run, splits: list[Split]) -> None:
    """Take the remaining steps on splits[0]; the others are held out.  run.on_step(step, model) is called
    before each step and after the last."""
    cfg, split = run.cfg, splits[0]
    for step in range(run.state["step"], split.steps + 1):
        run.on_step(step, run.model)
        if step % cfg.eval_every == 0 or step == split.steps:
            for held_out in splits[1:]:
                run.log_evaluation(step, evaluate(run.model, cfg.method, held_out, run.world))
        if step == split.steps:
            break
        began = time.perf_counter()
        run.optimizer.lr = learning_rate(cfg, step, split.steps)
        figures, accuracy = train_step(run, split, step)
        run.log_step(split, step, figures, began)
        if 0 < step < split.schedule.steps_per_epoch:                   # first visits; at step 0 nothing is learned
            run.state["agrees"] += accuracy
            if cfg.power == "learn":
                set_weights(cfg, splits, run.state)
        save_or_stop(run, step + 1, split.steps)                        # stops here if a signal asked for it


@torch.no_grad()
def evaluate(model: Transformer, method: Method, held_out: Split, world: World) -> dict[str, float]:
    """Means of the Outcome fields over all held-out pairs, each of which is in one row of one rank; and the
    accuracy in each quarter of the pairs, sorted by the dispersion index."""
    total = torch.zeros(len(Outcome._fields), device=world.device)
    accuracy = torch.zeros(len(held_out.pairs), device=world.device)
    for step in progress(world, "held out", range(held_out.steps), held_out.steps, "batches"):
        for indices in held_out.schedule.rows(step, world.rank, world.size):
            outcome = score_pairs(model, method, held_out, indices, 0, world)     # step 0: same draw each time
            total += torch.stack([value.sum() for value in outcome])    # (7,)
            accuracy[to_device(indices, world.device)] = outcome.accuracy
    means = world.sum_over_ranks(total) / len(held_out.pairs)
    quarters = mallowspo.accuracy_by_quartile(world.sum_over_ranks(accuracy), held_out.index)
    return {**dict(zip(Outcome._fields, means.tolist())), "accuracy_by_quartile": quarters}


DECAYS = {"cosine": lambda t: (1 + math.cos(math.pi * t)) / 2, "linear": lambda t: 1 - t, "constant": lambda t: 1.0}


def learning_rate(cfg: Config, step: int, steps: int) -> float:
    """Rise linearly over the first `warmup` (a share) of the steps, then decay."""
    rise = math.ceil(cfg.warmup * steps)
    if step < rise:
        return cfg.lr * (step + 1) / (rise + 1)
    return cfg.lr * DECAYS[cfg.decay]((step - rise) / max(1, steps - rise))


# ---------------------------------------------------------------------------------------------------------------
# 2. The reference and the weights: the model before its first step scores each pair once, into a file

SCORES_SECONDS = 60                                # between writes of the reference's scores
PROGRESS_SECONDS = 10                              # between progress lines


def score_reference(model: Transformer, path: Path, key: str, splits: list[Split], world: World) -> dict[bytes, Scores]:
    """Score the pairs that the file lacks, each in the first row that has it -> all scores, on every rank.

    The rows are those of training, so the policy's first step gives the same scores, to the last bit.
    After an interruption, the next call scores only what is not in the file yet."""
    rows = [[split.pairs[i] for i in row] for split in splits for step in split.first_epoch()
            for row in split.schedule.all_rows(step, world.size)]  # all ranks' rows; rank r has rows[r::size]
    first = {pair.digest(): i for i in reversed(range(len(rows))) for pair in rows[i]}     # the lowest i stays
    known = read_reference(path, key)
    missing = first.keys() - known.keys()
    what = f"scoring {len(missing):,} pairs into" if missing else "all scores reused from"
    world.say(f"reference   {what} {path}")
    turns = sorted({first[digest] // world.size for digest in missing})  # in each, every rank scores a row
    began = saved = time.perf_counter()
    fresh = {}                                                     # scores that are not in the file yet
    try:
        for turn in progress(world, "reference", turns, len(turns)):
            i = turn * world.size + world.rank
            for pair, scores in zip(rows[i], score_row(model, rows[i], world)):
                if first[pair.digest()] == i and pair.digest() in missing:
                    fresh.setdefault(pair.digest(), scores)
            if time.perf_counter() - saved > SCORES_SECONDS:
                add_scores(path, key, fresh)
                fresh, saved = {}, time.perf_counter()
    finally:
        if fresh:
            add_scores(path, key, fresh)
    world.barrier()                                                # now the file has the scores of all ranks
    if missing:
        world.say(f"            {len(missing) / (time.perf_counter() - began):.1f} pairs/s")
        known = read_reference(path, key)
    if not first.keys() <= known.keys():
        raise RunFailed(f"{path}: lacks the scores of another process; all machines must share this file")
    return known


@torch.no_grad()
def score_row(model: Transformer, row: list[Pair], world: World) -> list[Scores]:
    """Score the pairs of one row with the model, which is the reference."""
    packed = collate([pair[:3] for pair in row], BRANCHES, world.device)
    with world.autocast():
        scores = torch.stack(model(*packed.inputs(), entropy=True)).cpu().numpy()         # (2, N); synchronises
    if not np.isfinite(scores[0]).all():
        raise RunFailed("the reference's scores are not finite; are the weights of --model sound? The pairs: "
                        + ", ".join(pair.where for pair in row[:8]))
    ends = np.cumsum([len(pair.chosen) + len(pair.rejected) for pair in row])
    return [Scores(*part) for part in np.split(scores, ends[:-1], axis=1)]


def fingerprint(model: Transformer, world: World) -> str:
    """A hash of all weights and of what else sets the scores: device, dtype, config, compiled or not."""
    how = f"{world.device.type} {world.dtype} {model.config}"
    digest = hashlib.sha256((f"{how} compiled" if model.compiled else how).encode())
    for name, _ in model.named_parameters():
        if not name.endswith((".A", ".B")):                        # LoRA's, which change nothing yet: B is 0
            digest.update(name.encode())
            digest.update(model.merged_weight(name).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# The values of --dispersion that read a field of the records: the field, and the function that turns its
# values into phi, given those of the training pairs.
RECORD_PHI = {"field": ("dispersion", lambda phi, training: phi),
              "votes": ("votes", lambda votes, training: mallowspo.lam_of_votes(votes).neg().exp()),  # (P, 2) -> (P,)
              "scores": ("scores", mallowspo.phi_of_scores)}


def mix_references(cfg: Config, splits: list[Split], path: Path, world: World) -> None:
    """Replace the first reference's log-probabilities by the mean over all references.  The scores of the
    first are in `path`, those of each other one in a file beside it; one model at a time is in memory."""
    logps = [[each.ref_logp] for each in splits]
    for number, name in enumerate(cfg.references, 2):
        model = open_model(cfg, world.on_rank0(find_model, name), world)
        file = path.with_name(f"{path.stem}-{number}{path.suffix}")
        scores = score_reference(model, file, fingerprint(model, world), splits, world)
        del model                                                  # before the next one is opened
        for each, found in zip(splits, logps):
            found.append(each.sum_scores(scores)[0].to(each.ref_logp))
    for each, found in zip(splits, logps):                         # found: (P, 2) for each reference
        each.ref_logp = mallowspo.mixed_reference(cfg.method, torch.stack(found)).to(each.ref_logp)


def prompt_weights(cfg: Config, splits: list[Split], state: dict, world: World) -> None:
    """Set the index and the weight of every prompt, and print a summary; splits[0] has the training pairs."""
    method = cfg.method
    if method.dispersion == "constant":
        return
    if method.dispersion in RECORD_PHI:
        name, to_phi = RECORD_PHI[method.dispersion]
        values = [torch.tensor([getattr(pair, name) for pair in each.pairs], dtype=torch.float64) for each in splits]
        for each, value in zip(splits, values):
            each.index = to_phi(value, values[0]).float()                                             # (P,)
    set_weights(cfg, splits, state)
    run, visited, how = state["run"], splits[0].visited(), "given" if cfg.phi_star else "calibrated"
    weight, clamped = splits[0].weight[visited], mallowspo.count_clamped(splits[0].index[visited])
    learned = " so far, learned from the pairs" if cfg.power == "learn" else ""
    world.say(f"dispersion  power {run['dispersion_power']:.2f}{learned}; phi_star {run['phi_star']:.4f} ({how}), "
              f"weights {weight.min():.2f} to {weight.max():.2f}, mean {weight.mean():.3f}, "
              f"sd {weight.std(correction=0):.3f}; {clamped} of {len(visited):,} indices clamped")


def set_weights(cfg: Config, splits: list[Split], state: dict) -> None:
    """Set the weight of every prompt; without --phi-star, its mean over the training pairs (splits[0]) is 1.
    A learned power is fitted to the pairs visited so far: only past steps matter, so resuming is exact."""
    power, seen = cfg.power, splits[0].index[splits[0].visited()]
    if power == "learn":
        low, high = mallowspo.POWERS
        agrees, met = first_visits(splits[0], state)
        power = min(max(mallowspo.fit_trust(agrees, splits[0].index[met]).kappa, low), high)
    phi_star = cfg.phi_star or mallowspo.calibrate_phi_star(seen, power)
    for each in splits:
        each.weight = mallowspo.dispersion_weight(each.index, phi_star, power).to(each.weight.device)
    state["run"].update(dispersion_power=power, phi_star=phi_star)


def first_visits(split: Split, state: dict) -> tuple[Tensor, list[int]]:
    """For the pairs visited after step 0, in order: whether the policy got each right when it first met it
    (1: yes, 0: no, 1/2: a tie), as fit_trust needs it; and the numbers of these pairs."""
    order = [i for step in split.first_epoch()[1:] for i in split.schedule.batch(step)]
    agrees = torch.tensor(state["agrees"][:len(order)])
    return agrees, order[:len(agrees)]


def verdict(split: Split, state: dict) -> dict | None:
    """How well the index predicted agreement, in numbers and words, for run.json; None: nothing to judge."""
    agrees, met = first_visits(split, state)
    index, power = split.index[met], state["run"]["dispersion_power"]
    if not len(agrees) or index.isnan().all():
        return None
    found, quarters = mallowspo.fit_trust(agrees, index), mallowspo.accuracy_by_quartile(agrees, index)
    meaning = "nothing shows that the index tells where people agree here"
    if found.kappa > 2 * found.se:
        meaning = "the index orders these pairs by agreement"
    if found.kappa < -2 * found.se:
        meaning = "the index orders these pairs in reverse: people agree less where it says they agree more"
    used = f"at the end its power was {power:.2f}" if power else "it was not in use at the end: all weights were 1"
    right = " ".join(f"{x:.3f}" for x in quarters if x is not None)
    meaning += (f": trust {found.kappa:+.2f} +- {found.se:.2f} from {len(agrees):,} pairs, accuracy by quartile of the "
                f"index, least agreement first, {right}; {used}")
    return {**found._asdict(), "pairs": len(agrees), "accuracy_by_quartile": quarters, "meaning": meaning}


def dispersion_entries(method: Method, split: Split, state: dict) -> list[dict]:
    """The entries of dispersion.jsonl, one for every visited pair that has an index."""
    agrees, met = first_visits(split, state)
    right = dict(zip(met, agrees.tolist()))
    phi = split.index if method.dispersion == "field" else torch.exp(-mallowspo.lam_of(method, split.weight))
    index, weight, phi = split.index.tolist(), split.weight.tolist(), phi.tolist()
    return [{"index": i, "entropy": index[i], "weight": weight[i], "phi": phi[i], "agrees": right.get(i),
             "where": split.pairs[i].where} for i in split.visited() if not math.isnan(index[i])]


# ---------------------------------------------------------------------------------------------------------------
# 3. Settings: one dataclass; the flags, their types, help and errors come from it

class BadConfig(ValueError):
    """Settings that cannot be used; the message says which, and what to do."""


def refuse(wrong, why: str) -> None:
    """Raise BadConfig if something is wrong."""
    if wrong:
        raise BadConfig(why)


def flag(default, text: str, rule: tuple[str, Callable] | None = None, **kind):
    return field(default=default, metadata={"help": text, "rule": rule, "kind": kind})


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def learn_or_number(text: str) -> str | float:
    """The argparse type of --dispersion-power."""
    try:
        return text if text == "learn" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither learn nor a number") from None


# Rules for values: what a value must be or do, in words, and the function that tests it.
ABOVE_0 = "be a number above 0", lambda v: 0 < v < math.inf
FROM_0 = "be a number, 0 or above", lambda v: 0 <= v < math.inf
SHARE = "be from 0 to 1", lambda v: 0 <= v <= 1
BELOW_HALF = "be from 0 to below 0.5", lambda v: 0 <= v < 0.5
POWER = (f"be learn, or from 0 to {mallowspo.POWERS[1]:g}",
         lambda v: v == "learn" or (not isinstance(v, str) and 0 <= v <= mallowspo.POWERS[1]))
FINITE = "be a number", math.isfinite
PAIRS = "be a share below 1 or a whole number, not negative", lambda v: 0 <= v < 1 or (v > 0 and v % 1 == 0)
SEED = "be from 0 to below 2^32", lambda v: 0 <= v < 2 ** 32
NAME = "not be empty or contain control characters", lambda v: v and v.isprintable()
NAMES = "name files or folders", lambda v: all(name and name.isprintable() for name in v)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TERMS = ("dispersion", "token_weights", "clip_rejected", "length_term", "smoothing", "focal", "advantage", "references")
GROUPS = {"model": "what is trained on what", "loss": "the method: a row of LOSSES, and changes to it",
          "lora_rank": "LoRA", "lr": "the optimiser", "max_tokens": "memory and speed", "max_dropped": "bad data",
          "eval_every": "the run", "shard": "the machine"}          # headings of --help, before these flags
NEEDS = {**mallowspo.PARTS, "reference_mix": "references", "reference_clip": "references",
         "lora_alpha": "lora_rank", "lora_targets": "lora_rank", "merge": "lora_rank"}     # what each needs


@dataclass(frozen=True)
class Config:
    """Preference-train a language model (without --model: the demo)."""
    model: str | None = flag(None, "Hugging Face folder: config.json, safetensors, tokenizer.json", NAME)
    data: tuple[str, ...] | None = flag(None, "files of pairs: .jsonl, .json, .csv (.gz), .parquet; or hf://...", NAMES)
    eval_data: tuple[str, ...] | None = flag(None, "files of held-out pairs", NAMES)
    columns: tuple[str, ...] | None = flag(None, "which columns hold what: prompt=question chosen=good ...")
    eval_pairs: float = flag(0, "without --eval-data: hold out this many pairs of --data; below 1: this share", PAIRS)
    out: str = flag("out", "folder for the trained model and all logs", NAME)
    reference: str | None = flag(None, "file for the reference's scores (default: in OUT/cache)", NAME)
    references: tuple[str, ...] | None = flag(None, "more reference folders, averaged with --model", NAMES)
    loss: Literal[tuple(LOSSES)] = flag("mallows-theta", "row of mallowspo.LOSSES; the flags from "
                                           "--dispersion to --reference-clip override its settings")
    dispersion: Literal[("constant", "entropy", *RECORD_PHI)] | None = flag(None, "source of the weights")
    beta: float | None = flag(None, "strength of the pull towards the reference", ABOVE_0)
    alpha: float | None = flag(None, "share of the reference in the reward", SHARE)
    eta: float | None = flag(None, "0: sum the log-ratios over tokens; 1: average them", SHARE)
    margin: float | None = flag(None, "by how much the chosen response must lead", FINITE)
    sft: float | None = flag(None, "weight of the chosen response's negative log-likelihood", FROM_0)
    token_weights: Literal[("equal", *TOKEN_WEIGHTS)] | None = flag(None, "which tokens count more than others")
    token_decay: float | None = flag(None, "with decay: a token's weight as a share of the one before", SHARE)
    token_cap: float | None = flag(None, "with difference: the most added to a token's weight of 1", FROM_0)
    clip_rejected: bool | None = flag(None, "do not push a rejected response further below the reference")
    length_term: float | None = flag(None, "added to h per extra token of the chosen response", FINITE)
    smoothing: float | None = flag(None, "share of the labels assumed to be wrong", BELOW_HALF)
    unbiased: bool | None = flag(None, "subtract the mean effect of wrong labels, instead of adding it")
    focal: float | None = flag(None, "less weight to pairs that the policy gets wrong: g to this power", FROM_0)
    focal_gradient: bool | None = flag(None, "let the gradient pass through the weight of --focal")
    advantage: float | None = flag(None, 'weight of a likelihood of both responses, from "rewards"', FROM_0)
    advantage_beta: float | None = flag(None, "reward that makes that likelihood weigh e times more", ABOVE_0)
    reference_mix: Literal["adaptive", "equal"] | None = flag(None, "weights of several references")
    reference_clip: float | None = flag(None, "how far the others may be from the first, as a share of it", SHARE)
    phi_star: float | None = flag(None, "scale of the dispersion weight (default: makes its mean 1)", ABOVE_0)
    dispersion_power: float | str | None = flag(None, "0: DPO, 1: the paper, max 8; learn: fit to the pairs "
                                                "(default: 1, for scores learn)", POWER, type=learn_or_number)
    lora_rank: int = flag(0, "train updates of this rank beside frozen weights; 0: train all weights", FROM_0)
    lora_alpha: float | None = flag(None, "updates are scaled by this / rank (default: 2 * rank)", ABOVE_0)
    lora_targets: tuple[Literal[TARGETS], ...] | None = flag(None, "projections that get an update (default: all)")
    merge: bool = flag(False, "with --lora-rank: also save the whole model with the updates added")
    lr: float = flag(1e-6, "peak learning rate of AdamW; LoRA needs 10 to 50 times more", ABOVE_0)
    warmup: float = flag(0.1, "share of the steps during which the rate rises", SHARE)
    decay: Literal[tuple(DECAYS)] = flag("cosine", "how the rate falls afterwards")
    clip: float = flag(1.0, "clip the gradient norm to this", ABOVE_0)
    batch_size: int = flag(64, "pairs per step, over all GPUs", ABOVE_0)
    epochs: int | None = flag(None, "passes over the data (default: 1)", ABOVE_0)
    steps: int | None = flag(None, "stop after this many steps, instead of after --epochs", ABOVE_0)
    max_tokens: int | None = flag(None, "longest prompt + response; prompts lose their start (default: 1024)", ABOVE_0)
    tokens_per_row: int | None = flag(None, "tokens per pass (default: 2048; on a GPU 4096, compiled 16384)", ABOVE_0)
    checkpoint_activations: bool = flag(False, "a third more arithmetic for far less memory per token")
    compile: bool = flag(False, "compile the model's blocks (needs a compiler), and use flex_attention on a GPU")
    max_dropped: float = flag(0.1, "stop if more than this share of the pairs is too long", SHARE)
    skip_bad: bool = flag(False, "skip and count bad records, instead of stopping")
    eval_every: int = flag(100, "steps between evaluations of the held-out pairs", ABOVE_0)
    log_every: int = flag(1, "steps between progress lines (metrics.jsonl has every step)", ABOVE_0)
    save_every: int | None = flag(None, "steps between checkpoints; 0: none (default: half an hour)", FROM_0)
    resume: bool = flag(False, "continue the run in --out from its newest checkpoint")
    on_nonfinite: Literal["stop", "skip"] = flag("stop", "what to do if a loss or gradient is not finite")
    samples: int = flag(2, "prompts to answer before and after training", FROM_0)
    sample_tokens: int = flag(64, "tokens of the longest answer", FROM_0)
    seed: int = flag(0, "seed of the data order and of sampling", SEED)
    shard: bool = flag(False, "split the model over torchrun's processes (FSDP2), instead of a copy in each")
    param_dtype: Literal["float32", "bfloat16"] = flag("float32", "dtype of the weights")
    dry_run: bool = flag(False, "measure the memory that a step takes, and stop")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to run")
    dtype: Literal[("auto", *DTYPES)] = flag("auto", "dtype of the arithmetic; auto: bfloat16 on a GPU, else float32")

    def __post_init__(self):
        for name in ("data", "eval_data", "references", "columns"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata["rule"]
            if rule and value is not None:
                what, fits = rule
                refuse(not fits(value), f"{dashed(f.name)} is {value!r}, it must {what}")
        alone = self.model is None
        refuse(alone and self.resume, "--resume is for runs with --model; the demo takes minutes, and starts afresh")
        refuse(alone and self.data, "--model is missing: a Hugging Face folder (for the demo, omit --data)")
        refuse(not alone and not self.data, "--data is missing: a file of preference pairs")
        refuse(not alone and Path(self.model).resolve() == Path(self.out).resolve(),
               f"--out {self.out} is the folder of --model, which would be overwritten; choose another")
        refuse(self.reference and Path(self.reference).is_dir(),
               f"--reference {self.reference} is a folder, it should be a file for the reference's scores")
        refuse([self.shard, self.lora_rank > 0, self.param_dtype == "bfloat16"].count(True) > 1,
               "--shard, --lora-rank and --param-dtype do not go together; give one of them")
        refuse(self.eval_data and self.eval_pairs, "--eval-pairs is for runs without --eval-data; give one of them")
        refuse(self.epochs and self.steps, "--epochs and --steps both say when to stop (the demo has --steps)")
        method = self.method
        used = {name for name, neutral in Method._field_defaults.items() if getattr(method, name) != neutral}
        used |= {name for name in ("references", "lora_rank") if getattr(self, name)}
        used.add(f"token_weights {method.token_weights}")
        for term in TERMS:
            refuse(term in used and method.link is None, f"{dashed(term)} has no meaning for --loss {self.loss}")
        for term in ("references", "clip_rejected"):
            refuse(term in used and not method.alpha, f"{dashed(term)} is about the reference; --alpha 0 has none")
        for part, whole in NEEDS.items():
            refuse(getattr(self, part) not in (None, False) and whole not in used,
                   f"{dashed(part)} needs {dashed(whole)}, which is not in use")
        refuse(self.loss == "mrpo" and not self.references, "--references is missing: mrpo needs one or more")
        refuse(self.references and method.token_weights != "equal",
               "--references averages whole responses, so it cannot be used with --token-weights")
        refuse(self.power == "learn" and method.dispersion == "constant",
               f"--dispersion-power learn: --loss {self.loss} has no dispersion; give --dispersion a source")
        refuse(self.power == "learn" and self.phi_star,
               "--phi-star is for a power that is given; with --dispersion-power learn it follows from the pairs")

    @property
    def method(self) -> Method:
        """The row of LOSSES, changed by the flags that were given."""
        given = {name: getattr(self, name) for name in Method._fields[1:]}
        return LOSSES[self.loss]._replace(**{name: value for name, value in given.items() if value is not None})

    @property
    def power(self) -> float | str:
        """--dispersion-power, or its default: 1, but "learn" for scores, whose scale is arbitrary."""
        if self.dispersion_power is None:
            return "learn" if self.method.dispersion == "scores" else 1.0
        return self.dispersion_power


def parse_flags(argv: list[str], defaults: dict) -> tuple[Config, dict]:
    """Flags -> Config, and the flags that were given; `defaults` are for runs without --model."""
    parser = argparse.ArgumentParser(prog="train.py", description=Config.__doc__, allow_abbrev=False,
                                     usage="train.py [--model DIR --data FILE] [flags]    (--help lists them)",
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help="settings from a JSON file, such as OUT/run.json; other flags win")
    kinds, group = get_type_hints(Config), parser
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        text = f.metadata["help"]
        if f.default is not None and f.default is not False:
            text += f" (default: {f.default})"
        group.add_argument(dashed(f.name), help=text, **{**flag_kind(kinds[f.name]), **f.metadata["kind"]})
    first, _ = parser.parse_known_args(argv)
    try:
        before = config_flags(first.config) if "config" in first else []
        given = vars(parser.parse_args(before + argv))
        given.pop("config", None)
        return Config(**(given if "model" in given else {**defaults, **given})), given
    except (BadConfig, BadModel) as error:
        parser.error(str(error))


def flag_kind(hint) -> dict:
    """The arguments of add_argument for a type: bool, Literal, X | None, tuple[X, ...], or a class."""
    kind, inner = get_origin(hint), get_args(hint)
    if type(None) in inner:
        return flag_kind(inner[0])
    if kind is tuple:
        return {"nargs": "+", **flag_kind(inner[0])}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"choices": inner} if kind is Literal else {"type": hint}


def config_flags(path: str) -> list[str]:
    """A JSON file of settings -> flags, to pass the same checks.  Raises BadConfig or BadModel."""
    try:
        settings = read_json(Path(path))
    except OSError as error:
        raise BadConfig(f"--config {path}: {error.strerror}") from None
    settings = settings.get("config", settings)
    refuse(not isinstance(settings, dict), f"--config {path}: its 'config' is not a JSON object")
    unknown = {name for name in settings if name.replace("-", "_") not in Config.__dataclass_fields__}
    refuse(unknown, f"--config {path}: there is no setting {', '.join(sorted(unknown))}")
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(dashed(name if value else f"no_{name}"))
        elif isinstance(value, list):
            flags += [dashed(name), *map(str, value)]
        elif value is not None:
            flags.append(f"{dashed(name)}={value}")
    return flags


# ---------------------------------------------------------------------------------------------------------------
# 4. The job

class RunFailed(RuntimeError):
    """A run that had already begun cannot go on; the message says why."""


def fit(cfg: Config, world: World, on_step: Callable = lambda step, model: None) -> None:
    """The whole job, from a model folder and a file of pairs to a trained folder; on_step as in `train`."""
    out = Path(cfg.out)
    torch.manual_seed(cfg.seed)
    folder = world.on_rank0(find_model, cfg.model)                 # rank 0 downloads what is on the hub
    for name in (*cfg.data, *(cfg.eval_data or ())):
        world.on_rank0(fetch, name)                                # a missing file ends the run now, not later
    model, tokenizer = open_model(cfg, folder, world), Tokenizer(folder)
    check_model(cfg, model, tokenizer, world)
    with contextlib.ExitStack() as inside:
        if not cfg.dry_run:
            world.on_rank0(inside.enter_context, lock_folder(out / "lock", wait=False))
        splits = load_splits(cfg, model, tokenizer, world)
        measure_memory(cfg, model, splits[0], world)
        if cfg.dry_run:
            return
        world.on_rank0(refuse_small_disk, cfg, model)
        record, method = new_record(cfg, splits, fingerprint(model, world)), cfg.method
        path = Path(cfg.reference or out / "cache/reference.safetensors")
        scored = method.link and (method.alpha or method.dispersion == "entropy")
        if scored and cfg.reference:
            add_scores(path, record["model_sha256"], {})      # if it fails, nothing has changed yet
        state = world.on_rank0(start_or_resume, cfg, record)
        if state is None:
            return
        if scored:
            scores = score_reference(model, path, record["model_sha256"], splits, world)
            for each in splits:
                each.set_reference(scores, model.config.vocab_size, tokens=method.token_weights != "equal")
            del scores                                             # large: they are per token
        if cfg.references:
            model = None                                           # frees its memory
            mix_references(cfg, splits, path, world)
            model = open_model(cfg, folder, world)
        prompt_weights(cfg, splits, state, world)
        if world.rank == 0:
            write_jsonl(out / "dispersion.jsonl", dispersion_entries(cfg.method, splits[0], state))
            write_json(out / "run.json", state["run"])
        asked = splits[-1].pairs[:cfg.samples]
        before = answer(cfg, model, tokenizer, asked, world)       # still the reference, even if resuming
        with deferred_signals(world) as signals:
            train(Run(cfg, model, world, state, signals, on_step), splits)
        after = answer(cfg, model, tokenizer, asked, world)
        save_weights(cfg, model, out, world)
        if world.rank == 0:
            texts = [[tokenizer.text(part) for part in pair[:3]] for pair in asked]
            write_jsonl(out / "samples.jsonl",
                        [{"prompt": prompt, "chosen": chosen, "rejected": rejected, "before": one, "after": two}
                         for (prompt, chosen, rejected), one, two in zip(texts, before, after)])
            finish(cfg, splits[0], state)
        world.barrier()                                   # no rank reads the folder before it is complete


def new_record(cfg: Config, splits: list[Split], model_hash: str) -> dict:
    """The content of run.json at the start of a run."""
    split, held_out = splits[0], splits[1:]
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    return {"schema": 1, "config": {**asdict(cfg), "resume": False}, "finished": False, "phi_star": None,
            "dispersion_power": 0.0, "trust": None, "steps": split.steps, "pairs": len(split.pairs),
            "held_out": sum(len(each.pairs) for each in held_out), "model_sha256": model_hash, "versions": versions,
            "data_sha256": split.digest(), "eval_data_sha256": held_out[0].digest() if held_out else None}


def finish(cfg: Config, split: Split, state: dict) -> None:
    """Write and print what is known at the end of a run; then the checkpoint is removed."""
    out, record = Path(cfg.out), state["run"]
    record.update(finished=True, skipped=state["skipped"], trust=verdict(split, state))
    if record["trust"]:
        print(f"verdict     {record['trust']['meaning']}")
    write_jsonl(out / "dispersion.jsonl", dispersion_entries(cfg.method, split, state))
    draw_curves(out)
    write_file(out / "README.md", model_card(cfg, record).encode())
    write_json(out / "run.json", record)                           # says "finished", so it is written last
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    if record["skipped"]:
        print(f"skipped     {len(record['skipped'])} steps were skipped")
    saved = "adapter/" if cfg.lora_rank else "the model"
    if cfg.merge:
        saved = "adapter/ and the model it makes"
    print(f"saved       {out}: {saved}, and run.json, metrics.jsonl, dispersion.jsonl, samples.jsonl", flush=True)


def open_model(cfg: Config, folder: Path, world: World) -> Transformer:
    """Load a folder as the policy at its start; a further reference too, so that all score alike."""
    gc.collect()                                         # a model just dropped may sit in a reference cycle
    dtype = DTYPES[cfg.param_dtype]
    if cfg.lora_rank and world.device.type == "cuda":
        dtype = world.dtype                                        # frozen weights need no more precision
    shard = (lambda model: apply_fsdp(model, world)) if world.shard else None
    model = Transformer.from_pretrained(folder, world.device, dtype, shard)
    model.origin.files.pop("run.json", None)                       # it is about the run that made the folder
    model.checkpointed = cfg.checkpoint_activations
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha or 2 * cfg.lora_rank, cfg.lora_targets or TARGETS, cfg.seed)
    try:
        if cfg.compile:
            model.compile_blocks()
    except (RuntimeError, OSError) as error:
        raise BadConfig("--compile: torch has no compiler that works (C++ on a CPU; Triton and C on a GPU): "
                        f"{' '.join(str(error).split()):.300}; install one, or leave out --compile") from None
    return model


def check_model(cfg: Config, model: Transformer, tokenizer: Tokenizer, world: World) -> None:
    """Print what the model is.  Raises BadConfig if it does not fit the tokenizer, --references or --out."""
    for name in cfg.references or ():
        vocab = Tokenizer(world.on_rank0(find_model, name)).backend.get_vocab()
        refuse(vocab != tokenizer.backend.get_vocab(), f"--references {name}: its tokens are not those of {cfg.model}")
    own = [file for file, _ in model.origin.tensors.values()]
    others = [path.name for path in sorted(Path(cfg.out).glob("model*.safetensors")) if path.name not in own]
    refuse(others, f"--out {cfg.out} holds weights of another model ({', '.join(others)}); choose another folder")
    refuse(max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) >= model.config.vocab_size,
           f"{cfg.model}: the tokenizer has more tokens than the model's {model.config.vocab_size}")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    world.say(f"model       {cfg.model}: {size:,.1f}M parameters, {trained:,.1f}M of them trained, "
              f"{str(world.dtype)[6:]} on {world.size} x {world.device.type}")
    for note in model.notes:
        world.say(f"note        {note}")


# Defaults of --tokens-per-row.  Without --compile, attention on a GPU is dense, with a mask of row x row.
ROW_TOKENS = {("cpu", False): 2048, ("cpu", True): 2048, ("cuda", False): 4096, ("cuda", True): 16384}


def load_splits(cfg: Config, model: Transformer, tokenizer: Tokenizer, world: World) -> list[Split]:
    """Read and plan the training pairs and any held-out pairs; print the method and the plan."""
    limit = model.config.positions
    longest = cfg.max_tokens or min(1024, limit)
    refuse(longest > limit, f"--max-tokens {longest}: the model was made for {limit} positions")
    pairs = tokenised_pairs(cfg, "data", tokenizer, longest, world)
    held_out = tokenised_pairs(cfg, "eval_data", tokenizer, longest, world) if cfg.eval_data else []
    both = {pair.digest() for pair in pairs} & {pair.digest() for pair in held_out}
    if both:
        world.say(f"            {len(both):,} of the held-out pairs are training pairs too")
    if cfg.eval_pairs:
        pairs, held_out = hold_out(pairs, cfg.eval_pairs, cfg.seed)
    plan = cfg.batch_size, cfg.seed, cfg.tokens_per_row, ROW_TOKENS[world.device.type, cfg.compile], world.device
    split = Split.plan(pairs, *plan)
    split.steps = cfg.steps or (cfg.epochs or 1) * split.steps
    settings = ", ".join(f"{name} {value}" for name, value in shown_settings(cfg.method).items())
    world.say(f"method      {cfg.loss}: {settings}\n"
              f"plan        {split.steps} steps of {min(cfg.batch_size, len(split.pairs))} pairs, "
              f"{split.steps / split.schedule.steps_per_epoch:.2f} epochs; rows of at most "
              f"{split.schedule.tokens_per_row} tokens; a response ends with "
              f"{tokenizer.text([int(split.pairs[0].chosen[-1])])!r}")
    return [split, Split.plan(held_out, *plan)] if held_out else [split]


def tokenised_pairs(cfg: Config, name: str, tokenizer: Tokenizer, longest: int, world: World) -> list[Pair]:
    """The pairs of --data or of --eval-data, tokenised; OUT/cache keeps them for the next run."""
    paths, cache = getattr(cfg, name), Path(cfg.out) / f"cache/{name}.safetensors"
    needed = RECORD_PHI.get(cfg.method.dispersion, ())[:1]             # fields that the records must have
    if cfg.method.advantage:
        needed += ("rewards",)
    read = functools.partial(cached_pairs, cache, None if cfg.dry_run else write_file, paths, tokenizer, longest,
                             cfg.max_dropped, cfg.skip_bad, cfg.method.link is not None, needed, cfg.columns,
                             functools.partial(progress, world, "reading", unit="records"))
    if world.size > 1:
        world.on_rank0(lambda: len(read().pairs))                  # the others read what it has cached
    dataset = read()
    world.say(f"data        {' '.join(paths)}: {dataset}")
    return dataset.pairs


def shown_settings(method: Method) -> dict:
    """The settings of a method to show: link, dispersion, beta, and any other that is not neutral."""
    neutral = Method._field_defaults
    return {name: value for name, value in method._asdict().items()
            if name in ("link", "dispersion", "beta") or value != neutral[name]}


def measure_memory(cfg: Config, model: Transformer, split: Split, world: World) -> None:
    """Run the largest row forward and backward and print the memory it took, so that a run that does not fit
    ends at once.  Every rank runs one row, and the gradients are freed: this does not change the steps."""
    rows = [row for step in split.first_epoch() for row in split.schedule.rows(step, world.rank, world.size)]
    tokens, row = max((sum(split.schedule.costs[i] for i in row), row) for row in rows)
    method = cfg.method._replace(token_weights="equal")            # the reference has not scored the tokens yet
    score_pairs(model, method, split, row, 0, world).loss.sum().backward()
    model.zero_grad()
    gib = 2 ** 30 * (world.size if world.shard else 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    world.say(f"memory      parameters {sum(p.nbytes for p in model.parameters()) / gib:.2f}, "
              f"gradients {sum(p.nbytes for p in trained) / gib:.2f}, "
              f"optimiser {sum(8 * p.numel() for p in trained) / gib:.2f} GiB per process; forward and backward of "
              f"the largest row, {tokens:,} tokens, reached {peak_memory(world):.2f} GiB before there is an optimiser")


def peak_memory(world: World) -> float:
    """Peak memory so far, in GiB: on a GPU what torch allocated, on a CPU the process's resident set."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


@dataclass
class Run:
    """What the training loop works with."""
    cfg: Config
    model: Transformer
    world: World
    state: dict                         # progress, as in state.json
    signals: list[int]                  # those received, which ask it to stop
    on_step: Callable = lambda step, model: None

    def __post_init__(self):
        self.policy = self.model
        if self.world.size > 1 and not self.world.shard:
            self.policy = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = AdamW([p for p in self.model.parameters() if p.requires_grad], self.cfg.lr)
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.world.dtype == torch.float16)
        self.saved = time.perf_counter()           # time of the last checkpoint, or of the start of the loop
        self.started = self.saved - self.state["seconds"]
        if self.state["step"]:
            load_checkpoint(checkpoints(Path(self.cfg.out))[0], self.model, self.optimizer)
            self.scaler.load_state_dict(self.state["scaler"])
            with contextlib.suppress(OSError):                     # Linux: reset the peak memory
                Path("/proc/self/clear_refs").write_text("5")
        for name in ("metrics", "evaluations"):
            cut_log(Path(self.cfg.out) / f"{name}.jsonl", self.state["step"], self.world)

    def optimizer_step(self, split: Split, step: int, bad: list[int]) -> float:
        """Clip the gradients, take the step -> their norm before clipping.  If the loss (of pairs `bad`) or
        a gradient is not finite, record and skip the step, or raise RunFailed."""
        self.scaler.unscale_(self.optimizer)
        norm = to_cpu(torch.nn.utils.get_total_norm([p.grad for p in self.optimizer.params]))
        if bad or (not math.isfinite(norm.item()) and self.scaler.get_scale() <= 1):  # > 1: float16 overflow
            where, skipped = [split.pairs[i].where for i in bad or split.schedule.batch(step)], self.state["skipped"]
            part, more = "loss" if bad else "gradient", ", ..." if len(where) > 8 else ""
            what = f"the {part} is not finite; look at --lr, --beta, and {', '.join(where[:8])}{more}"
            skipped.append(step)
            if self.cfg.on_nonfinite == "stop" or skipped[-IN_A_ROW:] == list(range(step - IN_A_ROW + 1, step + 1)):
                raise RunFailed(f"step {step + 1}: {what}")
            self.world.say(f"step {step + 1:>5}  skipped: {what}")
        else:
            self.scaler.step(self.optimizer, ((norm + 1e-6) / self.cfg.clip).clamp(min=1))
        self.scaler.update()
        self.model.zero_grad()
        return norm.item()

    def log_evaluation(self, step: int, means: dict[str, float]) -> None:
        append_json(Path(self.cfg.out) / "evaluations.jsonl", {"step": step, **means}, self.world)
        self.world.say(f"step {step:>5}  held out: loss {means['loss']:.4f}  accuracy {means['accuracy']:.3f}  "
                       f"margin {means['margin']:+.4f}")

    def log_step(self, split: Split, step: int, figures: dict[str, float], began: float) -> None:
        """Write all figures of a step to metrics.jsonl, and print the main ones."""
        method, batch = self.cfg.method, split.schedule.batch(step)
        now = time.perf_counter()
        tokens = sum(split.schedule.costs[i] for i in batch)
        entry = {"step": step, **figures, "weight": split.weight[batch].mean().item(),
                 "dispersion_power": self.state["run"]["dispersion_power"],
                 "pairs_per_second": len(batch) / (now - began), "tokens_per_second": tokens / (now - began),
                 "memory_gib": peak_memory(self.world), "seconds": now - self.started}
        append_json(Path(self.cfg.out) / "metrics.jsonl", entry, self.world)
        if step == 0 and method.link and method.alpha:
            self.check_first_loss(split, entry["loss"])
        done = step + 1                                           # printed step numbers count finished steps
        if done % self.cfg.log_every == 0 or done in (1, split.steps):
            left = int(entry["seconds"] / done * (split.steps - done))
            shown = f"accuracy {entry['accuracy']:.3f}  margin {entry['margin']:+.4f}  " if method.link else ""
            self.world.say(f"step {done:>5}/{split.steps}  loss {entry['loss']:.4f}  {shown}lr {entry['lr']:.1e}  "
                           f"{entry['pairs_per_second']:.1f} pairs/s  {entry['tokens_per_second']:,.0f} tok/s  "
                           f"{entry['memory_gib']:.1f} GiB  left {left // 60}:{left % 60:02}")

    def check_first_loss(self, split: Split, loss: float) -> None:
        """Compare the first loss with that of a policy equal to the reference: ln 2 for logistic links."""
        method, batch = self.cfg.method, split.schedule.batch(0)
        if method.token_weights != "equal" and method.alpha != 1:
            return                                                 # (with alpha 1 all r(y) are 0, whatever the weights)
        length = [[len(side) for side in split.pairs[i][1:3]] for i in batch]                        # (B, 2)
        outcome = mallowspo.objective(method, split.start_logp[batch], split.ref_logp[batch],
                                      to_device(length, self.world.device), split.weight[batch],
                                      advantage=split.advantage[batch])
        expected, near = outcome.loss.mean().item(), 1e-4 if self.world.dtype == torch.float32 else 1e-2
        found = f"the first loss is {loss:.6f}; for a policy that equals its reference it is {expected:.6f}"
        if math.isclose(loss, expected, rel_tol=near):
            self.world.say(f"check       {found}")
        else:
            self.world.say(f"WARNING     {found}: the reference's scores are not this model's; remove their file")


def answer(cfg: Config, model: Transformer, tokenizer: Tokenizer, pairs: list[Pair], world: World) -> list[str]:
    """Sample a response to each prompt; without --shard, on rank 0 only: the others return at once."""
    if world.rank and not world.shard:
        return []
    texts, stop = [], {tokenizer.eos, *model.stop_tokens, *(int(pair.chosen[-1]) for pair in pairs)}
    for start in range(0, len(pairs), 16):         # in batches, to bound the memory for keys and values
        prompts = [pair.prompt.tolist() for pair in pairs[start:start + 16]]
        generators = [torch.Generator().manual_seed(cfg.seed + start + i) for i in range(len(prompts))]
        with world.autocast():
            steps = list(model.generate(prompts, cfg.sample_tokens, 0.7, 0.95, tuple(stop), generators))
        texts += [tokenizer.text([step[i] for step in steps if step[i] is not None]) for i in range(len(prompts))]
    return texts


# ---------------------------------------------------------------------------------------------------------------
# 5. Processes: one, or many under torchrun

def progress(world: World, what: str, items, total: int | None = None, unit: str = "rows"):
    """Yield the items; every ten seconds, print their number, the rate, and the time left."""
    began = said = time.perf_counter()
    for number, item in enumerate(items, 1):
        now = time.perf_counter()
        if now - said > PROGRESS_SECONDS:
            said, rate = now, number / (now - began)
            line = f"{what:<12}{number:,} {unit}"
            if total:
                left = int((total - number) / rate)
                line = f"{what:<12}{number:,} of {total:,} {unit}, left {left // 60}:{left % 60:02}"
            world.say(f"{line}, {rate:,.1f} per second")
        yield item


class World(NamedTuple):
    """This process and its place among all processes of the run."""
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype                  # of the arithmetic
    shard: bool = False                 # each rank holds a shard of the parameters

    def say(self, text: str = "") -> None:
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def on_rank0(self, job: Callable, *arguments):
        """Run job(*arguments) on rank 0; all ranks return its result, or raise its exception."""
        try:
            result = [job(*arguments) if self.rank == 0 else None]
        except Exception as error:
            result = [error]
        if self.size > 1:
            dist.broadcast_object_list(result)
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]


def join_world(cfg: Config) -> World:
    """Choose the device and the dtype, and join the other processes if torchrun started this one."""
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    refuse(cuda and not torch.cuda.is_available(), "--device cuda: torch finds no CUDA device here")
    device, best = torch.device("cpu"), "float32"
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        best = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    else:
        keep_freed_memory()
    dtype = DTYPES[best if cfg.dtype == "auto" else cfg.dtype]
    refuse(dtype == torch.float16 and not cuda, "--dtype float16 needs a GPU; on a CPU use float32 or bfloat16")
    refuse(dtype == torch.float16 and cfg.shard, "--shard needs --dtype bfloat16 or float32, not float16")
    refuse(dtype != torch.bfloat16 and cfg.param_dtype == "bfloat16",
           f"--param-dtype bfloat16 needs --dtype bfloat16, not {str(dtype)[6:]}")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, size = next(dist.rendezvous("env://"))  # after a restart it has addresses of dead ranks
        store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        return World(dist.get_rank(), dist.get_world_size(), device, dtype, cfg.shard)
    refuse(cfg.shard, "--shard splits a model over processes; start them with torchrun --nproc-per-node=...")
    return World(0, 1, device, dtype)


def keep_freed_memory() -> None:
    """Make Linux's C library keep freed memory.  Else, every step returns large tensors to the kernel and
    fetches them again page by page: 9 to 16 % slower at 128,256 words, not at 32,000 (tests/bench.py)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                             # M_MMAP_MAX: allocate from the heap only
        mallopt(-1, -1)                                            # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(1, 0)                                              # M_MXFAST: merge small free blocks at once


def apply_fsdp(model: Transformer, world: World) -> None:
    """FSDP2: each rank keeps a shard of every parameter; those of a block are gathered while it runs."""
    from torch.distributed.device_mesh import init_device_mesh  # takes seconds, so only with --shard
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(world.dtype, torch.float32, cast_forward_inputs=False)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(model, "predict")


def gradient_sync(policy, world: World, last: bool):
    """A context for a row's backward pass: after the last row of a step the gradients are summed over ranks."""
    if world.shard:
        policy.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or world.shard or world.size == 1 else policy.no_sync()


# ---------------------------------------------------------------------------------------------------------------
# 6. The optimiser

IN_A_ROW = 10                           # this many non-finite steps in succession end the run


class AdamW:
    """AdamW without weight decay, by torch's kernel (torch.optim's class imports a compiler: .9 s more).

    A step of bfloat16 weights is computed in float32, then rounded up or down at random, with probabilities
    that make it right on average.  Rounded to nearest, 99 in 100 weights would not move at a learning rate of
    5e-7.  The noise depends only on the number of the step."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float):
        self.params, self.lr = params, lr
        self.param_groups = [{"params": params}]                     # where a GradScaler looks for gradients
        self.state = {p: {"step": torch.zeros((), device=p.device),
                          "exp_avg": torch.zeros_like(p, dtype=torch.float32, requires_grad=False),
                          "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32, requires_grad=False)} for p in params}

    @torch.no_grad()
    def step(self, shrink: Tensor) -> None:
        """One step with the gradients divided by the scalar `shrink`, which clips and overwrites them."""
        groups, generator = [self.params], None
        if any(p.dtype == torch.bfloat16 for p in self.params):
            groups = [[p] for p in self.params]                      # one float32 copy at a time
        for params in groups:
            values, grads = [p.float() for p in params], [p.grad.float() for p in params]    # (float32: p itself)
            first, second, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
            adamw(values, grads, first, second, [], steps, fused=True, grad_scale=shrink, lr=self.lr, beta1=0.9,
                  beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)
            p = params[0]
            if p.dtype == torch.bfloat16:                            # the upper 16 bits of a float32
                generator = generator or torch.Generator(p.device).manual_seed(int(steps[0]))
                noise = torch.randint(1 << 16, p.shape, generator=generator, device=p.device, dtype=torch.int32)
                p.copy_(((values[0].view(torch.int32) + noise) & (-1 << 16)).view(torch.float32))


# ---------------------------------------------------------------------------------------------------------------
# 7. The run's folder.  No saved file is lost or half written: a new one is written beside it, then renamed.

MAY_CHANGE = ("out reference max_dropped skip_bad tokens_per_row eval_every log_every save_every on_nonfinite samples "
              "sample_tokens shard checkpoint_activations").split()           # when a run is resumed
STATE = {"step": int, "seconds": float, "skipped": list, "agrees": list, "scaler": dict, "run": dict, "sha256": dict}
SAVE_SECONDS = 1800                                # between checkpoints, by default


@contextlib.contextmanager
def lock_folder(path: Path, wait: bool = True):
    """Make this file and its folder, and hold an exclusive lock on the file inside the `with` block.  Raises
    BadConfig if they cannot be written or, without `wait`, if another process has the lock."""
    import fcntl  # not on Windows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")                                     # noqa: SIM115 (it is closed below)
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadConfig(f"{path.parent}: another run is writing there; choose another --out") from None
    except OSError as error:
        raise BadConfig(f"{path.parent}: cannot be written ({error.strerror})") from None
    with file:
        yield


def write_file(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file: the content, or what content(path) writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)                       # a killed run's
    new.touch()
    mode = new.stat().st_mode                         # as the umask has it
    if callable(content):
        content(new)
    else:
        new.write_bytes(content)
    new.chmod(mode)                                   # safetensors makes files that only their owner can read
    fsync(new)
    os.replace(new, path)


def nan_to_null(content):
    """JSON has no nan and no infinity: null stands for them."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def write_json(path: Path, content: dict) -> None:
    write_file(path, (json.dumps(nan_to_null(content), indent=2) + "\n").encode())


def write_jsonl(path: Path, entries) -> None:
    write_file(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_json(path: Path, entry: dict, world: World) -> None:
    if world.rank == 0:
        with open(path, "ab") as file:
            file.write(json.dumps(nan_to_null(entry)).encode() + b"\n")


def cut_log(path: Path, first: int, world: World) -> None:
    """Remove what an interrupted run logged for step `first` and later, and any incomplete line."""
    if world.rank == 0 and path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        found = [re.fullmatch(rb'\{"step": (\d+).*\}\n', line) for line in lines]
        write_file(path, b"".join(each[0] for each in found if each and int(each[1]) < first))


class Scores(NamedTuple):
    """The reference's scores of one pair: float32 arrays over the tokens of chosen, then rejected."""
    logp: np.ndarray
    entropy: np.ndarray


def read_reference(path: Path, key: str) -> dict[bytes, Scores]:
    """{digest of a pair: Scores}; empty without a file.  Raises BadData if damaged or of other weights."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, "np") as file:
            made_by = (file.metadata() or {}).get("key")
            digests, lengths, logp, entropy = (file.get_tensor(n) for n in ("digest", "length", "logp", "entropy"))
        n, total = len(lengths), int(lengths.sum(dtype=np.int64))
        kinds = [(x.dtype.name, x.shape) for x in (digests, lengths, logp, entropy)]
        whole = kinds == [("uint8", (n, 16)), ("int32", (n,)), ("float32", (total,)), ("float32", (total,))]
        if not whole or (lengths < 0).any() or not np.isfinite([logp.sum(), entropy.sum()]).all():
            raise TypeError("its tensors are not valid scores")
    except (SafetensorError, AttributeError, TypeError) as error:       # last two: dtypes that numpy lacks
        raise BadData(f"{path}: not a whole file of scores ({error}); give --reference another path") from None
    if made_by != key:
        raise BadData(f"{path}: scored by other weights, or with another --dtype, --device or --compile; "
                      "remove it, or choose another --reference or --out")
    ends = np.cumsum(lengths)[:-1]
    return dict(zip(map(bytes, digests), map(Scores, np.split(logp, ends), np.split(entropy, ends))))


def add_scores(path: Path, key: str, fresh: dict[bytes, Scores]) -> None:
    """Add scores to the file, as other processes may at the same time; those that are there stay."""
    with lock_folder(path.with_name(path.name + ".lock")):
        scores = fresh | read_reference(path, key)
        if not fresh:
            return
        tensors = {"digest": np.frombuffer(b"".join(scores), dtype=np.uint8).reshape(-1, 16),
                   "length": np.array([len(score.logp) for score in scores.values()], dtype=np.int32),
                   "logp": np.concatenate([score.logp for score in scores.values()]),
                   "entropy": np.concatenate([score.entropy for score in scores.values()])}
        write_file(path, save(tensors, metadata={"key": key}))


def refuse_small_disk(cfg: Config, model: Transformer) -> None:
    """Raise BadConfig if --out has no room for the final model or, for a moment, for two checkpoints."""
    trained, need = sum(p.numel() for p in model.parameters() if p.requires_grad), 0
    if cfg.lora_rank:
        need += 4 * trained
    if cfg.merge or not cfg.lora_rank:
        largest = max(dtype.itemsize for _, dtype in model.origin.tensors.values())
        need += largest * sum(p.numel() for p in model.parameters())
    if cfg.save_every != 0:
        need = 2 * (need + 12 * trained)                           # the weights as trained, and AdamW's moments
    there = sum(path.stat().st_size for path in Path(cfg.out).glob("checkpoint/**/*.safetensors"))
    free = shutil.disk_usage(cfg.out).free + there
    refuse(free < need, f"{cfg.out}: {need:,} bytes are needed there, {free:,} are free; make room, choose another "
           "--out, or do without checkpoints (--save-every 0 takes less)")


def checkpoints(out: Path) -> list[Path]:
    """The folders OUT/checkpoint/step-N, the newest first; each holds all that the steps change."""
    return sorted(out.glob("checkpoint/step-*"), reverse=True)


def save_or_stop(run: Run, done: int, steps: int) -> None:
    """Save a checkpoint every --save-every steps (default: every half hour by rank 0's clock) and after the
    last step.  A signal to any rank saves one too, and ends the run here."""
    every, world = run.cfg.save_every, run.world
    late = time.perf_counter() - run.saved > SAVE_SECONDS
    due = done == steps or (done % every == 0 if every else late)
    asked = [len(run.signals), due and world.rank == 0]
    stop, due = world.sum_over_ranks(torch.tensor(asked, device=world.device)).tolist()
    if (stop or due) and every != 0:                               # 0: no checkpoints
        save_checkpoint(run, done)
    if stop:
        world.barrier()                                            # when one rank ends, torchrun ends all
        raise KeyboardInterrupt((run.signals or [signal.SIGTERM])[0])      # (or another rank received it)


def save_checkpoint(run: Run, done: int) -> None:
    """Write the model's folder, state.safetensors (trained weights and their AdamW state) and state.json.
    The previous checkpoint is removed only when all of this is on the disk."""
    cfg, model, world, out = run.cfg, run.model, run.world, Path(run.cfg.out)
    if world.rank and not world.shard:
        return
    new, tensors = out / "checkpoint" / "new", {}
    run.state.update(step=done, seconds=time.perf_counter() - run.started, scaler=run.scaler.state_dict())
    for name, p in model.named_parameters():
        if p in run.optimizer.state:                               # it is trained
            for kind, value in {"weight": p, **run.optimizer.state[p]}.items():
                tensors[f"{kind}.{name}"] = to_cpu(value)
    if world.rank:
        return save_weights(cfg, model, new / "model", world)
    try:
        shutil.rmtree(new, ignore_errors=True)
        save_weights(cfg, model, new / "model", world)
        write_file(new / "state.safetensors", functools.partial(save_file, tensors))
        files = {str(path.relative_to(new)): sha256(path) for path in sorted(new.rglob("*")) if path.is_file()}
        write_json(new / "state.json", {**run.state, "sha256": files})
        for path in [*new.rglob("*"), new, *out.glob("*.jsonl")]:
            fsync(path)
        os.replace(new, out / "checkpoint" / f"step-{done:08}")
        fsync(out / "checkpoint")
        for former in checkpoints(out)[1:]:
            os.replace(former, new)                                # a folder named step-N is always complete
            shutil.rmtree(new)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise RunFailed(f"the checkpoint of step {done} cannot be written ({error}); "
                        f"{shutil.disk_usage(out).free:,} bytes are free in {out}") from None
    run.saved = time.perf_counter()


def load_checkpoint(folder: Path, model: Transformer, optimizer: AdamW) -> None:
    places = dict(model.named_parameters())
    with safe_open(folder / "state.safetensors", "pt") as file:
        for key in file.keys():                                    # noqa: SIM118 (it is not a dict)
            kind, _, name = key.partition(".")
            p = places.get(name)
            if p is None or file.get_slice(key).get_shape() not in ([], list(p.shape)):
                raise BadConfig(f"--resume: {folder}: state.safetensors has {key!r:.300}, which is not of this model")
            tensor = file.get_tensor(key).to(p.device, copy=True)      # a copy: the file is closed soon
            if kind == "weight":
                p.data.copy_(to_shard(tensor, p))
            else:
                optimizer.state[p][kind] = to_shard(tensor, p) if tensor.dim() else tensor


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_or_resume(cfg: Config, record: dict) -> dict | None:
    """The state to start from: new, or with --resume the newest checkpoint's; None: the run has finished.
    Raises BadConfig if there is a checkpoint but no --resume, or if it is from another run, or damaged."""
    out, found = Path(cfg.out), checkpoints(Path(cfg.out))
    former = read_json(out / "run.json") if (out / "run.json").exists() else {}
    if former.get("finished") and cfg.resume:
        refuse_changes(out / "run.json", former, record)
        print(f"finished    {out}: there is nothing to do")
        return None
    if found and not former.get("finished"):
        refuse(not cfg.resume, f"{found[0]} is from an interrupted run; --resume continues it; "
               f"to start afresh, choose another --out, or remove {out / 'checkpoint'}")
        state = read_checkpoint(found[0])
        refuse_changes(found[0] / "state.json", state["run"], record)
        print(f"start       after step {state['step']}, from {found[0]}")
        return {**state, "run": record}
    why = "; there is no checkpoint" if cfg.resume else ""
    if former.get("finished"):
        why = "; in place of the finished run"
    print(f"start       with step 1{why}")
    shutil.rmtree(out / "checkpoint", ignore_errors=True)          # left by a run killed while finishing
    write_json(out / "run.json", record)                           # the folder now belongs to this run
    return {"step": 0, "seconds": 0.0, "skipped": [], "agrees": [], "run": record}


def read_checkpoint(folder: Path) -> dict:
    """The state in a checkpoint.  Raises BadConfig if a file is missing, added, or not as it was written."""
    where = folder / "state.json"
    state = read_json(where) if where.exists() else {}
    wrong = [name for name, kind in STATE.items() if type(state.get(name)) is not kind]
    if not wrong and (state["step"] < 0 or any(x not in (0, 0.5, 1) for x in state["agrees"])):
        wrong = ["step", "agrees"]
    refuse(wrong, f"--resume: {where} has no usable value for {', '.join(wrong)}; remove the folder")
    there = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file() and path != where}
    for name in there | state["sha256"]:                           # all of these files, and no others
        refuse(name not in there or sha256(there[name]) != state["sha256"].get(name),
               f"--resume: {folder / name} is not as it was written; remove the folder {folder}")
    return state


def refuse_changes(where: Path, former: dict, record: dict) -> None:
    """Raise BadConfig if this run differs from the former one, recorded in `where`, in what may not change:
    the settings; for model and data, which the record has hashes of, their contents instead."""
    config, changed = former.get("config"), []
    refuse(not isinstance(config, dict) or former.get("schema") != record["schema"],
           f"--resume: {where} has no settings of a run as this program writes them; choose another --out")
    for name, value in nan_to_null(record["config"]).items():
        old = former.get(f"{name}_sha256", config.get(name, getattr(Config, name)))     # (or the default)
        new = record.get(f"{name}_sha256", value)
        if old != new and name not in MAY_CHANGE:
            changed.append(f"{name} ({old!s:.12}, now {new!s:.12})")
    refuse(changed, f"--resume: {where} is from a run with other settings: {', '.join(changed)}; choose another --out")


QUARTERS = ("least agreement", "second", "third", "most agreement")


def draw_curves(out: Path) -> None:
    """Draw metrics.jsonl and evaluations.jsonl by step in OUT/curves.png, if matplotlib is installed."""
    rows = []
    for file, where in (("metrics", "training"), ("evaluations", "held out")):
        for entry in read_jsonl(out / f"{file}.jsonl"):
            shown = [("loss", where, entry["loss"]), ("accuracy", where, entry["accuracy"]),
                     ("rewards", f"margin, {where}", entry["margin"])]
            if where == "training":
                shown += [("rewards", name, entry[name]) for name in ("chosen_reward", "rejected_reward")]
            shown += [("held out, by quarter", name, value)
                      for name, value in zip(QUARTERS, entry.get("accuracy_by_quartile", []))]
            rows += [{"measure": measure, "curve": curve, "step": entry["step"], "value": value}
                     for measure, curve, value in shown if value is not None]
    draw(rows, Panel("step", "value", "curve", "finished steps", "value", facet="measure"), out / "curves.png")


def model_card(cfg: Config, record: dict) -> str:
    """The text of OUT/README.md, a model card for the hub: base model, data, method, settings and results."""
    table = {"loss": cfg.loss, **shown_settings(cfg.method), "learning rate": cfg.lr, "pairs per step": cfg.batch_size,
             **{name: record[name] for name in ("steps", "pairs", "data_sha256", "phi_star", "dispersion_power")}}
    for entry in read_jsonl(Path(cfg.out) / "evaluations.jsonl")[-1:]:
        table |= {f"held-out {name}": entry[name] for name in ("loss", "accuracy", "margin")}
    rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
    meaning = record["trust"]["meaning"] if record["trust"] else "there was none"
    folder, library, loader = "", "transformers", "transformers.AutoModelForCausalLM"
    if cfg.lora_rank and not cfg.merge:
        folder, library, loader = "/adapter", "peft", "peft.AutoPeftModelForCausalLM"
    return f"""---
base_model: {json.dumps(cfg.model)}
library_name: {library}
pipeline_tag: text-generation
tags: [mallowspo, {cfg.loss}, preference-optimisation]
---
# {Path(cfg.model).name}, preference-trained by {cfg.loss}

Trained with [MallowsPO](https://arxiv.org/abs/2405.14953) from `{cfg.model}` on {", ".join(cfg.data)}. Load it with
`{loader}.from_pretrained("{Path(cfg.out).name}{folder}")`. All settings are in `run.json`;
`cache/` may be deleted. Dispersion index: {meaning}.

| | |
|---|---|
{rows}
"""


@contextlib.contextmanager
def deferred_signals(world: World):
    """A list that collects SIGINT and SIGTERM, which then end nothing; only a second ctrl-C does."""
    signals, former = [], {}

    def note(number, frame):
        signals.append(number)
        if world.rank == 0:                               # not print(): the signal may have interrupted one
            said = f"{signal.Signals(number).name}: stopping after this step; a second ctrl-C stops at once\n"
            with contextlib.suppress(OSError):
                os.write(1, said.encode())
        if number == signal.SIGINT:
            signal.signal(number, former[number])
    for number in (signal.SIGINT, signal.SIGTERM):
        former[number] = signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def save_weights(cfg: Config, model: Transformer, out: Path, world: World) -> None:
    """Save the model's folder, or with LoRA adapter/ in it, as PEFT reads it, or both; rank 0 writes."""
    if world.rank:
        for name in model.origin.tensors if world.shard else ():
            model.to_hf(name)                             # helps rank 0 to gather the shards
        return
    if cfg.lora_rank:
        save_adapter(model, out / "adapter", cfg.model)
        for name, content in model.origin.files.items():           # so that it loads with its tokenizer
            if not name.endswith(".index.json"):
                (out / "adapter" / name).write_bytes(content)
    if cfg.merge or not cfg.lora_rank:
        model.save_pretrained(out)


# ---------------------------------------------------------------------------------------------------------------
# 8. The demo: a population whose dispersion is known

DEMO = {"lr": 1e-3, "warmup": 0.5, "steps": 150, "batch_size": 128, "log_every": 50, "max_tokens": 64,
        "tokens_per_row": 1024, "samples": 3, "sample_tokens": 8, "save_every": 0}
DEMO_MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_hidden_layers": 1,
              "num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": False, "hidden_act": "silu"}
DEMO_METHODS = {"dpo": {"loss": "dpo", "dispersion_power": None}, "mallows-phi": {"loss": "mallows-phi"},
                "mallows-phi-learn": {"loss": "mallows-phi", "dispersion_power": "learn"}}
DEMO_BETAS = (0.25, 0.5, 1.0)
DEMO_SFT = 0.04     # times beta, like the reward; else other text gets up to a tenth of the probability


def make_reference(cfg: Config, folder: Path, population: Population, world: World) -> str:
    """Write a population's files; train a small model to answer as its members do -> its folder."""
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
                      "out": str(folder / "reference"), "loss": "sft", "lr": 4e-3, "warmup": 0.1,
                      "steps": 400, "batch_size": 64, "seed": cfg.seed, "device": cfg.device, "dtype": cfg.dtype})
    fit(start, world)
    return start.out


def demo(cfg: Config, chosen: bool, world: World) -> None:
    """Make a population and a reference that answers as its members do.  Train on the members' preferences,
    by each method and with several betas, to the end of the schedule, and compare the methods at equal KL."""
    out, population = Path(cfg.out), Population()
    folder = out / "demo"
    torch.set_num_threads(1)                         # matrices this small are slower on two cores than on one
    reference = make_reference(cfg, folder, population, world)
    runs, methods = [], {cfg.loss: {}} if chosen else DEMO_METHODS
    world.say(f"\n--- the policies learn what the members prefer: {', '.join(methods)}")
    for name, settings in methods.items():
        for beta in [cfg.beta] if cfg.beta else DEMO_BETAS:
            job = replace(cfg, model=reference, data=[str(folder / "pairs.jsonl")], beta=beta,
                          sft=DEMO_SFT * beta if cfg.sft is None else cfg.sft, out=str(out / f"{name}-{beta}"),
                          reference=str(folder / "reference.safetensors"), **settings)
            with contextlib.redirect_stdout(None) if runs else contextlib.nullcontext():  # only the first run prints
                runs += fit_and_measure(name, job, population, world)[-1:]
            world.say("trained     {method}, beta {beta}: KL {kl:.3f}, win rate {win_rate:.4f}".format(**runs[-1]))
    if world.rank == 0:
        content, text = report(population, runs, read_jsonl(Path(job.out) / "dispersion.jsonl"))
        write_json(out / "report.json", content)
        print(f"\n{text}\n\nwritten to {out / 'report.json'}")
        rows = [{**run, "measure": name, "value": run[name]} for name in MEASURES for run in runs]
        panel = Panel("kl", "value", "method", "KL from the reference (nats)", "value", facet="measure")
        draw(rows, panel, out / "report.png")


def fit_and_measure(name: str, job: Config, population: Population, world: World, every: int = 0) -> list[dict]:
    """Train -> what the population says of the policy: at step 0, at the end, and every so many steps."""
    tokenizer, path = Tokenizer(job.model), {}

    def watch(step, model):
        if step in (0, job.steps) or (every and step % every == 0):
            path[step] = answer_logp(model, population, tokenizer, world)
    fit(job, world, watch)
    record = world.on_rank0(read_json, Path(job.out) / "run.json")
    kappa = record["trust"]["kappa"] if record["trust"] else math.nan             # nan: there was no index
    about = {"method": name, "beta": job.beta, "power": record["dispersion_power"], "kappa": kappa}
    return [{**about, "step": step, **population.measure(logp, path[0])} for step, logp in path.items()]


@torch.no_grad()
def answer_logp(model: Transformer, population: Population, tokenizer: Tokenizer, world: World) -> Tensor:
    """(Q, N, A) log-probability of every answer to every question, asked by names that no training pair has.
    An answer's end token does not count: how surely the model stops is not an opinion of the population."""
    logp = []
    for q, answers in enumerate(population.answers):
        sides = [np.array(tokenizer.response(" " + answer)[:-1]) for answer in answers]
        groups = [(np.array(tokenizer.prompt(population.prompt(name, q))), *sides) for name in NEW_ASKERS]
        row = collate(groups, BRANCHES, world.device)
        with world.autocast():
            logp.append(row.sum_by_response(model(*row.inputs())[0]).cpu())                         # (N, A)
    return torch.stack(logp)


# ---------------------------------------------------------------------------------------------------------------
# 9. The command line

def main(argv: list[str] | None = None) -> None:
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    cfg, given = parse_flags(sys.argv[1:] if argv is None else argv, DEMO)
    if cfg.model and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):       # torchrun --max-restarts
        cfg = replace(cfg, resume=True)

    def saved():
        found = checkpoints(Path(cfg.out))
        return f"--resume continues from {found[0]}" if found else "nothing was saved"
    try:
        world = join_world(cfg)
        if cfg.model:
            fit(cfg, world)
        else:
            with contextlib.ExitStack() as inside:
                world.on_rank0(inside.enter_context, lock_folder(Path(cfg.out) / "lock", wait=False))
                demo(cfg, "loss" in given, world)
    except (BadConfig, BadData, BadModel) as error:
        leave(2, error)
    except (RunFailed, OSError, SafetensorError) as error:
        leave(1, f"{error}; {saved()}")
    except torch.OutOfMemoryError as error:
        what = str(error).splitlines()[0]
        leave(1, f"out of GPU memory: lower --tokens-per-row, or --max-tokens ({what}); {saved()}")
    except KeyboardInterrupt as error:
        leave(128 + error.args[0], f"ended by {signal.Signals(error.args[0]).name}; {saved()}")
    leave(0)


def leave(status: int, why: object = "") -> None:
    """End this process, at once under torchrun.  Gloo's threads outlive destroy_process_group, as DDP and
    FSDP2 keep the group; if one frees a tensor while Python shuts down, the process aborts: a false error."""
    if status:
        where = f" (rank {os.environ['RANK']})" if int(os.environ.get("RANK", 0)) else ""
        print(f"train.py: error: {why!s:.2000}{where}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        if status == 0:                                   # after an error, ranks could wait for each other
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
