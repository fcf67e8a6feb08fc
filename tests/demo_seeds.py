"""Run the demo with several seeds and a control, tabulate its results, and draw the picture of the README.

    python tests/demo_seeds.py --seeds 5 --out out/seeds                               about five minutes a seed
    python tests/demo_seeds.py --seeds 5 --out out/seeds --figure figures/demo.png     (needs matplotlib)

Runs that are already in --out are not repeated.  --only N runs seed N alone: several can run side by side.
"""
import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from bandit import MEASURES, Population, at_kl  # noqa: E402

ALONE = train.World(0, 1, torch.device("cpu"), torch.float32)
MORE = {"mallows-phi-shuffled-learn":                                           # the control, see run_seed
        {"loss": "mallows-phi", "dispersion": "field", "dispersion_power": "learn"}}
EARLY = {**train.DEMO_METHODS, **MORE}
KLS = (0.1, 0.15, 0.2)


def run_seed(out: Path, seed: int) -> None:
    """Run the demo, MORE at the same betas, then all methods at a small beta, measured along the way.
    The control trains on shuffled.jsonl: each question has another one's index, which says nothing."""
    if not (out / "report.json").exists():
        flags = ["--seed", str(seed), "--out", out]
        subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True)
    torch.set_num_threads(1)
    report, pairs = json.loads((out / "report.json").read_text()), out / "demo/pairs.jsonl"
    index, shuffled = shuffle(report["index"], seed), out / "demo/shuffled.jsonl"
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    train.write_jsonl(shuffled, ({**record, "dispersion": index[i % len(index)]} for i, record in enumerate(records)))

    def job(name: str, folder: str, beta: float, settings: dict) -> train.Config:
        data = shuffled if "shuffled" in name else pairs
        return train.Config(**{**train.DEMO, "model": str(out / "demo/reference"), "data": str(data), "seed": seed,
                               "out": str(out / folder), "beta": beta, "sft": train.DEMO_SFT * beta,
                               "device": "cpu", "reference": str(out / "demo/reference.safetensors"), **settings})

    if not (out / "more.json").exists():
        runs = []
        for name, settings in MORE.items():
            for beta in train.DEMO_BETAS:
                runs += quietly(name, job(name, f"{name}-{beta}", beta, settings), 0)[-1:]
        train.write_json(out / "more.json", {"runs": runs})
    if not (out / "early.json").exists():
        paths = [quietly(name, job(name, f"early-{name}", 0.1, settings), 5) for name, settings in EARLY.items()]
        train.write_json(out / "early.json", {"runs": [row for path in paths for row in path]})


def shuffle(index: list[float], seed: int) -> list[float]:
    return [index[i] for i in np.random.default_rng(seed).permutation(len(index))]


def rank_correlation(a, b) -> float:
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]


def quietly(name: str, cfg: train.Config, every: int) -> list[dict]:
    with contextlib.redirect_stdout(None):
        rows = train.fit_and_measure(name, cfg, Population(), ALONE, every)
    print(f"{name}, beta {cfg.beta}: KL {rows[-1]['kl']:.3f}, power {rows[-1]['power']:.2f}", flush=True)
    return rows


def mean_se(values, digits: int = 4) -> str:
    values = np.array(values)
    return f"{values.mean():+.{digits}f} +- {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


def table(title: str, found: list[list[dict]], kls: tuple) -> None:
    """Print DPO at each KL, and how the others differ from it, paired by seed; found: rows of each seed."""
    print(f"\n{title}; {len(found)} seeds")
    methods = list(dict.fromkeys(row["method"] for row in found[0]))
    for kl in kls:
        print(f"\nat KL {kl:<26}" + "".join(f"{key.replace('_', ' '):>22}" for key in MEASURES))
        dpo = [at_kl(rows, "dpo", kl) for rows in found]
        print(f"{'dpo':<32}" + "".join(f"{mean_se([row[key] for row in dpo]):>22}" for key in MEASURES))
        for name in methods:
            both = [(at_kl(rows, name, kl), base) for rows, base in zip(found, dpo)]
            both = [(row, base) for row, base in both if row and base]
            cells = [mean_se([row[key] - base[key] for row, base in both]) for key in MEASURES if len(both) > 1]
            if name != "dpo":
                print(f"{name + ' - dpo':<28} {len(both):>2} " + "".join(f"{cell:>22}" for cell in cells))


def figure(found: list[list[dict]], reports: list[dict], path: Path) -> None:
    """Left: the weight of each question by its true dispersion.  Right: consensus rank and win rate by KL."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    fig, (left, *right) = plt.subplots(1, 3, figsize=(16, 4.8))
    phi, index = np.array(reports[0]["true_phi"]), np.mean([r["index"] for r in reports], 0)
    power = np.mean([row["power"] for rows in found for row in rows if row["method"] == "mallows-phi-learn"])
    for exponent, color, label in ((1, "tab:blue", "the paper's (power 1)"), (power, "tab:red", "learned power")):
        weight = (-np.log(index)) ** exponent
        left.plot(phi, weight / weight.mean(), "o", color=color, label=label)
    left.plot(phi, np.log(phi) / np.log(phi).mean(), color="0.6", label="true")
    left.set(xlabel="true dispersion phi of the question", ylabel="weight in the loss (mean 1)")
    left.legend(frameon=False)
    styles = {"dpo": ("0.35", "o-", "DPO"), "mallows-phi": ("tab:blue", "s--", "MallowsPO-phi (the paper)"),
              "mallows-phi-learn": ("tab:red", "D-.", "MallowsPO-phi, learned power")}
    for axes, key, label in zip(right, ("consensus_rank", "win_rate"),
                                ("place in people's common ranking", "win rate, average member")):
        for name, (color, line, text) in styles.items():
            rows = [[row for row in seed if row["method"] == name] for seed in found]
            kl, value = (np.array([[row[k] for row in seed] for seed in rows]) for k in ("kl", key))
            se = value.std(0, ddof=1) / len(value) ** 0.5
            axes.errorbar(kl.mean(0), value.mean(0), se, fmt=line, color=color, label=text, linewidth=2, capsize=3)
        axes.set(xlabel="KL from the reference, nats", ylabel=label)
    right[0].invert_yaxis()                                                     # up is good in both
    right[0].set_title("what it buys: the consensus (up: better)", fontsize=13)
    right[1].set_title("what it costs: the average member", fontsize=13)
    left.set_title("how hard a question pulls", fontsize=13)
    right[0].legend(frameon=False, loc="lower right")
    fig.tight_layout()
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", type=int)
    parser.add_argument("--out", type=Path, default=Path("out/seeds"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    for seed in range(args.seeds) if args.only is None else [args.only]:
        run_seed(args.out / str(seed), seed)
    if args.only is not None:
        return

    def load(name):
        return [json.loads((args.out / str(seed) / name).read_text()) for seed in range(args.seeds)]
    reports = load("report.json")
    found = [one["runs"] + two["runs"] for one, two in zip(reports, load("more.json"))]
    correlation = [report["dispersion_rank_correlation"] for report in reports]
    print(f"rank correlation of index and phi {min(correlation):.3f} to {max(correlation):.3f}; probability elsewhere "
          f"at most {max(row['elsewhere'] for rows in found for row in rows):.3f}")
    chance = [rank_correlation(shuffle(r["index"], seed), r["true_phi"]) for seed, r in enumerate(reports)]
    print("the shuffled index and phi, by chance: " + " ".join(f"{value:+.2f}" for value in chance))
    for name in ("mallows-phi-learn", "mallows-phi-shuffled-learn"):
        kappa = [[row["kappa"] for row in rows if row["method"] == name] for rows in found]
        power = [row["power"] for rows in found for row in rows if row["method"] == name]
        print(f"{name}: kappa by seed {np.round(np.mean(kappa, 1), 2).tolist()}, {mean_se(np.mean(kappa, 1), 2)}; "
              f"power used {min(power):.2f} to {max(power):.2f}")
    table("trained until the learning rate is 0, several betas", found, KLS)
    table("beta 0.1, stopped on the way", [one["runs"] for one in load("early.json")], (0.05, 0.1, 0.2))
    if args.figure:
        figure(found, reports, args.figure)


if __name__ == "__main__":
    main()
