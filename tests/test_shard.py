"""Two processes that share the model out (FSDP2, gloo) against one that has all of it."""
import json

import pytest
import torch
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


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-untied"])
def test_shares_give_the_steps_of_one_process_and_resume_on_one(run, make_model, pairs, tmp_path, name):
    flags = ["--model", make_model(name), "--data", pairs, *FLAGS]
    one = run("train.py", *flags, "--out", tmp_path / "one")
    two = run("train.py", *flags, "--out", tmp_path / "two", "--shard", "--save-every", 3, processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert "first loss is 0.693147; of a policy that equals its reference it is 0.693147" in two.stdout
    close(*(rows_of(tmp_path / out / "metrics.jsonl") for out in ("one", "two")),
          ["loss", "margin", "accuracy", "grad_norm", "chosen_logp"])
    close(*(rows_of(tmp_path / out / "evaluations.jsonl") for out in ("one", "two")), ["loss", "margin"])
    assert rows_of(tmp_path / "one/samples.jsonl") == rows_of(tmp_path / "two/samples.jsonl")
    found, want = (load_file(tmp_path / out / "model.safetensors") for out in ("two", "one"))
    before = load_file(make_model(name) / "model.safetensors")
    assert found.keys() == want.keys() == before.keys()
    for key in want:
        assert torch.allclose(found[key], want[key], atol=1e-5) and not torch.equal(found[key], before[key]), key


