"""The demo over several seeds: means and standard errors of what its report says, and the picture of the README.

    python tests/demo_seeds.py --seeds 5 --out out/seeds                         about two minutes a seed
    python tests/demo_seeds.py --seeds 5 --out out/seeds --figure figures/demo.png     (needs matplotlib)

Seeds whose report.json is there already are not run again.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bandit import MATCHED_KL, MEASURES, at_kl  # noqa: E402


def reports(out: Path, seeds: int) -> list[dict]:
    for seed in range(seeds):
        if not (out / str(seed) / "report.json").exists():
            flags = ["--seed", str(seed), "--out", out / str(seed)]
            subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True)
    return [json.loads((out / str(seed) / "report.json").read_text()) for seed in range(seeds)]


def mean_se(values) -> str:
    values = np.array(values)
    return f"{values.mean():+.4f} +- {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def table(found: list[dict]) -> None:
    correlation = [r["dispersion_rank_correlation"] for r in found]
    print(f"{len(found)} seeds; rank correlation of index and phi {min(correlation):.3f} to {max(correlation):.3f}")
    for kl in MATCHED_KL:
        print(f"\nat KL {kl} nats      " + "".join(f"{key.replace('_', ' '):>22}" for key in MEASURES))
        at = {name: [at_kl(r["methods"][name], kl) for r in found] for name in found[0]["methods"]}
        print(f"{'dpo':<18}" + "".join(f"{mean_se([row[key] for row in at['dpo']]):>22}" for key in MEASURES))
        for name in list(at)[1:]:
            print(f"{name + ' - dpo':<18}"[:22].ljust(18) + "".join(
                f"{mean_se([a[key] - b[key] for a, b in zip(at[name], at['dpo'])]):>22}" for key in MEASURES))


def figure(found: list[dict], path: Path) -> None:
    """Left: the index of each question against its true dispersion.  Right: reward accuracy along the KL."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    phi, index = found[0]["true_phi"], np.mean([r["index"] for r in found], 0)
    weight = -np.log(index)
    left.plot(phi, weight / weight.mean(), "o", color="black")
    for q, (dx, dy, align) in {0: (0.02, 0.0, "left"), 7: (0.02, 0.02, "left"), 13: (0.01, 0.06, "left"),
                               20: (0.0, 0.07, "center"), 23: (0.0, -0.09, "right")}.items():
        left.annotate(found[0]["questions"][q], (phi[q], weight[q] / weight.mean()), ha=align,
                      xytext=(phi[q] + dx, weight[q] / weight.mean() + dy))
    left.set(xlabel="true dispersion phi of the question (1: people disagree)",
             ylabel="weight in the loss (mean 1)", ylim=(0.6, None))
    styles = {"dpo": ("0.45", "-"), "mallows-theta": ("tab:blue", "--"), "mallows-phi": ("tab:red", "-.")}
    grid = np.linspace(0.01, 0.4, 60)
    for name, (color, line) in styles.items():
        rows = np.array([[(at_kl(r["methods"][name], kl) or {}).get("reward_accuracy", np.nan) for kl in grid]
                         for r in found])
        mean, se = rows.mean(0), rows.std(0, ddof=1) / len(found) ** 0.5
        right.plot(grid, mean, line, color=color, label=name, linewidth=2)
        right.fill_between(grid, mean - se, mean + se, color=color, alpha=0.15, linewidth=0)
    right.set(xlabel="KL from the reference, nats", ylabel="share of people who agree\nwith the learned reward")
    right.legend(frameon=False, loc="lower right")
    fig.tight_layout()
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/seeds"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    found = reports(args.out, args.seeds)
    table(found)
    if args.figure:
        figure(found, args.figure)


if __name__ == "__main__":
    main()
