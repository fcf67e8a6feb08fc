"""The transformer against transformers', and the chunked scoring against the dense one."""
import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import MODELS
from safetensors import safe_open
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as model_py
from data import Tokenizer, collate
from model import BRANCHES, FAMILIES, BadModel, Head, Lookup, Transformer, attend, attention_tiles, visible


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stored(folder):
    """name -> (dtype, shape, bytes) of all tensors of a folder."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                content = tensor.flatten().view(torch.uint8).numpy().tobytes()
                found[name] = str(tensor.dtype), tuple(tensor.shape), content
    return found


def some_groups(model, count=5, responses=2, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, model.config.vocab_size, rng.integers(1, 20)) for _ in range(1 + responses))
            for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(make_model, name):
    model = Transformer.from_pretrained(make_model(name))
    length = min(70, model.config.positions)
    ids = torch.randint(0, 500, (3, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, want = model.logits(ids), theirs(make_model(name))(ids).logits
    assert ours.dtype == torch.float32 and (ours - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, shard", [(torch.float32, "5GB"), (torch.bfloat16, "100KB"), (torch.float16, "5GB")])
def test_saving_gives_back_what_was_loaded(make_model, tmp_path, name, dtype, shard):
    folder = make_model(name, dtype, shard)
    Transformer.from_pretrained(folder).save_pretrained(tmp_path)
    assert stored(tmp_path) == stored(folder)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in folder.iterdir())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("Ada asks")["input_ids"]


def test_a_made_model_loads_in_transformers(tmp_path):
    llama = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": 32, "tie_word_embeddings": False, "rotary_pct": 0.5}
    for kind in FAMILIES:
        settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32} if kind == "gpt2" else llama
        folder, ids = tmp_path / kind, torch.arange(20)[None]
        made = Transformer.from_config({**settings, "model_type": kind, "vocab_size": 50})
        made.save_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(made.logits(ids), Transformer.from_pretrained(folder).logits(ids))
            assert (theirs(folder)(ids).logits - made.logits(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("name, prefix, buffers", [
    ("gpt2", "transformer.", {"h.0.attn.bias": torch.ones(1, 1, 4, 4).tril().bool()}),
    ("neox", "gpt_neox.", {"layers.1.attention.bias": torch.ones(1, 1, 4, 4).tril().bool(),
                           "layers.1.attention.masked_bias": torch.tensor(-1e9),
                           "layers.1.attention.rotary_emb.inv_freq": torch.ones(3)}),
    ("llama-tied", "model.", {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})])
def test_buffers_of_old_checkpoints_are_kept(make_model, tmp_path, name, prefix, buffers):
    from safetensors.torch import load_file, save_file
    shutil.copytree(make_model(name), tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}            # as the first GPT-2 files
    save_file({**bare, **buffers}, tmp_path / "old/model.safetensors")
    model = Transformer.from_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    assert stored(tmp_path / "new") == stored(tmp_path / "old")
    assert torch.equal(model.logits(torch.arange(9)[None]),
                       Transformer.from_pretrained(make_model(name)).logits(torch.arange(9)[None]))


@pytest.mark.parametrize("name, changes", [
    ("neox", {"rotary_pct": 0.5, "rotary_emb_base": 700}),
    ("neox", {"rotary_pct": 0.5, "rotary_emb_base": 700, "partial_rotary_factor": 0.5, "rope_theta": 700.0}),
    ("neox-sequential", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}),
    ("llama-tied", {"rope_theta": 700.0}),
    ("llama-rope3", {"rope_theta": 700.0, "rope_scaling": {
        "type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    ("mistral", {"rope_theta": 700.0, "sliding_window": 60}),
    ("qwen2", {"layer_types": None, "rope_theta": 700.0, "use_sliding_window": False, "max_window_layers": 1})])
def test_settings_as_transformers_4_wrote_them(make_model, tmp_path, name, changes):
    folder, ids = edited(make_model(name), tmp_path, **{"rope_parameters": None, **changes}), torch.arange(60)[None]
    with torch.no_grad():
        ours, want = Transformer.from_pretrained(folder).logits(ids), theirs(folder)(ids).logits
        before = Transformer.from_pretrained(make_model(name)).logits(ids)
    assert (ours - want).abs().max() < 1e-4 < (ours - before).abs().max()


@pytest.mark.parametrize("name, changes, longest", [
    ("mistral", {}, 128), ("mistral-window", {}, 48), ("qwen3-window", {}, 48),
    ("mistral", {"sliding_window": 500}, 128), ("mistral", {"sliding_window": 7}, 7),
    ("qwen2-window", {"layer_types": None, "max_window_layers": 1}, 48),
    ("qwen2-window", {"use_sliding_window": False, "layer_types": None}, 128)])
def test_texts_are_no_longer_than_a_window_of_attention(make_model, tmp_path, name, changes, longest):
    model = Transformer.from_pretrained(edited(make_model(name), tmp_path, **changes))
    assert model.config.positions == longest and len(alone(model, [1, 2], 200, 0.0)) == longest - 2
    assert [f"its {longest} tokens" in note for note in model.notes] == [True] * (longest < 128)


@pytest.mark.parametrize("name", MODELS)
def test_packed_scores_equal_each_response_alone(make_model, name):
    model, oracle = Transformer.from_pretrained(make_model(name)), theirs(make_model(name))
    groups = some_groups(model)
    want, want_entropy = [], []
    with torch.no_grad():
        for prompt, *responses in groups:
            for ids in responses:
                logits = oracle(torch.tensor(np.concatenate([prompt, ids]))[None]).logits[0, len(prompt) - 1:-1]
                log_p = logits.log_softmax(-1)
                want.append(log_p[torch.arange(len(ids)), torch.tensor(ids)].sum())
                want_entropy.append(-(log_p.exp() * log_p).sum())
        for packing in ([[0, 1, 2, 3, 4]], [[4], [2, 0], [3, 1]], [[i] for i in range(5)]):
            for indices in packing:
                rows = collate([groups[i] for i in indices], BRANCHES)
                logp, entropy = model(*rows.inputs(), entropy=True)
                at = [2 * i + side for i in indices for side in (0, 1)]
                assert (rows.sum_by_response(logp).flatten() - torch.stack(want)[at]).abs().max() < 1e-4
                assert (rows.sum_by_response(entropy).flatten() - torch.stack(want_entropy)[at]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["neox", "qwen3-window"])
@pytest.mark.filterwarnings("error")
def test_bfloat16_autocast_gives_nearly_the_same(make_model, name):
    model = Transformer.from_pretrained(make_model(name))
    rows = collate(some_groups(model), BRANCHES)
    want, _ = model(*rows.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = model(*rows.inputs())
        got.sum().backward()
    assert 0 < (got - want).abs().max() < 0.1 and got.dtype == torch.float32


def test_responses_do_not_see_each_other(make_model):
    model = Transformer.from_pretrained(make_model())
    groups = some_groups(model, responses=3)
    changed = [list(group) for group in groups]
    changed[1][2] = (changed[1][2] + 7) % 500                       # group 1's second response
    with torch.no_grad():
        rows = collate(groups, BRANCHES), collate(changed, BRANCHES)
        before, after = (row.sum_by_response(model(*row.inputs())[0]) for row in rows)
    same = torch.ones(5, 3, dtype=torch.bool)
    same[1, 1] = False
    assert torch.equal(before[same], after[same]) and before[1, 1] != after[1, 1]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""
    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("width", [1, 7, 32, 100])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_the_head_by_slices_equals_autograd_on_the_dense_one(width, dtype, atol):
    """With 32 words, and one table for embedding and head; in float64 equal to the last digits."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(32, 8, generator=g, dtype=torch.float64).to(dtype)
    mix = torch.randn(8, 8, generator=g, dtype=torch.float64).to(dtype)
    ids, target = torch.randint(0, 32, (2, 1, 20), generator=g)
    scale = torch.rand(20, generator=g, dtype=torch.float64)

    dense = table.double().clone().requires_grad_()
    log_p = (dense[ids[0]] @ mix.double() @ dense.t()).log_softmax(-1)
    want = log_p.gather(-1, target[0][:, None])[:, 0]
    (want * scale).sum().backward()

    ours = table.clone().requires_grad_()
    x, head = Lookup.apply(ours, ids)
    logp, entropy = Head.apply(x[0] @ mix, head, target[0], width, True)
    assert torch.equal(logp, Head.apply(x[0] @ mix, head, target[0], width, False)[0]) and not entropy.requires_grad
    (logp * scale).sum().backward()
    assert torch.allclose(logp.double(), want, rtol=atol, atol=atol)
    assert torch.allclose(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=atol, atol=atol)
    assert (ours.grad.double() - dense.grad).norm() <= atol * dense.grad.norm()

    hidden = torch.randn(20, 8, dtype=torch.float64, generator=g, requires_grad=True)         # a head that is frozen
    Head.apply(hidden, table.double(), target[0], width, False)[0].sum().backward()
    got, hidden.grad = hidden.grad, None
    (hidden @ table.double().t()).log_softmax(-1).gather(-1, target[0][:, None]).sum().backward()
    assert torch.allclose(got, hidden.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 8, 50, 512])
def test_attention_by_tiles_equals_the_whole_row(make_model, monkeypatch, tile):
    """Cut at every edge of a group and inside groups, or at few edges; hidden states and gradients."""
    monkeypatch.setattr(model_py, "TILE", tile)
    model = Transformer.from_pretrained(make_model("llama-grouped"))
    rows = collate(some_groups(model, count=6), BRANCHES)
    tiles = attention_tiles(rows.segments, rows.tokens.size(1))
    assert sum(count for count, _, _ in tiles) == rows.tokens.numel()
    assert tile == 512 or len(tiles) > 2
    seen = visible(rows.segments[:, :, None], rows.segments[:, None, :]).tril()[:, None]
    whole = [(rows.tokens.numel(), slice(None), torch.zeros(seen.shape).masked_fill(~seen, -torch.inf))]
    found = []
    for each in (tiles, whole):
        monkeypatch.setattr(model_py, "attention_tiles", lambda *_, each=each: each)
        hidden = model.hidden(model.embed(rows.tokens), rows.positions, rows.segments)
        hidden.square().sum().backward()
        found.append((hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for name, want in found[1][1].items():
        assert (found[0][1][name] - want).norm() <= 1e-5 * want.norm(), name


def test_attention_on_a_gpu_asks_for_what_its_kernels_do(monkeypatch):
    """Otherwise torch chooses a kernel that holds all scores at once, or each layer copies the mask, or cuDNN
    builds a kernel per row length.  (tests/test_cuda.py measures the memory.)"""
    asked, ids = [], torch.zeros(1, 203, dtype=torch.long, device="meta")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, mask, **flags: asked.append((k, v, mask, flags["enable_gqa"])) or q)
    q, k = torch.empty(1, 6, 203, 8, device="meta"), torch.empty(1, 2, 203, 8, device="meta")
    attend(q, k, k, attention_tiles(ids, 203), enable_gqa=True)
    [(k, v, mask, grouped)] = asked
    assert k.size(1) == v.size(1) == 6 and not grouped
    assert mask.shape == (1, 1, 203, 203) and not any(stride % 8 for stride in mask.stride()[:-1])
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("name", ["llama-tied", "llama-grouped"])             # a tied head, and one of its own
def test_scores_without_gradients_keep_no_logits(make_model, name, monkeypatch):
    model, kept, forward = Transformer.from_pretrained(make_model(name)), [], Head.forward

    def noted(ctx, *arguments):
        result = forward(ctx, *arguments)
        kept.append(len(ctx.kept))
        return result
    monkeypatch.setattr(Head, "forward", staticmethod(noted))
    inputs = collate(some_groups(model), BRANCHES).inputs()
    model(*inputs)
    with torch.no_grad():
        model(*inputs, entropy=True)
    assert kept[0] > 0 and kept[1] == 0


def test_checkpointed_blocks_give_the_same_gradients_from_less_memory(make_model):
    model, found = Transformer.from_pretrained(make_model("llama-grouped")), []
    rows = collate(some_groups(model), BRANCHES)
    for model.checkpointed in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            logp, _ = model(*rows.inputs())
        logp.sum().backward()
        found.append((logp.detach(), sum(kept), {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    (plain, much, want), (again, little, gradients) = found
    assert torch.equal(plain, again) and little < much / 2
    for name in want:
        assert (gradients[name] - want[name]).norm() <= 1e-6 * want[name].norm(), name


def test_autocast_scores_and_gradients_are_near_float32(make_model):
    for name in ("gpt2", "llama-tied", "llama-grouped"):
        model, found = Transformer.from_pretrained(make_model(name)), []
        rows = collate(some_groups(model), BRANCHES)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logp, _ = model(*rows.inputs())
            sums = rows.sum_by_response(logp)
            sums.sum().backward()
            found.append((sums.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
            model.zero_grad()
        (want, gradient), (scores, near) = found
        assert scores.dtype == near.dtype == torch.float32 and (scores - want).abs().max() < 0.5
        assert (near - gradient).norm() < 0.05 * gradient.norm()


@pytest.mark.parametrize("chunk,kept", [(1, 0), (1, 10 ** 6), (7, 50_000), (10 ** 6, 0), (10 ** 6, 10 ** 6)])
def test_chunked_head_equals_dense(make_model, monkeypatch, chunk, kept):
    """Also where the backward pass computes all logits again, or all but the first ones, which were kept."""
    monkeypatch.setattr(model_py, "KEPT", kept)
    model = Transformer.from_pretrained(make_model("llama-tied"))
    rows = collate(some_groups(model, count=8), BRANCHES)
    weights = torch.rand(len(rows.target), generator=torch.Generator().manual_seed(0))

    hidden = model.hidden(model.embed(rows.tokens), rows.positions, rows.segments).flatten(0, 1)[rows.source]
    log_p = model.head(hidden).log_softmax(-1)
    dense = log_p.gather(-1, rows.target[:, None])[:, 0]
    (dense * weights).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    monkeypatch.setitem(model_py.CHUNK, "cpu", chunk)
    with Largest() as seen:
        logp, _ = model(*rows.inputs())
        (logp * weights).sum().backward(retain_graph=True)
    assert torch.allclose(logp, dense, atol=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - want[name]).norm() < 1e-5 * want[name].norm(), name
    (logp * weights).sum().backward()                                       # now without what was kept
    for name, p in model.named_parameters():
        assert (p.grad - 2 * want[name]).norm() < 2e-5 * want[name].norm(), name
    with torch.no_grad():
        _, entropy = model(*rows.inputs(), entropy=True)
    assert torch.allclose(entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-4)
    scored = len(rows.target) * model.config.vocab_size
    assert seen.size < scored if chunk <= 7 else seen.size >= scored


@pytest.mark.parametrize("spread", [0.3, 5, 16], ids=["unsure", "sure", "certain"])
def test_entropy_against_float64(spread):
    """Also where it is almost 0, as the difference of large numbers."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 256, generator=draw), torch.randn(5000, 256, generator=draw) * spread / 16
    log_p = (x.double() @ weight.double().t()).log_softmax(-1)
    _, entropy = model_py.Head.apply(x, weight, torch.zeros(400, dtype=torch.long), 256, True)
    assert (entropy + (log_p.exp() * log_p).sum(-1)).abs().max() < 3e-5 and entropy.min() >= 0


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_equals_transformers(make_model, name):
    folder, prompts = make_model(name), [[5, 300, 17, 88], [7], list(range(40, 62))]
    steps = list(Transformer.from_pretrained(folder).generate(prompts, 20, temperature=0))
    oracle = theirs(folder)
    for prompt, ours in zip(prompts, zip(*steps)):
        want = oracle.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert list(ours) == want[0, len(prompt):].tolist()


def alone(model, prompt, *arguments, seed=0, **more):
    """The tokens that follow one prompt."""
    steps = model.generate([prompt], *arguments, generators=[torch.Generator().manual_seed(seed)], **more)
    return [token for [token] in steps]


def test_generation_stops_and_is_seeded(make_model):
    model = Transformer.from_pretrained(make_model())
    texts = [alone(model, [1, 2], 12, 1.0, 0.9, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 12
    assert alone(model, [1, 2], 12, 0.0, stop=(alone(model, [1, 2], 1, 0.0)[0],)) == []
    assert len(alone(model, [1] * 120, 50)) == 8                               # the model has 128 positions


@pytest.mark.parametrize("name", ["gpt2", "neox", "mistral-window", "qwen3-window"])
def test_what_follows_a_prompt_does_not_depend_on_its_batch(make_model, name):
    model, prompts = Transformer.from_pretrained(make_model(name)), [[3], [1, 2], [9] * 30, [4] * 120]
    want = [alone(model, prompt, 25, 1.3, 0.95, seed=seed) for seed, prompt in enumerate(prompts)]
    stop = (want[1][5],)                                                       # the second prompt ends early
    want = [text[:text.index(stop[0])] if stop[0] in text else text for text in want]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    steps = list(model.generate(prompts, 25, 1.3, 0.95, stop, generators))
    assert [[token for token in text if token is not None] for text in zip(*steps)] == want
    assert len(want[1]) <= 5 and len(want[3]) <= 8 and len(steps) == max(map(len, want))
    assert all(None not in text[:len(kept)] for text, kept in zip(zip(*steps), want))


def edited(folder, tmp_path, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, **changes}))
    return copy


@pytest.mark.parametrize("name, changes, word", [
    ("llama-grouped", {"model_type": "mixtral"}, "mixtral"),
    ("llama-grouped", {"model_type": "mixtral", "num_local_experts": 8}, "mixtral"),
    ("qwen3", {"model_type": "qwen3_moe", "num_experts": 128}, "qwen3_moe"),
    ("llama-grouped", {"model_type": ["llama"]}, "unhashable"), ("llama-grouped", {"hidden_act": "swish9"}, "swish9"),
    ("llama-grouped", {"num_hidden_layers": 1}, "model.layers.1"), ("neox", {"num_hidden_layers": 3}, "blocks.2"),
    ("llama-grouped", {"intermediate_size": 95}, "95"), ("llama-grouped", {"hidden_size": None}, "llama"),
    ("llama-grouped", {"rms_norm_eps": "x"}, "llama"), ("llama-grouped", {"num_key_value_heads": 3}, "3 for keys"),
    ("llama-grouped", {"head_dim": 11}, "11"), ("llama-grouped", {"sliding_window": 7}, "sliding_window=7"),
    ("llama-grouped", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn"),
    ("llama-grouped", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ("llama-grouped", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ("llama-grouped", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama-grouped", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    *((name, {"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq")
      for name in ("gpt2", "neox", "llama-tied", "mistral", "qwen2", "qwen3")),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("gpt2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ("neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "3 of 12"),
    ("neox", {"rope_parameters": {"partial_rotary_factor": "a"}}, "gpt_neox"),
    ("neox", {"attention_bias": False}, "attention.dense.bias"),
    ("mistral", {"attention_bias": True}, "attention_bias=True"),
    ("mistral", {"sliding_window": 0}, "positions, found 0"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "with a window of None"),
    *(("gpt2", {"eos_token_id": wrong}, "eos_token_id") for wrong in (-1, "<", [3, True], 2.0)),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"), ("qwen2", {"mlp_bias": True}, "mlp_bias=True"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ("gpt2", {"vocab_size": 10 ** 12}, "vocab_size"), ("gpt2", {"n_positions": 10 ** 18}, "positions"),
    ("gpt2", {"n_positions": 10 ** 9}, "wpe"), ("neox", {"num_hidden_layers": 10 ** 9}, "layers"),
    ("qwen2", {"intermediate_size": 10 ** 6}, "1000000"), ("qwen3", {"num_attention_heads": 2 * 10 ** 12}, "heads")])
def test_refusals_of_settings_name_what_was_found(make_model, tmp_path, name, changes, word):
    folder = edited(make_model(name), tmp_path, **changes)
    with pytest.raises(BadModel, match=word) as error:
        Transformer.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_dropout_is_noted(make_model):
    notes = Transformer.from_pretrained(make_model("gpt2")).notes
    assert len(notes) == 3 and "attn_pdrop=0.1" in " ".join(notes)
    assert Transformer.from_pretrained(make_model("llama-tied")).notes == []


def test_a_tensor_that_is_there_twice_is_refused(make_model, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(make_model("gpt2"), tmp_path / "twice")
    tensors = load_file(tmp_path / "twice/model.safetensors")
    save_file({**tensors, "ln_f.bias": torch.zeros(48)}, tmp_path / "twice/model.safetensors")
    with pytest.raises(BadModel, match=r"ln_f\.bias.*the same place"):
        Transformer.from_pretrained(tmp_path / "twice")


def test_refusals_of_folders_name_what_was_found(make_model, tmp_path):
    folder = make_model("llama-grouped")
    with pytest.raises(BadModel, match="no such folder"):
        Transformer.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(BadModel, match="adapter alone"):
        Transformer.from_pretrained(tmp_path / "adapter")
    broken = edited(folder, tmp_path / "h")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(BadModel, match="not a whole safetensors file"):
        Transformer.from_pretrained(broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(BadModel, match=r"pytorch_model.bin.*pickle"):
        Transformer.from_pretrained(broken)
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(BadModel, match="names the file"):
        Transformer.from_pretrained(broken)
    for index in ({}, {"weight_map": []}, {"weight_map": {"a": 5}}, []):
        (broken / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(BadModel, match=r"weight_map|not a JSON object"):
            Transformer.from_pretrained(broken)


def test_stop_tokens_of_generation_config(make_model, tmp_path):
    folder = edited(make_model(), tmp_path)
    (end,) = Transformer.from_pretrained(folder).stop_tokens
    for ids, stop in [([3, 5], [3, 5, end]), (7, [7, end]), (None, [end]), ([end], [end])]:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert Transformer.from_pretrained(folder).stop_tokens == stop
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 100000]}')
    model = Transformer.from_pretrained(folder)
    assert model.stop_tokens == [3, 100000, end] and "eos_token_id 100000 is not one of" in model.notes[-1]
    for ids in ('"3"', "-1", "true", '{"a": [3]}', "2.5", "[[3]]"):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
        with pytest.raises(BadModel, match="eos_token_id"):
            Transformer.from_pretrained(folder)


@pytest.mark.parametrize("size, top_p", [(7, 0.8), (7, 1.0), (1000, 0.9), (1000, 1.0)])
def test_sampling_follows_the_kept_probabilities(size, top_p):
    """By hand: the fewest of the likeliest tokens that reach top_p, renormalised; also more than 256."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0))
    chances, ids = (logits / 0.7).softmax(-1).sort(descending=True)
    count = int((chances.cumsum(0) - chances < top_p).sum())
    want = torch.zeros(size).index_put((ids[:count],), chances[:count] / chances[:count].sum())
    draws = 4000
    generators = [torch.Generator().manual_seed(i) for i in range(draws)]
    found = model_py.sample(logits.expand(draws, size), 0.7, top_p, generators)
    rate = torch.bincount(torch.tensor(found), minlength=size) / draws
    assert rate[want == 0].sum() == 0
    assert ((rate - want).abs() < 5 * (want * (1 - want) / draws).sqrt() + 1e-3).all()
    other = torch.stack([logits * 3, logits])                       # beside another row: the same token
    pair = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(7)]
    assert model_py.sample(other, 0.7, top_p, pair)[1] == found[7]


def command_line(monkeypatch, capsys, *arguments):
    """(exit status, standard output, standard error) of model.py, in this process."""
    monkeypatch.setattr("sys.argv", ["model.py", *map(str, arguments)])
    status = 0
    try:
        model_py.main()
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_the_command_line_continues_a_text_or_says_why_not(run, monkeypatch, capsys, make_model, tmp_path):
    done = run("model.py", make_model(), "-p", "Ada asks", "--max-new-tokens", 5)
    assert done.returncode == 0 and done.stdout.startswith("Ada asks") and not done.stderr
    folder = edited(make_model("qwen3"), tmp_path)
    for flags, words in [(["-p", ""], "0 tokens"), (["-p", "Ada " * 200], "400 tokens"),
                         (["-p", "a", "--top-p", 0], "cannot sample"),
                         (["-p", "a", "--temperature", "nan"], "cannot sample"), ([], "required"),
                         (["-p", "a", "--max-new-tokens", -1], "cannot sample"),
                         (["-p", "a", "--seed", 2 ** 64], "Overflow"),
                         (["-p", "\udcff"], "utf-8"),
                         (["-p", "a", "--max-new-tokens", "x"], "invalid int value")]:
        status, text, said = command_line(monkeypatch, capsys, folder, *flags)
        assert status == 2 and words in said and not text
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 945, "content": "<|beyond|>"})
    for content, words in [(json.dumps(tokenizer), "token id 945; the model has 945"), ("{}", "not a tokenizer")]:
        (folder / "tokenizer.json").write_text(content)
        status, _, said = command_line(monkeypatch, capsys, folder, "-p", "a<|beyond|>")
        assert status == 2 and words in said
    (folder / "tokenizer.json").unlink()
    status, _, said = command_line(monkeypatch, capsys, folder, "-p", "a")
    assert status == 2 and "tokenizer.json" in said


def test_the_command_line_answers_a_message(monkeypatch, capsys, make_model):
    folder = make_model()
    stop = alone(Transformer.from_pretrained(folder), [5, 6, 7], 4, 0.0)[3]

    class Chat(Tokenizer):                                          # it has tests of its own
        def __init__(self, path):
            assert path == str(folder)
            super().__init__(path)
            self.eos = stop

        def prompt(self, messages):
            if messages != [{"role": "user", "content": "Ada asks"}]:
                raise data.BadData("the chat template says no")
            return [5, 6, 7]
    backend = Tokenizer(folder).backend
    monkeypatch.setattr(data, "Tokenizer", Chat)
    arguments = folder, "--chat", "--temperature", 0
    status, text, _ = command_line(monkeypatch, capsys, *arguments, "-p", "Ada asks")
    want = alone(Transformer.from_pretrained(folder), [5, 6, 7], 4, 0.0)
    want = want[:want.index(stop)]
    assert status == 0 and text == backend.decode([5, 6, 7, *want])[len(backend.decode([5, 6, 7])):] + "\n"
    status, _, said = command_line(monkeypatch, capsys, *arguments, "-p", "x")
    assert status == 2 and "model.py: error: the chat template says no" in said


def test_text_keeps_its_spaces_and_its_start(monkeypatch, capsys, tmp_path):
    """A tokenizer like Llama's: it adds the start token itself, and words carry the space before them."""
    vocabulary = {"<s>": 0, "<unk>": 1, "\u2581Ada": 2, "\u2581asks": 3}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(), MetaspaceDecoder()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "<end>"])                   # the second is never sampled: the model has 4
    torch.manual_seed(2)
    folder, made = tmp_path / "model", Transformer.from_config({
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8, "max_position_embeddings": 16, "vocab_size": 4}, {})
    made.origin.files["tokenizer.json"] = tokenizer.to_str().encode()
    made.origin.files["tokenizer_config.json"] = b'{"eos_token": "<end>"}'
    made.save_pretrained(folder)
    follow = alone(made, [0, 2], 6, 0.0)
    flags = "-p", "Ada", "--temperature", 0, "--max-new-tokens", 6
    words = {0: "", 1: "<unk>", 2: " Ada", 3: " asks"}              # special tokens are not shown
    assert command_line(monkeypatch, capsys, folder, *flags)[:2] == (
        0, "Ada" + "".join(words[token] for token in follow) + "\n")
    assert follow[0] in {2, 3}                                       # its space shows only after another word
