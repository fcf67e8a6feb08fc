"""The dispersion theory, checked: what MallowsPO claims, what of it is true, how strongly, and where it loses.

A bandit is a language model with all the words taken out: a prompt is a set of n answers, a policy a softmax over
them, and people rank the answers by a Mallows model whose centre is 0, 1, ..., n - 1.  Everything is known, so every
claim has a number.  The losses are mallowspo.LINKS, the very functions that train.py trains with.

    python bandit.py                                every experiment with few seeds, about a minute, then a verdict
    python bandit.py shared --seeds 100 --n 5       one experiment in full
    python bandit.py people --rankings *.soc        real rankings (PrefLib.org)

Each experiment prints a sentence and a table, and leaves NAME.json and, with matplotlib, NAME.png in --out.
The file reads from simple to composed: data, engine, rankings files, experiments, verdict, command line.
"""
import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import mallowspo
from mallowspo import LINKS

F64 = torch.float64
METHODS = {name: mallowspo.LOSSES[name].link for name in ("dpo", "mallows-theta", "mallows-phi", "ipo")}


# ---------------------------------------------------------------------------------------------------------------
# Data: who beats whom.  A matrix [i, j] is how often, or how probably, answer i is preferred to answer j.

def to_lam(phis) -> Tensor:
    return -torch.as_tensor(phis, dtype=F64).log()


def truth(n: int, lam: Tensor) -> Tensor:
    """(..., n, n) what infinitely many people say: the exact pair probabilities (1/2 on the diagonal)."""
    place = torch.arange(n, dtype=F64)
    return mallowspo.pair_probability(place - place[:, None], lam[..., None, None])


def draw_pairs(rng, chances: Tensor, count) -> Tensor:
    """(..., n, n) wins among `count` pairs of answers, each pair drawn at random and judged with these chances."""
    i, j = pairs_of(chances.shape[-1])
    seen = rng.multinomial(count, np.full(len(i), 1 / len(i)), size=chances.shape[:-2])   # (..., pairs)
    won = rng.binomial(seen, chances[..., i, j].clamp(0, 1).numpy())
    wins = torch.zeros(chances.shape, dtype=F64)
    wins[..., i, j] = torch.from_numpy(won).to(F64)
    wins[..., j, i] = torch.from_numpy(seen - won).to(F64)
    return wins


def pairs_of(n: int) -> Tensor:
    """(2, n(n-1)/2) the pairs i < j."""
    return torch.triu_indices(n, n, 1)


# ---------------------------------------------------------------------------------------------------------------
# Engine.  A policy is pi = ref * exp(u / beta) / Z; the losses see u only, so beta enters when a policy is read off.

def fit(link: str, wins: Tensor, lam: Tensor, steps: int = 60, ridge: float = 1e-10) -> Tensor:
    """The u (..., n) that minimises the mean loss over all pairs of all prompts: one policy for the P prompts of
    wins (..., P, n, n) with dispersions lam (..., P); everything before P is independent fits, done at once.

    Fisher scoring: the curvature of a pair is the mean of its squared slope over what the model expects people to
    say, so it is never negative, however bent the link.  Levenberg's damping makes every step a descent.  It
    converges in 10 to 60 steps; where the data are separable there is no minimum, and the ridge ends the growth.
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
        slope_win, slope_lose = (torch.autograd.grad(loss.sum(), gap)[0] for loss in (win, lose))
        win, lose = win.detach(), lose.detach()
        value = (won * win + lost * lose).sum((-2, -1)) + ridge / 2 * u.square().sum(-1)
        gradient = (won * slope_win + lost * slope_lose).sum(-2) @ design + ridge * u
        bend = torch.exp(-win) * slope_win ** 2 + torch.exp(-lose) * slope_lose ** 2
        bend = 2 * torch.ones_like(bend) if link == "square" else bend                    # IPO is no likelihood
        curvature = design.T @ (((won + lost) * bend).sum(-2)[..., None] * design)
        return value, gradient, curvature + ridge * torch.eye(n, dtype=F64)

    u = torch.zeros(*won.shape[:-2], n, dtype=F64)
    here, damping = look(u), torch.full(won.shape[:-2], 1e-3, dtype=F64)
    for _ in range(steps):
        value, gradient, curvature = here
        stiff = damping[..., None] * curvature.diagonal(dim1=-2, dim2=-1)
        # u is free up to a constant: the 1/n holds that direction still
        move = torch.linalg.solve(curvature + torch.diag_embed(stiff) + 1 / n, gradient)  # (..., n)
        there = look(u - move)
        better = there[0] <= value
        u = torch.where(better[..., None], u - move, u)
        here = tuple(torch.where(better.reshape(*better.shape, *[1] * (new.dim() - better.dim())), new, old)
                     for new, old in zip(there, here, strict=True))
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-12, 1e8)
        if (gradient * move).sum(-1).max() < 1e-15:           # what the step hoped to gain
            break
    return u - u.mean(-1, keepdim=True)


def log_loss(link: str, u: Tensor, lam: Tensor, chances: Tensor) -> Tensor:
    """(...) mean log-loss (nats) of a shared policy u (..., n) on new pairs of the prompts, chances (..., P, n, n)."""
    i, j = pairs_of(u.shape[-1])
    gap = (u[..., i] - u[..., j])[..., None, :]                                           # (..., 1, pairs)
    p, lam = chances[..., i, j], lam[..., None]
    return (p * LINKS[link](gap, lam) + (1 - p) * LINKS[link](-gap, lam)).mean((-2, -1))


def floor_loss(chances: Tensor) -> Tensor:
    """(...) the log-loss of knowing the chances: nobody does better."""
    i, j = pairs_of(chances.shape[-1])
    return (torch.special.entr(chances[..., i, j]) + torch.special.entr(chances[..., j, i])).mean((-2, -1))


def slope_per_rank(u: Tensor) -> Tensor:
    """(...) what u falls by from one place to the next, on average; 1 is the target pi_ref * exp(-place / beta)."""
    return (u[..., 0] - u[..., -1]) / (u.shape[-1] - 1)


def mean_se(x: Tensor) -> tuple[float, float]:
    """Mean over the seeds (all entries) and its standard error."""
    return x.mean().item(), (x.std().item() / math.sqrt(x.numel()) if x.numel() > 1 else 0.0)


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
    voters: int        # all voters of the file, also those whose order is too short to use


def read_rankings(path: str) -> Ballots:
    """Read one file: `# KEY: VALUE` lines, then `COUNT: a,b,c`, items numbered from 1, best first.

    An order that leaves out one item is complete, that item being last; shorter ones are counted and left out.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None
    facts, orders, voters = {}, {}, 0
    number = 0
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise BadFile(f"{where}: not a text file") from None
        if "\0" in text:
            raise BadFile(f"{where}: not a text file")
        if text.startswith("#"):
            key, _, value = text[1:].partition(":")
            if key.strip() in ("NUMBER ALTERNATIVES", "NUMBER VOTERS", "NUMBER UNIQUE ORDERS"):
                facts[key.strip()] = whole_number(value, where, key.strip().lower(), 2 if "ALT" in key else 1), where
        elif text:
            if "NUMBER ALTERNATIVES" not in facts:
                raise BadFile(f"{where}: no '# NUMBER ALTERNATIVES: ...' line before the first order; "
                              "files in PrefLib's format since 2022 have one")
            count, order = read_order(text, facts["NUMBER ALTERNATIVES"][0], where, path.endswith(".soc"))
            if order in orders:
                raise BadFile(f"{where}: the same order as line {orders[order][1]}")
            orders[order] = count, number
            voters += count
    if not orders:
        raise BadFile(f"{path}:{max(number, 1)}: the file ends without an order, such as '12: 3,1,2'")
    for key, found in (("NUMBER VOTERS", voters), ("NUMBER UNIQUE ORDERS", len(orders))):
        if facts.get(key, (found,))[0] != found:
            raise BadFile(f"{facts[key][1]}: says {key} {facts[key][0]}, but the orders below add up to {found}")
    return tabulate(path, orders, facts["NUMBER ALTERNATIVES"][0], voters)


def whole_number(text: str, where: str, what: str, least: int = 1) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise BadFile(f"{where}: {what} must be a whole number from {least}, found {text[:20]!r}")
    return int(text)


def read_order(text: str, items: int, where: str, complete: bool) -> tuple[int, tuple[int, ...]]:
    """A line `COUNT: a,b,c` as the count and the item numbers."""
    count, colon, order = text.partition(":")
    if not colon:
        raise BadFile(f"{where}: expected 'COUNT: a,b,c', found {text[:40]!r}")
    if "{" in order:
        raise BadFile(f"{where}: a tie, {order.strip()[:40]!r}; only strict orders can be read (.soc, .soi)")
    count = whole_number(count, where, "the count before the colon")
    order = tuple(whole_number(item, where, "an item") for item in order.split(","))
    unknown = [item for item in order if item > items]
    if unknown:
        raise BadFile(f"{where}: unknown item {unknown[0]}; the file has items 1 to {items}")
    if len(set(order)) < len(order):
        raise BadFile(f"{where}: item {max(order, key=order.count)} is there twice")
    if complete and len(order) < items:
        raise BadFile(f"{where}: {len(order)} items of {items}; a .soc file has complete orders (.soi may be partial)")
    return count, order


def tabulate(path: str, orders: dict, items: int, voters: int) -> Ballots:
    weights = {}
    for order, (count, _) in orders.items():
        if len(order) >= items - 1:
            order += tuple(set(range(1, items + 1)) - set(order))
            weights[order] = weights.get(order, 0) + count
    if not weights:
        raise BadFile(f"{path}: no order names {items - 1} of the {items} items or more: too partial to use")
    order = torch.tensor(list(weights)) - 1                                               # (orders, items)
    return Ballots(order.argsort(-1), torch.tensor(list(weights.values()), dtype=F64), voters)


# ---------------------------------------------------------------------------------------------------------------
# Experiments: each takes the options and returns its rows and what they say.  Numbers are means over seeds, and
# `se` their standard errors; log-losses are in thousandths of a nat (mnat).

class Claim(NamedTuple):
    text: str
    holds: bool
    number: str


class Result(NamedTuple):
    rows: list[dict]
    claims: list[Claim]
    curves: list[dict] | None = None     # finer rows for the picture
    more: dict = {}                      # further keys of NAME.json            # noqa: RUF012


def pick(rows, value, **where) -> list:
    return [row[value] for row in rows if all(row.get(key) == want for key, want in where.items())]


def exact(opt) -> Result:
    """The closed forms of the Kendall model agree with adding up every ranking, and the sampler with both."""
    lam = to_lam(opt.phis or [.01, .05, .1, .2, .3, .5, .7, .8, .9, .95, .99])
    rows = []
    for n in range(2, 8):
        ranks = mallowspo.enumerate_rankings(n)
        p = mallowspo.exact_model(ranks, lam)                                             # (phis, n!)
        d = mallowspo.kendall_distance(ranks).to(F64)
        mean, log_z = (p * d).sum(-1), torch.logsumexp(-lam[:, None] * d, -1)
        variance = (p * (d - mean[:, None]) ** 2).sum(-1)
        top = (p @ (ranks == 0).to(F64), mallowspo.top_choice(n, lam))
        i, j = pairs_of(n)
        pair = truth(n, lam)[..., i, j]
        formula = mallowspo.distance_moments(n, lam)
        generator = torch.Generator().manual_seed(opt.seed)
        draws = mallowspo.sample_rankings(20_000, n, lam[len(lam) // 2].item(), generator)
        drawn = mallowspo.pair_rates(draws, torch.ones(len(draws), dtype=F64))[i, j]
        expected = pair[len(lam) // 2]
        rows.append({"n": n, "log Z": gap_of(log_z, mallowspo.log_partition(n, lam)), "mean d": gap_of(mean, formula[0]),
                     "var d": gap_of(variance, formula[1]), "favourite": gap_of(*top),
                     "pair": gap_of(mallowspo.pair_rates(ranks, p)[..., i, j], pair),
                     "sampler |z|": ((drawn - expected) / (expected * (1 - expected) / len(draws)).sqrt()).abs().max().item()})
    worst = max(max(row[key] for key in row if key not in ("n", "sampler |z|")) for row in rows)
    return Result(rows, [Claim("Kendall: the closed forms are exact", worst < 1e-12, f"worst error {worst:.0e}, n <= 7")])


def gap_of(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def spearman(opt) -> Result:
    """The theta link sigmoid(2 lam gap) is not Spearman's pair probability but its lower bound: exact for answers that
    a person places side by side, too cautious for all others, the more so the more answers and the more dispute.
    """
    phis = opt.phis or [.05, .3, .5, .7, .9, .95, .99]
    lam, rows = to_lam(phis), []
    for n in (3, 5, 7):
        ranks = mallowspo.enumerate_rankings(n)
        p = mallowspo.exact_model(ranks, lam, mallowspo.spearman_distance)
        i, j = pairs_of(n)
        marginal = mallowspo.pair_rates(ranks, p)[..., i, j]                              # (phis, pairs)
        link = lambda lam: torch.exp(-LINKS["mallows-theta"]((j - i).to(F64), lam))       # noqa: B023
        beside = (ranks[:, i] - ranks[:, j]).abs() == 1                                   # (n!, pairs)
        first = (ranks[:, i] < ranks[:, j]) & beside
        beside = (p @ first.to(F64)) / (p @ beside.to(F64))
        factors = torch.linspace(1, 3, 801, dtype=F64)
        errors = (link(factors[:, None, None] * lam[:, None]) - marginal).abs().amax(-1)  # (factors, phis)
        below = marginal - link(lam[:, None])
        for k, phi in enumerate(phis):
            rows.append({"n": n, "phi": phi, "error": below[k].max().item(), "lowest": below[k].min().item(),
                         "side by side": gap_of(beside[k], link(lam[k])), "best factor": factors[errors[:, k].argmin()].item(),
                         "error after": errors[:, k].min().item(), "(n+1)/3": (n + 1) / 3})
    worst = max(pick(rows, "error", n=5))
    return Result(rows, [
        Claim("theta's link is Spearman's pair probability", worst < 1e-3, f"off by up to {worst:.3f} at n = 5"),
        Claim("theta's link never exceeds it", min(pick(rows, "lowest")) > -1e-12, f"least gap {min(pick(rows, 'lowest')):.0e}")])


def as_printed(h: Tensor, lam: Tensor) -> Tensor:
    """g(h) of the paper's Eq. 11, word for word: what `link` compares the stable form with."""
    a, phi = h.abs(), torch.exp(-lam)
    g = (a + 1) / (1 - phi ** (a + 1)) - a / (1 - phi ** a)
    return torch.where(h > 0, g, 1 - g)


def kendall_link(opt) -> Result:
    """The Kendall link as printed fails in float32: not a number at h = 0, where training starts, noise at small lam,
    log 0 for h << 0.  The stable form has none of that, and bridges the jump at 0 without moving an integer gap.
    """
    h = torch.cat([-torch.logspace(4, -3, 29), torch.zeros(1), torch.logspace(-3, 4, 29)])
    rows, curves = [], []
    for lam in [1e-6, 1e-4, .01, .1, .7, 3., 30.] if opt.phis is None else to_lam(opt.phis).tolist():
        lam = torch.tensor(lam)
        reference = LINKS["mallows-phi"](h.to(F64), lam.to(F64))  # the tests hold this against 50 digits
        printed, ours = -torch.log(as_printed(h, lam)), LINKS["mallows-phi"](h, lam)
        normal = reference > 1e-37                                # below, float32 itself has fewer digits
        outside = torch.isfinite(printed) & normal & (h.abs() >= mallowspo.BRIDGE)
        rows.append({"lam": lam.item(), "nan or inf, printed": int((~torch.isfinite(printed)).sum()),
                     "error, printed": (printed / reference - 1).abs()[outside].max().item(),
                     "nan or inf, ours": int((~torch.isfinite(ours)).sum()),
                     "error, ours": (ours / reference - 1).abs()[normal].max().item(),
                     "jump at 0": (1 / torch.tanh(lam.to(F64) / 2) - 2 / lam.to(F64)).item()})
    for phi in (.05, .8):
        for x in torch.linspace(-3, 3, 241, dtype=F64).tolist():
            point, lam = torch.tensor(x, dtype=F64), to_lam(phi)
            for form, g in (("printed", as_printed), ("ours", mallowspo.pair_probability)):
                curves.append({"link": f"{form} {phi}", "h": x, "g": g(point, lam).item() if x else None})
    bad, ours = sum(pick(rows, "nan or inf, printed")), sum(pick(rows, "nan or inf, ours"))
    worst = max(pick(rows, "error, ours"))
    return Result(rows, [
        Claim("phi's formula can be used as printed (float32)", bad == 0, f"{bad} of {len(rows) * len(h)} losses nan or inf"),
        Claim("phi's stable form is right in float32", ours == 0 and worst < 1e-5, f"relative error {worst:.0e}")], curves)


def optimum(opt) -> Result:
    """With infinite data, one prompt and beta fixed, MallowsPO-phi learns pi_ref * exp(-place / beta) whatever the
    dispersion.  What the others learn depends on how much people agree: DPO blows up where they do.
    """
    phis = opt.phis or [.01, .05, .1, .2, .3, .5, .7, .8, .9, .95, .98]
    lam, rows = to_lam(phis)[:, None], []
    for method in opt.methods:
        u = fit(METHODS[method], truth(opt.n, lam), lam)                                  # (phis, n)
        best = torch.softmax(u / opt.beta, -1)[:, 0]
        rows += [{"method": method, "phi": phi, "slope": slope, "chance of best": chance}
                 for phi, slope, chance in zip(phis, slope_per_rank(u).tolist(), best.tolist(), strict=True)]
    claims = []
    for method in opt.methods:
        slope = pick(rows, "slope", method=method)
        flat, spread = max(abs(s - 1) for s in slope), max(slope) / max(min(slope), 1e-12)
        claims.append(Claim(f"optimum of {method}: 1 nat a rank at every dispersion", flat < 1e-3,
                            f"slope {min(slope):.3f} to {max(slope):.3f}" + (f", {spread:.0f} x" if spread > 2 else "")))
    return Result(rows, claims)


def growth(opt) -> Result:
    """On pairs that nobody disputes no likelihood method stops: the margin grows like log(time), faster or slower by
    dispersion.  MallowsPO slows it where people agree and speeds it up where they do not; only IPO is bounded.
    """
    margin = torch.cat([torch.linspace(0, 1, 10_001, dtype=F64), torch.linspace(1, 1500, 150_000, dtype=F64)[1:]])
    curves = []
    for phi in opt.phis or [.05, .3, .9]:
        for method in opt.methods:
            x = margin.clone().requires_grad_()
            speed, = torch.autograd.grad(-2 * LINKS[METHODS[method]](x, to_lam(phi)).sum(), x)
            # gradient flow on one pair of logits is d margin / d time = -2 loss'(margin): time is an integral
            usable = int((speed > 1e-12).sum())
            m, speed = margin[:usable].numpy(), speed[:usable].numpy()
            elapsed = np.concatenate([[0], np.cumsum(np.diff(m) * (1 / speed[1:] + 1 / speed[:-1]) / 2)])
            for t in np.logspace(0, 8, 33):
                at = float(np.interp(t, elapsed, m))
                pace = t * math.exp(np.interp(at, m, np.log(speed))) if t < elapsed[-1] else 0.0
                curves.append({"method": method, "phi": phi, "time": t, "margin": at, "per e-fold": pace})
    rows = [row for row in curves if row["time"] in (1e2, 1e4, 1e6, 1e8)]
    claims = []
    for phi in opt.phis or [.05, .9]:
        rate = {method: pick(rows, "per e-fold", phi=phi, time=1e6, method=method) for method in opt.methods}
        if rate.get("mallows-phi") and rate.get("dpo"):
            rate = rate["mallows-phi"][0] / rate["dpo"][0]
            claims.append(Claim(f"phi tames undisputed pairs: margin grows slower than DPO's, phi = {phi}", rate < 1,
                                f"{rate:.2f} x as fast, and without end"))
    return Result(rows, claims, curves)


def frontier(opt) -> Result:
    """Reward for KL, one beta for prompts of many dispersions, at a mean KL of 1/2 nat: mean place of the answer, 0
    being best.  MallowsPO-phi is on the frontier of the consensus, and off that of a random annotator, where IPO is.
    """
    n, phis = opt.n, opt.phis or [.05, .1, .2, .5, .8, .9, .95]
    lam, rng = to_lam(phis), np.random.default_rng(opt.seed)
    chances = truth(n, lam)                                                               # (P, n, n)
    place = torch.arange(n, dtype=F64)
    costs = {"consensus": place.expand(len(phis), n),
             "annotator": chances.sum(-2) - chances.diagonal(dim1=-2, dim2=-1)}           # E place = sum_j P(j above i)
    rows, curves = [], []
    for count in ["infinite", *(opt.pairs or [1024, 64])]:
        wins = chances if count == "infinite" else draw_pairs(rng, chances.expand(opt.seeds, -1, -1, -1), count)
        policies = {method: fit(METHODS[method], wins[..., None, :, :], lam[:, None]) for method in opt.methods}
        for reward, cost in costs.items():
            best = {"best possible": -cost} if count == "infinite" else {}
            for method, u in {**best, **policies}.items():
                mean, se = mean_se(cost_at_kl(u, cost, 0.5))
                rows.append({"reward": reward, "pairs": count, "method": method, "place": mean, "se": se})
                if count == "infinite":
                    curves += [{"reward": reward, "method": method, "kl": kl, "place": cost_at_kl(u, cost, kl).item()}
                               for kl in (.01, .03, .06, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1.)]
    claims = []
    for reward in costs:
        best = pick(rows, "place", reward=reward, method="best possible")[0]
        for method in opt.methods:
            at = pick(rows, "place", reward=reward, method=method, pairs="infinite")[0]
            if method in ("mallows-phi", "ipo"):
                claims.append(Claim(f"{method} is on the frontier, reward: the {reward}'s place", at < best + .005,
                                    f"place {at:.3f}, best {best:.3f}"))
    return Result(rows, claims, curves)


def cost_at_kl(u: Tensor, cost: Tensor, kl: float) -> Tensor:
    """(...) mean cost of the policies softmax(scale * u), u (..., P, n), at the one scale where their mean KL is kl."""
    n = u.shape[-1]
    policy = lambda scale: torch.softmax(scale[..., None, None] * u, -1)
    entropy = lambda scale: torch.special.entr(policy(scale)).sum(-1).mean(-1)            # falls as the scale grows
    scale = mallowspo.invert(entropy, torch.full(u.shape[:-2], math.log(n) - kl, dtype=F64), high=1e4)
    return (policy(scale) * cost).sum(-1).mean(-1)


def samples(opt) -> Result:
    """What a disputed prompt costs: with few pairs MallowsPO-phi amplifies their noise.  Regret, beta * KL(pi || pi*), as
    a ratio to DPO's: worse (above 1) until N * lam^2 passes about 2 to 6, N pairs of the prompt, then far better.
    """
    phis = opt.phis or [.7, .8, .9, .95]
    lam, rng = to_lam(phis), np.random.default_rng(opt.seed)
    reach = torch.tensor([.1, .3, 1, 2, 3, 6, 10, 30, 100], dtype=F64)[:, None]
    counts = torch.tensor(opt.pairs)[:, None].expand(-1, len(phis)) if opt.pairs else (reach / lam ** 2).ceil().long()
    chances = truth(opt.n, lam).expand(opt.seeds, len(counts), -1, -1, -1)                # (S, counts, phis, n, n)
    wins = draw_pairs(rng, chances, counts.numpy())[..., None, :, :]
    target = torch.log_softmax(-torch.arange(opt.n, dtype=F64) / opt.beta, -1)
    regret = {}
    for method in ("dpo", "mallows-phi"):
        policy = torch.log_softmax(fit(METHODS[method], wins, lam[:, None]) / opt.beta, -1)
        regret[method] = opt.beta * (policy.exp() * (policy - target)).sum(-1)            # (S, counts, phis)
    rows = []
    for k, phi in enumerate(phis):
        for c in range(len(counts)):
            dpo, phi_regret = regret["dpo"][:, c, k], regret["mallows-phi"][:, c, k]
            ratio, se = ratio_se(phi_regret, dpo)
            rows.append({"phi": phi, "N lam^2": (counts[c, k] * lam[k] ** 2).item() if opt.pairs else reach[c].item(),
                         "pairs": int(counts[c, k]), "dpo": dpo.mean().item(), "mallows-phi": phi_regret.mean().item(),
                         "ratio": ratio, "se": se})
    few = [row["ratio"] for row in rows if row["N lam^2"] < .5 and row["phi"] >= .8]
    many = [row["ratio"] for row in rows if row["N lam^2"] >= 30 and row["phi"] >= .8]
    claims = []
    if few:
        claims.append(Claim("phi beats DPO on a disputed prompt with N lam^2 < 0.5 pairs", max(few) < 1,
                            f"regret {min(few):.2f} to {max(few):.2f} x DPO's"))
    if many:
        claims.append(Claim("phi beats DPO on a disputed prompt with N lam^2 > 30 pairs", max(many) < .5,
                            f"regret {min(many):.2f} to {max(many):.2f} x DPO's"))
    return Result(rows, claims)


def excess(link: str, u: Tensor, lam: Tensor, chances: Tensor) -> Tensor:
    """(...) log-loss on new pairs beyond the least possible, mnat."""
    return 1000 * (log_loss(link, u, lam, chances) - floor_loss(chances))


def compare(opt, rng, train: Tensor, test: Tensor, lam: Tensor, entropy: Tensor, choices: Tensor, pairs) -> list[dict]:
    """One policy for P prompts, fitted to pairs drawn with the chances `train` and judged by `test`, (S, P, n, n).

    lam: (S, P) best knowledge of the dispersions; entropy: (S, P) of people's favourites; choices: (S, P, n) counts.
    """
    n, prompts = lam.shape[-1], torch.arange(lam.shape[-1])
    proxy = mallowspo.dispersion_weight(entropy / math.log(test.shape[-1]), 1.0)
    moved = torch.from_numpy(rng.integers(1, n, size=(len(lam), 1))) if n > 1 else 0      # nobody keeps its own
    indices = {"dpo": ("dpo", lam),
               "phi, one index for all": ("mallows-phi", lam.mean(-1, keepdim=True).expand_as(lam)),
               "phi, best index": ("mallows-phi", lam),
               "theta, best index": ("mallows-theta", lam),
               "phi, entropy proxy": ("mallows-phi", proxy / proxy.mean(-1, keepdim=True)),
               "phi, inverted entropy": ("mallows-phi", mallowspo.lam_of_choices(choices)),
               "phi, shuffled index": ("mallows-phi", lam.gather(-1, (prompts + moved) % n))}
    rows = []
    for count in pairs:
        wins = draw_pairs(rng, train, count)
        found = {name: (excess(METHODS[method], u := fit(METHODS[method], wins, index), index, test), u)
                 for name, (method, index) in indices.items()}
        alone = fit("sigmoid", wins[..., None, :, :], lam[..., None])                     # (S, P, n)
        alone = excess("sigmoid", alone, lam[..., None], test[..., None, :, :]).mean(-1)
        found["dpo, a policy a prompt"] = alone, None
        for name, (loss, u) in found.items():
            mean, se = mean_se(loss)
            ahead, ahead_se = mean_se(loss - found["dpo"][0])
            rows.append({"index": name, "pairs": count, "excess": mean, "se": se,
                         "over dpo": ahead, "over dpo se": ahead_se})
            if u is not None:
                i, j = pairs_of(u.shape[-1])
                rows[-1] |= {"slope": slope_per_rank(u).mean().item(), "tau": (u[:, i] - u[:, j]).sign().mean().item()}
    return rows


def shared(opt) -> Result:
    """One policy shared by prompts that differ only in dispersion, which is what a language model is: log-loss on new
    pairs beyond the least possible, mnat.  Knowing the dispersions is worth nearly all of DPO's; a wrong index hurts.
    """
    n, rng = opt.n, np.random.default_rng(opt.seed)
    lam = to_lam(opt.phis or [.05, .1, .3, .6, .9, .95]).expand(opt.seeds, -1)
    chances = truth(n, lam)
    choices = torch.from_numpy(rng.multinomial(64, mallowspo.top_choice(n, lam).numpy()))
    pairs = opt.pairs or [16, 64, 256, 1024]
    rows = compare(opt, rng, chances, chances, lam, mallowspo.favourite_entropy(n, lam), choices, pairs)
    at = {row["index"]: row["excess"] for row in rows if row["pairs"] == pairs[min(2, len(pairs) - 1)]}
    dpo = at["dpo"]
    return Result(rows, [
        Claim(f"one policy for many dispersions: {name} beats DPO", at[name] < dpo, f"excess {at[name]:.1f}, DPO {dpo:.1f} mnat")
        for name in ("phi, best index", "phi, inverted entropy", "phi, entropy proxy", "phi, shuffled index")])


def noise(opt) -> Result:
    """What an imprecise index costs: excess log-loss of MallowsPO-phi as a ratio to DPO's, by the noise r in log lam as a
    multiple of its true spread over 12 prompts.  As is it loses from about r = 1.2; shrunk by 1/(1 + r^2), never.
    """
    rng, rows = np.random.default_rng(opt.seed), []
    z = torch.special.ndtri((torch.arange(12, dtype=F64) + .5) / 12)
    for spread in (.4, .8, 1.3):
        log_lam = (math.log(.7) + spread * z / z.std(correction=0)).expand(opt.seeds, -1)   # (S, 12)
        chances = truth(opt.n, log_lam.exp())
        for count in opt.pairs or [256]:
            wins = draw_pairs(rng, chances, count)
            dpo = excess("sigmoid", fit("sigmoid", wins, log_lam), log_lam, chances)
            for r in (0, .25, .5, .75, 1, 1.25, 1.5):
                guess = log_lam + r * spread * torch.from_numpy(rng.standard_normal(log_lam.shape))
                for form, kappa in (("as is", 1), ("shrunk", 1 / (1 + r * r))):
                    middle = guess.mean(-1, keepdim=True)
                    index = (middle + kappa * (guess - middle)).exp().clamp(max=30)
                    ratio, se = ratio_se(excess("mallows-phi", fit("mallows-phi", wins, index), index, chances), dpo)
                    rows.append({"spread": spread, "pairs": count, "r": r, "index": form, "ratio": ratio, "se": se,
                                 "dpo": dpo.mean().item(), "line": f"{form}, {spread}"})
    return Result(rows, [
        Claim(f"phi with an index of noise r = {r}, {form}, beats DPO", max(ratios) < 1, f"{min(ratios):.2f} to {max(ratios):.2f} x")
        for r, form in ((.5, "as is"), (1.5, "as is"), (1.5, "shrunk")) for ratios in [pick(rows, "ratio", r=r, index=form)]])


def estimate(opt) -> Result:
    """What can be known of lam from few answers: the paper's proxy, -log of the normalised entropy times one constant,
    orders prompts rightly but is not proportional to lam; inverting the entropy is, and needs one pseudo-count.
    """
    phis = opt.phis or [round(.05 * k, 2) for k in range(1, 20)]
    lam, rng, rows, curves = to_lam(phis), np.random.default_rng(opt.seed), [], []
    proxy_of = lambda entropy, n: mallowspo.dispersion_weight(entropy / math.log(n), 1.0)
    for n in sorted({5, 10, opt.n}):
        constant = (lam.mean() / proxy_of(mallowspo.favourite_entropy(n, lam), n).mean()).item()
        for m in opt.pairs or [8, 16, 64, 1024]:
            counts = torch.from_numpy(rng.multinomial(m, mallowspo.top_choice(n, lam).numpy(), size=(opt.seeds, len(phis))))
            entropy = torch.special.entr(counts / m).sum(-1)                              # (S, phis)
            differ = rng.binomial(max(m // 2, 1), mallowspo.disagreement(n, lam).numpy(), size=entropy.shape)
            guesses = {"proxy (the paper)": constant * proxy_of(entropy, n),
                       "inverted entropy": mallowspo.lam_of_entropy(entropy, n),
                       "inverted, pseudo-count": mallowspo.lam_of_choices(counts),
                       "two people, random pair": mallowspo.lam_of_disagreement(torch.from_numpy(differ) / max(m // 2, 1), n)}
            if n <= 5:
                ranks = mallowspo.enumerate_rankings(n)
                people = rng.multinomial(m, mallowspo.exact_model(ranks, lam).numpy(), size=entropy.shape)
                guesses["whole rankings"] = mallowspo.fit_rankings(ranks, torch.from_numpy(people).to(F64))[1]
            for name, guess in guesses.items():
                square, se = mean_se((guess - lam).square().mean(-1))
                rows.append({"n": n, "estimator": name, "answers": m, "rmse": square ** .5, "se": se / (2 * square ** .5 + 1e-12)})
    fine = to_lam(torch.linspace(.99, .01, 99, dtype=F64))
    worst, ratios, ordered = 0.0, {}, True
    for n in (5, 10, 100):
        entropy = mallowspo.favourite_entropy(n, fine)
        proxy = proxy_of(entropy, n) * fine.mean() / proxy_of(entropy, n).mean()
        worst, ordered = max(worst, gap_of(mallowspo.lam_of_entropy(entropy, n), fine)), ordered and bool((proxy.diff() > 0).all())
        ratios[n] = proxy / fine
        curves += [{"n": n, "lam": x, "proxy": y} for x, y in zip(fine.tolist(), proxy.tolist(), strict=True)]
    curves += [{"n": "lam", "lam": x, "proxy": x} for x in fine.tolist()]
    few = {row["estimator"]: row["rmse"] for row in rows if row["n"] == 5 and row["answers"] == max(pick(rows, "answers"))}
    return Result(rows, [
        Claim("the entropy proxy orders prompts by dispersion", ordered, "strictly rising at n = 5, 10, 100"),
        Claim("the entropy proxy is proportional to lam", bool(ratios[5].max() < 1.1 * ratios[5].min()), f"proxy / lam from {ratios[5].min():.2f} to {ratios[5].max():.2f}, n = 5"),
        Claim("inverting the entropy gives lam", worst < 1e-8, f"error {worst:.0e}; from answers, n = 5: RMSE "
              f"{few['inverted, pseudo-count']:.3f}, proxy {few['proxy (the paper)']:.3f}")], curves)


def people(opt) -> Result:
    """Real rankings.  Per file the centre, the dispersion, and how well the Kendall link tells who is preferred at each
    gap; then one policy for all files of as many items, dispersions and pairs from half of the voters, judged by the
    other half: log-loss minus DPO's, mnat.
    """
    if not opt.rankings:
        print("No rankings given.  PrefLib.org has many (.soc and .soi; 00024 is a good start): download some, then\n"
              "    python bandit.py people --rankings 00024-*.soc")
        return Result([], [])
    rng, rows, groups, files = np.random.default_rng(opt.seed), [], {}, []
    for name in opt.rankings:
        ballots = read_rankings(name)
        n = ballots.ranks.shape[-1]
        groups.setdefault(n, []).append(ballots)
        centre, lam = mallowspo.fit_rankings(ballots.ranks, ballots.weight)
        used = int(ballots.weight.sum())
        files.append({"file": name, "phi": math.exp(-lam), "centre": (centre + 1).tolist(), "voters": used, "items": n,
                      "voters in file": ballots.voters})
        print(f"{name}: {n} items, {used:,} of {ballots.voters:,} voters used, phi {math.exp(-lam):.4f}, "
              f"centre {','.join(map(str, files[-1]['centre']))}")
        by_gap(mallowspo.pair_rates(ballots.ranks[:, centre], ballots.weight), lam)
    claims = []
    for n, group in groups.items():
        if len(group) < 2 or min(int(b.weight.sum()) for b in group) < 2:
            print(f"A comparison needs two files or more of as many items and voters: {n} items has {len(group)}.")
            continue
        rows += [{"items": n, **row} for row in held_out(opt, rng, group)]
        last = max(count for count in pick(rows, "pairs", items=n) if count <= 256) if not opt.pairs else max(opt.pairs)
        for name in ("phi, inverted entropy", "phi, shuffled index"):
            (over,), (se,) = (pick(rows, key, index=name, pairs=last, items=n) for key in ("over dpo", "over dpo se"))
            claims.append(Claim(f"people, {n} items: {name} beats DPO", over < -2 * se, f"{over:+.2f} +- {se:.2f} mnat"))
    return Result(rows, claims, None, {"files": files})


def by_gap(rates: Tensor, lam: Tensor) -> None:
    """Print how often the item that the centre has k places higher is preferred, and what two links say."""
    n = len(rates)
    gap = torch.arange(1, n, dtype=F64)
    seen = torch.stack([rates.diagonal(k).mean() for k in range(1, n)])
    weight = (n - gap) * gap
    score = lambda c: -(weight * torch.sigmoid(c[..., None] * gap)).sum(-1)               # its likelihood's slope
    logistic = torch.sigmoid(mallowspo.invert(score, -(weight * seen).sum()) * gap)
    for name, values in (("observed", seen), ("Kendall", mallowspo.pair_probability(gap, lam)), ("logistic", logistic)):
        print(f"    {name:<9} by gap  " + " ".join(f"{value:.3f}" for value in values.tolist()))


def held_out(opt, rng, group: list[Ballots]) -> list[dict]:
    """Compare on random halves of the voters of several files; answer k of a file is what its first half puts k-th."""
    halves = []
    for ballots in group:
        all_votes = ballots.weight.to(torch.long).numpy()
        first = rng.multivariate_hypergeometric(all_votes, all_votes.sum() // 2, size=opt.seeds)   # (S, orders)
        first, second = (torch.from_numpy(half).to(F64) for half in (first, all_votes - first))
        centre, lam = mallowspo.fit_rankings(ballots.ranks, first)
        rates = [torch.stack([rate[c][:, c] for rate, c in zip(mallowspo.pair_rates(ballots.ranks, half), centre, strict=True)])
                 for half in (first, second)]
        halves.append((*rates, lam, first @ (ballots.ranks == 0).to(F64)))
    train, test, lam, choices = (torch.stack(parts, 1) for parts in zip(*halves, strict=True))
    entropy = torch.special.entr(choices / choices.sum(-1, keepdim=True)).sum(-1)
    return compare(opt, rng, train, test, lam, entropy, choices, opt.pairs or [16, 64, 256, 1024])


# ---------------------------------------------------------------------------------------------------------------
# The experiments as a table: what runs, what is printed (columns; or a Grid), what is drawn.

class Grid(NamedTuple):
    down: tuple[str, ...]
    across: str
    value: str
    se: str | None = None


class Panel(NamedTuple):
    x: str
    y: str
    by: str
    lines: dict               # value of `by` -> its name in the legend; four at most
    xlabel: str
    ylabel: str
    log: str = ""             # axes with a log scale
    guide: float | None = None
    where: dict = {}                                                                      # noqa: RUF012
    title: str = ""


class Experiment(NamedTuple):
    run: Callable
    layout: Grid | None       # None: every column
    panels: list[Panel]


NAMES = {"mallows-phi": "MallowsPO-phi", "dpo": "DPO", "mallows-theta": "MallowsPO-theta", "ipo": "IPO"}
INDEX = {"phi, best index": "phi, true index", "dpo": "DPO", "phi, entropy proxy": "phi, entropy proxy",
         "phi, shuffled index": "phi, shuffled index"}
FRONTIER = {"mallows-phi": "MallowsPO-phi", "dpo": "DPO", "ipo": "IPO", "best possible": "best possible"}
EXPERIMENTS = {
    "exact": Experiment(exact, None, [Panel("n", "pair", "", {"": "pair probability"}, "answers", "largest error", "y")]),
    "spearman": Experiment(spearman, None, [
        Panel("phi", "error", "n", {3: "3 answers", 5: "5", 7: "7"}, "dispersion phi", "exact - theta link, largest")]),
    "link": Experiment(kendall_link, None, [
        Panel("h", "g", "link", {f"{form} {phi}": f"{form}, phi = {phi}" for phi in (.05, .8) for form in ("ours", "printed")},
              "h = beta * log-ratio (ranks)", "g(h): chance to be preferred")]),
    "optimum": Experiment(optimum, Grid(("method",), "phi", "slope"), [
        Panel("phi", "slope", "method", NAMES, "dispersion phi (0: all agree, 1: coin toss)", "learned log-ratio per rank (nats)", "y")]),
    "growth": Experiment(growth, Grid(("phi", "method"), "time", "margin"), [
        Panel("time", "margin", "method", NAMES, "training time (steps x rate)", "margin (nats)", "xy", None, {"phi": phi},
              f"phi = {phi}") for phi in (.05, .9)]),
    "frontier": Experiment(frontier, Grid(("reward", "pairs"), "method", "place", "se"), [
        Panel("kl", "place", "method", FRONTIER, "mean KL to the reference (nats)", "mean place (0 = best)", "", None,
              {"reward": reward}, title) for reward, title in (("consensus", "as the consensus ranks"),
                                                               ("annotator", "as a random annotator ranks"))]),
    "samples": Experiment(samples, Grid(("phi",), "N lam^2", "ratio", "se"), [
        Panel("N lam^2", "ratio", "phi", {phi: f"phi = {phi}" for phi in (.7, .8, .9, .95)},
              "N lam^2  (N pairs of the prompt)", "regret, MallowsPO-phi / DPO", "xy", 1)]),
    "shared": Experiment(shared, Grid(("index",), "pairs", "excess", "se"), [
        Panel("pairs", "excess", "index", INDEX, "pairs a prompt", "excess log-loss (mnat)", "xy")]),
    "noise": Experiment(noise, Grid(("spread", "index"), "r", "ratio", "se"), [
        Panel("r", "ratio", "line", {"as is, 0.4": "as is", "shrunk, 0.4": "shrunk", "as is, 1.3": "as is, wide spread",
              "shrunk, 1.3": "shrunk, wide spread"}, "noise r of the index / its true spread", "excess log-loss / DPO's", "", 1)]),
    "estimate": Experiment(estimate, Grid(("n", "estimator"), "answers", "rmse", "se"), [
        Panel("lam", "proxy", "n", {"lam": "inverted entropy", 5: "proxy, 5 answers", 10: "10", 100: "100"},
              "lam = -log phi", "estimate of lam, infinite data")]),
    "people": Experiment(people, Grid(("items", "index"), "pairs", "over dpo", "over dpo se"), [
        Panel("pairs", "over dpo", "index", {"phi, best index": "phi, fitted index", "dpo": "DPO",
              "phi, inverted entropy": "phi, inverted entropy", "phi, shuffled index": "phi, shuffled"},
              "pairs a file", "log-loss minus DPO's (mnat)", "x", 0)]),
}
STYLES = [{"color": "#00633a", "marker": "o", "linewidth": 3}, {"color": "#e8590c", "marker": "s", "linestyle": "--"},
          {"color": "#1864ab", "marker": "^", "linestyle": "-."}, {"color": "#868e96", "marker": "D", "linestyle": ":"}]


def cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(rows: list[dict], grid: Grid | None) -> None:
    """Print rows as a table."""
    if not rows:
        return
    if grid:
        cells = {}
        for row in rows:
            text = f"{row[grid.value]:.4g}" + (f" +-{row[grid.se]:.2g}" if grid.se and row[grid.se] else "")
            cells.setdefault(tuple(row[key] for key in grid.down), {})[row[grid.across]] = text
        across = list(dict.fromkeys(row[grid.across] for row in rows))
        lines = [[*grid.down, *(f"{grid.across} {key}" if key == across[0] else key for key in across)]]
        lines += [[*down, *(line.get(key, "") for key in across)] for down, line in cells.items()]
    else:
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    lines = [[cell(value) for value in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def draw(rows: list[dict], panels: list[Panel], path: Path) -> None:
    """Save the picture, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("  no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(6.2 * len(panels), 4.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for style, (key, name) in zip(STYLES, panel.lines.items(), strict=False):
            line = [row for row in rows if row.get(panel.by, "") == key and panel.where.items() <= row.items()]
            if line:
                few = {} if len(line) < 50 else {"marker": ""}
                axes.plot([row[panel.x] for row in line], [row[panel.y] for row in line], label=name, **{**style, **few})
        if panel.guide is not None:
            axes.axhline(panel.guide, color="black", linewidth=1)
        axes.set_xscale("log" if "x" in panel.log else "linear")
        axes.set_yscale("log" if "y" in panel.log else "linear")
        axes.set_xlabel(panel.xlabel, fontsize=15)
        axes.set_ylabel(panel.ylabel, fontsize=15)
        axes.set_title(panel.title, fontsize=15)
        axes.tick_params(labelsize=13)
        axes.legend(fontsize=13, framealpha=.8)
        axes.grid(alpha=.3)
    figure.savefig(path, dpi=80)


# ---------------------------------------------------------------------------------------------------------------

def number(kind, low, high):
    """An argparse type: a number in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number from {low} to {high}")
        return value
    return parse


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("experiment", nargs="?", default="all", choices=["all", *EXPERIMENTS], help="default: all")
    parser.add_argument("--n", type=number(int, 2, 30), default=5, help="answers to a prompt (5)")
    parser.add_argument("--phis", type=number(float, .001, .999), nargs="+", help="dispersions, one a prompt (each experiment has its own)")
    parser.add_argument("--pairs", type=number(int, 1, 10**7), nargs="+", help="preference pairs a prompt, or answers (estimate)")
    parser.add_argument("--seeds", type=number(int, 1, 10_000), default=20, help="independent repetitions (20)")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of the random numbers (0)")
    parser.add_argument("--beta", type=number(float, 1e-3, 1e3), default=1.0, help="of optimum and samples: pull to the reference (1)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of optimum, growth and frontier (all)")
    parser.add_argument("--rankings", nargs="+", metavar="FILE", help="of people: .soc and .soi files from PrefLib.org")
    parser.add_argument("--out", type=Path, default=Path("out/bandit"), help="folder of NAME.json and NAME.png (out/bandit)")
    return parser


def main():
    parser = arguments()
    opt = parser.parse_args()
    if opt.rankings and opt.experiment not in ("all", "people"):
        parser.error(f"--rankings is for people, not for {opt.experiment}")
    try:
        opt.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {opt.out}: {error.strerror}")
    torch.set_num_threads(1)                  # the matrices are tiny: more threads only wait for each other
    claims, started = [], time.time()
    for name in EXPERIMENTS if opt.experiment == "all" else [opt.experiment]:
        experiment = EXPERIMENTS[name]
        print(f"\n{name}: " + " ".join(experiment.run.__doc__.split()))
        try:
            result = experiment.run(opt)
        except BadFile as error:
            parser.error(str(error))
        show(result.rows, experiment.layout)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(opt).items()}
        record = {"experiment": name, "settings": settings, **result.more, "rows": result.rows,
                  "claims": [claim._asdict() for claim in result.claims]}
        (opt.out / f"{name}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        if result.rows:
            draw(result.curves or result.rows, experiment.panels, opt.out / f"{name}.png")
        claims += result.claims
    print(f"\nVerdict ({opt.seeds} seeds, {time.time() - started:.0f} s)")
    for claim in claims:
        print(f"  {'holds' if claim.holds else 'DOES NOT':<9} {claim.text:<76} {claim.number}")


if __name__ == "__main__":
    main()
