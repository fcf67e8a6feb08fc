"""One transformer that reads and writes Hugging Face checkpoints, scores responses, and generates text.

A family of models (GPT-2, Llama, ...) is a row of FAMILIES: a function that reads its config.json and a table of its
weight names.  Loading and saving read the same table, so what is saved has the names, shapes and dtypes of what was
loaded.  Training goes through one call, `model(tokens, positions, segments, source, target)`: it gives the
log-probability of the response tokens only, and never holds the logits of more than a chunk of them.

    python model.py DIR -p "The capital of France is"          continue a text
"""
import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class BadModel(ValueError):
    """A checkpoint folder that cannot be used; the message says what was found and what to do."""


# ---------------------------------------------------------------------------------------------------------------
# 1. Configuration: config.json of each family -> one Config

@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int                        # C, width of the residual stream
    layers: int
    heads: int
    kv_heads: int                   # fewer than heads: grouped-query attention
    head_dim: int
    hidden: int                     # width inside the MLP
    positions: int                  # longest sequence the model was made for
    activation: str
    eps: float
    tied: bool                      # the head is the embedding
    rms: bool = False               # RMSNorm instead of LayerNorm
    gated: bool = False             # act(gate) * up instead of act(up)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope: dict | None = None        # rotary positions; None: learned ones


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"),
               "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def gpt2_config(c: dict) -> Config:
    for key, want in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                      "add_cross_attention": False}.items():
        if c.get(key, want) != want:
            raise BadModel(f"config.json asks for {key}={c[key]}, which this GPT-2 does not have")
    return Config(vocab_size=c["vocab_size"], dim=c["n_embd"], layers=c["n_layer"], heads=c["n_head"],
                  kv_heads=c["n_head"], head_dim=c["n_embd"] // c["n_head"], positions=c["n_positions"],
                  hidden=c.get("n_inner") or 4 * c["n_embd"], activation=c.get("activation_function", "gelu_new"),
                  eps=c.get("layer_norm_epsilon", 1e-5), tied=c.get("tie_word_embeddings", True),
                  qkv_bias=True, out_bias=True, mlp_bias=True)


def llama_config(c: dict) -> Config:
    for key, value in {**c, **(c.get("rope_parameters") or {})}.items():
        if key == "quantization_config" or (key == "partial_rotary_factor" and value != 1):
            raise BadModel(f"config.json asks for {key}={value}, which this Llama does not have")
    heads, bias = c["num_attention_heads"], c.get("attention_bias", False)
    rope = {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {}),
            **(c.get("rope_parameters") or {})}               # transformers 5 writes the last, 4 wrote the others
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ROPE_SCALING:
        raise BadModel(f"config.json asks for RoPE scaling {rope['rope_type']!r}; known: {', '.join(ROPE_SCALING)}")
    return Config(vocab_size=c["vocab_size"], dim=c["hidden_size"], layers=c["num_hidden_layers"], heads=heads,
                  kv_heads=c.get("num_key_value_heads") or heads,
                  head_dim=c.get("head_dim") or c["hidden_size"] // heads, hidden=c["intermediate_size"],
                  positions=c.get("max_position_embeddings", 2048), activation=c.get("hidden_act", "silu"),
                  eps=c.get("rms_norm_eps", 1e-6), tied=c.get("tie_word_embeddings", False), rms=True, gated=True,
                  qkv_bias=bias, out_bias=bias, mlp_bias=c.get("mlp_bias", False), rope=rope)


def llama3_frequencies(f: Tensor, rope: dict) -> Tensor:
    """Llama 3.1: slow rotations are slowed by `factor`, fast ones kept, those between blended (transformers' rule)."""
    turns = rope["original_max_position_embeddings"] * f / (2 * torch.pi)     # over the length first trained on
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * f + (1 - keep) * f / rope["factor"]


ROPE_SCALING = {"default": lambda f, rope: f, "linear": lambda f, rope: f / rope["factor"],
                "llama3": llama3_frequencies}


# ---------------------------------------------------------------------------------------------------------------
# 2. Families: how each names its weights

class Family(NamedTuple):
    config: Callable[[dict], Config]
    names: dict[str, tuple[str, ...]]   # their module: our modules, whose weights (and biases) stacked are theirs
    prefix: str = ""                    # may or may not stand before every name
    transposed: str = "(?!)"            # modules whose weight is stored (in, out)
    buffers: str = "(?!)"               # tensors that are no parameters: kept as they are

    def find(self, name: str, layers: int) -> tuple[list[str], bool] | None:
        """Our parameters behind their tensor `name`, and whether it is stored transposed."""
        module, _, leaf = name.removeprefix(self.prefix).rpartition(".")
        layer = re.search(r"(?<=\.)\d+(?=\.)", module)
        pattern = module.replace(f".{layer[0]}.", ".{}.", 1) if layer and int(layer[0]) < layers else module
        if pattern not in self.names or leaf not in ("weight", "bias"):
            return None
        ours = [f"{each.format(layer and layer[0])}.{leaf}" for each in self.names[pattern]]
        return ours, leaf == "weight" and bool(re.search(self.transposed, module))

    def all_names(self, config: Config) -> list[str]:
        """Their name of every weight of a model that is made, not loaded."""
        names = [f"{self.prefix}{pattern.format(i)}.{leaf}" for pattern in self.names if pattern != "lm_head"
                 for i in range(config.layers if "{}" in pattern else 1) for leaf in ("weight", "bias")]
        return names if config.tied else [*names, "lm_head.weight"]


GPT2_NAMES = {
    "wte": ("embed",),
    "wpe": ("position",),
    "h.{}.ln_1": ("blocks.{}.norm1",),
    "h.{}.attn.c_attn": ("blocks.{}.attn.q", "blocks.{}.attn.k", "blocks.{}.attn.v"),
    "h.{}.attn.c_proj": ("blocks.{}.attn.out",),
    "h.{}.ln_2": ("blocks.{}.norm2",),
    "h.{}.mlp.c_fc": ("blocks.{}.mlp.up",),
    "h.{}.mlp.c_proj": ("blocks.{}.mlp.down",),
    "ln_f": ("norm",),
    "lm_head": ("head",),
}
LLAMA_NAMES = {
    "model.embed_tokens": ("embed",),
    "model.layers.{}.input_layernorm": ("blocks.{}.norm1",),
    "model.layers.{}.self_attn.q_proj": ("blocks.{}.attn.q",),
    "model.layers.{}.self_attn.k_proj": ("blocks.{}.attn.k",),
    "model.layers.{}.self_attn.v_proj": ("blocks.{}.attn.v",),
    "model.layers.{}.self_attn.o_proj": ("blocks.{}.attn.out",),
    "model.layers.{}.post_attention_layernorm": ("blocks.{}.norm2",),
    "model.layers.{}.mlp.gate_proj": ("blocks.{}.mlp.gate",),
    "model.layers.{}.mlp.up_proj": ("blocks.{}.mlp.up",),
    "model.layers.{}.mlp.down_proj": ("blocks.{}.mlp.down",),
    "model.norm": ("norm",),
    "lm_head": ("head",),
}
FAMILIES = {                            # model_type of config.json
    "gpt2": Family(gpt2_config, GPT2_NAMES, "transformer.", r"\.c_(attn|proj|fc)$", r"\.attn\.(masked_)?bias$"),
    "llama": Family(llama_config, LLAMA_NAMES, buffers=r"\.rotary_emb\.inv_freq$"),
}


# ---------------------------------------------------------------------------------------------------------------
# 3. The transformer

TILE = 512         # queries of one call of attention on a CPU
BRANCHES = 16      # a segment id is group * BRANCHES + branch; branch 0 is the prompt, 1.. are responses to it


def visible(query: Tensor, key: Tensor) -> Tensor:
    """Which earlier tokens a token sees, by segment ids: its own branch, and the prompt of its own group."""
    return (query == key) | ((query // BRANCHES == key // BRANCHES) & (key % BRANCHES == 0))


def attention_tiles(segments: Tensor, dtype: torch.dtype = torch.float32) -> list[tuple[int, slice, Tensor]]:
    """(B, T) segment ids -> how many queries come next, the keys among which they see any, and what is added to their
    scores: (B, 1, queries, keys), -inf for what is not seen.  Every token sees itself: no empty row.

    A GPU takes a row whole; a CPU by groups, short ones together, long ones TILE queries at a time: no attention is
    computed between neighbours, nor for what is yet to come.
    """
    total, size, cuts, tiles = segments.size(1), segments.size(1), [0], []
    if segments.device.type == "cpu":
        group, size = segments // BRANCHES, TILE
        for edge in (1 + (group[:, 1:] != group[:, :-1]).all(0).nonzero()[:, 0]).tolist():
            cuts += [edge] * (edge - cuts[-1] >= TILE // 4)
    for start, stop in zip(cuts, [*cuts[1:], total]):
        for at in range(start, stop, size):
            end = min(at + size, stop)
            seen = visible(segments[:, at:end, None], segments[:, None, start:end]).tril(at - start)[:, None]
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            tiles.append((end - at, slice(start, end), mask))
    return tiles


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; the halves of a head are the two coordinates (Hugging Face's layout)."""
    a, b = x.chunk(2, dim=-1)                                        # (B, H, T, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Cache:
    """Keys and values of the tokens so far, of one attention layer."""

    def __init__(self):
        self.kept = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.kept, (k, v)))
        self.kept = k, v
        return self.kept


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.grouped = c.kv_heads != c.heads
        self.q = nn.Linear(c.dim, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.heads * c.head_dim, c.dim, bias=c.out_bias)

    def forward(self, x, rope, tiles, cache):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))                # (B, H, T, D), k and v (B, KV, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)                                # (B, KV, past + T, D)
        causal = tiles is None and q.size(2) > 1                     # one new token sees all that is cached
        tiles = tiles or [(q.size(2), slice(None), None)]
        y = [F.scaled_dot_product_attention(part, k[:, :, keys], v[:, :, keys], mask, is_causal=causal,
                                            enable_gqa=self.grouped)
             for part, (_, keys, mask) in zip(q.split([count for count, _, _ in tiles], 2), tiles)]
        return self.out(torch.cat(y, 2).transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.act = ACTIVATIONS[c.activation]
        self.gate = nn.Linear(c.dim, c.hidden, bias=c.mlp_bias) if c.gated else None
        self.up = nn.Linear(c.dim, c.hidden, bias=c.mlp_bias)
        self.down = nn.Linear(c.hidden, c.dim, bias=c.mlp_bias)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) if self.gate else self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        norm = nn.RMSNorm if c.rms else nn.LayerNorm
        self.norm1, self.attn = norm(c.dim, eps=c.eps), Attention(c)
        self.norm2, self.mlp = norm(c.dim, eps=c.eps), MLP(c)

    def forward(self, x, rope, tiles, cache=None):
        x = x + self.attn(self.norm1(x), rope, tiles, cache)         # (B, T, C)
        return x + self.mlp(self.norm2(x))                           # (B, T, C)


class Head(torch.autograd.Function):
    """Log-probability of each scored token, and the entropy there (which carries no gradient), `width` words of the
    vocabulary at a time.  The backward pass makes the logits again, and writes each weight's gradient once, in place:
    no more than a slice of the logits is ever in memory."""

    @staticmethod
    def forward(ctx, x, weight, target, width, entropy):             # (N, C), (V, C), (N,)
        log_z = x.new_full((len(x),), -torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))    # (N,)
        mean = torch.zeros_like(log_z)                               # (N,) expected logit, of the words so far
        for w in weight.split(width):
            logits = F.linear(x, w).to(log_z.dtype)                  # (N, width)
            before, log_z = log_z, torch.logaddexp(log_z, logits.logsumexp(-1))
            if entropy:
                inside = (logits - log_z[:, None]).exp_().mul_(logits).sum(-1)
                mean = mean * (before - log_z).exp() + inside
        ctx.save_for_backward(x, weight, target, log_z)
        ctx.width, entropies = width, log_z - mean if entropy else None
        ctx.mark_non_differentiable(*[entropies] * entropy)
        return (x.to(log_z.dtype) * weight[target]).sum(-1) - log_z, entropies

    @staticmethod
    def backward(ctx, up, _):
        x, weight, target, log_z = ctx.saved_tensors
        up, dw = up[:, None], torch.empty_like(weight) if ctx.needs_input_grad[1] else None   # (N, 1), (V, C)
        dx, down = torch.zeros_like(x, dtype=log_z.dtype), (x * -up).to(x.dtype)              # (N, C) both
        for at in range(0, len(weight), ctx.width):
            w = weight[at:at + ctx.width]
            p = F.linear(x, w).to(log_z.dtype).sub_(log_z[:, None]).exp_().to(x.dtype)        # (N, width)
            dx += p @ w
            if dw is not None:                                       # else the head is frozen
                torch.mm(p.t(), down, out=dw[at:at + ctx.width])
        dx = (up * (weight[target] - dx)).to(x.dtype)
        return dx, dw if dw is None else dw.index_add_(0, target, down, alpha=-1), None, None, None


class Lookup(torch.autograd.Function):
    """Rows of a table, and the table for its second use, the tied head; both gradients go into one table."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, d_rows, d_table):
        return d_table.index_add_(0, ctx.saved_tensors[0].flatten(), d_rows.flatten(0, -2)), None


class Transformer(nn.Module):
    """A decoder-only language model.  There is no dropout: the reference is the policy before step 1, exactly."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.chunk = None                                            # logits at a time, see forward
        self.checkpointed = False                                    # keep of a block only what goes in
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(config.positions, config.dim) if config.rope is None else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = (nn.RMSNorm if config.rms else nn.LayerNorm)(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def hidden(self, tokens: Tensor, positions: Tensor, tiles: list | None = None, caches=None, x=None) -> Tensor:
        x = self.embed(tokens) if x is None else x                   # (B, T) -> (B, T, C)
        rope = None
        if self.position is not None:
            x = x + self.position(positions)                         # (B, T, C)
        else:
            rope = self._rotations(positions)                        # cos and sin, (B, 1, T, D/2)
        again = self.checkpointed and torch.is_grad_enabled()
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            call = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) if again else block
            x = call(x, rope, tiles, cache)                          # (B, T, C)
        return self.norm(x)

    def _rotations(self, positions):
        exponent = torch.arange(0, self.config.head_dim, 2, device=positions.device) / self.config.head_dim
        frequencies = ROPE_SCALING[self.config.rope["rope_type"]](
            self.config.rope["rope_theta"] ** -exponent, self.config.rope)                  # (D/2)
        angles = positions[:, None, :, None] * frequencies           # (B, 1, T, D/2)
        return angles.cos(), angles.sin()

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) float32 logits of plain text, all at once (for short texts and tests)."""
        positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
        return self.head(self.hidden(ids, positions)).float()

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor, source: Tensor, target: Tensor,
                entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(N,) float32 log-probability of each scored token and, if asked for, (N,) entropy in nats of what
        the model expected there.

        tokens, positions, segments: (B, T), see data.collate.  Scored token i is target[i] (N,); it is predicted
        from the hidden state at source[i] (N,), an index into the B*T tokens.
        """
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.embed.weight.dtype
        x, weight = Lookup.apply(self.embed.weight, tokens) if self.config.tied else (None, self.head.weight)
        x = self.hidden(tokens, positions, attention_tiles(segments, dtype), x=x).flatten(0, 1)[source]     # (N, C)
        chunk = self.chunk or (2 ** 18 if kind == "cpu" else 2 ** 24)            # what a cache holds; what fills a GPU
        width = max(256, chunk // max(1, len(target)))
        return Head.apply(x.to(dtype), weight.to(dtype), target, width, entropy)

    @torch.no_grad()
    def generate(self, ids: list[int], max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
                 stop: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Iterator[int]:
        """Yield sampled token ids until one is in `stop` (not yielded) or the positions end; temperature 0: greedy.

        ids must hold a token at least.
        """
        device = self.embed.weight.device
        caches, new = [Cache() for _ in self.blocks], ids            # the prompt, then a token at a time
        for length in range(len(ids), min(len(ids) + max_new_tokens, self.config.positions)):
            positions = torch.arange(length - len(new), length, device=device)[None]
            x = self.hidden(torch.tensor([new], device=device), positions, caches=caches)[0, -1]
            token = sample(self.head(x).float().cpu(), temperature, top_p, generator)
            if token in stop:
                return
            yield token
            new = [token]

    # --- Hugging Face folders ------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, settings: dict, files: dict[str, bytes] | None = None) -> "Transformer":
        """A model with random weights (normal, 0.02) from the contents of a config.json, to be saved with `files`."""
        family, config = read_config(settings, "config")
        model = cls(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = [name for name in family.all_names(config) if family.find(name, config.layers)[0][0] in parameters]
        model.origin = Origin(family, {"config.json": json.dumps(settings, indent=2).encode(), **(files or {})},
                              {name: ("model.safetensors", torch.float32) for name in names}, {}, {})
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Transformer":
        """Read a Hugging Face folder (config.json and safetensors); the parameters become float32.

        Raises BadModel, naming the file or tensor: unknown family, pickles, missing, left-over or misshapen tensors.
        """
        origin, config, tensors = read_folder(Path(folder))
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        have = {}
        for name, tensor in tensors:
            ours, transposed = origin.family.find(name, config.layers) or ([], False)
            if not ours or ours[0] not in shapes:
                raise BadModel(f"{folder}: tensor {name!r} {tuple(tensor.shape)} has no place in this model of "
                               f"{config.layers} layers; is config.json that of another one?")
            tensor = tensor.t() if transposed else tensor
            sizes = [shapes[p][0] for p in ours]
            if tensor.shape != (sum(sizes), *shapes[ours[0]][1:]):
                raise BadModel(f"{folder}: tensor {name!r} has the shape {tuple(tensor.shape)}, config.json asks for "
                               f"{(sum(sizes), *shapes[ours[0]][1:])}" + " (transposed)" * transposed)
            for p, part in zip(ours, tensor.split(sizes)):
                have[p] = part.to(device, torch.float32).contiguous()
        if config.tied and have.keys() & {"embed.weight", "head.weight"}:
            embed = have.setdefault("embed.weight", have.get("head.weight"))
            if not torch.equal(embed, have.setdefault("head.weight", embed)):
                raise BadModel(f"{folder}: config.json ties the head to the embedding, but the two tensors differ")
        missing = sorted(shapes.keys() - have.keys())
        if missing:
            raise BadModel(f"{folder}: no tensor for {', '.join(missing[:3])}{' ...' if missing[3:] else ''}")
        model.load_state_dict(have, assign=True)
        if config.tied:
            model.head.weight = model.embed.weight
        model.origin = origin
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that from_pretrained read, with these weights: same files, tensor names, shapes, dtypes.

        Everything is written beside its place first and then renamed, so that no file is ever half written.
        """
        folder, origin = Path(folder), self.origin
        staging = folder / ".saving"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        parameters = dict(self.named_parameters(remove_duplicate=False))
        for file in sorted({file for file, _ in origin.tensors.values()}):
            tensors = {}
            for name, (where, dtype) in origin.tensors.items():
                if where != file:
                    continue
                if name in origin.buffers:
                    tensors[name] = origin.buffers[name]
                    continue
                ours, transposed = origin.family.find(name, self.config.layers)
                stacked = torch.cat([parameters[p].detach().cpu() for p in ours])
                tensors[name] = (stacked.t() if transposed else stacked).to(dtype, copy=True).contiguous()
            save_file(tensors, staging / file, metadata=origin.metadata.get(file, {"format": "pt"}))
            (staging / file).chmod(0o644)                            # safetensors leaves it readable by its owner only
        for name, content in origin.files.items():
            (staging / name).write_bytes(content)
        for path in staging.iterdir():
            os.replace(path, folder / path.name)
        staging.rmdir()

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The end-of-text ids that the folder's generation_config.json and config.json name."""
        found = []
        for name in ("generation_config.json", "config.json"):
            ids = json.loads(self.origin.files.get(name, b"{}")).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids] if ids is not None else []
        return tuple(dict.fromkeys(found))


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """One token id from (V,) logits; top_p keeps the fewest likeliest tokens whose probabilities reach it."""
    if temperature == 0:
        return int(logits.argmax())
    chances, ids = (logits / temperature).softmax(-1).sort(descending=True)
    chances[chances.cumsum(0) - chances >= top_p] = 0
    return int(ids[torch.multinomial(chances, 1, generator=generator)])


# ---------------------------------------------------------------------------------------------------------------
# 4. Reading a folder

class Origin(NamedTuple):
    """What a folder held besides the numbers, so that saving can give it back."""
    family: Family
    files: dict[str, bytes]                       # config, tokenizer, index: copied as they are
    tensors: dict[str, tuple[str, torch.dtype]]   # name: (file, dtype)
    buffers: dict[str, Tensor]                    # tensors that are no parameters
    metadata: dict[str, dict]                     # of each safetensors file


KEPT = (".json", ".jinja", ".model", ".txt")      # files beside the weights that belong to a model


def read_config(settings: dict, where: str) -> tuple[Family, Config]:
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind not in FAMILIES:
        raise BadModel(f"{where}: model_type {kind!r} is not one of those built here ({', '.join(FAMILIES)})")
    try:
        config = FAMILIES[kind].config(settings)
        if config.rope is not None:
            ROPE_SCALING[config.rope["rope_type"]](config.rope["rope_theta"] ** -torch.ones(1), config.rope)
        float(config.eps + 0)
    except KeyError as error:
        raise BadModel(f"{where}: a {kind} model needs {error} there") from None
    except (TypeError, ZeroDivisionError) as error:
        raise BadModel(f"{where}: a number of this {kind} model is none ({error})") from None
    for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden", "positions"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise BadModel(f"{where}: a {kind} model needs a size above 0 for its {name}, found {value!r}")
    if config.activation not in ACTIVATIONS:
        raise BadModel(f"{where}: activation {config.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return FAMILIES[kind], config


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadModel(f"{path}: not a JSON object")
    return content


def read_folder(folder: Path) -> tuple[Origin, Config, Iterator[tuple[str, Tensor]]]:
    """What is in a Hugging Face folder; the tensors come one by one."""
    if not (folder / "config.json").is_file():
        raise BadModel(f"{folder}: {'no config.json there' if folder.is_dir() else 'no such folder'}; "
                       "a model is a folder with config.json, *.safetensors and tokenizer.json")
    family, config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise BadModel(f"{index}: has no weight_map from tensors to files")
        names = sorted(set(places.values()))
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise BadModel(f"{folder}: neither model.safetensors nor its index there" + (
            f", only {pickles[0]}: loading a pickle can run any code, so none is read; convert it with "
            "transformers (from_pretrained, then save_pretrained)" if pickles else ""))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise BadModel(f"{index}: names the file {name!r}, which is not in {folder}")
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())
             if path.suffix in KEPT and path.is_file() and path.stat().st_size < 2 ** 27}
    origin = Origin(family, files, {}, {}, {})
    return origin, config, _tensors(folder, names, origin)


def _tensors(folder, names, origin):
    for file in names:
        try:
            with safe_open(folder / file, "pt") as tensors:
                origin.metadata[file] = tensors.metadata() or {}
                for name in tensors.keys():                          # noqa: SIM118 (it is not a dict)
                    tensor = tensors.get_tensor(name)
                    origin.tensors[name] = file, tensor.dtype
                    if re.search(origin.family.buffers, name):
                        origin.buffers[name] = tensor
                    else:
                        yield name, tensor
        except SafetensorError as error:
            raise BadModel(f"{folder / file}: not a whole safetensors file ({error})") from None


# ---------------------------------------------------------------------------------------------------------------

def number(kind, low, high):
    """An argparse type: a number from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    parse.__name__ = kind.__name__                                   # what argparse says of text that is no number
    return parse


def main():
    parser = argparse.ArgumentParser(description="Continue a text.", allow_abbrev=False)
    parser.add_argument("folder", help="Hugging Face folder with config.json, *.safetensors, tokenizer.json")
    parser.add_argument("-p", "--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=number(int, 1, 10 ** 6), default=100)
    parser.add_argument("--temperature", type=number(float, 0, 100), default=0.7, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=number(float, 1e-6, 1), default=0.95)
    parser.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0)
    args = parser.parse_args()
    try:
        model = Transformer.from_pretrained(args.folder, "cuda" if torch.cuda.is_available() else "cpu")
        if "tokenizer.json" not in model.origin.files:
            raise BadModel(f"{args.folder}: no tokenizer.json there")
        tokenizer = Tokenizer.from_str(model.origin.files["tokenizer.json"].decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        prompt = tokenizer.encode(args.prompt).ids
        if not 0 < len(prompt) < model.config.positions:
            raise BadModel(f"--prompt has {len(prompt)} tokens, it must have 1 to {model.config.positions - 1}")
    except (BadModel, OSError) as error:
        print(f"model.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(args.prompt, end="", flush=True)
    ids, shown = [], ""
    for token in model.generate(prompt, args.max_new_tokens, args.temperature, args.top_p,
                                model.stop_tokens, torch.Generator().manual_seed(args.seed)):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):           # a character may take several tokens
            print(text[len(shown):], end="", flush=True)
            shown = text
    print()


if __name__ == "__main__":
    main()
