"""Tests that need a GPU.  Run this file alone; it takes minutes:  python -m pytest -q tests/test_cuda.py

All run in one process, as CUDA does not survive forks (conftest hides the GPU from all other tests).
"""
import gc
import json
import math

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import train
from data import Pair, Split, collate
from model import BRANCHES, CHUNK, KEPT, Head, Transformer, attend, attention_tiles
from train import Config, World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = torch.device("cuda", 0)
SIZES = dict(vocab_size=3000, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=512, max_position_embeddings=2048, tie_word_embeddings=False)
KINDS = {
    "llama": dict(SIZES, model_type="llama", head_dim=64),
    "odd": dict(SIZES, model_type="llama", head_dim=80, tie_word_embeddings=True),
    "neox": dict(SIZES, model_type="gpt_neox", num_key_value_heads=4),
    "qwen3": dict(SIZES, model_type="qwen3", head_dim=64),
    "gpt2": dict(model_type="gpt2", vocab_size=3000, n_embd=256, n_layer=3, n_head=4, n_positions=2048),
}


def make(settings):
    torch.manual_seed(0)
    return Transformer.from_config(settings).to(DEVICE)


def autocast(dtype):
    return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


def some_pairs(count, low, high, vocab_size=3000, seed=0):
    """Pairs of random ids; prompt, chosen and rejected have low to high ids each."""
    rng = np.random.default_rng(seed)
    return [Pair(*(rng.integers(0, vocab_size, rng.integers(low, high + 1), dtype=np.int32) for _ in range(3)), None,
                 f"made:{i}") for i in range(count)]


def row_of(*arguments, **more):
    return collate([pair[:3] for pair in some_pairs(*arguments, **more)], BRANCHES, DEVICE)


def scores(model, row, dtype=torch.float32):
    """Log-probabilities, and the gradient of their sum."""
    with autocast(dtype):
        logp, _ = model(*row.inputs())
    logp.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return logp.detach(), gradient


def planned(pairs, batch_size, tokens_per_row):
    return Split.plan(pairs, batch_size, 0, tokens_per_row, 0, DEVICE)


def started(model, world, folder, loss="mallows-theta"):
    state = {"step": 0, "seconds": 0.0, "skipped": [], "agrees": [], "run": {"dispersion_power": 0.0}}
    return train.Run(Config(out=str(folder), loss=loss), model, world, state, [])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_sync_debug_mode("default")


# --- the same numbers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_equals_sdpa(kind):
    """Forward and backward; in bfloat16 both are equally far from float32."""
    model = make(KINDS[kind])
    rows = [row_of(3, 2, 30), row_of(4, 30, 300), row_of(2, 200, 640)]
    plain = [scores(model, row) for row in rows]
    rough = [scores(model, row, torch.bfloat16) for row in rows]
    model.compile_blocks()
    assert model.flex is not None
    for row, (want, gradient), near in zip(rows, plain, rough):
        logp, found = scores(model, row)
        assert (logp - want).abs().max() < 1e-4 and (found - gradient).norm() < 1e-4 * gradient.norm()
        logp, found = scores(model, row, torch.bfloat16)
        assert (logp - want).abs().max() < 2 * (near[0] - want).abs().max() + 0.01
        assert (found - gradient).norm() < 2 * (near[1] - gradient).norm() + 0.01 * gradient.norm()


def test_heads_too_small_for_flex_attention_go_on_with_sdpa():
    model, row = make(dict(KINDS["llama"], head_dim=8)), row_of(4, 2, 60)
    want, gradient = scores(model, row)
    model.compile_blocks()
    logp, found = scores(model, row)
    assert model.flex is None and (logp - want).abs().max() < 1e-4
    assert (found - gradient).norm() < 1e-4 * gradient.norm()


def test_rows_of_any_length_share_few_graphs():
    model = make(KINDS["qwen3"])
    model.compile_blocks()
    lengths = set()
    for seed in range(12):
        row = row_of(1 + seed, 5, 20 + 40 * seed, seed=seed)
        scores(model, row, torch.bfloat16)
        lengths.add(row.tokens.size(1))
    assert len(lengths) == 12
    assert counters["stats"]["unique_graphs"] <= 8     # a trial, before, after, attention; some for short and long rows


@pytest.mark.parametrize("compiled", [False, True])
def test_the_cpu_agrees(compiled):
    """Scores in float32, and the likeliest continuation, token by token."""
    model = make(KINDS["qwen3"])
    if compiled:
        model.compile_blocks()
    row, prompts = row_of(4, 5, 200), [[5, 6, 7], list(range(300)), [9]]
    with torch.no_grad():
        logp, entropy = model(*row.inputs(), entropy=True)
    steps = list(model.generate(prompts, 8, temperature=0))
    alone = [token for [token] in model.generate(prompts[:1], 8, temperature=0)]
    assert alone == [step[0] for step in steps] and len(alone) == 8
    host = make(KINDS["qwen3"]).cpu()
    with torch.no_grad():
        want, want_entropy = host(*(x.cpu() for x in row.inputs()), entropy=True)
    assert (logp.cpu() - want).abs().max() < 1e-3 and (entropy.cpu() - want_entropy).abs().max() < 1e-3
    assert steps == list(host.generate(prompts, 8, temperature=0))


# --- runs ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    [], ["--compile"], ["--dtype", "float32"], ["--dtype", "float32", "--compile"], ["--dtype", "float16"],
    ["--lora-rank", "4", "--merge"], ["--lora-rank", "4", "--compile"], ["--param-dtype", "bfloat16"],
    ["--param-dtype", "bfloat16", "--compile", "--checkpoint-activations"],
    ["--loss", "sampo", "--dispersion", "entropy", "--dispersion-power", "learn"],
    ["--loss", "decay-dpo", "--compile"]], ids=" ".join)
def test_runs_begin_at_the_reference_and_end(make_model, pairs, tmp_path, capsys, flags):
    """(The reference pass compiles blocks without gradients: other kernels, which may round differently.)"""
    train.main(["--model", str(make_model("mistral")), "--data", str(pairs), "--out", str(tmp_path / "out"),
                "--steps", "3", "--batch-size", "16", "--tokens-per-row", "200", "--max-tokens", "64", "--lr", "1e-4",
                "--eval-pairs", "9", "--samples", "2", "--sample-tokens", "5", "--device", DEVICE.type, *flags])
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    near = 2e-3 if "float32" not in flags else 1e-5 if "--compile" in flags else 1e-6
    assert len(rows) == 3 and rows[0]["loss"] == pytest.approx(math.log(2), abs=near)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert "saved" in capsys.readouterr().out


def test_a_mean_of_references(make_model, pairs, tmp_path, capsys):
    """If the second reference is the same model as the first, the loss is DPO's."""
    model = str(make_model("mistral"))
    train.main(["--model", model, "--references", model, "--loss", "mrpo", "--data", str(pairs),
                "--out", str(tmp_path / "out"), "--steps", "2", "--batch-size", "16", "--lr", "1e-4",
                "--device", DEVICE.type])
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=2e-3) and "WARNING" not in capsys.readouterr().out


class Impatient(World):
    """Waiting for the device is an error until the end of a step, where the sum over ranks is asked for."""

    def sum_over_ranks(self, values):
        torch.cuda.set_sync_debug_mode("default")
        return super().sum_over_ranks(values)


@pytest.mark.parametrize("loss, dtype, compiled", [
    *[("mallows-theta", dtype, compiled) for dtype in (torch.float32, torch.bfloat16) for compiled in (False, True)],
    *[(loss, torch.bfloat16, False) for loss in ("decay-dpo", "sampo", "bmc", "mallows-phi")]])
def test_no_row_waits_for_the_device(loss, dtype, compiled, tmp_path):
    model, world = make(KINDS["qwen3"]), Impatient(0, 1, DEVICE, dtype)
    model.checkpointed = compiled
    if compiled:
        model.compile_blocks()
    part = planned(some_pairs(24, 5, 100), 24, 700)
    part.ref_tokens = {i: np.full(len(pair.chosen) + len(pair.rejected), -8, np.float32)
                       for i, pair in enumerate(part.pairs)}
    run = started(model, world, tmp_path, loss)
    assert len(part.schedule.rows(0)) > 5
    for mode in ("default", "error"):                       # the first pass loads libraries and compiles
        torch.cuda.set_sync_debug_mode(mode)
        figures, _ = train.train_step(run, part, 0)
        assert math.isfinite(figures["loss"]) and not run.state["skipped"]
        torch.cuda.set_sync_debug_mode(mode)
        train.evaluate(model, run.cfg.method, part, world)
    assert torch.cuda.get_sync_debug_mode() == 0


# --- memory -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_measurement_of_memory(compiled, checkpointed, capsys, tmp_path):
    """Plus optimiser (and gradients of earlier rows) it bounds the memory of two steps of a 130M model."""
    settings = dict(SIZES, model_type="llama", vocab_size=32000, hidden_size=768, num_hidden_layers=12,
                    num_attention_heads=12, num_key_value_heads=12, intermediate_size=2048)
    model, world = make(settings), World(0, 1, DEVICE, torch.bfloat16)
    model.checkpointed = checkpointed
    if compiled:
        model.compile_blocks()
    part = planned(some_pairs(16, 200, 300, 32000), 8, 2048)
    torch.cuda.reset_peak_memory_stats()
    train.measure_memory(Config(), model, part, world)
    measured = torch.cuda.max_memory_allocated()
    assert f"reached {measured / 2 ** 30:.2f} GiB" in capsys.readouterr().out
    assert all(p.grad is None for p in model.parameters())
    gradients = sum(p.numel() * p.itemsize for p in model.parameters())
    run = started(model, world, tmp_path)
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        train.train_step(run, part, step)
    assert 0.85 * measured < torch.cuda.max_memory_allocated() - 2 * gradients < 1.05 * (measured + gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [4096, 4091])
def test_attention_never_holds_the_scores(dtype, total):
    """Nor a copy of its mask per layer; with 8 query heads over 2 key heads, and a mask of any width."""
    ids, parts = torch.arange(total, device=DEVICE)[None] // 500 * 16, []
    tiles = attention_tiles(ids, total, dtype)
    for heads in (8, 2, 2):
        parts.append(torch.randn(1, heads, total, 64, device=DEVICE, dtype=dtype, requires_grad=True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(*parts, tiles, enable_gqa=True)
    kept = torch.cuda.memory_allocated() - before
    out.sum().backward()
    mask = total ** 2 * dtype.itemsize
    assert kept < mask and torch.cuda.max_memory_allocated() - before < 4 * mask
    q, k, v = (x.detach().cpu().double() for x in parts)
    want = attend(q, k, v, [(n, span, seen.cpu().double()) for n, span, seen in tiles], enable_gqa=True)
    assert (out.detach().cpu().double() - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_never_holds_the_logits(dtype):
    """8,192 scored tokens, 131,072 words: beside inputs and their gradients, some slices of the logits."""
    x = torch.randn(8192, 512, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = (torch.randn(2 ** 17, 512, device=DEVICE, dtype=dtype) * 0.02).requires_grad_()
    target = torch.randint(0, len(weight), (len(x),), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, entropy = Head.apply(x, weight, target, CHUNK["cuda"] // len(x), True)
    logp.sum().backward()
    own = sum(p.numel() * p.itemsize for p in (x, weight))
    extra = torch.cuda.max_memory_allocated() - before - own
    assert extra < 4 * KEPT + 6 * 4 * CHUNK["cuda"] + 20 * x.numel() + 2 ** 26 < 4 * len(x) * len(weight) / 3
    with torch.no_grad():
        log_p = (x[:64].float() @ weight.float().t()).log_softmax(-1)
    near = 1e-3 if dtype == torch.float32 else 0.1
    assert (log_p.gather(-1, target[:64, None])[:, 0] - logp[:64]).abs().max() < near
    assert (entropy[:64] + (log_p.exp() * log_p).sum(-1)).abs().max() < near
