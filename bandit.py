"""The theory of dispersion, tested: which claims of MallowsPO are true, how strongly, and where it loses.

A bandit is a language model with the words taken out: a prompt is a set of n answers, a policy is a softmax
over them, and people rank the answers by a Mallows model with centre 0, 1, ..., n - 1.  Everything is known,
so every claim has a number.  The losses are mallowspo.LINKS, the same functions that train.py trains with.

    python bandit.py                              every experiment with few seeds, in a minute, then a verdict
    python bandit.py shared --seeds 100 --n 5     one experiment in full
    python tests/theory.py                        two formulas: the index as an estimate, phi's link as printed
    python tests/people.py *.soc                  real people's rankings (PrefLib.org): do dispersions help there?

Each experiment prints a summary and a table, and writes NAME.json and, with matplotlib, NAME.png to --out.
The file: 1. ranking models -> 2. pair probabilities -> 3. fitting a policy -> 4. experiments -> 5. related
methods that need a sampler -> 6. a bandit with words: train.py's demo population -> 7. run, print and draw.
"""
import argparse
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

import mallowspo
from mallowspo import LINKS

F64 = torch.float64
METHODS = {name: mallowspo.LOSSES[name].link for name in ("mallows-phi", "dpo", "mallows-theta", "ipo")}

# ------------------------------------------------------------------------------------------------------------
# 1. The ranking models.  Kendall-Mallows:  P(ranking) = phi^d(ranking, centre) / Z
#    d counts the pairs that ranking and centre order differently (Mallows 1957).  A ranking of n items is
#    stored as ranks: ranks[i] is the place (0 = best) of the item that the centre puts in place i.

def sample_rankings(count: int, n: int, lam: float, generator: torch.Generator | None = None) -> Tensor:
    """(count, n) ranks of independent draws, by repeated insertion (Doignon, Pekec, Regenwetter 2004).
    Items are inserted from the centre's best to its worst.  Item i overtakes j of the items before it with
    probability proportional to phi^j; each item overtaken is one inversion."""
    ranks = torch.empty(count, 0, dtype=torch.long)
    for i in range(n):
        chances = torch.exp(-lam * torch.arange(i + 1.0, dtype=torch.float64))
        overtaken = torch.multinomial(chances, count, replacement=True, generator=generator)
        place = i - overtaken[:, None]                                                  # (count, 1)
        ranks = torch.cat([ranks + (ranks >= place), place], dim=1)                     # (count, i + 1)
    return ranks


def top_choice(n: int, lam: Tensor) -> Tensor:
    """(..., n) probability that item 0 (best), 1, ... of the centre is the favourite: phi^i, normalised."""
    return torch.softmax(-lam[..., None] * torch.arange(n, dtype=lam.dtype, device=lam.device), -1)


def favourite_entropy(n: int, lam: Tensor) -> Tensor:
    """Entropy (nats) of people's favourites: log n at lam = 0; its slope in lam is -lam * Var(place)."""
    return torch.special.entr(top_choice(n, lam)).sum(-1)


def enumerate_rankings(n: int) -> Tensor:
    """(n!, n) ranks of all rankings of n items (5,040 for n = 7), for quantities without a closed form."""
    return torch.tensor(list(itertools.permutations(range(n))))


def pair_rates(ranks: Tensor, weight: Tensor) -> Tensor:
    """(..., n, n) share of rankings (count, n), weighted by (..., count), that place item i above item j."""
    above = ranks[:, :, None] < ranks[:, None, :]                                       # (count, n, n)
    return torch.einsum("...r,rij->...ij", weight / weight.sum(-1, keepdim=True), above.to(weight.dtype))


def invert(decreasing, value: Tensor, high: float = 50.0) -> Tensor:
    """The x in [0, high] where a decreasing function equals each value, by bisection; else the nearer end."""
    low, high = torch.zeros_like(value), torch.full_like(value, high)
    for _ in range(64):
        middle = (low + high) / 2
        above = decreasing(middle) > value
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def lam_of_entropy(entropy: Tensor, n: int) -> Tensor:
    """The lam at which people's favourites among n answers have this entropy (nats)."""
    return invert(lambda lam: favourite_entropy(n, lam), entropy)


def lam_of_choices(counts: Tensor) -> Tensor:
    """lam from counts (..., n): how often each of n answers was drawn or named best; needs no order of them.
    One count is added, 1/n per answer: otherwise a few draws that happen to agree would make lam infinite."""
    n = counts.shape[-1]
    share = (counts + 1 / n) / (counts.sum(-1, keepdim=True) + 1)
    return lam_of_entropy(torch.special.entr(share).sum(-1), n)


# ------------------------------------------------------------------------------------------------------------
# 2. Pair probabilities.  Entry [i, j] of a matrix: how often, or how probably, answer i is preferred to j.

def to_lam(phis) -> Tensor:
    return -torch.as_tensor(phis, dtype=F64).log()


def pairs_of(n: int) -> Tensor:
    """(2, n(n-1)/2) indices of the pairs i < j."""
    return torch.triu_indices(n, n, 1)


def truth(n: int, lam: Tensor) -> Tensor:
    """(..., n, n) exact pair probabilities: what infinitely many people say (1/2 on the diagonal)."""
    place = torch.arange(n, dtype=F64)
    return mallowspo.pair_probability(place - place[:, None], lam[..., None, None])


def draw_pairs(rng, chances: Tensor, count) -> Tensor:
    """(..., n, n) wins in `count` random pairs of answers, judged with the probabilities `chances`."""
    i, j = pairs_of(chances.shape[-1])
    seen = rng.multinomial(count, np.full(len(i), 1 / len(i)), size=chances.shape[:-2])     # (..., pairs)
    won = rng.binomial(seen, chances[..., i, j].clamp(0, 1).numpy())
    wins = torch.zeros(chances.shape, dtype=F64)
    wins[..., i, j] = torch.from_numpy(won).to(F64)
    wins[..., j, i] = torch.from_numpy(seen - won).to(F64)
    return wins


# ------------------------------------------------------------------------------------------------------------
# 3. Fitting a policy pi = ref * exp(u / beta) / Z.  The losses depend on u alone; beta only turns u into pi.

def fit_policy(link: str, wins: Tensor, lam: Tensor, steps: int = 60, ridge: float = 1e-10) -> Tensor:
    """The u (..., n) with the least mean loss over all pairs of all prompts: one policy for the P prompts of
    wins (..., P, n, n) with dispersions lam (..., P).  Dimensions before P are independent fits, run at once.
    Fisher scoring: the curvature of a pair is its squared slope, averaged over the judgements that the model
    predicts, so it is never negative, whatever the link.  Levenberg's damping: no step raises the loss.  It
    takes 10 to 60 steps.  Separable data have no minimum; for them the ridge stops the growth of u."""
    n = wins.shape[-1]
    i, j = pairs_of(n)
    wins = wins / wins.sum((-3, -2, -1), keepdim=True)
    won, lost = wins[..., i, j], wins[..., j, i]                                        # (..., P, pairs)
    lam = lam.expand(won.shape[:-1])[..., None]
    design = torch.eye(n, dtype=F64)[i] - torch.eye(n, dtype=F64)[j]                    # (pairs, n)

    def look(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:           # mean loss (...), gradient, curvature
        gap = (u @ design.T)[..., None, :].expand(won.shape).detach().requires_grad_()
        win, lose = LINKS[link](gap, lam), LINKS[link](-gap, lam)                       # (..., P, pairs)
        win_slope, lose_slope = (torch.autograd.grad(loss.sum(), gap)[0] for loss in (win, lose))
        win, lose = win.detach(), lose.detach()
        value = (won * win + lost * lose).sum((-2, -1)) + ridge / 2 * u.square().sum(-1)
        gradient = (won * win_slope + lost * lose_slope).sum(-2) @ design + ridge * u
        bend = torch.exp(-win) * win_slope ** 2 + torch.exp(-lose) * lose_slope ** 2
        if link == "square":
            bend = torch.full_like(bend, 2)         # IPO is no likelihood; its curvature is 2 everywhere
        curvature = design.T @ (((won + lost) * bend).sum(-2)[..., None] * design)
        return value, gradient, curvature + ridge * torch.eye(n, dtype=F64)

    u = torch.zeros(*won.shape[:-2], n, dtype=F64)
    (value, gradient, curvature), damping = look(u), torch.full(won.shape[:-2], 1e-3, dtype=F64)
    for _ in range(steps):
        stiff = torch.diag_embed(damping[..., None] * curvature.diagonal(dim1=-2, dim2=-1))
        # + 1 / n: the losses do not change if a constant is added to u, so the matrix alone would be singular
        move = torch.linalg.solve(curvature + stiff + 1 / n, gradient)
        could_gain = (gradient * move).sum(-1)
        new_value, new_gradient, new_curvature = look(u - move)
        better = new_value <= value
        u = torch.where(better[..., None], u - move, u)
        value = torch.where(better, new_value, value)
        gradient = torch.where(better[..., None], new_gradient, gradient)
        curvature = torch.where(better[..., None, None], new_curvature, curvature)
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-12, 1e8)
        if could_gain.max() < 1e-15:
            break
    return u - u.mean(-1, keepdim=True)


def excess(link: str, u: Tensor, lam: Tensor, chances: Tensor) -> Tensor:
    """(...) log-loss of a shared u (..., n) on new pairs, minus the least for chances (..., P, n, n)."""
    i, j = pairs_of(u.shape[-1])
    gap = (u[..., i] - u[..., j])[..., None, :]                                         # (..., 1, pairs)
    p, q = chances[..., i, j], chances[..., j, i]                                       # (..., P, pairs)
    loss = p * LINKS[link](gap, lam[..., None]) + q * LINKS[link](-gap, lam[..., None])
    return 1000 * (loss - torch.special.entr(p) - torch.special.entr(q)).mean((-2, -1))         # mnat


def slope_per_rank(u: Tensor) -> Tensor:
    """(...) mean decrease of u from one place to the next; 1 for the target pi_ref * exp(-place / beta)."""
    return (u[..., 0] - u[..., -1]) / (u.shape[-1] - 1)


def mean_se(x: Tensor) -> tuple[float, float]:
    """Mean over the seeds and its standard error (0 for a single seed)."""
    se = x.std().item() / math.sqrt(len(x)) if x.numel() > 1 else 0.0
    return x.mean().item(), se


def ratio_se(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Ratio of two means over the same seeds and its standard error (delta method)."""
    ratio = (a.mean() / b.mean()).item()
    return ratio, mean_se(a - ratio * b)[1] / b.mean().item()


# ------------------------------------------------------------------------------------------------------------
# 4. The experiments.  Each takes the options and returns rows and claims.  Numbers are means over seeds, `se`
#    their standard errors; log-losses are in mnat (thousandths of a nat).

class Result(NamedTuple):
    rows: list[dict]
    claims: list[tuple[str, bool, str]]  # claim, whether it holds, the numbers behind that
    curves: list[dict] | None = None     # finer rows, for the picture
    more: dict | None = None             # additional keys of NAME.json


def pick(rows, value, **where) -> list:
    """The values of the key `value` in the rows that match all of `where`."""
    return [row[value] for row in rows if where.items() <= row.items()]


def table(columns: dict) -> list[dict]:
    """Turn columns into rows; a column given as a single value is repeated in every row."""
    values = [column.tolist() for column in np.broadcast_arrays(*columns.values())]
    return [dict(zip(columns, row)) for row in zip(*values)]


def spearman(opt) -> Result:
    """theta's link sigmoid(2 lam gap) is a lower bound of Spearman's pair probability: exact for answers that
    a person ranks side by side.  For others lam needs a factor that grows with n and with phi."""
    phis, rows = opt.phis or [.05, .3, .5, .7, .9, .95, .99], []
    lam, factors = to_lam(phis)[:, None], torch.linspace(1, 3, 801, dtype=F64)
    for n in (3, 5, 7):
        i, j = pairs_of(n)
        ranks, gap = enumerate_rankings(n), (j - i).to(F64)
        cost = (ranks - torch.arange(n)).square().sum(-1)             # (n!,) the distance of Spearman's rho
        p = torch.softmax(-lam * cost, -1)                            # (phis, n!)
        link = torch.exp(-LINKS["mallows-theta"](gap, lam))                             # (phis, pairs)
        above = pair_rates(ranks, p)[..., i, j] - link
        beside = ((ranks[:, i] - ranks[:, j]).abs() == 1).to(F64)                       # (n!, pairs)
        adjacent = (p @ (beside * (ranks[:, i] < ranks[:, j]))) / (p @ beside) - link
        stretched = torch.exp(-LINKS["mallows-theta"](gap, factors[:, None, None] * lam))
        errors = (above + link - stretched).abs().amax(-1)                              # (factors, phis)
        rows += table({"n": n, "phi": phis, "largest error": above.amax(-1), "smallest": above.amin(-1),
                       "side by side": adjacent.abs().amax(-1), "best factor": factors[errors.argmin(0)],
                       "error with it": errors.amin(0)})
    worst, least = max(pick(rows, "largest error", n=5)), min(pick(rows, "smallest"))
    return Result(rows, [
        ("theta's link is Spearman's pair probability", worst < 1e-3, f"off by {worst:.3f} at n = 5"),
        ("theta's link never exceeds that probability", least > -1e-12, f"smallest difference {least:.0e}")])


def optimum(opt) -> Result:
    """With infinite data, one prompt and one beta, MallowsPO-phi learns pi_ref * exp(-place / beta), 1 nat
    per rank, at every phi.  What the others learn depends on phi; DPO's slope blows up where people agree."""
    phis = opt.phis or [.01, .05, .1, .2, .3, .5, .7, .8, .9, .95, .98]
    lam = to_lam(phis)[:, None]
    rows, claims = [], []
    for method in opt.methods:
        u = fit_policy(METHODS[method], truth(opt.n, lam), lam)                         # (phis, n)
        slope, best = slope_per_rank(u), torch.softmax(u / opt.beta, -1)[:, 0]
        rows += table({"method": method, "phi": phis, "slope": slope, "best": best})
        low, high = slope.min().item(), slope.max().item()
        claims.append((f"{method} learns 1 nat per rank at every dispersion", max(1 - low, high - 1) < 1e-3,
                       f"{low:.3f} to {high:.3f}, {high / max(low, 1e-12):.4g} x apart"))
    return Result(rows, claims)


def growth(opt) -> Result:
    """On a pair that nobody disputes, no likelihood method stops: the margin grows like log(time).  MallowsPO
    slows it if the prompt's index says that people agree, and speeds it up if not.  Only IPO is bounded."""
    curves, claims = [], []
    grid = torch.cat([torch.linspace(0, 1, 10_001, dtype=F64), torch.linspace(1, 1500, 150_000, dtype=F64)[1:]])
    time = np.logspace(0, 8, 33)
    for phi in opt.phis or [.05, .3, .9]:
        for method in opt.methods:
            x = grid.clone().requires_grad_()
            # gradient flow on the two logits: d margin / d time = -2 loss'(margin); time integrates 1 / speed
            speed, = torch.autograd.grad(-2 * LINKS[METHODS[method]](x, to_lam(phi)).sum(), x)
            usable = int((speed > 1e-12).sum())
            margin, speed = grid[:usable].numpy(), speed[:usable].numpy()
            elapsed = np.append(0, np.cumsum(np.diff(margin) * (1 / speed[1:] + 1 / speed[:-1]) / 2))
            now = np.interp(time, elapsed, margin)
            pace = time * np.exp(np.interp(now, margin, np.log(speed))) * (time < elapsed[-1])
            curves += table({"phi": phi, "method": method, "time": time, "margin": now, "per e-fold": pace})
        if {"mallows-phi", "dpo"} <= set(opt.methods):
            ours, = pick(curves, "per e-fold", phi=phi, time=1e6, method="mallows-phi")
            dpo, = pick(curves, "per e-fold", phi=phi, time=1e6, method="dpo")
            claims.append((f"phi's margin grows slower than DPO's on undisputed pairs, phi = {phi}",
                           ours < dpo, f"{ours / dpo:.2f} x DPO's pace, without end"))
    return Result([row for row in curves if row["time"] in (1e2, 1e4, 1e6, 1e8)], claims, curves)


def frontier(opt) -> Result:
    """Mean place of the answers (0 is best) at a mean KL of 1/2 nat, with one beta for prompts of many
    dispersions.  MallowsPO-phi is optimal for the consensus, but not for a random annotator: there IPO is."""
    lam, rng = to_lam(opt.phis or [.05, .1, .2, .5, .8, .9, .95]), np.random.default_rng(opt.seed)
    chances = truth(opt.n, lam)                                                         # (P, n, n)
    places = {"consensus": torch.arange(opt.n, dtype=F64).expand(len(lam), -1),
              "annotator": chances.sum(-2) - 1 / 2}           # expected place: how many others are above it
    found = Result(rows=[], claims=[], curves=[])
    for count in ["infinite", *(opt.pairs or [1024, 64])]:
        wins = chances if count == "infinite" else draw_pairs(rng, chances.expand(opt.seeds, -1, -1, -1), count)
        wins = wins[..., None, :, :]                            # each of the P prompts has a policy of its own
        policies = {name: fit_policy(METHODS[name], wins, lam[:, None]) for name in opt.methods}
        for judge, place in places.items():
            rivals = {"best possible": -place, **policies} if count == "infinite" else policies
            for method, u in rivals.items():
                mean, se = mean_se(place_at_kl(u, place, .5))
                found.rows.append({"judge": judge, "pairs": count, "method": method, "place": mean, "se": se})
                if count == "infinite":
                    found.curves.extend({"judge": judge, "method": method, "kl": kl,
                                         "place": place_at_kl(u, place, kl).item()} for kl in np.arange(1, 21) / 20)
                if count == "infinite" and method in ("mallows-phi", "ipo"):
                    best, = pick(found.rows, "place", judge=judge, method="best possible")
                    found.claims.append((f"{method} is optimal, judged by the {judge}", mean < best + .005,
                                         f"place {mean:.3f}, best possible {best:.3f}"))
    return found


def place_at_kl(u: Tensor, place: Tensor, kl: float) -> Tensor:
    """(...) mean place under the policies softmax(scale * u), u (..., P, n), scaled to a mean KL of kl."""
    policy = lambda scale: torch.softmax(scale[..., None, None] * u, -1)
    entropy = lambda scale: torch.special.entr(policy(scale)).sum(-1).mean(-1)      # falls as the scale grows
    target = torch.full(u.shape[:-2], math.log(u.shape[-1]) - kl, dtype=F64)
    return (policy(invert(entropy, target, high=1e4)) * place).sum(-1).mean(-1)


def samples(opt) -> Result:
    """The cost of a disputed prompt: with few pairs, MallowsPO-phi amplifies their noise.  With N pairs, its
    regret, beta * KL(pi || pi*), divided by DPO's is above 1 until N * lam^2 reaches 3 to 8."""
    phis, rng = opt.phis or [.7, .8, .9, .95], np.random.default_rng(opt.seed)
    lam = to_lam(phis)
    reach = torch.tensor([.1, .3, 1, 2, 3, 6, 10, 30, 100], dtype=F64)[:, None].expand(-1, len(lam))
    counts = (reach / lam ** 2).ceil().long()                                           # (counts, phis)
    if opt.pairs:
        counts = torch.tensor(opt.pairs)[:, None].expand(-1, len(lam))
        reach = counts * lam ** 2
    wins = draw_pairs(rng, truth(opt.n, lam).expand(opt.seeds, len(counts), -1, -1, -1), counts.numpy())
    target = torch.log_softmax(-torch.arange(opt.n, dtype=F64) / opt.beta, -1)
    rows, regret = [], {}
    for method in ("dpo", "mallows-phi"):
        u = fit_policy(METHODS[method], wins[..., None, :, :], lam[:, None])            # (S, counts, phis, n)
        policy = torch.log_softmax(u / opt.beta, -1)
        regret[method] = opt.beta * (policy.exp() * (policy - target)).sum(-1)          # (S, counts, phis)
    for c, k in np.ndindex(*counts.shape):
        dpo, ours = regret["dpo"][:, c, k], regret["mallows-phi"][:, c, k]
        ratio, se = ratio_se(ours, dpo)
        rows.append({"phi": phis[k], "pairs": int(counts[c, k]), "N lam^2": reach[c, k].item(),
                     "dpo": dpo.mean().item(), "mallows-phi": ours.mean().item(), "ratio": ratio, "se": se})
    few = [row["ratio"] for row in rows if row["phi"] >= .8 and row["N lam^2"] < .5]
    many = [row["ratio"] for row in rows if row["phi"] >= .8 and row["N lam^2"] >= 30]
    return Result(rows, [(f"phi beats DPO on a disputed prompt, N lam^2 {size} (N pairs)", max(ratios) < 1,
                          f"regret {min(ratios):.2f} to {max(ratios):.2f} x DPO's")
                         for size, ratios in (("< 0.5", few), (">= 30", many)) if ratios])


def compare(opt, rng, train: Tensor, test: Tensor, lam: Tensor, entropy: Tensor,
            choices: Tensor) -> tuple[list[dict], dict[str, dict]]:
    """For each index, one policy for P prompts: fitted to pairs drawn with probabilities `train`, judged by
    `test`, both (S, P, n, n).  Returns all rows, and index -> its row at 256 pairs.
    lam: (S, P) best known; entropy: (S, P) of people's favourites; choices: (S, P, n) favourites' counts."""
    prompts, n = lam.shape[-1], test.shape[-1]
    i, j = pairs_of(n)
    proxy = mallowspo.dispersion_weight(entropy / math.log(n), 1.0)                     # (S, P)
    moved = torch.arange(prompts) + torch.from_numpy(rng.integers(1, max(prompts, 2), size=(len(lam), 1)))
    indices = {"dpo": ("sigmoid", lam),
               "phi, one index": ("mallows-phi", lam.mean(-1, keepdim=True).expand_as(lam)),
               "phi, best index": ("mallows-phi", lam),
               "theta, best index": ("mallows-theta", lam),
               "phi, entropy proxy": ("mallows-phi", proxy / proxy.mean(-1, keepdim=True)),
               "phi, inverted entropy": ("mallows-phi", lam_of_choices(choices)),
               "phi, shuffled index": ("mallows-phi", lam.gather(-1, moved % prompts)),     # another prompt's
               "dpo, one policy each": ("sigmoid", lam)}
    counts = opt.pairs or [16, 64, 256, 1024]
    rows, loss = [], {}
    for count in counts:
        wins = draw_pairs(rng, train, count)
        for name, (link, index) in indices.items():
            alone = name == "dpo, one policy each"          # then each prompt is fitted by itself
            group = lambda x, alone=alone: x[:, :, None] if alone else x
            u = fit_policy(link, group(wins), group(index))                             # (S, n) or (S, P, n)
            loss[name] = excess(link, u, group(index), group(test)).view(len(lam), -1).mean(-1)
            mean, se = mean_se(loss[name])
            ahead, ahead_se = mean_se(loss[name] - loss["dpo"])
            rows.append({"index": name, "pairs": count, "excess": mean, "se": se, "minus DPO": ahead,
                         "minus DPO se": ahead_se, "slope": slope_per_rank(u).mean().item(),
                         "tau": (u[..., i] - u[..., j]).sign().mean().item()})
    count = 256 if 256 in counts else counts[-1]            # the claims are judged at this count
    return rows, {row["index"]: row for row in rows if row["pairs"] == count}


def shared(opt) -> Result:
    """One policy for prompts that differ only in dispersion, as in a language model: log-loss on new pairs
    above the least possible, mnat.  True dispersions remove nearly all of DPO's; wrong ones increase it."""
    lam = to_lam(opt.phis or [.05, .1, .3, .6, .9, .95]).expand(opt.seeds, -1)
    rng, chances = np.random.default_rng(opt.seed), truth(opt.n, lam)
    choices = torch.from_numpy(rng.multinomial(64, top_choice(opt.n, lam).numpy())).to(F64)
    rows, at = compare(opt, rng, chances, chances, lam, favourite_entropy(opt.n, lam), choices)
    loss, count = {name: row["excess"] for name, row in at.items()}, at["dpo"]["pairs"]
    return Result(rows, [(f"one policy for many dispersions: {name} beats DPO", loss[name] < loss["dpo"],
                          f"{loss[name]:.1f} against {loss['dpo']:.1f} mnat, {count} pairs per prompt")
                         for name in ("phi, best index", "phi, entropy proxy", "phi, shuffled index")])


def trust(opt) -> Result:
    """How far to trust an index, learned from the pairs as in train.py --dispersion-power learn.  Ratio of
    the excess log-loss to DPO's, by the noise r of the index, with power 1, the learned power, and the best
    fixed power of a grid.  A useless index gets a power near 0, which is close to DPO."""
    rng, rows = np.random.default_rng(opt.seed), []
    count = (opt.pairs or [256])[0]
    z, grid = torch.special.ndtri((torch.arange(12, dtype=F64) + .5) / 12), (0, .25, .5, .75, 1, 1.5)
    for spread in (.4, .8, 1.3):
        log_lam = (math.log(.7) + spread * z / z.std(correction=0)).expand(opt.seeds, -1)   # (S, 12)
        chances = truth(opt.n, log_lam.exp())
        halves = [draw_pairs(rng, chances, (count + side) // 2) for side in (0, 1)]
        wins = halves[0] + halves[1]

        def loss(power, index, wins=wins, chances=chances) -> Tensor:
            weight = mallowspo.dispersion_weight(index, 1.0, power)
            weight = weight / weight.mean(-1, keepdim=True)
            return excess("mallows-phi", fit_policy("mallows-phi", wins, weight), weight, chances)

        dpo = excess("sigmoid", fit_policy("sigmoid", wins, log_lam), log_lam, chances)
        for r in (0, .5, 1, 1.5, "useless"):
            error = torch.from_numpy(rng.standard_normal(log_lam.shape))
            guess = spread * error if r == "useless" else log_lam + r * spread * error
            index = torch.exp(-guess.exp())                                             # (S, 12)
            power = learned_power(halves, index)                                        # (S, 1)
            for name, powers in (("power 1", [1.0]), ("learned", [power]), ("best fixed", grid)):
                best = min((loss(p, index) for p in powers), key=lambda x: x.mean())
                ratio, se = ratio_se(best, dpo)
                rows.append({"spread": spread, "power": name, "r": r, "ratio": ratio, "se": se,
                             "learned": power.mean().item()})
    learned = [row for row in rows if row["power"] == "learned"]
    worst = max(learned, key=lambda row: row["ratio"] - 2 * row["se"])
    behind = max(row["ratio"] - best for row, best in zip(learned, pick(rows, "ratio", power="best fixed")))
    return Result(rows, [
        ("phi with a learned power never loses to DPO", worst["ratio"] < 1 + 2 * worst["se"],
         f"at worst {worst['ratio']:.2f} +- {worst['se']:.2f} x DPO's excess"),
        ("the learned power is as good as the best fixed one", behind < .05, f"behind by up to {behind:.2f}")])


def learned_power(halves: list[Tensor], index: Tensor) -> Tensor:
    """(S, 1) the power for an index (S, P).  DPO learns an order of the answers from each half of the pairs
    (S, P, n, n); mallowspo.fit_trust gets how often that order agrees with the other half."""
    i, j = pairs_of(halves[0].shape[-1])
    found, kappas = [], []
    for mine, other in (halves, halves[::-1]):
        u = fit_policy("sigmoid", mine, index)                                          # (S, n)
        first = (u[:, i] > u[:, j])[:, None]                                            # (S, 1, pairs)
        won, lost = other[..., i, j], other[..., j, i]                                  # (S, P, pairs)
        found.append(torch.stack([torch.where(first, won, lost).sum(-1), torch.where(first, lost, won).sum(-1)], -1))
    for counts, h in zip(sum(found).long(), index):                                     # (P, 2) right, wrong; (P,)
        agrees = torch.tensor([1.0, 0.0]).repeat(len(h)).repeat_interleave(counts.flatten())
        kappas.append(mallowspo.fit_trust(agrees, h.repeat_interleave(counts.sum(-1))).kappa)
    return torch.tensor(kappas, dtype=F64).clamp(*mallowspo.POWERS)[:, None]


# ------------------------------------------------------------------------------------------------------------
# 5. Related methods that need a sampler, a judge or another kind of data, with the same objective.  Random
#    numbers come from torch's global generator.  S seeds are S independent runs, computed side by side.

def descend(parts: list[Tensor], loss: Callable, steps: int, rate: float) -> Iterator[list[Tensor]]:
    """Minimise the losses (S,) of S independent seeds over parts (S, ...) with Adam; yield the parts after
    each step.  Use them before the next step, which changes them in place."""
    parts = [part.clone().requires_grad_() for part in parts]
    optimizer = torch.optim.Adam(parts, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(parts).sum().backward()
        optimizer.step()
        yield [part.detach() for part in parts]


def pair_loss(logp: Tensor, ref_logp: Tensor, weight: Tensor, beta: float) -> Tensor:
    """(S,) mean DPO loss of pairs: logp, ref_logp (S, ..., 2), chosen first; weight expands to (S, ...)."""
    flat, weight = logp.reshape(-1, 2), weight.expand(logp.shape[:-1]).reshape(-1)
    method = mallowspo.LOSSES["dpo"]._replace(beta=beta)
    loss = mallowspo.objective(method, flat, ref_logp.reshape(-1, 2), torch.ones_like(flat), weight).loss
    return loss.view(len(logp), -1).mean(-1)


def advantage_loss(logp: Tensor, ref_logp: Tensor, weight: Tensor, beta: float) -> Tensor:
    """(S,) APA's (2306.02231): weight * beta * log-ratio should be the advantage over the other, +-1/2."""
    gap = weight[..., None] * beta * (logp - ref_logp) - torch.tensor([.5, -.5], dtype=F64)
    return gap.square().sum(-1).mean((-2, -1))


class Crowd:
    """P prompts of several dispersions, people who judge, and policies first(y | x) * exp(u(y) + v(x, y)) / Z
    over n answers: all prompts share u, so each helps the others.  theta: (S, 1 + P, n), u then v."""

    def __init__(self, opt):
        self.lam, self.n = to_lam(opt.phis or np.linspace(.05, .95, 8)), opt.n
        self.chances = truth(self.n, self.lam)                                          # (P, n, n)
        # The first policy knows a little: half of it is people's favourites, the other half is uniform.
        self.first = ((top_choice(self.n, self.lam) + 1 / self.n) / 2).log()            # (P, n)
        self.start = torch.zeros(opt.seeds, 1 + len(self.lam), self.n, dtype=F64)

    def logp(self, theta: Tensor) -> Tensor:
        """(S, P, n) log-probability of every answer."""
        return torch.log_softmax(self.first + theta[:, :1] + theta[:, 1:], -1)

    def draw(self, logp: Tensor, count: int) -> Tensor:
        """(S, P, count, 2) pairs of different answers, drawn from the policy (Gumbel's trick)."""
        noise = -torch.log(-torch.log(torch.rand(*logp.shape[:2], count, self.n, dtype=F64)))
        return (logp[:, :, None] + noise).topk(2).indices

    def judge(self, pairs: Tensor) -> Tensor:
        """The pairs, with the answer that a random person prefers put first: one gold label each."""
        prompt = torch.arange(len(self.lam))[:, None]
        agrees = torch.rand(pairs.shape[:3], dtype=F64) < self.chances[prompt, pairs[..., 0], pairs[..., 1]]
        return torch.where(agrees[..., None], pairs, pairs.flip(-1))

    def regret(self, theta: Tensor) -> Tensor:
        """(S,) mean place of the policy's answers in the common ranking; 0 if they are always the best."""
        return (self.logp(theta).exp() * torch.arange(self.n, dtype=F64)).sum(-1).mean(-1)


def of_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    """(S, P, n) values of all answers -> (S, P, count, 2) values of the answers in these pairs."""
    return values[:, :, None].expand(*pairs.shape[:3], -1).gather(-1, pairs)


class Loop(NamedTuple):
    """How a policy learns in rounds from people who judge its answers."""
    loss: Callable = pair_loss
    beta: float = 0.3
    anchored: bool = False     # True: the reference is the first policy (APA); False: the previous round's
    momentum: float = 0.0      # Accelerated PO (2410.06293): extend the change of each round by this share
    silver: int = 0            # D2PO (2405.01511): pairs that a discriminator labels, per gold label; 0: none
    unsure: bool = False       # with D2PO: people judge the pairs that the discriminator is least sure of


LOOPS = {"iterated DPO": Loop(), "DPO, half of beta": Loop(beta=0.15), "Accelerated PO": Loop(momentum=0.5),
         "D2PO": Loop(silver=8), "D2PO, least sure": Loop(silver=8, unsure=True),
         "APA": Loop(advantage_loss, anchored=True)}


def fit_discriminator(crowd: Crowd, gold: Tensor, weight: Tensor) -> Tensor:
    """(S, P, n) answer scores u(y) + v(x, y), Bradley-Terry from all gold pairs, with an L2 penalty."""
    nothing = torch.zeros(gold.shape, dtype=F64)
    scores = lambda theta: theta[:, :1] + theta[:, 1:]
    loss = lambda parts: (pair_loss(of_pairs(scores(parts[0]), gold), nothing, weight[:, None], 1.0)
                          + .01 * parts[0].square().sum((-2, -1)))
    *_, [theta] = descend([crowd.start], loss, 40, .05)
    return scores(theta)


def run_loop(crowd: Crowd, loop: Loop, weight: Tensor, gold: int, rounds: int,
             discriminate: Callable = fit_discriminator) -> Tensor:
    """(S, rounds + 1) regret before and after each round, in which people give `gold` labels per prompt."""
    theta = last = crowd.start
    scores = torch.zeros_like(theta[:, 1:])
    regret, judged = [crowd.regret(theta)], []
    for _ in range(rounds):
        here = crowd.logp(theta)
        pairs = crowd.draw(here, max(1, loop.silver) * gold)
        asked = pairs[:, :, :gold]
        if loop.unsure:
            doubt = of_pairs(scores, pairs).diff(dim=-1)[..., 0].abs().argsort(dim=-1, stable=True)[..., :gold]
            asked = pairs.take_along_dim(doubt[..., None], 2)
        judged.append(crowd.judge(asked))
        labelled = judged[-1]
        if loop.silver:
            scores = discriminate(crowd, torch.cat(judged, 2), weight)
            found = of_pairs(scores, pairs)
            labelled = torch.where(found[..., :1] >= found[..., 1:], pairs, pairs.flip(-1))
        ref = of_pairs(crowd.logp(crowd.start) if loop.anchored else here, labelled)
        loss = lambda parts, ref=ref, labelled=labelled: loop.loss(
            of_pairs(crowd.logp(parts[0]), labelled), ref, weight[:, None], loop.beta)
        *_, [learned] = descend([theta], loss, 20, .05)
        theta, last = learned + loop.momentum * (learned - last), learned
        regret.append(crowd.regret(theta))
    return torch.stack(regret, 1)


def online(opt) -> Result:
    """A policy learns in rounds from people who judge its own answers: mean place of its answers by gold
    labels per prompt.  DPO with the previous round's policy as its reference, alone, with momentum
    (Accelerated PO), with a smaller beta, or with a discriminator that labels eight times as many pairs
    (D2PO); and APA.  Each runs without weights, and with weights from the prompts' dispersion."""
    gold, rounds = (opt.pairs or [2])[0], 8
    rows, found = [], {}
    crowd = Crowd(opt)
    entropy = torch.special.entr(crowd.first.exp()).sum(-1) / math.log(crowd.n)         # (P,)
    weights = {"none": torch.ones_like(crowd.lam), "known": crowd.lam,
               "entropy": mallowspo.dispersion_weight(entropy, 1.0)}
    for name, loop in LOOPS.items():
        for source, weight in weights.items():
            torch.manual_seed(opt.seed)                     # every run gets the same random numbers
            regret = found[name, source] = run_loop(crowd, loop, weight / weight.mean(), gold, rounds)
            for done in range(rounds + 1):
                mean, se = mean_se(regret[:, done])
                rows.append({"loop": name, "dispersion": source, "labels": gold * done, "place": mean, "se": se,
                             "line": f"{name}, {source}"})

    def claim(text: str, one: tuple, other: tuple, done: int) -> tuple[str, bool, str]:
        gain, se = mean_se(found[one][:, done] - found[other][:, done])
        return f"online, {gold * done} labels: {text}", gain < -2 * se, f"place {gain:+.3f} +- {se:.3f}"
    base, half = ("iterated DPO", "none"), rounds // 2
    rise = {name: found[name, "none"].diff(dim=1).amax(1) for name in ("APA", "iterated DPO")}
    steadier, se = mean_se(rise["APA"] - rise["iterated DPO"])
    shown = [row for row in rows if row["labels"] // gold in (0, 1, 2, 4, 8)]
    return Result(shown, [
        claim("momentum is faster than DPO", ("Accelerated PO", "none"), base, 2),
        claim("momentum is still ahead of DPO", ("Accelerated PO", "none"), base, half),
        claim("momentum is faster than halving beta", ("Accelerated PO", "none"), ("DPO, half of beta", "none"), 2),
        claim("silver labels help while gold is scarce", ("D2PO", "none"), base, 1),
        claim("silver labels still help later", ("D2PO", "none"), base, rounds),
        claim("having people judge unsure pairs helps", ("D2PO, least sure", "none"), ("D2PO", "none"), half),
        ("online: APA is steadier than DPO", steadier < -2 * se, f"largest rise {steadier:+.3f} +- {se:.3f}"),
        *(claim(f"dispersion helps {name}", (name, "known"), (name, "none"), half) for name in LOOPS)], rows)


def denoise(parts: list[Tensor], x: Tensor, angle: Tensor, half: Tensor) -> Tensor:
    """(S, B, 2) noise that S perceptrons predict in points (S, B, 2); angle (S, B), 0: none, pi / 2: all."""
    hidden = torch.cat([x, torch.stack([angle.cos(), angle.sin(), half], -1)], -1)
    *first, (matrix, bias) = zip(parts[::2], parts[1::2])
    for layer, shift in first:
        hidden = torch.nn.functional.silu(torch.baddbmm(shift, hidden, layer))
    return torch.baddbmm(bias, hidden, matrix)


def mix_noise(x: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    return angle[..., None].cos() * x + angle[..., None].sin() * noise


@torch.no_grad()
def sample_points(parts: list[Tensor], x: Tensor, half: Tensor) -> Tensor:
    """(S, B, 2) points from noise x in 20 deterministic steps (DDIM), so that two models are comparable."""
    for now, after in itertools.pairwise(torch.linspace(.98, 0, 21) * math.pi / 2):
        seen = denoise(parts, x, now.expand(half.shape), half)
        x = mix_noise((x - now.sin() * seen) / now.cos(), seen, after)
    return x


def nearness(x: Tensor, half: Tensor) -> Tensor:
    """(S, B) minus the distance to the preferred cloud, the right one of this half (-1: lower, 1: upper)."""
    return -(x - torch.stack([torch.ones_like(half), half], -1)).norm(dim=-1)


# The data: see diffusion.  The four clouds lie around (+-1, +-1), and the half of the plane is the prompt.
HALF_LAM = to_lam([.95, .05]).float()                                                   # of the lower, the upper half


def sides(*shape: int) -> Tensor:
    return 2.0 * torch.randint(2, shape) - 1


def angles(half: Tensor) -> Tensor:
    return (.98 * torch.rand(half.shape) + .01) * math.pi / 2


def points(half: Tensor) -> Tensor:
    return torch.stack([sides(*half.shape), half], -1) + .25 * torch.randn(*half.shape, 2)                  # (S, B, 2)


def perceptron(seeds: int, *sizes: int) -> list[Tensor]:
    parts = []
    for wide, next_wide in itertools.pairwise(sizes):
        parts += [torch.randn(seeds, wide, next_wide) / wide ** .5, torch.zeros(seeds, 1, next_wide)]
    return parts


def denoising_loss(parts: list[Tensor]) -> Tensor:
    """(S,) loss that trains the reference."""
    half = sides(len(parts[0]), 256)
    angle, noise = angles(half), torch.randn(*half.shape, 2)
    seen = denoise(parts, mix_noise(points(half), noise, angle), angle, half)
    return (seen - noise).square().mean((-2, -1))


def preference_loss(parts: list[Tensor], reference: list[Tensor], weight: Tensor) -> Tensor:
    """(S,) loss of Diffusion-DPO on newly drawn pairs; weight: (2,) of the lower and the upper half."""
    half = sides(len(parts[0]), 128)
    upper, angle = (half > 0).long(), angles(half)
    one, two = points(half), points(half)
    noise = torch.randn(*half.shape, 2)
    agrees = torch.rand(half.shape) < torch.sigmoid(HALF_LAM[upper])                    # neighbours in a ranking
    first = ((nearness(one, half) > nearness(two, half)) == agrees)[..., None]
    pair = torch.where(first, one, two), torch.where(first, two, one)

    def errors(parts):                                  # (S, B, 2) of both points, with the same angle and noise
        seen = [denoise(parts, mix_noise(x, noise, angle), angle, half) for x in pair]
        return torch.stack([(each - noise).square().mean(-1) for each in seen], -1)
    with torch.no_grad():
        before = errors(reference)
    return pair_loss(-errors(parts), -before, weight[upper], 30.0)


def diffusion(opt) -> Result:
    """Diffusion-DPO (2311.12908): the log-ratio is minus the difference of two denoising errors.  Points come
    from four clouds in a plane, and people prefer those on the right; in the lower half they disagree.  With
    the half's dispersion as the weight of a pair, and without: how often a point in the upper half beats one
    of the reference's, and how far each half drifts; over 8 seeds at most."""
    torch.manual_seed(opt.seed)
    seeds, rows = min(opt.seeds, 8), []
    paths = {"none": [], "known": []}           # lists of (3, S): win rate, upper and lower drift
    *_, reference = descend(perceptron(seeds, 5, 48, 48, 2), denoising_loss, 1000, .005)
    half, noise = torch.tensor([-1.0, 1.0]).repeat(256).expand(seeds, -1), torch.randn(seeds, 512, 2)
    base = sample_points(reference, noise, half)
    for name, weight in (("none", torch.ones(2)), ("known", HALF_LAM / HALF_LAM.mean())):
        loss = functools.partial(preference_loss, reference=reference, weight=weight)
        for step, parts in enumerate(descend(reference, loss, 150, 2e-4), 1):
            if step % 10:
                continue
            x = sample_points(parts, noise, half)
            better = nearness(x, half) > nearness(base.roll(2, 1), half)                # another point of the half
            drift = (x - base).norm(dim=-1)                                             # (S, B)
            won, drifts = better[:, 1::2].float().mean(-1), [drift[:, 1::2].mean(-1), drift[:, ::2].mean(-1)]
            paths[name].append(torch.stack([won, *drifts]))
            mean, se = mean_se(won)
            rows.append({"dispersion": name, "step": step, "win rate": mean, "se": se,
                         "upper drift": drifts[0].mean().item(), "lower drift": drifts[1].mean().item()})
    won, se = rows[-1]["win rate"], rows[-1]["se"]
    claims = [("diffusion: points become better than the reference's", won > .5 + 2 * se, f"{won:.3f} +- {se:.3f}")]
    for k, where in ((1, "people agree"), (2, "people disagree")):
        gain, se = mean_se(drift_at(.6, paths["known"], k) - drift_at(.6, paths["none"], k))
        claims.append((f"diffusion, win rate .6: dispersion reduces drift where {where}", gain < -2 * se,
                       f"{gain:+.3f} +- {se:.3f}"))
    curves = [{**row, "half": half, "drift": row[f"{half} drift"]} for half in ("upper", "lower") for row in rows]
    return Result([row for row in rows if row["step"] in (10, 50, 100, 150)], claims, curves)


def drift_at(win_rate: float, path: list[Tensor], k: int) -> Tensor:
    """(S,) field k of a path at the point where the win rate, field 0, first reaches this value."""
    fields = torch.stack([torch.zeros_like(path[0]), *path]).numpy()                    # (steps, 3, S)
    rising = np.maximum.accumulate(fields[:, 0])
    return torch.tensor([np.interp(win_rate, rising[:, s], fields[:, k, s]) for s in range(fields.shape[-1])])


# ------------------------------------------------------------------------------------------------------------
# 6. A bandit with words: a population that ranks answers in plain English, with known dispersions.
#    A language model learns its preferences in train.py's demo; what it learned is known exactly, as above.

# Each line: a question and its answers, the population's favourite first.  Phi rises from line to line.
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
ASKERS = """
Ada Ben Carla David Elena Felix Greta Hugo Ines Jonas Klara Leo Maria Nils Olga Paul Rosa Simon Tara Ulla
Viktor Wanda Xenia Yann Zoe Anton Bella Cyril Dora Emil Frida Gustav Hanna Igor Julia Karl Lena Nora Otto
""".split()
NEW_ASKERS = "Pia Quentin Rita Sven Thea Uwe Vera Willem".split()       # they ask only in the evaluation


class Population:
    """People who rank A = 6 answers to each of Q = 24 questions by one Kendall-Mallows model per question."""

    def __init__(self):
        lines = [line.split("?") for line in QUESTIONS.strip().splitlines()]
        self.questions = [question + "?" for question, _ in lines]
        self.answers = [words.split() for _, words in lines]                            # best first
        self.phi = torch.linspace(0.05, 0.95, len(self.questions), dtype=F64)           # (Q,)
        self.wins = truth(6, to_lam(self.phi))                                          # (Q, A, A)

    def prompt(self, name: str, question: int) -> str:
        return f"{name} asks: {self.questions[question]}\nAnswer:"

    def _asked(self, count: int, seed: int) -> Iterator[tuple[int, str, Tensor]]:
        """Yield `count` times a question, its prompt and a member's ranks; the questions take turns."""
        generator = torch.Generator().manual_seed(seed)
        names = torch.randint(len(ASKERS), (count,), generator=generator).tolist()
        turns = math.ceil(count / len(self.phi))
        rankings = [sample_rankings(turns, 6, -math.log(phi), generator) for phi in self.phi.tolist()]
        for i in range(count):
            turn, question = divmod(i, len(self.phi))
            yield question, self.prompt(ASKERS[names[i]], question), rankings[question][turn]

    def favourites(self, count: int, seed: int) -> Iterator[dict]:
        """Records for the reference: questions, each with a random member's favourite, and `NAME says:`
        records that go through all answers, so that it also learns to end an answer that nobody gives."""
        names, words = itertools.cycle(ASKERS), itertools.cycle(itertools.chain(*self.answers))
        for i, (question, prompt, ranks) in enumerate(self._asked(count, seed)):
            yield {"prompt": prompt, "chosen": " " + self.answers[question][int(ranks.argmin())]}
            if i % 4 == 0:
                yield {"prompt": f"{next(names)} says:", "chosen": " " + next(words)}

    def judgements(self, count: int, seed: int) -> Iterator[dict]:
        """Pairs of answers, drawn uniformly and judged by a random member, with the question's true phi."""
        rng = np.random.default_rng(seed)
        for question, prompt, ranks in self._asked(count, seed):
            better, worse = sorted(rng.choice(6, size=2, replace=False).tolist(), key=ranks.__getitem__)
            yield {"prompt": prompt, "chosen": " " + self.answers[question][better],
                   "rejected": " " + self.answers[question][worse], "dispersion": self.phi[question].item()}

    def measure(self, logp: Tensor, ref_logp: Tensor) -> dict[str, float]:
        """What a policy does to this population: exact sums over the answers, averaged over names and
        questions; the KL also over the agreed half and the disputed half of the questions.
        logp, ref_logp: (Q, N, A) log-probability of every answer to every question asked by every name."""
        p, r = logp.double().log_softmax(-1), ref_logp.double().log_softmax(-1)         # (Q, N, A)
        reward = (logp - ref_logp).double()
        i, j = pairs_of(6)
        lead, wins = reward[..., i] - reward[..., j], self.wins[:, None, i, j]          # (Q, N, pairs), (Q, 1, pairs)
        agree = torch.where(lead > 0, wins, 1 - wins).where(lead != 0, 0.5)             # (Q, N, pairs)
        found = {
            "kl": (p.exp() * (p - r)).sum(-1),
            "win_rate": torch.einsum("qni,qij,qnj->qn", p.exp(), self.wins, r.exp()),  # against the reference
            "consensus_rank": (p.exp() * torch.arange(6, dtype=F64)).sum(-1),       # 0: always the favourite
            "reward_accuracy": agree.mean(-1),                 # share of members who agree with the reward
            "entropy": -(p.exp() * p).sum(-1),
            "elsewhere": 1 - logp.double().exp().sum(-1),       # probability of anything but the six answers
        }
        found = {name: value.mean(-1) for name, value in found.items()}                 # (Q,)
        found["kl_agreed"], found["kl_disputed"] = found["kl"].chunk(2)
        return {name: value.mean().item() for name, value in found.items()}

    def best_accuracy(self) -> float:
        """The reward accuracy of the consensus order: no ranking agrees with more people."""
        i, j = pairs_of(6)
        return self.wins[:, i, j].mean().item()

    def tokenizer_files(self) -> dict[str, bytes]:
        """A byte-level BPE in which each of these words is a token, as the files of a Hugging Face folder."""
        texts = [f"{self.prompt(name, question)} {' '.join(words)}\n{name} says:"
                 for question, words in enumerate(self.answers) for name in ASKERS + NEW_ASKERS]
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
            vocab_size=2048, special_tokens=["<end>"], show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
        return {"tokenizer.json": bpe.to_str().encode(),
                "tokenizer_config.json": json.dumps(settings).encode()}


# Methods are compared where they have moved equally far from the reference: at these KLs (nats).
MATCHED_KL = (0.15, 0.2)
# +1: higher is better, -1: lower; then the change that counts as none, about the sd by seed (demo_seeds.py).
MEASURES = {"win_rate": (+1, 0.001), "consensus_rank": (-1, 0.01), "reward_accuracy": (+1, 0.005)}


def report(population: Population, runs: list[dict], records: list[dict]) -> tuple[dict, str]:
    """Compare methods, each trained with several betas: the content of report.json, and a text.
    runs: {"method", "beta", "power", and Population.measure's results}; records: a run's dispersion.jsonl."""
    seen = [[] for _ in population.phi]
    for record in records:
        line = int(record["where"].rpartition(":")[2]) - 1         # the lines take the questions in turn
        seen[line % len(seen)].append(record["entropy"])
    index = [float(np.mean(each)) if each else math.nan for each in seen]
    known = ~np.isnan(index)                                       # a short run does not reach every question
    correlation, told = math.nan, "there was no dispersion index"
    if known.sum() > 1:
        ranks = np.argsort(np.argsort(np.array(index)[known]))     # phi rises from question to question
        correlation = float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])                # Spearman's
        told = f"rank correlation of the dispersion index with the true phi: {correlation:.3f}"
    content = {"dispersion_rank_correlation": correlation, "true_phi": population.phi.tolist(),
               "index": index, "questions": population.questions, "runs": runs}
    columns = ("method", "beta", "power", "kl", "kl_agreed", "kl_disputed", *MEASURES, "elsewhere")
    lines = [f"--- report: {len(population.questions)} questions, asked by {len(NEW_ASKERS)} names "
             "never trained on; all figures are exact sums",
             told,
             f"highest possible reward accuracy, as people disagree: {population.best_accuracy():.4f}\n",
             lay_out([{name: run[name] for name in columns} for run in runs])]
    if any(run["method"] == "dpo" for run in runs):
        lines += [compare_at(kl, runs) for kl in MATCHED_KL]
    return content, "\n".join(lines)


def compare_at(kl: float, runs: list[dict]) -> str:
    """A line for each method except DPO: its difference from DPO at this KL."""
    reached = {run["method"]: at_kl(runs, run["method"], kl) for run in runs}
    dpo, lines = reached.pop("dpo"), [f"\nbeside dpo at KL {kl} nats, interpolated between two betas"]
    for name, row in reached.items():
        words = []
        for key, (good, same) in MEASURES.items() if dpo and row else ():
            change, verdict = row[key] - dpo[key], "worse"
            if abs(change) < same:
                verdict = "as good"
            elif good * change > 0:
                verdict = "better"
            words.append(f"{key.replace('_', ' ')} {change:+.4f} ({verdict})")
        lines.append(f"{name:<19} {', '.join(words) or 'no runs on both sides of this KL'}")
    return "\n".join(lines)


def at_kl(runs: list[dict], method: str, kl: float) -> dict[str, float] | None:
    """A method's figures at this KL, interpolated between two betas; None if it has no runs on both sides.
    Linear in the square root of the KL, in which the figures are nearly straight lines."""
    path = sorted((run for run in runs if run["method"] == method), key=lambda run: run["kl"])
    for low, high in itertools.pairwise(path):
        if low["kl"] <= kl < high["kl"]:
            t = (kl ** .5 - low["kl"] ** .5) / (high["kl"] ** .5 - low["kl"] ** .5)
            return {key: (1 - t) * low[key] + t * high[key] for key in low if key != "method"}
    return None


# ------------------------------------------------------------------------------------------------------------
# 7. What to run, print and draw.

class Panel(NamedTuple):
    """How rows are shown: y plotted by x, one panel per value of `facet`, one line per value of `by`."""
    x: str
    y: str
    by: str
    xlabel: str
    ylabel: str
    facet: str = ""
    log: str = ""             # which axes are logarithmic
    lines: tuple = ()         # values of `by` to draw; (): the first five
    grid: bool = True         # print a grid, y by x, as drawn; False: print the rows as they are
    se: str = "se"            # the key of y's standard error


INDICES = ("phi, best index", "dpo", "phi, entropy proxy", "phi, shuffled index")
ONLINE = ("D2PO, known", "iterated DPO, known", "D2PO, none", "iterated DPO, none")
EXPERIMENTS = {               # name -> a function of opt (its docstring is printed), how its rows are shown
    "spearman": (spearman, Panel(
        "phi", "largest error", "n", "dispersion phi", "exact probability - theta link, largest", grid=False)),
    "optimum": (optimum, Panel(
        "phi", "slope", "method", "dispersion phi (0: all agree, 1: coin toss)", "learned nats per rank", log="y")),
    "growth": (growth, Panel(
        "time", "margin", "method", "training time (steps x rate)", "margin (nats)", facet="phi", log="xy")),
    "frontier": (frontier, Panel(
        "kl", "place", "method", "mean KL to the reference (nats)", "mean place (0 best)", facet="judge", grid=False)),
    "samples": (samples, Panel(
        "N lam^2", "ratio", "phi", "N lam^2, N pairs of the prompt", "regret, MallowsPO-phi / DPO", log="xy")),
    "shared": (shared, Panel(
        "pairs", "excess", "index", "pairs per prompt", "excess log-loss (mnat)", log="xy", lines=INDICES)),
    "trust": (trust, Panel(
        "r", "ratio", "power", "r: noise of the index / its true spread", "excess log-loss / DPO's", facet="spread")),
    "online": (online, Panel(
        "labels", "place", "line", "gold labels per prompt", "mean place (0 best)", lines=ONLINE)),
    "diffusion": (diffusion, Panel(
        "drift", "win rate", "dispersion", "drift of the half", "win rate, upper half", facet="half", grid=False)),
}
STYLES = ("o-", "s--", "^-.", "D:", "v-")
say_once = functools.cache(print)


def pivot(rows: list[dict], panel: Panel) -> list[dict]:
    """y by x: a row for each value of `facet` and `by`, a column for each value of x."""
    lines = {}
    for row in rows:
        text = f"{row[panel.y]:.4g}"
        if row.get(panel.se, 0) > 1e-12:
            text += f" +-{row[panel.se]:.2g}"
        start = {key: row[key] for key in (panel.facet, panel.by) if key}
        line = lines.setdefault(tuple(start.values()), {**start, f"{panel.y} by {panel.x}:": ""})
        line[row[panel.x]] = text
    return list(lines.values())


def lay_out(rows: list[dict]) -> str:
    """Format rows as a table."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = [head, *([row.get(key, "") for key in head] for row in rows)]
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in cells)


def draw(rows: list[dict], panel: Panel, path: Path) -> None:
    """Save the picture, if matplotlib is installed."""
    try:
        import matplotlib.figure
    except ImportError:
        say_once("no pictures: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.rcParams["font.size"] = 14
    facets = list(dict.fromkeys(row.get(panel.facet) for row in rows))
    figure = matplotlib.figure.Figure(figsize=(5.7 * len(facets), 4.6), dpi=75, layout="constrained")
    for axes, facet in zip(figure.subplots(1, len(facets), squeeze=False)[0], facets):
        here = [row for row in rows if row.get(panel.facet) == facet]
        for style, name in zip(STYLES, panel.lines or dict.fromkeys(pick(here, panel.by))):
            line = [row for row in here if row[panel.by] == name]
            axes.plot(pick(line, panel.x), pick(line, panel.y), style, label=name, markevery=max(len(line) // 12, 1))
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, **{f"{name}scale": "log" for name in panel.log})
        if panel.facet:
            axes.set_title(f"{panel.facet} = {facet}".removeprefix("measure = "))
        axes.legend(title=panel.by)
        axes.grid(alpha=.3)
    figure.savefig(path)


def perform(experiments: dict, opt) -> None:
    """Print each docstring and table, write NAME.json and NAME.png to opt.out; then print the verdict."""
    torch.set_num_threads(1)                  # the matrices are tiny: more threads only wait for each other
    opt.out.mkdir(parents=True, exist_ok=True)
    claims, start = [], time.time()
    for name, (run, panel) in experiments.items():
        print(f"\n{name}: " + " ".join(run.__doc__.split()))
        result = run(opt)
        record = {"experiment": name, "settings": {**vars(opt), "out": str(opt.out)},
                  **(result.more or {}), "rows": result.rows, "claims": result.claims}
        (opt.out / f"{name}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        if result.rows:
            print(lay_out(pivot(result.rows, panel) if panel.grid else result.rows))
            draw(result.curves or result.rows, panel, opt.out / f"{name}.png")
        claims += result.claims
    print(f"\nVerdict ({opt.seeds} seeds, {time.time() - start:.0f} s)")
    for claim, holds, found in claims:
        verdict = "holds" if holds else "FAILS"
        print(f"  {verdict:<9} {claim:<74} {found}")


def number(kind: type, low: float, high: float) -> Callable:
    """An argparse type for a number of this kind in [low, high]."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not in the range {low} to {high}")
    return number


def main(about: str = __doc__, experiments: dict = EXPERIMENTS):
    parser = argparse.ArgumentParser(description=about, usage="python %(prog)s [EXPERIMENT] [flags]",
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("experiment", nargs="?", default="all", choices=["all", *experiments], help="default: all")
    flag("--n", type=number(int, 2, 30), default=5, help="answers per prompt (5)")
    flag("--phis", type=number(float, .001, .999), nargs="+", help="dispersions phi (default: by experiment)")
    flag("--pairs", type=number(int, 1, 10**7), nargs="+", help="pairs per prompt; trust, online: the first")
    flag("--seeds", type=number(int, 1, 10_000), default=20, help="independent repetitions (20)")
    flag("--beta", type=number(float, .001, 1000), default=1.0, help="in optimum, samples: pull to ref (1)")
    flag("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="in optimum, growth, frontier (all)")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="seed of the random numbers (0)")
    flag("--out", type=Path, default=Path("out/bandit"), help="folder of NAME.json and NAME.png (out/bandit)")
    opt = parser.parse_args()
    chosen = experiments if opt.experiment == "all" else {opt.experiment: experiments[opt.experiment]}
    try:
        perform(chosen, opt)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
