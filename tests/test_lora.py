"""LoRA: the update against PEFT's, and the merged model."""
import peft
import pytest
import torch
import transformers
from conftest import MODELS
from safetensors.torch import load_file
from test_model import stored, theirs

from model import TARGETS, Transformer, add_lora, save_adapter


def trained_lora(folder, targets=TARGETS):
    """A model with updates that are not 0, its weights before them, and the ids they were trained on."""
    model = Transformer.from_pretrained(folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = model.logits(ids)
    add_lora(model, rank=3, alpha=5.0, targets=targets)
    assert torch.equal(model.logits(ids), plain), "the untrained update changes nothing, to the last bit"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    for _ in range(2):
        model.logits(ids).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before, ids


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [TARGETS, ("q", "v", "down")])
def test_lora_adapter_and_merged_model_give_the_same_logits(make_model, tmp_path, name, targets):
    folder = make_model(name)
    model, before, ids = trained_lora(folder, targets)
    mine = model.logits(ids)
    save_adapter(model, tmp_path / "adapter", str(folder))
    model.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert (plain(ids).logits - mine).abs().max() > 0.01, "the update moved the model"
        adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert (adapted(ids).logits - mine).abs().max() < 1e-4
        assert (theirs(tmp_path / "merged")(ids).logits - mine).abs().max() < 1e-4
    assert (Transformer.from_pretrained(tmp_path / "merged").logits(ids) - mine).abs().max() < 1e-4
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} == {"A", "B"}
    for n, p in model.named_parameters():
        assert n in trained or torch.equal(p, before[n]), f"{n} is frozen"
    moved = {n for n, t in stored(tmp_path / "merged").items() if t != stored(folder)[n]}
    assert len(moved) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) / 2


def test_frozen_matrices_may_be_bfloat16(make_model):
    """As on a GPU: the base matrices in bfloat16, norms and updates in float32."""
    folder = make_model("llama-tied", torch.bfloat16)
    model = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    add_lora(model, rank=2, alpha=4.0)
    kinds = {p.dtype for n, p in model.named_parameters() if n.endswith((".A", ".B")) or "norm" in n}
    assert kinds == {torch.float32} and model.blocks[0].q.weight.dtype == torch.bfloat16
    ids = torch.randint(0, 100, (1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        model.logits(ids).sum().backward()
        wide = Transformer.from_pretrained(folder).logits(ids)
        assert (model.logits(ids) - wide).abs().max() < 0.05
    assert model.blocks[0].q.B.grad.dtype == torch.float32 and model.blocks[0].q.weight.grad is None
