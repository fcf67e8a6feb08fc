"""Kill training runs at random moments, resume them, and compare the results with an undisturbed run.

    python tests/torture.py                                 20 kills of one process, 3 of one of two ranks: 2 minutes
    python tests/torture.py --kills 3 --rank-kills 1        what pytest does

A kill is SIGKILL, at a random time or at a random file operation: in the reference pass, in steps, in saves.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                    # we fork, to import once; threads do not survive
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import train  # noqa: E402
from bandit import Population  # noqa: E402
from model import Transformer  # noqa: E402
from train import write_jsonl  # noqa: E402

FLAGS = ("--steps 10 --batch-size 16 --lr 1e-3 --samples 1 --sample-tokens 4 --eval-every 3 --save-every 2 "
         "--max-tokens 64 --tokens-per-row 100").split()
TIMED = {"seconds", "pairs_per_second", "tokens_per_second", "memory_gib"}
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}


def make_inputs(folder: Path) -> None:
    """Write a random bfloat16 model (too coarse to resume from its folder alone) and pairs, some twice."""
    population = Population()
    files = population.tokenizer_files()
    vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
    settings = {**train.DEMO_MODEL, "vocab_size": len(vocabulary), "eos_token_id": vocabulary["<end>"]}
    Transformer.from_config(settings, files).save_pretrained(folder / "model")
    path = folder / "model/model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    pairs = list(population.judgements(60, 0))
    write_jsonl(folder / "pairs.jsonl", pairs + pairs[:7])
    write_jsonl(folder / "held.jsonl", population.judgements(20, 5))


def keep_states(out: Path) -> None:
    """Copy AdamW's state out of each checkpoint, because the last one is deleted when the run ends."""
    def copy():
        for folder in train.checkpoints(out)[:1]:
            shutil.copy(folder / "state.safetensors", out.with_suffix(".state"))
    save = train.save_checkpoint

    def save_and_copy(*arguments):
        save(*arguments)
        copy()
    copy()
    train.save_checkpoint, train.SCORES_SECONDS = save_and_copy, 0


def in_child(job, log: Path) -> int:
    """Run job() in a forked process -> its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        job()
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status)


def run_once(folder: Path, out: Path, at_second: float | None = None, at_operation: int | None = None) -> int:
    """Train, or resume, until the end or the kill -> exit status 0 or -9."""
    def job():
        keep_states(out)
        count = [0]

        def watch(event, arguments):
            if event in OPERATIONS and str(out) in str(arguments[0]):
                count[0] += 1
                if count[0] == at_operation:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        train.main(["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--eval-data",
                    str(folder / "held.jsonl"), "--out", str(out), *FLAGS, "--resume"])
        out.with_suffix(".count").write_text(str(count[0]))
    child = in_child(job, out.with_suffix(".log"))
    if at_second is not None:
        timer = threading.Timer(at_second, os.kill, (child, signal.SIGKILL))
        timer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if at_second is not None:
        timer.cancel()
    return status


def contents(out: Path) -> dict:
    """All results of a run that must be equal."""
    found = {"state": load_file(out.with_suffix(".state")), "model": load_file(out / "model.safetensors")}
    scores = load_file(out / "cache/reference.safetensors")
    order = sorted(range(len(scores["digest"])), key=lambda i: scores["digest"][i].tolist())
    ends = scores["length"].cumsum(0).tolist()
    for name in ("logp", "entropy"):
        parts = [scores[name][end - n:end] for end, n in zip(ends, scores["length"].tolist())]
        found[name] = {str(scores["digest"][i].tolist()): parts[i] for i in order}
    for name in ("metrics", "evaluations", "samples", "dispersion"):
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        found[name] = [{key: value for key, value in row.items() if key not in TIMED} for row in rows]
    assert [row["step"] for row in found["metrics"]] == list(range(10))
    return found


def differences(one: dict, two: dict) -> list[str]:
    found = []
    for name in one:
        if isinstance(one[name], dict):
            same = one[name].keys() == two[name].keys() and \
                all(torch.equal(tensor, two[name][key]) for key, tensor in one[name].items())
        else:
            same = one[name] == two[name]
        found += [] if same else [name]
    return found


def kill_runs(folder: Path, kills: int, rng: random.Random) -> None:
    start = time.perf_counter()
    assert run_once(folder, folder / "whole") == 0, (folder / "whole.log").read_text()
    duration, operations = time.perf_counter() - start, int((folder / "whole.count").read_text())
    expected, out, runs, killed = contents(folder / "whole"), folder / "out", 0, 0
    while True:
        moment = {} if killed == kills else {"at_operation": rng.randint(1, operations)} if rng.random() < 0.6 else \
            {"at_second": rng.uniform(0, duration)}
        status = run_once(folder, out, **moment)
        assert status in (0, -signal.SIGKILL), out.with_suffix(".log").read_text()
        if status:
            killed += 1
            steps = [path.name for path in train.checkpoints(out)]
            print(f"kill {killed:>2} at {moment}: {', '.join(steps) or 'no checkpoint'}", flush=True)
            continue
        runs += 1
        wrong = differences(expected, contents(out))
        assert not wrong, f"{wrong} differ from the run that nobody disturbed"
        if killed == kills:
            break
        shutil.rmtree(out)
        out.with_suffix(".state").unlink()
    print(f"{killed} kills in {runs} runs: weights, optimiser, scores and records are equal, bit for bit", flush=True)


def kill_ranks(folder: Path, kills: int, rng: random.Random) -> None:
    found = []
    for out, moments in ((folder / "ranks-whole", []), (folder / "ranks", [rng.randint(1, 4) for _ in range(kills)])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   "--max-restarts", str(kills), __file__, "--worker", ",".join(map(str, moments)) or "0", "--folder",
                   folder, "--out", out]
        start = time.perf_counter()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("start       ") - 1 == len(moments), done.stdout
        print(f"two ranks, one killed in its step {moments or '-'}: {time.perf_counter() - start:.0f} s",
              flush=True)
        found.append(contents(out))
    wrong = differences(*found)
    assert not wrong, f"{wrong} differ from the run that nobody disturbed"
    print(f"{kills} kills of one of two ranks: all is equal again, bit for bit", flush=True)


def worker(folder: Path, out: Path, moments: list[int]) -> None:
    """One rank under torchrun; in attempt r, rank r % 2 kills itself in its step number moments[r]."""
    keep_states(out)
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    count, step = [0], train.train_step

    def deadly(*arguments):
        count[0] += 1
        if attempt < len(moments) and rank == attempt % 2 and count[0] == moments[attempt]:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)
    train.train_step = deadly
    train.main(["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--eval-data",
                str(folder / "held.jsonl"), "--out", str(out), *FLAGS])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rank-kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--worker", "--folder", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(Path(args.folder), Path(args.out), [int(k) for k in args.worker.split(",") if k != "0"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = in_child(lambda: make_inputs(folder), folder / "log")
        assert os.waitpid(child, 0)[1] == 0, (folder / "log").read_text()
        kill_runs(folder, args.kills, random.Random(args.seed))
        if args.rank_kills:
            kill_ranks(folder, args.rank_kills, random.Random(args.seed))


if __name__ == "__main__":
    main()
