"""Compiled blocks and flex_attention's masks, as far as a CPU can test them (more: tests/test_cuda.py)."""
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo
from conftest import ROOT
from test_model import alone, some_groups
from test_train import refused
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

import model as model_py
import train
from data import Split, Tokenizer, collate, load_pairs
from model import BRANCHES, Transformer, add_lora, attention_blocks, visible
from train import Config


@pytest.fixture
def count():
    """A function that counts the graphs compiled since the test began."""
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def row_of(*lengths):
    """Segments, (1, S), of groups (prompt, response, ...) of these lengths."""
    segments = []
    for group, parts in enumerate(lengths):
        for branch, length in enumerate(parts):
            segments += [group * BRANCHES + branch] * length
    return torch.tensor([segments])


@pytest.mark.parametrize("lengths", [
    [(1, 1, 1)], [(40, 60, 28)], [(100, 20, 9)], [(300, 500, 400), (700, 130, 600)], [(5, 900, 900)],
    [(60, 40, 80)] * 9, [(256, 128, 128, 256)] * 2])
def test_blocks_are_the_rule(lengths):
    """mask_mod equals `visible`; skipped blocks see nothing, and blocks without a mask see everything."""
    segments = row_of(*lengths)
    mask, total = attention_blocks(segments), segments.size(1)
    want = visible(segments[0][:, None], segments[0][None]).tril()
    assert torch.equal(flex.create_mask(mask.mask_mod, 1, 1, total, total, "cpu")[0, 0], want)

    exact = flex.create_block_mask(mask.mask_mod, 1, 1, total, total, "cpu")         # looks at every score
    visited, least = mask.to_dense()[0, 0].bool(), exact.to_dense()[0, 0].bool()
    assert (visited >= least).all() and visited.sum() <= least.sum()
    whole, most = torch.zeros(2, *visited.shape, dtype=torch.bool)
    for blocks, each in ((whole, mask), (most, exact)):
        for line, count, which in zip(blocks, each.full_kv_num_blocks[0, 0], each.full_kv_indices[0, 0]):
            line[which[:count]] = True
    assert (whole <= most).all() and whole.sum() >= most.sum() - len(most)   # (a block of a prompt and its response)
    for way in ("kv", "q"):
        part, full = (getattr(mask, f"{kind}{way}_num_blocks").sum() for kind in ("", "full_"))
        assert part + full == visited.sum()


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "qwen3-window"])
def test_flex_attention_equals_the_tiles(make_model, monkeypatch, count, name):
    """The kernel's arithmetic, forward and backward, for rows of any length, with few compiled graphs."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)       # refuses gradients on CPUs
    model, lengths, found = Transformer.from_pretrained(make_model(name)), set(), {}
    rows = [collate(some_groups(model, groups, seed=groups), BRANCHES) for groups in (2, 7, 13, 10)]
    kernel = partial(torch.compile(flex.flex_attention, dynamic=True, backend="aot_eager"),
                     kernel_options={"BACKEND": "TRITON"})
    for kind in ("tiles", "flex"):
        model.flex = kernel if kind == "flex" else None
        for i, row in enumerate(rows):
            logp, _ = model(*row.inputs())
            row.sum_by_response(logp).sum().backward()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                near, _ = model(*row.inputs())
            found[kind, i] = logp.detach(), near, torch.cat([p.grad.flatten() for p in model.parameters()])
            model.zero_grad()
            lengths.add(row.tokens.size(1))
    for i in range(len(rows)):
        (want, want_near, gradient), (logp, near, got) = found["tiles", i], found["flex", i]
        assert torch.allclose(logp, want, atol=1e-5) and (got - gradient).norm() < 1e-5 * gradient.norm()
        assert (near - want_near).abs().max() < 0.1
    assert len(lengths) == 4 and min(lengths) < 128 < max(lengths) and count() <= 4         # one block, more; bfloat16


@pytest.mark.parametrize("name", ["neox", "qwen3-window"])
def test_compiled_blocks_are_the_blocks(make_model, monkeypatch, count, name):
    """In training, scoring and generation; all blocks share few graphs, whatever the length of a row."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, found = Transformer.from_pretrained(make_model(name)), {}
    add_lora(model, 2, 4.0, ("q", "down"))
    model.requires_grad_(True)
    rows = [collate(some_groups(model, groups, seed=groups), BRANCHES) for groups in (1, 4, 9)]
    names = list(model.state_dict())
    for kind in ("plain", "compiled", "checkpointed"):
        if kind == "compiled":
            model.compile_blocks()
        model.checkpointed = kind == "checkpointed"
        for i, row in enumerate(rows):
            logp, _ = model(*row.inputs())
            row.sum_by_response(logp).sum().backward()
            found[kind, i] = logp.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
            model.zero_grad()
    for (_, i), (logp, gradient) in found.items():
        assert torch.allclose(logp, found["plain", i][0], atol=1e-5)
        assert (gradient - found["plain", i][1]).norm() < 1e-5 * gradient.norm()
    assert list(model.state_dict()) == names and 3 <= count() <= 4   # a trial, two parts of a block; rows of one tile
    with torch.no_grad():
        for i, row in enumerate(rows):
            assert torch.allclose(model(*row.inputs())[0], found["plain", i][0], atol=1e-5)
    assert count() <= 7
    assert alone(model, [1, 2, 3], 9, 0.0) == alone(Transformer.from_pretrained(make_model(name)), [1, 2, 3], 9, 0.0)
    assert count() <= 9


COMPILED = """
import sys, train
from torch._dynamo.utils import counters
for more in ([], ["--compile"]):
    train.main([*sys.argv[1:], "--out", f"out{len(more)}", *more])
print("graphs", counters["stats"]["unique_graphs"])
"""


def test_a_compiled_run_has_the_losses_of_a_plain_one(make_model, pairs, tmp_path):
    """With torch's own compiler, in a separate process: the compiler's helper processes break in forks."""
    flags = ["--model", make_model("llama-grouped"), "--data", pairs, "--steps", 6, "--batch-size", 8, "--lr", 1e-4,
             "--samples", 0, "--tokens-per-row", 100, "--max-tokens", 64, "--save-every", 0]
    done = subprocess.run([sys.executable, "-c", COMPILED, *map(str, flags)], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = [[json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
            for out in ("out0", "out1")]
    assert len(rows[0]) == len(rows[1]) == 6 and rows[1][0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    for plain, compiled in zip(*rows):
        assert compiled["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    assert "graphs 5" in done.stdout                    # a trial; two parts of a block, with gradients and without


def test_without_a_compiler_one_line_says_so(run, make_model, pairs, tmp_path, monkeypatch):
    from torch._inductor import config
    monkeypatch.setattr(config.cpp, "cxx", (None, "nowhere-g++"))
    refused(run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path / "out", "--compile"),
            "--compile: torch has no compiler that works")
    assert not (tmp_path / "out").exists()


def test_no_row_waits_for_the_device(make_model, pairs, monkeypatch):
    """Tensors on `meta` have no values: code that would wait for a value, or read it, raises an error."""
    folder = make_model("qwen3-window")
    cfg = Config(model="-", data=str(pairs), batch_size=16, tokens_per_row=400)
    world = train.join_world(cfg)._replace(device=torch.device("meta"))
    part = Split.plan(load_pairs(pairs, Tokenizer(folder), 64).pairs, 16, 0, 400, 0, world.device)
    model = Transformer.from_pretrained(folder).to("meta")
    monkeypatch.setitem(model_py.CHUNK, "meta", 10 ** 6)
    monkeypatch.setattr(model, "precision", lambda device: torch.float32)             # (no autocast there)
    outcome = train.score_pairs(model, cfg.method, part, part.schedule.rows(0)[0], 0, world)
    outcome.loss.sum().backward()
    assert all(p.grad.is_meta for p in model.parameters())
    attention_blocks(row_of((300, 500, 400)).to("meta"))
    with pytest.raises(RuntimeError):
        outcome.loss.sum().item()
