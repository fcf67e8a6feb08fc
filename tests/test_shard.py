"""Two processes, each with a share of the model (FSDP2, gloo), against one that has all of it."""
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from safetensors.torch import load_file

FLAGS = ["--steps", 5, "--batch-size", 7, "--lr", 1e-3, "--samples", 3, "--sample-tokens", 6, "--max-tokens", 64,
         "--tokens-per-row", 110, "--eval-every", 2, "--eval-pairs", 9]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(found, want, names):
    assert len(found) == len(want)
    for one, two in zip(found, want):
        assert one["step"] == two["step"]
        for name in names:
            assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-5), (name, one["step"])


@pytest.mark.parametrize("name", ["llama-tied", "llama-grouped"])
def test_shares_give_the_steps_of_one_process(run, make_model, pairs, tmp_path, name):
    flags = ["--model", make_model(name), "--data", pairs, *FLAGS]
    one = run("train.py", *flags, "--out", tmp_path / "one")
    two = run("train.py", *flags, "--out", tmp_path / "two", "--shard", "--save-every", 3, processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert "first loss is 0.693147; for a policy that equals its reference it is 0.693147" in two.stdout
    close(*(rows_of(tmp_path / out / "metrics.jsonl") for out in ("one", "two")),
          ["loss", "margin", "accuracy", "grad_norm", "chosen_logp"])
    close(*(rows_of(tmp_path / out / "evaluations.jsonl") for out in ("one", "two")), ["loss", "margin"])
    assert rows_of(tmp_path / "one/samples.jsonl") == rows_of(tmp_path / "two/samples.jsonl")
    found, want = (load_file(tmp_path / out / "model.safetensors") for out in ("two", "one"))
    before = load_file(make_model(name) / "model.safetensors")
    assert found.keys() == want.keys() == before.keys()
    for key in want:                                    # (Adam takes full steps where gradients are rounding noise)
        assert (found[key] - want[key]).norm() < 1e-3 * (want[key] - before[key]).norm(), key




def test_a_sharded_run_goes_on_in_one_process(run, make_model, pairs, tmp_path):
    flags = ["--model", make_model(), "--data", pairs, *FLAGS[2:], "--steps", 80, "--lr", 1e-4]
    whole = run("train.py", *flags, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "train.py"), *map(str, flags), "--out", str(tmp_path / "out")]
    started = subprocess.Popen([*command, "--shard"], env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "out/metrics.jsonl"
    while started.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        time.sleep(0.02)
    started.terminate()
    started.wait(120)
    checkpoint, = (tmp_path / "out/checkpoint").glob("step-*")
    assert 3 < int(checkpoint.name[5:]) < 80
    resumed = run("train.py", *flags, "--out", tmp_path / "out", "--resume")
    assert f"start       after step {int(checkpoint.name[5:])}" in resumed.stdout, resumed.stderr
    close(*(rows_of(tmp_path / out / "metrics.jsonl") for out in ("out", "whole")), ["loss", "margin", "grad_norm"])
