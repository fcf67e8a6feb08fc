"""The dispersion as a plug-in: base methods with and without a dispersion index, on the demo's population.

    python tests/plugin.py --seeds 8 --out out/plugin        about seven minutes per seed on one core
    python tests/plugin.py --seeds 8 --out out/plugin --only 3          one seed; several can run side by side

Each method is trained once per seed and measured along the way, so methods are compared where they have moved
equally far from the reference.  Runs that are already in --out are not repeated.  r-dpo and sampo are left
out: all answers have the same length, so both equal dpo to the last bit (tests/test_neighbours.py).
"""
import argparse
import contextlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from bandit import MEASURES, Population, at_kl  # noqa: E402

ALONE = train.World(0, 1, torch.device("cpu"), torch.float32)
METHODS = ("dpo", "ipo", "hinge", "simpo", "decay-dpo", "focalpo", "minor-dpo")
SOURCES = {"base": {"dispersion": "constant"},
           "estimated": {"dispersion": "entropy"},
           "learned": {"dispersion": "entropy", "dispersion_power": "learn"},
           "true": {"dispersion": "field"},
           "shuffled": {"dispersion": "field"}}                     # the true phi of another question
BETAS = {"simpo": 2.0}                                              # 0.1 for the others
KLS = (0.05, 0.1, 0.15)


def run_seed(out: Path, seed: int) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    population, found = Population(), out / "runs.json"
    base, pairs = train.Config(out=str(out), seed=seed, device="cpu"), out / "demo/pairs.jsonl"
    runs = json.loads(found.read_text()) if found.exists() else []
    if not runs:
        with contextlib.redirect_stdout(None):
            train.make_reference(base, out / "demo", population, ALONE)
    shuffled = out / "demo/shuffled.jsonl"
    for method in METHODS:
        for source, settings in SOURCES.items():
            name = f"{method} {source}"
            if any(row["method"] == name for row in runs):
                continue
            if source == "shuffled" and not shuffled.exists():
                write_shuffled(pairs, shuffled, seed)
            beta = BETAS.get(method, 0.1)
            cfg = train.Config(**{**train.DEMO, "model": str(out / "demo/reference"), "loss": method, "seed": seed,
                                  "data": str(shuffled if source == "shuffled" else pairs), "beta": beta,
                                  "sft": train.DEMO_SFT * beta, "out": str(out / "run"), "device": "cpu",
                                  "reference": str(out / "demo/reference.safetensors"), "samples": 0, "steps": 100,
                                  **settings})
            with contextlib.redirect_stdout(None):
                runs += train.fit_and_measure(name, cfg, population, ALONE, 5)
            print(f"seed {seed}, {name}: KL {runs[-1]['kl']:.3f}", flush=True)
            found.write_text(json.dumps(runs))


def write_shuffled(pairs: Path, shuffled: Path, seed: int) -> None:
    """Write the pairs, each question with the true dispersion of another one."""
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    phi = np.random.default_rng(seed).permutation([record["dispersion"] for record in records[:24]])
    train.write_jsonl(shuffled, ({**record, "dispersion": phi[i % 24]} for i, record in enumerate(records)))


def first_at(rows: list[dict], method: str, kl: float) -> dict[str, float] | None:
    """The figures where the path of a method first reaches this KL; None: it never does."""
    path = [row for row in rows if row["method"] == method]
    return next(filter(None, (at_kl(list(two), method, kl) for two in itertools.pairwise(path)
                              if two[0]["kl"] <= kl < two[1]["kl"])), None)


def mean_se(values) -> str:
    values = np.array(values)
    return f"{values.mean():+.4f} +- {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--only", type=int)
    parser.add_argument("--out", type=Path, default=Path("out/plugin"))
    args = parser.parse_args()
    for seed in range(args.seeds) if args.only is None else [args.only]:
        run_seed(args.out / str(seed), seed)
    if args.only is not None:
        return
    found = [json.loads((args.out / str(seed) / "runs.json").read_text()) for seed in range(args.seeds)]
    for kl in KLS:
        print(f"\nat KL {kl}, differences from the same method without dispersion; {args.seeds} seeds")
        print(f"{'':<24}" + "".join(f"{key.replace('_', ' '):>22}" for key in MEASURES))
        for method in METHODS:
            for source in list(SOURCES)[1:]:
                both = [(first_at(rows, f"{method} {source}", kl), first_at(rows, f"{method} base", kl))
                        for rows in found]
                both = [(row, base) for row, base in both if row and base]
                cells = [mean_se([row[key] - base[key] for row, base in both]) for key in MEASURES if len(both) > 1]
                print(f"{method:<11} {source:<9} {len(both):>2} " + "".join(f"{cell:>22}" for cell in cells))
    learned = [row for rows in found for row in rows if row["method"].endswith("learned") and row["power"]]
    for method in METHODS:
        power = [row["power"] for row in learned if row["method"].startswith(method + " ")]
        print(f"{method}: power learned at the end {min(power):.2f} to {max(power):.2f}")
    print(f"probability elsewhere at most {max(row['elsewhere'] for rows in found for row in rows):.3f}")


if __name__ == "__main__":
    main()
