"""The dispersion theory, checked: what MallowsPO claims, what of it is true, how strongly, and where it loses.

A bandit is a language model with the words taken out: a prompt is a set of n answers, a policy a softmax over
them, and people rank the answers by a Mallows model whose centre is 0, 1, ..., n - 1.  Everything is known: every
claim has a number.  The losses are mallowspo.LINKS, the very functions that train.py trains with.

    python bandit.py                                every experiment with few seeds, about a minute, then a verdict
    python bandit.py shared --seeds 100 --n 5       one experiment in full
    python bandit.py people --rankings *.soc        real rankings (PrefLib.org)

Each experiment prints a sentence and a table, and leaves NAME.json and, with matplotlib, NAME.png in --out.
The file reads from simple to composed: data -> engine -> rankings files -> experiments -> verdict.
"""
import argparse
import json
import math
import re
import time
from collections.abc import Iterator
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

# ---------------------------------------------------------------------------------------------------------------
# Data: who beats whom.  In a matrix, [i, j] is how often, or how probably, answer i is preferred to answer j.

def to_lam(phis) -> Tensor:
    return -torch.as_tensor(phis, dtype=F64).log()


def pairs_of(n: int) -> Tensor:
    """(2, n(n-1)/2) the pairs i < j."""
    return torch.triu_indices(n, n, 1)


def truth(n: int, lam: Tensor) -> Tensor:
    """(..., n, n) what infinitely many people say (1/2 on the diagonal)."""
    place = torch.arange(n, dtype=F64)
    return mallowspo.pair_probability(place - place[:, None], lam[..., None, None])


def draw_pairs(rng, chances: Tensor, count) -> Tensor:
    """(..., n, n) wins in `count` random pairs of answers, judged with these chances."""
    i, j = pairs_of(chances.shape[-1])
    seen = rng.multinomial(count, np.full(len(i), 1 / len(i)), size=chances.shape[:-2])   # (..., pairs)
    won = rng.binomial(seen, chances[..., i, j].clamp(0, 1).numpy())
    wins = torch.zeros(chances.shape, dtype=F64)
    wins[..., i, j], wins[..., j, i] = (torch.from_numpy(counts).to(F64) for counts in (won, seen - won))
    return wins


# ---------------------------------------------------------------------------------------------------------------
# Engine.  A policy is pi = ref * exp(u / beta) / Z; the losses see u only: beta enters when a policy is read off.

def fit_policy(link: str, wins: Tensor, lam: Tensor, steps: int = 60, ridge: float = 1e-10) -> Tensor:
    """The u (..., n) with the least mean loss over all pairs of all prompts: one policy for the P prompts of
    wins (..., P, n, n) with dispersions lam (..., P); everything before P is independent fits, done at once.

    Fisher scoring: the curvature of a pair is its squared slope, averaged over what the model itself expects
    people to say, so it is never negative, however bent the link; Levenberg's damping makes every step a descent.
    That takes 10 to 60 steps.  Where the data are separable there is no minimum; the ridge ends the growth.
    """
    n = wins.shape[-1]
    i, j = pairs_of(n)
    wins = wins / wins.sum((-3, -2, -1), keepdim=True)
    won, lost = wins[..., i, j], wins[..., j, i]                                          # (..., P, pairs)
    lam = lam.expand(won.shape[:-1])[..., None]
    design = torch.eye(n, dtype=F64)[i] - torch.eye(n, dtype=F64)[j]                      # (pairs, n)

    def look(u):
        gap = (u @ design.T)[..., None, :].expand(won.shape).detach().requires_grad_()
        win, lose = LINKS[link](gap, lam), LINKS[link](-gap, lam)                         # (..., P, pairs)
        win_slope, lose_slope = (torch.autograd.grad(loss.sum(), gap)[0] for loss in (win, lose))
        win, lose = win.detach(), lose.detach()
        value = (won * win + lost * lose).sum((-2, -1)) + ridge / 2 * u.square().sum(-1)
        gradient = (won * win_slope + lost * lose_slope).sum(-2) @ design + ridge * u
        bend = torch.exp(-win) * win_slope ** 2 + torch.exp(-lose) * lose_slope ** 2
        if link == "square":
            bend = torch.full_like(bend, 2)                                               # IPO is no likelihood
        curvature = design.T @ (((won + lost) * bend).sum(-2)[..., None] * design)
        return value, gradient, curvature + ridge * torch.eye(n, dtype=F64)

    u = torch.zeros(*won.shape[:-2], n, dtype=F64)
    here, damping = look(u), torch.full(won.shape[:-2], 1e-3, dtype=F64)
    for _ in range(steps):
        value, gradient, curvature = here
        stiff = torch.diag_embed(damping[..., None] * curvature.diagonal(dim1=-2, dim2=-1))
        move = torch.linalg.solve(curvature + stiff + 1 / n, gradient)      # 1/n: u is free up to a constant
        there = look(u - move)
        better = there[0] <= value
        here = tuple(torch.where(better.reshape(better.shape + (1,) * (new.dim() - better.dim())), new, old)
                     for new, old in zip(there, here, strict=True))
        u = torch.where(better[..., None], u - move, u)
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-12, 1e8)
        if (gradient * move).sum(-1).max() < 1e-15:                         # what the step could gain
            break
    return u - u.mean(-1, keepdim=True)


def excess(link: str, u: Tensor, lam: Tensor, chances: Tensor) -> Tensor:
    """(...) log-loss of a shared u (..., n) on new pairs, beyond what chances (..., P, n, n) allow (mnat)."""
    i, j = pairs_of(u.shape[-1])
    gap = (u[..., i] - u[..., j])[..., None, :]                                           # (..., 1, pairs)
    p, q = chances[..., i, j], chances[..., j, i]                                         # (..., P, pairs)
    loss = p * LINKS[link](gap, lam[..., None]) + q * LINKS[link](-gap, lam[..., None])
    return 1000 * (loss - torch.special.entr(p) - torch.special.entr(q)).mean((-2, -1))


def slope_per_rank(u: Tensor) -> Tensor:
    """(...) what u falls by from place to place, on average; 1 is the target pi_ref * exp(-place / beta)."""
    return (u[..., 0] - u[..., -1]) / (u.shape[-1] - 1)


def mean_se(x: Tensor) -> tuple[float, float]:
    """Mean over the seeds and its standard error."""
    return x.mean().item(), x.std().item() / math.sqrt(len(x)) if x.numel() > 1 else 0.0


def ratio_se(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Ratio of two means over the same seeds and its standard error (delta method)."""
    ratio = (a.mean() / b.mean()).item()
    return ratio, mean_se(a - ratio * b)[1] / b.mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Rankings files: PrefLib's .soc (complete strict orders) and .soi (incomplete ones).

class BadFile(Exception):
    """What is wrong with a rankings file, and where."""


class Ballots(NamedTuple):
    ranks: Tensor      # (orders, items) place of each item, 0 = best
    weight: Tensor     # (orders,) voters who gave this order
    voters: int        # all of the file's voters, also those whose order is too short to use


def parse_order(text: str, items: int, complete: bool) -> tuple[int, tuple[int, ...]]:
    """A line `COUNT: a,b,c` as the count and the item numbers; ValueError says what is wrong with it."""
    if "{" in text:
        raise ValueError(f"a tie in {text[:50]!r}; only strict orders can be read (.soc, .soi)")
    if not re.fullmatch(r"0*[1-9][0-9]{0,8} *: *[0-9]{1,9}( *, *[0-9]{1,9})*", text):
        raise ValueError(f"expected 'COUNT: a,b,c' (voters: items, best first), found {text[:50]!r}")
    count, *order = map(int, re.findall("[0-9]+", text))
    if not all(1 <= item <= items for item in order):
        unknown = next(item for item in order if not 1 <= item <= items)
        raise ValueError(f"unknown item {unknown}; the file has 1 to {items}")
    if len(set(order)) < len(order):
        raise ValueError(f"item {max(order, key=order.count)} is there twice")
    if complete and len(order) < items:
        raise ValueError(f"{len(order)} items of {items}; in a .soc file orders are complete (unlike .soi)")
    return count, tuple(order)


def read_rankings(path: str) -> Ballots:
    """Read a file of `# KEY: VALUE` lines and then orders, `COUNT: a,b,c`, items numbered from 1, best first.

    An order that leaves out one item is complete, that item being last; shorter ones are counted and left out.
    """
    facts, orders, where = {}, {}, f"{path}:1"
    try:
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            where, text = f"{path}:{number}", line.decode("utf-8-sig", "replace").strip()
            fact = re.fullmatch("# *NUMBER (ALTERNATIVES|VOTERS|UNIQUE ORDERS): *(.*)", text)
            if "\ufffd" in text or "\0" in text:
                raise ValueError("not a text file")
            if fact and not re.fullmatch("[0-9]{1,9}", fact[2]):
                raise ValueError(f"expected a whole number, found {fact[2][:50]!r}")
            if fact:
                facts[fact[1]] = int(fact[2]), where
            elif text and text[0] != "#":
                if facts.get("ALTERNATIVES", (0,))[0] < 2:
                    raise ValueError("before the first order there must be '# NUMBER ALTERNATIVES: ', 2 or more")
                count, order = parse_order(text, facts["ALTERNATIVES"][0], path.endswith(".soc"))
                if order in orders:
                    raise ValueError("this order was there before")
                orders[order] = count
        for key, found in (("VOTERS", sum(orders.values())), ("UNIQUE ORDERS", len(orders))):
            told, at = facts.get(key, (found, where))
            if orders and told != found:
                where = at
                raise ValueError(f"says {told} {key.lower()}, but the orders below make {found}")
        items, full = facts.get("ALTERNATIVES", (0,))[0], {}
        for order, count in orders.items():
            if len(order) >= items - 1:
                order += tuple(set(range(1, items + 1)) - set(order))
                full[order] = full.get(order, 0) + count
        if not full:
            raise ValueError("the file ends without an order" + f" of {items - 1} items or more" * bool(orders))
    except ValueError as error:
        raise BadFile(f"{where}: {error}") from None
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None
    ranks = (torch.tensor(list(full)) - 1).argsort(-1)                                    # (orders, items)
    return Ballots(ranks, torch.tensor(list(full.values()), dtype=F64), sum(orders.values()))


# ---------------------------------------------------------------------------------------------------------------
# Experiments: each takes the options and returns rows and claims.  Numbers are means over seeds, `se` their
# standard errors; log-losses are in mnat, thousandths of a nat.

class Result(NamedTuple):
    rows: list[dict]
    claims: list[tuple[str, bool, str]]  # claim, whether it holds, the number that says so
    curves: list[dict] | None = None     # finer rows, for the picture
    more: dict | None = None             # further keys of NAME.json


def pick(rows, value, **where) -> list:
    return [row[value] for row in rows if where.items() <= row.items()]


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def exact(opt) -> Result:
    """The closed forms of the Kendall model agree with adding up every ranking."""
    lam, rows = to_lam(opt.phis or [.01, .05, .1, .2, .3, .5, .7, .8, .9, .95, .99]), []
    for n in range(2, 8):
        (i, j), ranks = pairs_of(n), mallowspo.enumerate_rankings(n)
        p = mallowspo.exact_model(ranks, lam)                                             # (phis, n!)
        cost = mallowspo.kendall_distance(ranks).to(F64)                                  # (n!,)
        mean, variance = mallowspo.distance_moments(n, lam)
        by_sum, log_z = (p * cost).sum(-1), (-lam[:, None] * cost).logsumexp(-1)
        rows.append({"n": n, "log Z": distance(mallowspo.log_partition(n, lam), log_z),
                     "mean": distance(mean, by_sum),
                     "variance": distance(variance, (p * (cost - by_sum[:, None]) ** 2).sum(-1)),
                     "favourite": distance(mallowspo.top_choice(n, lam), p @ (ranks == 0).to(F64)),
                     "pair": distance(truth(n, lam)[..., i, j], mallowspo.pair_rates(ranks, p)[..., i, j])})
    worst = max(max(list(row.values())[1:]) for row in rows)
    return Result(rows, [("Kendall's closed forms are exact", worst < 1e-12, f"error {worst:.0e}, n = 2 to 7")])


def spearman(opt) -> Result:
    """theta's link sigmoid(2 lam gap) is not Spearman's pair probability but its lower bound: exact for answers
    that a person places side by side, too cautious for the others, the more so the more answers and dispute.
    """
    phis, rows = opt.phis or [.05, .3, .5, .7, .9, .95, .99], []
    lam, factors = to_lam(phis)[:, None], torch.linspace(1, 3, 801, dtype=F64)
    for n in (3, 5, 7):
        (i, j), ranks = pairs_of(n), mallowspo.enumerate_rankings(n)
        p = mallowspo.exact_model(ranks, lam[:, 0], mallowspo.spearman_distance)
        link = lambda lam: torch.exp(-LINKS["mallows-theta"]((j - i).to(F64), lam))       # noqa: B023
        above = mallowspo.pair_rates(ranks, p)[..., i, j] - link(lam)                     # (phis, pairs)
        beside = ((ranks[:, i] - ranks[:, j]).abs() == 1).to(F64)                         # (n!, pairs)
        adjacent = (p @ (beside * (ranks[:, i] < ranks[:, j]))) / (p @ beside) - link(lam)
        errors = (above + link(lam) - link(factors[:, None, None] * lam)).abs().amax(-1)  # (factors, phis)
        rows += [{"n": n, "phi": phi, "largest error": above[k].max().item(), "smallest": above[k].min().item(),
                  "side by side": adjacent[k].abs().max().item(),
                  "best factor": factors[errors[:, k].argmin()].item(), "error with it": errors[:, k].min().item()}
                 for k, phi in enumerate(phis)]
    worst, least = max(pick(rows, "largest error", n=5)), min(pick(rows, "smallest"))
    return Result(rows, [
        ("theta's link is Spearman's pair probability", worst < 1e-3, f"off by {worst:.3f} at n = 5"),
        ("theta's link never exceeds it", least > -1e-12, f"smallest difference {least:.0e}")])


def as_printed(h: Tensor, lam: Tensor) -> Tensor:
    """g(h) of the paper's Eq. 11 word for word, to show what the stable form is for."""
    a, phi = h.abs(), torch.exp(-lam)
    g = (a + 1) / (1 - phi ** (a + 1)) - a / (1 - phi ** a)
    return torch.where(h > 0, g, 1 - g)


def kendall_link(opt) -> Result:
    """phi's link as printed fails in float32: not a number at h = 0, where training starts, noise at small lam,
    log 0 for h << 0.  The stable form has none of that, and bridges the jump at 0 without moving an integer gap.
    """
    h, rows = torch.cat([-torch.logspace(4, -3, 29), torch.zeros(1), torch.logspace(-3, 4, 29)]), []
    for lam in to_lam(opt.phis).float() if opt.phis else torch.tensor([1e-6, 1e-4, .01, .1, .7, 3., 30.]):
        right = LINKS["mallows-phi"](h.to(F64), lam.to(F64))      # the tests hold this against 50 digits
        printed, ours = -torch.log(as_printed(h, lam)), LINKS["mallows-phi"](h, lam)
        normal = right > 1e-37                                    # below, float32 itself has fewer digits
        usable = torch.isfinite(printed) & normal & (h.abs() >= mallowspo.BRIDGE)
        rows.append({"lam": lam.item(), "printed: nan or inf": int((~torch.isfinite(printed)).sum()),
                     "printed: error": distance((printed / right)[usable], torch.ones(())),
                     "ours: nan or inf": int((~torch.isfinite(ours)).sum()),
                     "ours: error": distance((ours / right)[normal], torch.ones(())),
                     "jump at 0": (1 / torch.tanh(lam.to(F64) / 2) - 2 / lam.to(F64)).item()})
    curves = [{"link": f"{form} {phi}", "h": x.item(), "g": g(x, to_lam(phi)).item()} for phi in (.05, .8)
              for x in torch.linspace(-3, 3, 240, dtype=F64)
              for form, g in (("printed", as_printed), ("ours", mallowspo.pair_probability))]
    bad, ours, worst = (sum(pick(rows, "printed: nan or inf")), sum(pick(rows, "ours: nan or inf")),
                        max(pick(rows, "ours: error")))
    return Result(rows, [
        ("phi's link can be used as printed (float32)", bad == 0, f"{bad} of {len(rows) * len(h)} nan or inf"),
        ("phi's stable form is right in float32", ours == 0 and worst < 1e-5, f"error {worst:.0e}")], curves)


def optimum(opt) -> Result:
    """With infinite data, one prompt and one beta, MallowsPO-phi learns pi_ref * exp(-place / beta) at every
    dispersion: 1 nat a rank.  What the others learn depends on how much people agree; DPO blows up where they do.
    """
    phis, rows, claims = opt.phis or [.01, .05, .1, .2, .3, .5, .7, .8, .9, .95, .98], [], []
    lam = to_lam(phis)[:, None]
    for method in opt.methods:
        u = fit_policy(METHODS[method], truth(opt.n, lam), lam)                                  # (phis, n)
        slope, best = slope_per_rank(u).tolist(), torch.softmax(u / opt.beta, -1)[:, 0].tolist()
        rows += [{"method": method, "phi": phi, "slope": slope[k], "best": best[k]} for k, phi in enumerate(phis)]
        claims.append((f"{method} learns 1 nat a rank at every dispersion", max(abs(s - 1) for s in slope) < 1e-3,
                       f"{min(slope):.3f} to {max(slope):.3f}, {max(slope) / max(min(slope), 1e-12):.4g} x"))
    return Result(rows, claims)


def growth(opt) -> Result:
    """On a pair that nobody disputes no likelihood method stops: the margin grows like log(time).  MallowsPO slows
    it where the prompt's index says that people agree, and speeds it up where it does not; only IPO is bounded.
    """
    curves, claims, phis = [], [], opt.phis or [.05, .3, .9]
    grid = torch.cat([torch.linspace(0, 1, 10_001, dtype=F64), torch.linspace(1, 1500, 150_000, dtype=F64)[1:]])
    for phi in phis:
        for method in opt.methods:
            x = grid.clone().requires_grad_()
            # gradient flow on the two logits is d margin / d time = -2 loss'(margin): so time is an integral
            speed, = torch.autograd.grad(-2 * LINKS[METHODS[method]](x, to_lam(phi)).sum(), x)
            usable = int((speed > 1e-12).sum())
            margin, speed = grid[:usable].numpy(), speed[:usable].numpy()
            elapsed = np.append(0, np.cumsum(np.diff(margin) * (1 / speed[1:] + 1 / speed[:-1]) / 2))
            for t in np.logspace(0, 8, 33).tolist():
                now = float(np.interp(t, elapsed, margin))
                pace = t * math.exp(np.interp(now, margin, np.log(speed))) if t < elapsed[-1] else 0.0
                curves.append({"phi": phi, "method": method, "time": t, "margin": now, "per e-fold": pace})
        if {"mallows-phi", "dpo"} <= set(opt.methods):
            ours, dpo = (pick(curves, "per e-fold", phi=phi, time=1e6, method=method)[0]
                         for method in ("mallows-phi", "dpo"))
            claims.append((f"phi's margin grows slower than DPO's on agreed pairs, phi = {phi}", ours < dpo,
                           f"{ours / dpo:.2f} x, and no end"))
    return Result([row for row in curves if row["time"] in (1e2, 1e4, 1e6, 1e8)], claims, curves)


def frontier(opt) -> Result:
    """What a mean KL of 1/2 nat buys, with one beta for prompts of many dispersions: the answer's mean place, 0 is
    best.  MallowsPO-phi is on the frontier if the consensus ranks, not if a random annotator does: there IPO is.
    """
    lam, rng = to_lam(opt.phis or [.05, .1, .2, .5, .8, .9, .95]), np.random.default_rng(opt.seed)
    chances, rows, curves, claims = truth(opt.n, lam), [], [], []                         # (P, n, n)
    places = {"consensus": torch.arange(opt.n, dtype=F64).expand(len(lam), -1),
              "annotator": chances.sum(-2) - 1 / 2}           # an item's place: how many others are above it
    for count in ["infinite", *(opt.pairs or [1024, 64])]:
        known = count == "infinite"
        wins = chances if known else draw_pairs(rng, chances.expand(opt.seeds, -1, -1, -1), count)
        policies = {method: fit_policy(METHODS[method], wins[..., None, :, :], lam[:, None]) for method in opt.methods}
        for judge, place in places.items():
            for method, u in (({"best possible": -place} if known else {}) | policies).items():
                mean, se = mean_se(place_at_kl(u, place, .5))
                rows.append({"judge": judge, "pairs": count, "method": method, "place": mean, "se": se})
                curves += [{"judge": judge, "method": method, "kl": k / 20,
                            "place": place_at_kl(u, place, k / 20).item()} for k in range(1, 21) if known]
                if known and method in ("mallows-phi", "ipo"):
                    best = pick(rows, "place", judge=judge, method="best possible")[0]
                    claims.append((f"{method} gets the most per KL, judged by the {judge}", mean < best + .005,
                                   f"place {mean:.3f}, best possible {best:.3f}"))
    return Result(rows, claims, curves)


def place_at_kl(u: Tensor, place: Tensor, kl: float) -> Tensor:
    """(...) mean place under the policies softmax(scale * u), u (..., P, n), scaled to a mean KL of kl."""
    policy = lambda scale: torch.softmax(scale[..., None, None] * u, -1)
    entropy = lambda scale: torch.special.entr(policy(scale)).sum(-1).mean(-1)      # falls as the scale grows
    target = torch.full(u.shape[:-2], math.log(u.shape[-1]) - kl, dtype=F64)
    return (policy(mallowspo.invert(entropy, target, high=1e4)) * place).sum(-1).mean(-1)


def samples(opt) -> Result:
    """What a disputed prompt costs: with few pairs MallowsPO-phi amplifies their noise.  Its regret, beta *
    KL(pi || pi*), over DPO's is above 1 until the N pairs of the prompt reach N * lam^2 of 3 to 8.
    """
    phis, rows, rng = opt.phis or [.7, .8, .9, .95], [], np.random.default_rng(opt.seed)
    lam, steps = to_lam(phis), torch.tensor([.1, .3, 1, 2, 3, 6, 10, 30, 100], dtype=F64)[:, None]
    counts = torch.tensor(opt.pairs)[:, None] + 0 * lam.long() if opt.pairs else (steps / lam ** 2).ceil().long()
    wins = draw_pairs(rng, truth(opt.n, lam).expand(opt.seeds, len(counts), -1, -1, -1), counts.numpy())
    target, regret = torch.log_softmax(-torch.arange(opt.n, dtype=F64) / opt.beta, -1), {}
    for method in ("dpo", "mallows-phi"):
        policy = torch.log_softmax(fit_policy(METHODS[method], wins[..., None, :, :], lam[:, None]) / opt.beta, -1)
        regret[method] = opt.beta * (policy.exp() * (policy - target)).sum(-1)            # (S, counts, phis)
    for c, k in np.ndindex(*counts.shape):
        dpo, ours = regret["dpo"][:, c, k], regret["mallows-phi"][:, c, k]
        ratio, se = ratio_se(ours, dpo)
        reach = (counts[c, k] * lam[k] ** 2).item() if opt.pairs else steps[c].item()
        rows.append({"phi": phis[k], "pairs": int(counts[c, k]), "N lam^2": reach, "dpo": dpo.mean().item(),
                     "mallows-phi": ours.mean().item(), "ratio": ratio, "se": se})
    few = [row["ratio"] for row in rows if row["N lam^2"] < .5 and row["phi"] >= .8]
    many = [row["ratio"] for row in rows if row["N lam^2"] >= 30 and row["phi"] >= .8]
    return Result(rows, [(f"phi beats DPO on a disputed prompt with N lam^2 {size} pairs", max(ratios) < 1,
                          f"regret {min(ratios):.2f} to {max(ratios):.2f} x DPO's")
                         for size, ratios in (("< 0.5", few), (">= 30", many)) if ratios])


def compare(opt, rng, train: Tensor, test: Tensor, lam: Tensor, entropy: Tensor, choices: Tensor) -> list[dict]:
    """One policy for P prompts, fitted to pairs drawn with the chances `train` and judged by `test`, (S, P, n, n).

    lam: (S, P) best known; entropy: (S, P) of people's favourites; choices: (S, P, n) counts of favourites.
    """
    proxy, prompts = mallowspo.dispersion_weight(entropy / math.log(test.shape[-1]), 1.0), lam.shape[-1]
    moved = torch.arange(prompts) + torch.from_numpy(rng.integers(1, max(prompts, 2), size=(len(lam), 1)))
    indices = {"dpo": ("sigmoid", lam),
               "phi, one index": ("mallows-phi", lam.mean(-1, keepdim=True).expand_as(lam)),
               "phi, best index": ("mallows-phi", lam),
               "theta, best index": ("mallows-theta", lam),
               "phi, entropy proxy": ("mallows-phi", proxy / proxy.mean(-1, keepdim=True)),
               "phi, inverted entropy": ("mallows-phi", mallowspo.lam_of_choices(choices)),
               "phi, shuffled index": ("mallows-phi", lam.gather(-1, moved % prompts)),   # nobody keeps its own
               "dpo, one policy each": ("sigmoid", lam)}
    rows, dpo, (i, j) = [], None, pairs_of(test.shape[-1])
    for count in opt.pairs or [16, 64, 256, 1024]:
        wins = draw_pairs(rng, train, count)
        for name, (link, index) in indices.items():
            if name == "dpo, one policy each":
                u = fit_policy(link, wins[..., None, :, :], lam[..., None])                      # (S, P, n)
                loss = excess(link, u, lam[..., None], test[..., None, :, :]).mean(-1)
            else:
                u = fit_policy(link, wins, index)                                                # (S, n)
                loss = excess(link, u, index, test)
            dpo = loss if name == "dpo" else dpo                                          # the first of them
            (mean, se), (ahead, ahead_se) = mean_se(loss), mean_se(loss - dpo)
            rows.append({"index": name, "pairs": count, "excess": mean, "se": se, "minus DPO": ahead,
                         "minus DPO se": ahead_se, "slope": slope_per_rank(u).mean().item(),
                         "tau": (u[..., i] - u[..., j]).sign().mean().item()})
    return rows


def shared(opt) -> Result:
    """One policy for prompts that differ only in dispersion, as a language model is: log-loss on new pairs beyond
    the least possible, mnat.  Knowing the dispersions removes nearly all of DPO's; wrong ones are worse than none.
    """
    lam = to_lam(opt.phis or [.05, .1, .3, .6, .9, .95]).expand(opt.seeds, -1)
    rng, chances = np.random.default_rng(opt.seed), truth(opt.n, lam)
    choices = torch.from_numpy(rng.multinomial(64, mallowspo.top_choice(opt.n, lam).numpy())).to(F64)
    rows = compare(opt, rng, chances, chances, lam, mallowspo.favourite_entropy(opt.n, lam), choices)
    count = 256 if 256 in pick(rows, "pairs") else rows[-1]["pairs"]
    at = dict(zip(pick(rows, "index", pairs=count), pick(rows, "excess", pairs=count), strict=True))
    return Result(rows, [(f"one policy for many dispersions: {name} beats DPO", at[name] < at["dpo"],
                          f"{at[name]:.1f} against {at['dpo']:.1f} mnat, {count} pairs a prompt")
                         for name in ("phi, best index", "phi, entropy proxy", "phi, shuffled index")])


def noise(opt) -> Result:
    """What an imprecise index costs: excess log-loss of MallowsPO-phi over DPO's, by the noise r of log lam as a
    multiple of its spread over 12 prompts.  As it is it loses from r of about 1.2; shrunk by 1 / (1 + r^2), never.
    """
    rng, rows = np.random.default_rng(opt.seed), []
    z = torch.special.ndtri((torch.arange(12, dtype=F64) + .5) / 12)
    for spread in (.4, .8, 1.3):
        log_lam = (math.log(.7) + spread * z / z.std(correction=0)).expand(opt.seeds, -1)   # (S, 12)
        chances = truth(opt.n, log_lam.exp())
        wins = draw_pairs(rng, chances, (opt.pairs or [256])[0])
        dpo = excess("sigmoid", fit_policy("sigmoid", wins, log_lam), log_lam, chances)
        for r in (0, .25, .5, .75, 1, 1.25, 1.5):
            guess = log_lam + r * spread * torch.from_numpy(rng.standard_normal(log_lam.shape))
            middle = guess.mean(-1, keepdim=True)
            for form, power in (("as is", 1), ("shrunk", 1 / (1 + r * r))):
                index = (middle + power * (guess - middle)).exp().clamp(max=30)
                ratio, se = ratio_se(excess("mallows-phi", fit_policy("mallows-phi", wins, index), index, chances), dpo)
                rows.append({"spread": spread, "index": form, "r": r, "ratio": ratio, "se": se,
                             "line": f"{form}, {spread}"})
    return Result(rows, [(f"phi beats DPO with an index of noise r = {r}, {form}", max(ratio) < 1,
                          f"{min(ratio):.2f} to {max(ratio):.2f} x DPO's excess")
                         for r, form in ((.5, "as is"), (1.5, "as is"), (1.5, "shrunk"))
                         for ratio in [pick(rows, "ratio", r=r, index=form)]])


def proxy(n: int, entropy: Tensor, over: Tensor) -> Tensor:
    """The paper's estimate of lam, -log of the normalised entropy, with the constant that is right on average."""
    weight = lambda entropy: mallowspo.dispersion_weight(entropy / math.log(n), 1.0)
    return weight(entropy) * over.mean() / weight(mallowspo.favourite_entropy(n, over)).mean()


def estimate(opt) -> Result:
    """lam from few answers, root mean square error.  The paper's proxy, -log of the normalised entropy times a
    constant, orders prompts rightly but is not proportional to lam; the inverted entropy is, with a pseudo-count.
    (Estimates end before lam = 50: where they can be infinite, how bad they are in the mean is arbitrary.)
    """
    lam, rng, rows, curves = to_lam(opt.phis or np.arange(1, 20) / 20), np.random.default_rng(opt.seed), [], []
    fine, worst, ordered = to_lam(torch.linspace(.99, .01, 99, dtype=F64)), 0.0, True
    size = (opt.seeds, len(lam))
    for n in (5, 10):
        for m in opt.pairs or [8, 16, 64, 1024]:
            counts = torch.from_numpy(rng.multinomial(m, mallowspo.top_choice(n, lam).numpy(), size=size)).to(F64)
            entropy, couples = torch.special.entr(counts / m).sum(-1), (m + 1) // 2       # (S, phis)
            differ = rng.binomial(couples, mallowspo.disagreement(n, lam).numpy(), size=size) / couples
            guesses = {"entropy proxy (the paper)": proxy(n, entropy, fine),
                       "inverted entropy": mallowspo.lam_of_entropy(entropy, n),
                       "inverted, pseudo-count": mallowspo.lam_of_choices(counts),
                       "two people, random pair": mallowspo.lam_of_disagreement(torch.from_numpy(differ), n)}
            for name, guess in guesses.items():
                square, se = mean_se((guess - lam).square().mean(-1))
                rmse = square ** .5
                rows.append({"n": n, "estimator": name, "answers": m, "rmse": rmse, "se": se / (2 * rmse)})
    for n in (5, 10, 100):
        entropy = mallowspo.favourite_entropy(n, fine)
        worst = max(worst, distance(mallowspo.lam_of_entropy(entropy, n), fine))
        guess = proxy(n, entropy, fine)
        ordered &= bool((guess.diff() > 0).all())
        curves += [{"n": n, "lam": x, "guess": y, "ratio": y / x}
                   for x, y in zip(fine.tolist(), guess.tolist(), strict=True)]
    curves += [{"n": "lam", "lam": x, "guess": x} for x in fine.tolist()]
    low, high = min(pick(curves, "ratio", n=5)), max(pick(curves, "ratio", n=5))
    return Result(rows, [
        ("the entropy proxy orders prompts by dispersion", ordered, "strictly, for 5, 10, 100 answers"),
        ("the entropy proxy is proportional to lam", high < 1.1 * low, f"{low:.2f} to {high:.2f} x lam, n = 5"),
        ("inverting the entropy gives lam", worst < 1e-8, f"error {worst:.0e}")], curves)


def people(opt) -> Result:
    """Real rankings: centre, dispersion, how often the item that is k places higher in the centre is preferred.
    Then one policy for all files of as many items: index and pairs from half of the voters, judged by the others.
    """
    if not opt.rankings:
        print("  No --rankings given.  PrefLib.org has many; give the .soc or .soi files of a set (00024).")
        return Result([], [], None, {"files": []})
    rng, rows, claims, files, groups = np.random.default_rng(opt.seed), [], [], [], {}
    for name in opt.rankings:
        ballots = read_rankings(name)
        n, used = ballots.ranks.shape[-1], int(ballots.weight.sum())
        centre, lam = mallowspo.fit_rankings(ballots.ranks, ballots.weight)
        rates = by_gap(ballots.ranks[:, centre], ballots.weight, lam)
        files.append({"file": name, "phi": math.exp(-lam), "centre": (centre + 1).tolist(), "voters": used,
                      "items": n, "voters in file": ballots.voters, "by gap": rates})
        groups.setdefault(n, []).append(ballots)
        print(f"  {name}: phi {math.exp(-lam):.4f}, centre {','.join(map(str, files[-1]['centre']))}, "
              f"{used:,} of {ballots.voters:,} voters used")
        for key, rate in rates.items():
            print(f"    {key:<9} by gap  " + " ".join(f"{x:.3f}" for x in rate))
    for n, group in groups.items():
        if len(group) < 2 or min(ballots.weight.sum() for ballots in group) < 2:
            print(f"  {n} items: a comparison needs two files, and two voters in each")
            continue
        rows += [{"items": n, **row} for row in compare(opt, rng, *held_out(opt, rng, group))]
        count = 256 if 256 in pick(rows, "pairs", items=n) else rows[-1]["pairs"]
        for index in ("phi, inverted entropy", "phi, shuffled index"):
            row, = (row for row in rows if (row["items"], row["pairs"], row["index"]) == (n, count, index))
            claims.append((f"people, {n} items, new voters: {index} beats DPO", row["minus DPO"] < 0,
                           f"{row['minus DPO']:+.2f} +- {row['minus DPO se']:.2f} mnat"))
    return Result(rows, claims, None, {"files": files})


def by_gap(ranks: Tensor, weight: Tensor, lam: Tensor) -> dict[str, list[float]]:
    """How often an item is preferred to the one k = 1, 2, ... places below it: seen, and as two links have it."""
    rates, gap = mallowspo.pair_rates(ranks, weight), torch.arange(1, ranks.shape[-1], dtype=F64)
    seen = torch.stack([rates.diagonal(k).mean() for k in range(1, len(rates))])
    load = (len(rates) - gap) * gap            # the logistic link's one parameter is where its likelihood is flat
    slope = mallowspo.invert(lambda c: -(load * torch.sigmoid(c * gap)).sum(), -(load * seen).sum())
    links = {"observed": seen, "Kendall": mallowspo.pair_probability(gap, lam),
             "logistic": torch.sigmoid(slope * gap)}
    return {name: rate.tolist() for name, rate in links.items()}


def held_out(opt, rng, group: list[Ballots]) -> tuple[Tensor, ...]:
    """What `compare` wants, from random halves of the voters; answer k is what a file's first half puts k-th."""
    parts = []
    for ranks, weight, _ in group:
        votes = weight.long().numpy()
        first = rng.multivariate_hypergeometric(votes, votes.sum() // 2, size=opt.seeds)  # (S, orders)
        first, second = (torch.from_numpy(half).to(F64) for half in (first, votes - first))
        centre, lam = mallowspo.fit_rankings(ranks, first)
        train, test = (mallowspo.pair_rates(ranks, half).take_along_dim(centre[:, :, None], 1)
                       .take_along_dim(centre[:, None], 2) for half in (first, second))   # (S, n, n), by place
        choices = first @ (ranks == 0).to(F64)
        entropy = torch.special.entr(choices / choices.sum(-1, keepdim=True)).sum(-1)
        parts.append((train, test, lam, entropy, choices))
    return tuple(torch.stack(part, 1) for part in zip(*parts, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# 7. The demo: a population whose dispersion is known

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
ASKERS = ("Ada Ben Carla David Elena Felix Greta Hugo Ines Jonas Klara Leo Maria Nils Olga Paul Rosa Simon Tara Ulla "
         "Viktor Wanda Xenia Yann Zoe Anton Bella Cyril Dora Emil Frida Gustav Hanna Igor Julia Karl Lena Nora Otto"
         ).split()
NEW_ASKERS = "Pia Quentin Rita Sven Thea Uwe Vera Willem".split()       # only ever asked in the evaluation


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
        names = torch.randint(len(ASKERS), (count,), generator=generator).tolist()
        each = [mallowspo.sample_rankings(-(-count // len(self.phi)), 6, -math.log(phi), generator)
                for phi in self.phi.tolist()]
        for i in range(count):
            turn, question = divmod(i, len(self.phi))
            yield question, self.prompt(ASKERS[names[i]], question), each[question][turn]

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
                 for q, words in enumerate(self.answers) for name in ASKERS + NEW_ASKERS]
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


def report(population: Population, methods: dict, records: list[dict]) -> tuple[dict, str]:
    """Compare the methods where they have moved equally far from the reference -> report.json's content, and a text.

    methods: name -> [(step, what Population.measure says)]; records: the rows of a run's dispersion.jsonl.
    """
    half, content = len(population.phi) // 2, {}
    for loss, path in methods.items():
        rows = [{"step": step, **{k: v.mean().item() for k, v in m.items()},
                 **{f"{k}_{name}": m[k][side].mean().item() for k in ("kl", "entropy")
                    for name, side in (("agreed", slice(half)), ("disputed", slice(half, None)))}} for step, m in path]
        content[loss] = {key: [row[key] for row in rows] for key in rows[0]}
    index = [[] for _ in population.phi]
    for record in records:
        line = int(record["where"].rpartition(":")[2]) - 1         # the file asks the questions in turn
        index[line % len(index)].append(record["entropy"])
    index = [float(np.mean(each)) if each else math.nan for each in index]
    known = ~np.isnan(index)                                       # in few steps not every question is asked
    ranks = [np.argsort(np.argsort(np.array(values)[known])) for values in (index, population.phi.tolist())]
    correlation = float(np.corrcoef(ranks)[0, 1])                  # Spearman's
    said = [f"--- report: {len(population.questions)} questions, asked by {len(NEW_ASKERS)} names never trained on; "
            f"all figures are exact sums\nrank correlation of the dispersion index with the true phi: {correlation:.3f}\n"
            f"reward accuracy that nobody can pass, as people disagree: {population.best_accuracy():.4f}"]
    said += [compare_at(kl, content) for kl in MATCHED_KL]
    return {"dispersion_rank_correlation": correlation, "true_phi": population.phi.tolist(), "index": index,
            "questions": population.questions, "methods": content}, "\n\n".join(said)


# ---------------------------------------------------------------------------------------------------------------
# What to run, to print and to draw.

class Panel(NamedTuple):
    x: str
    y: str
    by: str                   # one line for each of these values of the key `by`: {value: its name}, four at most
    lines: dict
    xlabel: str
    ylabel: str
    log: str = ""             # which axes are logarithmic
    guide: float | None = None
    title: str = ""
    where: tuple = (None, None)


NAMES = {"mallows-phi": "MallowsPO-phi", "dpo": "DPO", "mallows-theta": "MallowsPO-theta", "ipo": "IPO"}
BEST = {"mallows-phi": "MallowsPO-phi", "dpo": "DPO", "best possible": "best possible", "ipo": "IPO"}
INDEX = {"phi, best index": "phi, true index", "dpo": "DPO", "phi, entropy proxy": "phi, entropy proxy",
         "phi, shuffled index": "phi, shuffled index"}
SPREADS = {"as is, 0.4": "as is, spread 0.4", "shrunk, 0.4": "shrunk, spread 0.4",
           "as is, 1.3": "as is, spread 1.3", "shrunk, 1.3": "shrunk, spread 1.3"}
GUESSES = {"lam": "inverted entropy", 5: "proxy, 5 answers", 10: "proxy, 10", 100: "proxy, 100"}
SHAPES = {f"{form} {phi}": f"{form}, phi = {phi}" for phi in (.05, .8) for form in ("ours", "printed")}

# name: function; rows printed as they are (None) or in a grid (keys down, key across, value, its error); picture
EXPERIMENTS = {
    "exact": (exact, None, [Panel("n", "pair", "", {"": "pair probability"}, "answers n", "largest error", "y")]),
    "spearman": (spearman, None, [Panel("phi", "largest error", "n", {n: f"{n} answers" for n in (3, 5, 7)},
                                        "dispersion phi", "exact probability - theta link, largest")]),
    "link": (kendall_link, None, [Panel("h", "g", "link", SHAPES, "h (ranks)", "g(h), chance to be preferred")]),
    "optimum": (optimum, (["method"], "phi", "slope", ""), [
        Panel("phi", "slope", "method", NAMES, "dispersion phi (0: all agree, 1: coin toss)",
              "learned nats per rank", "y")]),
    "growth": (growth, (["phi", "method"], "time", "margin", ""), [
        Panel("time", "margin", "method", NAMES, "training time (steps x rate)", "margin (nats)", "xy", None,
              f"phi = {phi}", ("phi", phi)) for phi in (.05, .9)]),
    "frontier": (frontier, (["judge", "pairs"], "method", "place", "se"), [
        Panel("kl", "place", "method", BEST, "mean KL to the reference (nats)", "mean place (0 best)",
              "", None, f"judged by {judge}", ("judge", judge.split()[-1]))
        for judge in ("the consensus", "a random annotator")]),
    "samples": (samples, (["phi"], "N lam^2", "ratio", "se"), [
        Panel("N lam^2", "ratio", "phi", {phi: f"phi = {phi}" for phi in (.95, .9, .8, .7)},
              "N lam^2, N pairs of the prompt", "regret, MallowsPO-phi / DPO", "xy", 1)]),
    "shared": (shared, (["index"], "pairs", "excess", "se"), [
        Panel("pairs", "excess", "index", INDEX, "pairs a prompt", "excess log-loss (mnat)", "xy")]),
    "noise": (noise, (["spread", "index"], "r", "ratio", "se"), [
        Panel("r", "ratio", "line", SPREADS, "r: noise of the index / its true spread",
              "excess log-loss / DPO's", "", 1)]),
    "estimate": (estimate, (["n", "estimator"], "answers", "rmse", "se"), [
        Panel("lam", "guess", "n", GUESSES, "true lam = -log phi", "estimate, infinite data")]),
    "people": (people, (["items", "index"], "pairs", "minus DPO", "minus DPO se"), [
        Panel("pairs", "minus DPO", "index", INDEX | {"phi, best index": "phi, fitted index"}, "pairs a file",
              "log-loss minus DPO's (mnat)", "x")]),
}
STYLES = [dict(zip(("color", "marker", "linestyle", "linewidth"), style, strict=True)) for style in (
    ("#00633a", "o", "-", 3.5), ("#f76707", "s", "--", 2.2),
    ("#1864ab", "^", "-.", 2.2), ("#868e96", "D", ":", 2.2))]


def show(rows: list[dict], grid) -> None:
    """Print rows as a table."""
    if grid:
        down, across, value, se = grid
        table = {}
        for row in rows:
            text = f"{row[value]:.4g}" + (f" +-{row[se]:.2g}" if row.get(se) else "")
            table.setdefault(tuple(row[key] for key in down), {key: row[key] for key in down})[row[across]] = text
        print(f"  {value} by {across}:")
        rows = list(table.values())
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = [head, *([row.get(key, "") for key in head] for row in rows)]
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def draw(rows: list[dict], panels: list[Panel], path: Path) -> None:
    """Save the picture, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("  no picture: for those, pip install matplotlib")
        return
    figure = Figure(figsize=(6.2 if len(panels) == 1 else 10.4, 4.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        here = [row for row in rows if row.get(panel.where[0]) == panel.where[1]]
        found = list(dict.fromkeys(row.get(panel.by, "") for row in here))
        if not found:
            axes.set_axis_off()
            continue
        known = {key: name for key, name in panel.lines.items() if key in found}
        for style, key in zip(STYLES, known or found, strict=False):                      # four lines at most
            line = [row for row in here if row.get(panel.by, "") == key]
            axes.plot([row[panel.x] for row in line], [row[panel.y] for row in line], label=known.get(key, key),
                      markevery=max(len(line) // 12, 1), markersize=7, **style)
        if panel.guide is not None:
            axes.axhline(panel.guide, color="black", linewidth=1)
        axes.set(xscale="log" if "x" in panel.log else "linear", yscale="log" if "y" in panel.log else "linear")
        for axis in [getattr(axes, f"{name}axis") for name in panel.log]:
            axis.set_major_formatter("{x:g}")
        axes.set_xlabel(panel.xlabel, fontsize=15)
        axes.set_ylabel(panel.ylabel, fontsize=15)
        axes.set_title(panel.title, fontsize=15)
        axes.tick_params(labelsize=13)
        axes.legend(fontsize=13)
        axes.grid(alpha=.3)
    figure.savefig(path, dpi=80 if len(panels) == 1 else 72)


KINDS = {int: "a whole number", float: "a number"}


def number(kind, low, high):
    """An argparse type: a number in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {KINDS[kind]} from {low} to {high}")
        return value
    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage="python bandit.py [EXPERIMENT] [flags]",
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("experiment", nargs="?", default="all", choices=["all", *EXPERIMENTS], help="default: all")
    flag("--n", type=number(int, 2, 30), default=5, help="answers to a prompt (5)")
    flag("--phis", type=number(float, .001, .999), nargs="+", help="dispersions (each experiment has its own)")
    flag("--pairs", type=number(int, 1, 10**7), nargs="+", help="preference pairs a prompt; of estimate: answers")
    flag("--seeds", type=number(int, 1, 10_000), default=20, help="independent repetitions (20)")
    flag("--beta", type=number(float, .001, 1000), default=1.0, help="of optimum, samples: pull to reference (1)")
    flag("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of optimum, growth, frontier (all)")
    flag("--rankings", nargs="+", metavar="FILE", help="of people: .soc and .soi files from PrefLib.org")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of the random numbers (0)")
    flag("--out", type=Path, default=Path("out/bandit"), help="folder of NAME.json and NAME.png (out/bandit)")
    opt = parser.parse_args()
    if opt.rankings and opt.experiment not in ("all", "people"):
        parser.error(f"--rankings is for people, not for {opt.experiment}")
    torch.set_num_threads(1)                  # the matrices are tiny: more threads only wait for each other
    claims, start = [], time.time()
    try:
        opt.out.mkdir(parents=True, exist_ok=True)
        for name in EXPERIMENTS if opt.experiment == "all" else [opt.experiment]:
            run, grid, panels = EXPERIMENTS[name]
            print(f"\n{name}: " + " ".join(run.__doc__.split()))
            result = run(opt)
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(opt).items()}
            record = {"experiment": name, "settings": settings, **(result.more or {}), "rows": result.rows,
                      "claims": result.claims}
            (opt.out / f"{name}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
            if result.rows:
                show(result.rows, grid)
                draw(result.curves or result.rows, panels, opt.out / f"{name}.png")
            claims += result.claims
    except BadFile as error:
        parser.exit(2, f"bandit.py: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"bandit.py: error: {error.filename}: {error.strerror}\n")
    print(f"\nVerdict ({opt.seeds} seeds, {time.time() - start:.0f} s)")
    for claim, holds, found in claims:
        print(f"  {'holds' if holds else 'DOES NOT':<9} {claim:<74} {found}")


if __name__ == "__main__":
    main()
