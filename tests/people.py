"""Real rankings: do people rank as a Mallows model says, and does their dispersion help to predict others?

    python tests/people.py FILES... --seeds 200        .soc and .soi files from PrefLib.org (00024: four sets)

Prints each file's centre, dispersion, and how often the item k places higher in the centre is preferred.
Then fits one policy to all files with the same number of items, as in `bandit.py shared`: half of the voters
give index and pairs, the others judge it.  Writes people.json and, with matplotlib, people.png to --out.
The file: 1. fitting the model to rankings -> 2. reading the files -> 3. the experiment.
"""
import argparse
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bandit  # noqa: E402
from bandit import F64, Panel, Result  # noqa: E402
from mallowspo import pair_probability  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# 1. The Kendall-Mallows model, P(ranking) = phi^d(ranking, centre) / Z, of rankings given as ranks (count, n):
#    ranks[r, i] is the place (0 = best) of item i; d is kendall_distance.  bandit.py has what needs no ranks.

def kendall_distance(ranks: Tensor) -> Tensor:
    """(...) number of pairs that a ranking (..., n) orders differently from the centre 0, 1, ..., n - 1."""
    return (ranks[..., :, None] > ranks[..., None, :]).triu(1).sum((-2, -1))


def log_partition(n: int, lam: Tensor) -> Tensor:
    """log Z for n items (Fligner and Verducci 1986); lam has any shape and may be 0 (then log n!).
    Z = prod_{i=1..n} (1 + phi + ... + phi^(i-1)): inserting the i-th item costs 0 to i-1 inversions."""
    exponents = -lam[..., None] * torch.arange(n, dtype=lam.dtype, device=lam.device)   # (..., n)
    return exponents.logcumsumexp(-1).sum(-1)


def distance_moments(n: int, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the distance to the centre, summed over the insertions, which are independent.

    They equal derivatives of log Z (Fligner and Verducci 1986); the sums avoid cancellation near lam = 0."""
    mean, variance = torch.zeros_like(lam), torch.zeros_like(lam)
    for i in range(2, n + 1):
        cost = torch.arange(i, dtype=lam.dtype, device=lam.device)                      # (i,) inversions
        chances = bandit.top_choice(i, lam)                         # (..., i) distributed as a favourite
        step = (chances * cost).sum(-1, keepdim=True)                                   # (..., 1)
        mean = mean + step[..., 0]
        variance = variance + (chances * (cost - step) ** 2).sum(-1)
    return mean, variance


def fit_rankings(ranks: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (..., n) and maximum-likelihood lam (...) of rankings (count, n); weight: (..., count) people.

    The centre lists the items by mean place, best first (Borda).  Given the centre, the likelihood of an
    exponential family is highest where the expected distance equals the observed mean distance."""
    weight = weight / weight.sum(-1, keepdim=True)
    centre = (weight @ ranks.to(weight.dtype)).argsort(dim=-1, stable=True)
    placed = ranks.T[centre].transpose(-1, -2)                                          # (..., count, n)
    distance = (weight * kendall_distance(placed)).sum(-1)
    return centre, bandit.invert(lambda lam: distance_moments(ranks.shape[-1], lam)[0], distance)


# ------------------------------------------------------------------------------------------------------------
# 2. Reading PrefLib's files: .soc (complete strict orders) and .soi (incomplete ones).

class BadFile(Exception):
    """A rankings file is wrong; the message says where and what."""


class Ballots(NamedTuple):
    ranks: Tensor      # (orders, items) place of each item, 0 = best
    weight: Tensor     # (orders,) voters who gave this order
    voters: int        # all voters in the file, including those whose order is too short to use


def need(holds: bool, where: str, problem: str) -> None:
    if not holds:
        raise BadFile(f"{where}: {problem}")


def parse_order(text: str, items: int, complete: bool, where: str) -> tuple[int, tuple[int, ...]]:
    """Parse a line `COUNT: a,b,c` into the count and the item numbers."""
    need("{" not in text, where, f"a tie in {text[:50]!r}; only strict orders can be read (.soc, .soi)")
    need(re.fullmatch(r"0*[1-9][0-9]{0,8} *: *[0-9]{1,9}( *, *[0-9]{1,9})*", text), where,
         f"expected 'COUNT: a,b,c' (voters: items, best first), found {text[:50]!r}")
    count, *order = map(int, re.findall("[0-9]+", text))
    for item in order:
        need(1 <= item <= items, where, f"unknown item {item}; the file's items are 1 to {items}")
        need(order.count(item) == 1, where, f"item {item} appears twice")
    need(len(order) == items or not complete, where,
         f"{len(order)} items of {items}; orders in a .soc file must be complete (unlike .soi)")
    return count, tuple(order)


def read_rankings(path: str) -> Ballots:
    """Read a file of `# KEY: VALUE` lines, then orders `COUNT: a,b,c`; items are numbered from 1, best first.

    An order that leaves out one item is complete, with that item last; shorter ones only count as voters."""
    where, facts = f"{path}:1", {}
    votes, full = Counter(), Counter()
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        where, text = f"{path}:{number}", line.decode("utf-8-sig", "replace").strip()
        need("\ufffd" not in text and "\0" not in text, where, "not a text file")
        fact = re.fullmatch("# *NUMBER (ALTERNATIVES|VOTERS|UNIQUE ORDERS): *(.*)", text)
        if fact:
            need(re.fullmatch("[0-9]{1,9}", fact[2]), where, f"expected a whole number, found {fact[2][:50]!r}")
            need(fact[1] not in facts, where, "this key appeared before")
            facts[fact[1]] = int(fact[2]), where
        elif text and text[0] != "#":
            items, _ = facts.get("ALTERNATIVES", (0, where))
            need(items >= 2, where, "expected '# NUMBER ALTERNATIVES: N', N >= 2, before the first order")
            count, order = parse_order(text, items, path.endswith(".soc"), where)
            need(order not in votes, where, "this order appeared before")
            votes[order] = count
            if len(order) >= items - 1:
                full[(*order, *set(range(1, items + 1)).difference(order))] += count
    need(votes, where, "the file ends without an order")
    for key, found in (("VOTERS", votes.total()), ("UNIQUE ORDERS", len(votes))):
        told, at = facts.get(key, (found, where))
        need(told == found, at, f"says {told} {key.lower()}, but the orders below have {found}")
    need(full, where, f"the file ends without an order of at least {items - 1} items")
    ranks = (torch.tensor(list(full)) - 1).argsort(-1)                                  # (orders, items)
    return Ballots(ranks, torch.tensor(list(full.values()), dtype=F64), votes.total())


# ------------------------------------------------------------------------------------------------------------
# 3. The experiment.

def people(opt) -> Result:
    """Real rankings: centre, dispersion, how often the item k places higher in the centre is preferred.  Then
    one policy per number of items: half of each file's voters give index and pairs, the others judge."""
    files, groups = [], {}
    for name in opt.rankings:
        ballots = read_rankings(name)
        files.append(describe(name, ballots))
        groups.setdefault(ballots.ranks.shape[-1], []).append(ballots)
    rng = np.random.default_rng(opt.seed)
    rows, claims = [], []
    for n, group in groups.items():
        if len(group) < 2 or min(ballots.weight.sum() for ballots in group) < 2:
            print(f"  {n} items: not compared, as that needs two files with two voters each")
            continue
        found, at = bandit.compare(opt, rng, **held_out(opt, rng, group))
        rows += [{"items": n, **row} for row in found]
        for index in ("phi, inverted entropy", "phi, shuffled index"):
            ahead, se = at[index]["minus DPO"], at[index]["minus DPO se"]
            claims.append((f"people, {n} items, new voters: {index} beats DPO", ahead < 0,
                           f"{ahead:+.2f} +- {se:.2f} mnat"))
    return Result(rows, claims, None, {"files": files})


def describe(name: str, ballots: Ballots) -> dict:
    """Print a file's centre, dispersion and rates by gap, and return them for people.json."""
    centre, lam = fit_rankings(ballots.ranks, ballots.weight)
    phi, items = math.exp(-lam), (centre + 1).tolist()
    used = int(ballots.weight.sum())
    rates = by_gap(ballots.ranks[:, centre], ballots.weight, lam)
    print(f"  {name}: phi {phi:.4f}, centre {','.join(map(str, items))}, "
          f"{used:,} of {ballots.voters:,} voters used")
    for key, rate in rates.items():
        print(f"    {key:<9} by gap  " + " ".join(f"{x:.3f}" for x in rate))
    return {"file": name, "phi": phi, "centre": items, "voters": used, "items": len(items),
            "voters in file": ballots.voters, "by gap": rates}


def by_gap(ranks: Tensor, weight: Tensor, lam: Tensor) -> dict[str, list[float]]:
    """How often an item is preferred to the one k = 1, 2, ... places below: observed, and by two links."""
    rates, gap = bandit.pair_rates(ranks, weight), torch.arange(1, ranks.shape[-1], dtype=F64)
    seen = torch.stack([rates.diagonal(k).mean() for k in range(1, len(rates))])
    load = (len(rates) - gap) * gap     # the logistic slope is where the log-likelihood's derivative is 0
    slope = bandit.invert(lambda c: -(load * torch.sigmoid(c * gap)).sum(), -(load * seen).sum())
    links = {"observed": seen, "Kendall": pair_probability(gap, lam),
             "logistic": torch.sigmoid(slope * gap)}
    return {name: rate.tolist() for name, rate in links.items()}


def held_out(opt, rng, group: list[Ballots]) -> dict[str, Tensor]:
    """What bandit.compare takes, from random halves of the voters; answer k is k-th in the first half."""
    parts = []
    for ballots in group:
        ranks, votes = ballots.ranks, ballots.weight.long().numpy()
        half = rng.multivariate_hypergeometric(votes, votes.sum() // 2, size=opt.seeds)
        first = torch.from_numpy(half).to(F64)                                          # (S, orders)
        second = torch.from_numpy(votes - half).to(F64)
        centre, lam = fit_rankings(ranks, first)                              # (S, n), (S,)
        choices = first @ (ranks == 0).to(F64)                                          # (S, n)
        entropy = torch.special.entr(choices / choices.sum(-1, keepdim=True)).sum(-1)   # (S,)
        parts.append({"train": rates_by_place(ranks, first, centre), "test": rates_by_place(ranks, second, centre),
                      "lam": lam, "entropy": entropy, "choices": choices})
    return {name: torch.stack([part[name] for part in parts], 1) for name in parts[0]}


def rates_by_place(ranks: Tensor, weight: Tensor, centre: Tensor) -> Tensor:
    """(S, n, n) pair rates, with the items in the order of these centres (S, n)."""
    rates = bandit.pair_rates(ranks, weight)
    return rates.take_along_dim(centre[:, :, None], 1).take_along_dim(centre[:, None], 2)


PANEL = Panel("pairs", "minus DPO", "index", "pairs per file", "log-loss minus DPO's (mnat)", facet="items", log="x",
              lines=bandit.INDICES, se="minus DPO se")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("rankings", nargs="*", metavar="FILE", help=".soc and .soi files")
    flag("--pairs", type=bandit.number(int, 1, 10**7), nargs="+", help="pairs per file (16 64 256 1024)")
    flag("--seeds", type=bandit.number(int, 1, 10_000), default=20, help="random halves of the voters (20)")
    flag("--seed", type=bandit.number(int, 0, 2**31), default=0, help="seed of the random numbers (0)")
    flag("--out", type=Path, default=Path("out/bandit"), help="folder of people.json and people.png (out/bandit)")
    opt = parser.parse_args()
    if not opt.rankings:
        parser.error("no FILE given; pass the .soc or .soi files of a set from PrefLib.org, such as 00024")
    try:
        bandit.perform({"people": (people, PANEL)}, opt)
    except (BadFile, OSError) as error:
        parser.exit(2, f"people.py: error: {error}\n")


if __name__ == "__main__":
    main()
