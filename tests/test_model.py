"""The transformer against transformers', and the chunked scoring against the dense one."""
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import MODELS
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_py
from data import collate
from model import BadModel, Head, Lookup, Transformer, attention_tiles, visible


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stored(folder):
    """name -> (dtype, shape, bytes) of all tensors of a folder."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()
    return found


def some_groups(model, count=5, responses=2, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, model.config.vocab_size, rng.integers(1, 20)) for _ in range(1 + responses))
            for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(make_model, name):
    folder = make_model(name)
    ids = torch.randint(0, 500, (3, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, want = Transformer.from_pretrained(folder).logits(ids), theirs(folder)(ids).logits
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
    for settings in ({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
                     {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "intermediate_size": 32, "max_position_embeddings": 32, "tie_word_embeddings": False}):
        folder, ids = tmp_path / settings["model_type"], torch.arange(20)[None]
        made = Transformer.from_config({**settings, "vocab_size": 50})
        made.save_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(made.logits(ids), Transformer.from_pretrained(folder).logits(ids))
            assert (theirs(folder)(ids).logits - made.logits(ids)).abs().max() < 1e-4


def test_buffers_of_old_checkpoints_are_kept(make_model, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(make_model("gpt2"), tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril().bool()
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}    # as the first GPT-2 files
    save_file(bare, tmp_path / "old/model.safetensors")
    Transformer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert stored(tmp_path / "new") == stored(tmp_path / "old")


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
                rows = collate([groups[i] for i in indices])
                logp, entropy = model(*rows.inputs(), entropy=True)
                at = [2 * i + side for i in indices for side in (0, 1)]
                assert (rows.total(logp).flatten() - torch.stack(want)[at]).abs().max() < 1e-4
                assert (rows.total(entropy).flatten() - torch.stack(want_entropy)[at]).abs().max() < 1e-4


def test_responses_do_not_see_each_other(make_model):
    model = Transformer.from_pretrained(make_model())
    groups = some_groups(model, responses=3)
    changed = [list(group) for group in groups]
    changed[1][2] = (changed[1][2] + 7) % 500                       # group 1's second response
    with torch.no_grad():
        before, after = (r.total(model(*r.inputs())[0]) for r in (collate(groups), collate(changed)))
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
    """32 words, embedding and head one table; in double precision to the last digits."""
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
    """Cut at every edge of a group, or at few, and inside of groups; in scores and in gradients."""
    monkeypatch.setattr(model_py, "TILE", tile)
    model = Transformer.from_pretrained(make_model("llama-grouped"))
    rows = collate(some_groups(model, count=6))
    tiles = attention_tiles(rows.segments)
    assert sum(count for count, _, _ in tiles) == rows.tokens.numel()
    assert tile == 512 or len(tiles) > 2
    seen = visible(rows.segments[:, :, None], rows.segments[:, None, :]).tril()[:, None]
    whole = [(rows.tokens.numel(), slice(None), torch.zeros(seen.shape).masked_fill(~seen, -torch.inf))]
    found = []
    for each in (tiles, whole):
        hidden = model.hidden(rows.tokens, rows.positions, each)
        hidden.square().sum().backward()
        found.append((hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for name, want in found[1][1].items():
        assert (found[0][1][name] - want).norm() <= 1e-5 * want.norm(), name


def test_checkpointed_blocks_give_the_same_gradients_from_less_memory(make_model):
    model, found = Transformer.from_pretrained(make_model("llama-grouped")), []
    rows = collate(some_groups(model))
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
        rows = collate(some_groups(model))
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logp, _ = model(*rows.inputs())
            rows.total(logp).sum().backward()
            found.append((rows.total(logp).detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
            model.zero_grad()
        (want, gradient), (scores, near) = found
        assert scores.dtype == near.dtype == torch.float32 and (scores - want).abs().max() < 0.5
        assert (near - gradient).norm() < 0.05 * gradient.norm()


@pytest.mark.parametrize("chunk", [1, 7, 10 ** 6])
def test_chunked_head_equals_dense(make_model, chunk):
    model = Transformer.from_pretrained(make_model("llama-tied"))
    rows = collate(some_groups(model, count=8))
    weights = torch.rand(len(rows.target), generator=torch.Generator().manual_seed(0))

    hidden = model.hidden(rows.tokens, rows.positions, attention_tiles(rows.segments)).flatten(0, 1)[rows.source]
    log_p = model.head(hidden).log_softmax(-1)
    dense = log_p.gather(-1, rows.target[:, None])[:, 0]
    (dense * weights).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    model.chunk = chunk
    with Largest() as seen:
        logp, _ = model(*rows.inputs())
        (logp * weights).sum().backward()
    assert torch.allclose(logp, dense, atol=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - want[name]).norm() < 1e-5 * want[name].norm(), name
    with torch.no_grad():
        _, entropy = model(*rows.inputs(), entropy=True)
    assert torch.allclose(entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-4)
    scored = len(rows.target) * model.config.vocab_size
    assert seen.size < scored if chunk <= 7 else seen.size >= scored


def test_greedy_generation_equals_transformers(make_model):
    for name in ("gpt2", "llama-rope3"):
        folder, prompt = make_model(name), [5, 300, 17, 88]
        ours = list(Transformer.from_pretrained(folder).generate(prompt, 20, temperature=0))
        want = theirs(folder).generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert ours == want[0, 4:].tolist()


def test_generation_stops_and_is_seeded(make_model):
    model = Transformer.from_pretrained(make_model())
    texts = [list(model.generate([1, 2], 12, 1.0, 0.9, (), torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 12
    assert list(model.generate([1, 2], 12, 0.0, stop=(next(model.generate([1, 2], 1, 0.0)),))) == []
    assert len(list(model.generate([1] * 120, 50))) == 8                       # the model has 128 positions


def edited(folder, tmp_path, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, **changes}))
    return copy


def test_refusals_name_what_was_found(make_model, tmp_path):
    folder = make_model("llama-grouped")
    for name, changes, word in [("a", {"model_type": "mixtral"}, "mixtral"), ("b", {"hidden_act": "swish9"}, "swish9"),
                                ("c", {"num_hidden_layers": 1}, "model.layers.1"),
                                ("d", {"num_hidden_layers": 3}, "blocks.2"), ("e", {"intermediate_size": 95}, "95"),
                                ("f", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn"),
                                ("g", {"hidden_size": None}, "llama"), ("i", {"rms_norm_eps": "x"}, "llama"),
                                ("j", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
                                ("k", {"partial_rotary_factor": 0.5}, "partial_rotary_factor")]:
        with pytest.raises(BadModel, match=word):
            Transformer.from_pretrained(edited(folder, tmp_path / name, **changes))
    with pytest.raises(BadModel, match="no such folder"):
        Transformer.from_pretrained(tmp_path / "nowhere")
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


def test_the_command_line_continues_a_text_or_says_why_not(run, make_model):
    done = run("model.py", make_model(), "-p", "Ada asks", "--max-new-tokens", 5)
    assert done.returncode == 0 and done.stdout.startswith("Ada asks") and not done.stderr
    for flags, words in [(["-p", ""], "0 tokens"), (["-p", "Ada " * 200], "tokens, it must have"),
                         (["-p", "a", "--top-p", 0], "not from"), (["-p", "a", "--temperature", "nan"], "not from"),
                         (["-p", "a", "--seed", 2 ** 64], "not from"), ([], "required"),
                         (["-p", "a", "--max-new-tokens", "x"], "invalid int value")]:
        done = run("model.py", make_model(), *flags)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
