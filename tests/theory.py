"""Two formulas of the paper, checked: the dispersion index as an estimate of lam, and phi's link as it is printed.

    python tests/theory.py                          both, in seconds
    python tests/theory.py estimate --seeds 100     one of them (--pairs: numbers of answers)

Flags, tables, pictures and files are those of bandit.py.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bandit import (  # noqa: E402
    F64,
    Panel,
    Result,
    favourite_entropy,
    invert,
    lam_of_choices,
    lam_of_entropy,
    main,
    mean_se,
    pick,
    table,
    to_lam,
    top_choice,
)
from mallowspo import BRIDGE, LINKS, dispersion_weight, pair_probability  # noqa: E402


def disagreement(n: int, lam: Tensor) -> Tensor:
    """How often two people differ on a random pair of n items: the mean of 2 g (1 - g) over the pairs."""
    gap = torch.arange(1, n, dtype=lam.dtype, device=lam.device)
    agree = pair_probability(gap, lam[..., None])                                       # (..., n - 1)
    return (2 * agree * (1 - agree) * (n - gap)).sum(-1) / (n * (n - 1) / 2)


def lam_of_disagreement(rate: Tensor, n: int) -> Tensor:
    """lam at which two people differ on this share of the pairs; 1/2 or more gives 0."""
    return invert(lambda lam: disagreement(n, lam), rate)


def paper_proxy(n: int, entropy: Tensor, over: Tensor) -> Tensor:
    """The paper's lam: -log of the normalised entropy, scaled to have the right mean over the lams `over`."""
    weight = lambda entropy: dispersion_weight(entropy / math.log(n), 1.0)
    return weight(entropy) * over.mean() / weight(favourite_entropy(n, over)).mean()


def estimate(opt) -> Result:
    """Root mean square error of lam from few answers.  The paper's proxy, -log of the normalised entropy
    times a constant, orders prompts correctly but is not proportional to lam; inverted entropy with a
    pseudo-count is.  (Estimates end at 50; where they could be infinite, the mean error is arbitrary.)"""
    lam, fine = to_lam(opt.phis or np.arange(1, 20) / 20), to_lam(torch.linspace(.99, .01, 99, dtype=F64))
    rng, size = np.random.default_rng(opt.seed), (opt.seeds, len(lam))
    rows, curves = [], []
    for n in (5, 10):
        top, differ = top_choice(n, lam).numpy(), disagreement(n, lam).numpy()
        for m in opt.pairs or [8, 16, 64, 1024]:
            counts = torch.from_numpy(rng.multinomial(m, top, size=size)).to(F64)       # (S, phis, n)
            entropy, couples = torch.special.entr(counts / m).sum(-1), (m + 1) // 2     # (S, phis)
            rate = torch.from_numpy(rng.binomial(couples, differ, size=size) / couples)
            guesses = {"entropy proxy (the paper)": paper_proxy(n, entropy, fine),
                       "inverted entropy": lam_of_entropy(entropy, n),
                       "inverted, pseudo-count": lam_of_choices(counts),
                       "two people, random pair": lam_of_disagreement(rate, n)}
            for name, guess in guesses.items():
                square, se = mean_se((guess - lam).square().mean(-1))
                rows.append({"n": n, "estimator": name, "answers": m, "rmse": square ** .5,
                             "se": se / (2 * square ** .5)})
    for n in (5, 10, 100):
        entropy = favourite_entropy(n, fine)
        guess, inverted = paper_proxy(n, entropy, fine), lam_of_entropy(entropy, n)
        curves += table({"n": n, "lam": fine, "guess": guess, "rise": guess.diff(prepend=torch.zeros(1)),
                         "ratio": guess / fine, "error": (inverted - fine).abs()})
    least, worst = min(pick(curves, "rise")), max(pick(curves, "error"))
    curves += table({"n": "any, inverted", "lam": fine, "guess": fine})
    low, high = min(pick(curves, "ratio", n=5)), max(pick(curves, "ratio", n=5))
    return Result(rows, [
        ("the entropy proxy orders prompts by dispersion", least > 0, "strictly, for 5, 10, 100 answers"),
        ("the entropy proxy is proportional to lam", high < 1.1 * low, f"{low:.2f} to {high:.2f} x lam, n = 5"),
        ("inverting the entropy gives lam", worst < 1e-8, f"error {worst:.0e}")], curves)


def as_printed(h: Tensor, lam: Tensor) -> Tensor:
    """g(h) exactly as printed in the paper's Eq. 11, to show why a stable form is needed."""
    a, phi = h.abs(), torch.exp(-lam)
    g = (a + 1) / (1 - phi ** (a + 1)) - a / (1 - phi ** a)
    return torch.where(h > 0, g, 1 - g)


def kendall_link(opt) -> Result:
    """As printed, phi's link fails in float32: nan at h = 0, where training starts, noise at small lam, log 0
    for h << 0.  The stable form has none of this, and bridges the jump at 0 without moving integer gaps."""
    h = torch.cat([-torch.logspace(4, -3, 29), torch.zeros(1), torch.logspace(-3, 4, 29)])
    lam = to_lam(opt.phis).float() if opt.phis else torch.tensor([1e-6, 1e-4, .01, .1, .7, 3., 30.])
    lam, exactly = lam[:, None], lam.to(F64)
    printed, ours = -torch.log(as_printed(h, lam)), LINKS["mallows-phi"](h, lam)        # (lams, h)
    right = LINKS["mallows-phi"](h.to(F64), exactly[:, None])     # test_mallowspo.py checks it to 1e-12
    normal = right > 1e-37                                        # below, float32 itself has fewer digits
    usable = torch.isfinite(printed) & normal & (h.abs() >= BRIDGE)
    error = lambda loss, where: torch.where(where, (loss / right - 1).abs(), 0).amax(-1)
    rows = table({"lam": lam[:, 0], "printed: nan or inf": (~torch.isfinite(printed)).sum(-1),
                  "printed: error": error(printed, usable), "ours: nan or inf": (~torch.isfinite(ours)).sum(-1),
                  "ours: error": error(ours, normal), "jump at 0": 1 / torch.tanh(exactly / 2) - 2 / exactly})
    curves, x = [], torch.linspace(-3, 3, 240, dtype=F64)
    for phi in (.05, .8):
        for form, g in (("printed", as_printed), ("ours", pair_probability)):
            curves += table({"link": f"{form} {phi}", "h": x, "g": g(x, to_lam(phi))})
    bad, worst = sum(pick(rows, "printed: nan or inf")), max(pick(rows, "ours: error"))
    sound = sum(pick(rows, "ours: nan or inf")) == 0 and worst < 1e-5
    return Result(rows, [
        ("phi's link can be used as printed (float32)", bad == 0, f"{bad} of {printed.numel()} nan or inf"),
        ("phi's stable form is right in float32", sound, f"error {worst:.0e}")], curves)


EXPERIMENTS = {
    "link": (kendall_link, Panel(
        "h", "g", "link", "h (ranks)", "g(h), probability of being preferred", grid=False)),
    "estimate": (estimate, Panel(
        "lam", "guess", "n", "true lam = -log phi", "estimate, infinite data", grid=False)),
}

if __name__ == "__main__":
    main(__doc__, EXPERIMENTS)
