"""One transformer that reads and writes Hugging Face checkpoints, scores responses, and generates text.

To add a family, add a row to FAMILIES (and a column to NAMES if its names are new); to refuse a setting of
config.json, add it to ONLY.  Training makes one call, model(tokens, positions, segments, source, target): it
returns the log-probabilities of the response tokens alone, and never holds all logits of a large batch.

    python model.py DIR -p "The capital of France is"          continue a text; --chat: answer a message
"""
import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint


class BadModel(ValueError):
    """A checkpoint folder that cannot be used; the message says what was found and what to do."""


def check(good: bool, message: str) -> None:
    if not good:
        raise BadModel(message)


# ---------------------------------------------------------------------------------------------------------------
# 1. Families: the config.json of each family -> Config, and how the family names its weights

@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int                        # C, width of the residual stream
    layers: int
    heads: int
    kv_heads: int                   # fewer than heads: grouped-query attention
    head_dim: int
    hidden: int                     # width inside the MLP
    positions: int                  # longest sequence that the model accepts
    activation: str
    eps: float
    tied: bool                      # the output head and the embedding are one matrix
    rms: bool = False               # RMSNorm instead of LayerNorm
    gated: bool = False             # act(gate) * up instead of act(up)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope: dict | None = None        # settings of rotary positions; None: learned positions
    rotary: int = 0                 # how many leading coordinates of each head are rotated
    qk_norm: bool = False           # RMSNorm on each head of q and k
    parallel: bool = False          # the MLP reads the block's input, not x + attention


def gpt2_config(c: dict) -> Config:
    return Config(vocab_size=c["vocab_size"], dim=c["n_embd"], layers=c["n_layer"], heads=c["n_head"],
                  kv_heads=c["n_head"], head_dim=c["n_embd"] // c["n_head"], positions=c["n_positions"],
                  hidden=c.get("n_inner") or 4 * c["n_embd"], activation=c.get("activation_function", "gelu_new"),
                  eps=float(c.get("layer_norm_epsilon", 1e-5)), tied=c.get("tie_word_embeddings", True),
                  qkv_bias=True, out_bias=True, mlp_bias=True)


def llama_config(c: dict) -> Config:
    """If layers have a sliding window, texts may be no longer than that window: so it never hides a token."""
    heads, bias = c["num_attention_heads"], c.get("attention_bias", False)
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": c.get("max_position_embeddings"), **c}
    rope["rope_type"] = c.get("rope_type") or c.get("type") or "default"
    check(rope["rope_type"] in ROPE_SCALING,
          f"asks for RoPE scaling {rope['rope_type']!r}; supported: {', '.join(ROPE_SCALING)}")
    longest, layer_types = c.get("max_position_embeddings", 2048), c.get("layer_types") or []
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    known = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
    check(set(layer_types) <= known, f"cannot use layer_types={layer_types!r:.300} with a window of {window}")
    return Config(vocab_size=c["vocab_size"], dim=c["hidden_size"], layers=c["num_hidden_layers"], heads=heads,
                  kv_heads=c.get("num_key_value_heads") or heads, head_dim=head_dim, hidden=c["intermediate_size"],
                  positions=longest if window is None else min(longest, window), activation=c.get("hidden_act", "silu"),
                  eps=float(c.get("rms_norm_eps", 1e-6)), tied=c.get("tie_word_embeddings", False), rms=True,
                  gated=True, qkv_bias=bias, out_bias=bias, mlp_bias=c.get("mlp_bias", False), rope=rope,
                  rotary=int(head_dim * float(c.get("partial_rotary_factor", 1))))


def neox_config(c: dict) -> Config:
    rope = {"rope_theta": c.get("rotary_emb_base", 10000.0), "partial_rotary_factor": c.get("rotary_pct", 0.25)}
    config = llama_config({"hidden_act": "gelu", "attention_bias": True, **rope, **c})
    return replace(config, eps=float(c.get("layer_norm_eps", 1e-5)), rms=False, gated=False, mlp_bias=True,
                   parallel=c.get("use_parallel_residual", True))


def llama3_frequencies(f: Tensor, rope: dict) -> Tensor:
    """Llama 3.1, as in transformers: divide low frequencies by `factor`, keep high ones, blend the rest."""
    turns = rope["original_max_position_embeddings"] * f / (2 * torch.pi)   # over the original context length
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * f + (1 - keep) * f / rope["factor"]


class Family(NamedTuple):
    config: Callable[[dict], Config]
    column: int = 2                     # column of NAMES; most families use Llama's
    prefix: str = "model."              # of those names; some old files omit it
    head: str = "lm_head"               # name of the output head
    transposed: tuple[str, ...] = ()    # name endings of matrices that are stored as (in, out)
    by_head: tuple[str, ...] = ()       # of tensors stacked by head: q, k, v of head 0, then of head 1, ...
    buffers: tuple[str, ...] = ()       # of tensors that are not parameters: saved unchanged

    def parts(self, layers: int) -> dict[str, list[str]]:
        """Each tensor name that a model of so many layers can have -> our parameters stacked in it."""
        names = {ours: self.prefix + theirs[self.column] for ours, theirs in NAMES.items() if theirs[self.column]}
        parts = {}
        for ours, theirs in {**names, "head": self.head}.items():
            for i in range(layers if "{}" in ours else 1):
                for leaf in ("weight", "bias"):
                    parts.setdefault(f"{theirs.format(i)}.{leaf}", []).append(f"{ours.format(i)}.{leaf}")
        return parts


NAMES = {                               # our module: name in GPT-2, GPT-NeoX, Llama; equal names: stacked
    "embed": ("wte", "embed_in", "embed_tokens"),
    "position": ("wpe", None, None),
    "blocks.{}.norm1": ("h.{}.ln_1", "layers.{}.input_layernorm", "layers.{}.input_layernorm"),
    "blocks.{}.q": ("h.{}.attn.c_attn", "layers.{}.attention.query_key_value", "layers.{}.self_attn.q_proj"),
    "blocks.{}.k": ("h.{}.attn.c_attn", "layers.{}.attention.query_key_value", "layers.{}.self_attn.k_proj"),
    "blocks.{}.v": ("h.{}.attn.c_attn", "layers.{}.attention.query_key_value", "layers.{}.self_attn.v_proj"),
    "blocks.{}.q_norm": (None, None, "layers.{}.self_attn.q_norm"),
    "blocks.{}.k_norm": (None, None, "layers.{}.self_attn.k_norm"),
    "blocks.{}.out": ("h.{}.attn.c_proj", "layers.{}.attention.dense", "layers.{}.self_attn.o_proj"),
    "blocks.{}.norm2": ("h.{}.ln_2", "layers.{}.post_attention_layernorm", "layers.{}.post_attention_layernorm"),
    "blocks.{}.gate": (None, None, "layers.{}.mlp.gate_proj"),
    "blocks.{}.up": ("h.{}.mlp.c_fc", "layers.{}.mlp.dense_h_to_4h", "layers.{}.mlp.up_proj"),
    "blocks.{}.down": ("h.{}.mlp.c_proj", "layers.{}.mlp.dense_4h_to_h", "layers.{}.mlp.down_proj"),
    "norm": ("ln_f", "final_layer_norm", "norm"),
}
FAMILIES = {                            # key: model_type in config.json
    "gpt2": Family(gpt2_config, 0, "transformer.", buffers=(".attn.bias", ".attn.masked_bias"),
                   transposed=(".c_attn.weight", ".c_proj.weight", ".c_fc.weight")),
    "gpt_neox": Family(neox_config, 1, "gpt_neox.", head="embed_out",
                       by_head=(".query_key_value.weight", ".query_key_value.bias"),
                       buffers=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")),
    "llama": Family(llama_config, buffers=(".rotary_emb.inv_freq",)),
    "mistral": Family(lambda c: llama_config({**c, "use_sliding_window": True})),
    "qwen2": Family(lambda c: replace(llama_config(c), qkv_bias=True, out_bias=False)),
    "qwen3": Family(lambda c: replace(llama_config({"head_dim": 128, **c}), qk_norm=True)),
}
ONLY = {  # settings of config.json: the only supported value (full_attention, sliding_attention: of RoPE)
    "every": {"quantization_config": None, "attn_logit_softcapping": None, "final_logit_softcapping": None,
              "add_cross_attention": False, "full_attention": None, "sliding_attention": None},
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "llama": {"partial_rotary_factor": 1, "sliding_window": None, "use_sliding_window": False, "layer_types": None},
    "mistral": {"partial_rotary_factor": 1, "layer_types": None, "attention_bias": False, "mlp_bias": False},
    "qwen2": {"partial_rotary_factor": 1, "mlp_bias": False},
    "qwen3": {"partial_rotary_factor": 1, "mlp_bias": False},
}


# ---------------------------------------------------------------------------------------------------------------
# 2. The transformer

TILE = 512         # most queries per attention call on a CPU
BLOCK = 128        # side of the square blocks of scores (queries, keys) that flex_attention computes or skips
CHUNK = {"cpu": 2 ** 19, "cuda": 2 ** 24}      # logits per slice: fits a core's cache; fills a GPU
KEPT = 2 ** 26     # at most so many logits are kept for the backward pass
LIKELIEST = 256    # so many of the likeliest tokens are sorted; all of them only if top_p needs more
BRANCHES = 16      # segment id = group * BRANCHES + branch; branch 0: the prompt.  Passed to data.collate
TARGETS = ("q", "k", "v", "out", "gate", "up", "down")      # the projections of a block that LoRA may update
TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": TANH, "gelu_fast": TANH, "gelu_pytorch_tanh": TANH,
               "relu": F.relu, "silu": F.silu}
ROPE_SCALING = {"default": lambda f, rope: f, "linear": lambda f, rope: f / rope["factor"],
                "llama3": llama3_frequencies}
torch.backends.cuda.enable_cudnn_sdp(False)    # cuDNN builds a kernel per row length and per generated token


def visible(query: Tensor, key: Tensor) -> Tensor:
    """Whether a query sees an earlier key, by segment ids: same branch, or the prompt of the same group."""
    return (query == key) | ((query // BRANCHES == key // BRANCHES) & (key % BRANCHES == 0))


def attention_tiles(segments: Tensor, new: int, dtype: torch.dtype = torch.float32) -> list[tuple[int, slice, Tensor]]:
    """Tiles of attention for the last `new` tokens, from the (B, S) segment ids of all tokens.
    A tile is: how many queries it has, the slice of keys they may see, and the mask to add to their scores,
    (B, 1, queries, keys), -inf for hidden keys.  A GPU gets one tile.  On a CPU, tiles end between groups
    (short groups share one) and after TILE queries: so no scores with later keys or other tiles' groups."""
    total, cuts, size = segments.size(1), [0], new
    if segments.device.type == "cpu":
        size, group = TILE, segments // BRANCHES
        for edge in (1 + (group[:, 1:] != group[:, :-1]).all(0).nonzero()[:, 0]).tolist():
            if edge - cuts[-1] >= TILE // 4:
                cuts.append(edge)
    tiles = []
    for start, stop in zip(cuts, [*cuts[1:], total]):
        for at in range(max(start, total - new), stop, size):
            end = min(at + size, stop)
            seen = visible(segments[:, at:end, None], segments[:, None, start:end]).tril(at - start)
            width = -(-(end - start) // 8) * 8                       # multiple of 8: a GPU copies other masks
            mask = torch.zeros(*seen.shape[:2], width, dtype=dtype, device=seen.device)[..., :end - start]
            tiles.append((end - at, slice(start, end), mask.masked_fill_(~seen, -torch.inf)[:, None]))
    return tiles


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: list | None = None, enable_gqa: bool = False) -> Tensor:
    """Attention of q (B, H, T, D) to k, v (B, KV, S, D) by tiles; without tiles, to all earlier tokens."""
    if enable_gqa and q.device.type != "cpu":                        # else most GPUs hold all scores at once
        groups, enable_gqa = q.size(1) // k.size(1), False
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if tiles is None:                                                # a single new token sees all cached ones
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=enable_gqa)
    counts, spans, masks = zip(*tiles)
    lengths = [mask.size(-1) for mask in masks]
    beside = spans[0].start == 0 and sum(lengths) == k.size(2)       # split: a cheaper backward than slices
    keys, values = (x.split(lengths, 2) if beside else [x[:, :, span] for span in spans] for x in (k, v))
    y = [F.scaled_dot_product_attention(*each, is_causal=False, enable_gqa=enable_gqa)
         for each in zip(q.split(counts, 2), keys, values, masks)]
    return torch.cat(y, 2) if len(y) > 1 else y[0]                   # (B, H, T, D)


def attention_blocks(segments: Tensor) -> BlockMask:
    """The mask for flex_attention: it skips blocks that are wholly hidden and calls `seen` in mixed ones.
    A block is judged by its first and last segment ids, so these (B, S) must never decrease along a row."""
    segments, total = segments.int(), segments.size(1)

    def seen(b, _, q, k):
        return visible(segments[b, q], segments[b, k]) & (k <= q)

    def listed(blocks):              # per query block: how many key blocks (B, 1, N), and which (B, 1, N, N)
        which = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1)[:, None].int(), which[:, None].int()

    ids = F.pad(segments, (0, -total % BLOCK), value=2 ** 30).unflatten(1, (-1, BLOCK))
    low, high = ids[:, :, :1], ids[:, :, -1:]                        # (B, N, 1) each
    ends, start = high.mT, torch.maximum(low, high // BRANCHES * BRANCHES).mT                # (B, 1, N) of keys
    some = (visible(low, ends) | visible(low, start)).tril(-1)       # (B, N, N)
    some = some | torch.eye(ends.size(2), dtype=torch.bool, device=ends.device)
    whole = (visible(low, ends) & visible(high, low.mT) & (low == high).mT).tril(-1)
    return BlockMask.from_kv_blocks(*listed(some & ~whole), *listed(whole), BLOCK, seen, (total, total))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions: coordinates i and i + R/2 are rotated as a pair (Hugging Face's layout)."""
    half = cos.size(-1)                                              # R/2
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)             # (B, H, T, R/2), the same, D - R
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c, norm = c, nn.RMSNorm if c.rms else nn.LayerNorm
        self.norm1 = norm(c.dim, eps=c.eps)
        self.q = nn.Linear(c.dim, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.heads * c.head_dim, c.dim, bias=c.out_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.eps) if c.qk_norm else None
        self.norm2 = norm(c.dim, eps=c.eps)
        self.gate = nn.Linear(c.dim, c.hidden, bias=c.mlp_bias) if c.gated else None
        self.up = nn.Linear(c.dim, c.hidden, bias=c.mlp_bias)
        self.down = nn.Linear(c.hidden, c.dim, bias=c.mlp_bias)

    def forward(self, x, rope, attend, cache=None, source=None):
        q, k, v = self.before(x, rope)                               # (B, H, T, D), k and v (B, KV, T, D)
        if cache is not None:                                        # (2, B, KV, S, D), of which the last T are new
            cache[:, :, :, -k.size(2):] = torch.stack([k, v])
            k, v = cache                                             # (B, KV, S, D)
        y = attend(q, k, v, enable_gqa=self.c.kv_heads != self.c.heads)           # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)                             # (B, T, H*D)
        if source is not None:                                       # the last block: only these are needed
            x, y = (each.flatten(0, 1).index_select(0, source)[None] for each in (x, y))     # (1, N, C or H*D)
        return self.after(x, y)                                      # (B, T, C)

    def before(self, x, rope):
        x = self.norm1(x)                                            # (B, T, C)
        q, k, v = (project(x).unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2)
                   for project in (self.q, self.k, self.v))          # (B, H, T, D), k and v (B, KV, T, D)
        if self.q_norm is not None:                                  # float32 in autocast, like other norms
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v

    def after(self, x, y):
        y, act = x + self.out(y), ACTIVATIONS[self.c.activation]     # (B, T, C)
        x = self.norm2(x if self.c.parallel else y)                  # (B, T, C)
        return y + self.down(act(self.gate(x)) * self.up(x) if self.gate else act(self.up(x)))       # (B, T, C)


class Head(torch.autograd.Function):
    """Log-probability of each scored token, and entropy of its prediction (no gradient), by slices of `width`
    vocabulary entries.  The backward pass recomputes all logits but the first KEPT, and writes each weight's
    gradient once, in place: memory never holds more logits than those KEPT and one slice."""

    @staticmethod
    def forward(ctx, x, weight, target, width, entropy):             # (N, C), (V, C), (N,)
        exact, slices = torch.promote_types(x.dtype, torch.float32), weight.split(width)
        top, mass, inside = x.new_zeros(3, len(slices), len(x), dtype=exact)                 # (S, N) each
        ctx.kept, most = [], KEPT if any(ctx.needs_input_grad) else 0
        for i, w in enumerate(slices):
            logits = F.linear(x, w).to(exact)                        # (N, width)
            torch.amax(logits, -1, out=top[i])
            logits.sub_(top[i, :, None])
            p = logits.exp() if entropy else logits.exp_()           # (N, width), in units of exp(top)
            torch.sum(p, -1, out=mass[i])
            if entropy:
                torch.sum(logits.mul_(p), -1, out=inside[i])
            if (i + 1) * width * len(x) <= most:
                ctx.kept.append(p)
        log_z = (top + mass.log()).double().logsumexp(0)             # (N,) few numbers: float64 costs little
        lead = log_z - top                                           # (S, N)
        entropies = None
        if entropy:
            entropies = ((mass * lead - inside) * lead.neg().exp()).sum(0).to(exact)         # (N,)
            ctx.mark_non_differentiable(entropies)
        ctx.width, log_z = width, log_z.to(exact)
        ctx.save_for_backward(x, weight, target, log_z, top)
        return (x.to(exact) * weight[target]).sum(-1) - log_z, entropies

    @staticmethod
    def backward(ctx, up, _):
        x, weight, target, log_z, tops = ctx.saved_tensors
        up = up[:, None]                                             # (N, 1)
        down = x * -up                                               # (N, C)
        dx = torch.zeros_like(x, dtype=log_z.dtype)                  # (N, C), a sum over slices: in float32
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        kept, ctx.kept = ctx.kept[::-1], []                          # each is freed once it is used
        for at, top in zip(range(0, len(weight), ctx.width), tops[:, :, None]):              # (N, 1)
            w = weight[at:at + ctx.width]                            # (width, C)
            p = kept.pop() if kept else F.linear(x, w).to(log_z.dtype).sub_(top).exp_()
            p = p.to(x.dtype)                                        # (N, width)
            share = (top - log_z[:, None]).exp()                     # (N, 1); share * p: the probabilities
            dx += share * (p @ w)
            if dw is not None:
                torch.mm(p.t(), (share * down).to(x.dtype), out=dw[at:at + ctx.width])
        if dw is not None:
            dw.index_add_(0, target, down.to(x.dtype), alpha=-1)
        return (up * (weight[target] - dx)).to(x.dtype), dw, None, None, None


class Lookup(torch.autograd.Function):
    """Look up rows of a table, and pass the table on as the tied head: both gradients go into one tensor.
    Autograd makes two: 14 to 17 % more peak memory at vocabulary 128,256 (tests/bench.py), none at 32,000."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, d_rows, d_table):
        return d_table.index_add_(0, ctx.saved_tensors[0].flatten(), d_rows.flatten(0, -2)), None


class Transformer(nn.Module):
    """A decoder-only language model without dropout: before step 1 the policy is exactly the reference."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointed = False                                    # True: keep only the inputs of blocks
        self.compiled, self.flex = False, None                       # see compile_blocks

        def table(*size):                                            # (initialising on meta takes a second)
            empty = torch.empty(size)
            return nn.Embedding.from_pretrained(empty, freeze=False) if empty.is_meta else nn.Embedding(*size)
        self.embed = table(config.vocab_size, config.dim)
        self.position = table(config.positions, config.dim) if config.rope is None else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = (nn.RMSNorm if config.rms else nn.LayerNorm)(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def hidden(self, x: Tensor, positions: Tensor, segments: Tensor | None = None, cache: Tensor | None = None,
               source: Tensor | None = None) -> Tensor:
        """(B, T, C) token embeddings -> (B, T, C) hidden states, or (1, N, C): only those at `source` (N,).
        positions and segments (B, S) include earlier tokens, whose keys and values the cache holds, with room
        for more: (layers, 2, B, KV, room, D).  Without segments each row is one text."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))        # sums over layers: not in half precision
        at = positions[:, -x.size(1):]                               # (B, T)
        rope = None if self.config.rope is None else self._rotations(at)        # cos and sin, (B, 1, T, R/2)
        if self.position is not None:
            x = x + self.position(at)                                # (B, T, C)
        look = attend
        if segments is not None and self.flex and cache is None:
            look = partial(self.flex, block_mask=attention_blocks(segments))
        elif segments is not None:
            look = partial(attend, tiles=attention_tiles(segments, x.size(1), self.precision(x.device)))
        again = self.checkpointed and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            call = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) if again else block
            past = None if cache is None else cache[i, :, :, :, :positions.size(1)]
            asked = source if block is self.blocks[-1] else None
            x = call(x, rope, look, past, asked)                     # (B, T, C)
        return self.norm(x)

    def compile_blocks(self) -> None:
        """Compile blocks (one code for all) and, on a GPU, flex_attention.  RuntimeError if torch cannot."""
        device = self.embed.weight.device
        torch.compile(torch.square)(torch.ones(2, device=device))   # a missing compiler raises here
        self.compiled = True
        torch._dynamo.config.optimize_ddp = False                   # graphs are parts of blocks: do not split
        torch._dynamo.config.recompile_limit = 32                   # rows have tens to thousands of tokens
        if device.type == "cuda" and self.config.head_dim >= 16:    # (its minimum)
            flex = torch.compile(flex_attention, dynamic=True)
            self.flex = partial(flex, kernel_options={"BACKEND": "TRITON"})  # also for rows below 128 tokens
        for block in self.blocks:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)

    def precision(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products: that of autocast, or else that of the weights."""
        autocast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if autocast else self.embed.weight.dtype

    def _rotations(self, positions):
        rope = self.config.rope
        exponent = torch.arange(0, self.config.rotary, 2, device=positions.device) / self.config.rotary
        frequencies = ROPE_SCALING[rope["rope_type"]](rope["rope_theta"] ** -exponent, rope)         # (R/2)
        angles = positions[:, None, :, None] * frequencies           # (B, 1, T, R/2)
        return angles.cos(), angles.sin()

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) float32 logits of plain text, all at once (for short texts and tests)."""
        positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
        return self.head(self.hidden(self.embed(ids), positions)).float()

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor, source: Tensor, target: Tensor,
                entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(N,) float32 log-probability of each scored token; with `entropy`, also (N,) entropies in nats.
        tokens, positions, segments: (B, T), see data.collate.  Scored token i is target[i] (N,); it is predicted
        from the hidden state at source[i] (N,), an index into the B*T tokens."""
        if self.config.tied:
            x, weight = Lookup.apply(self.embed.weight, tokens)      # (B, T, C), (V, C)
        else:
            x, weight = self.embed(tokens), self.head.weight
        x = self.hidden(x, positions, segments, source=source).squeeze(0)                            # (N, C)
        width = CHUNK[tokens.device.type] // (64 * max(1, len(target))) * 64  # vocabulary per slice, aligned
        if not torch.is_grad_enabled():
            weight = weight.detach()                                 # else Head would keep logits
        dtype = self.precision(tokens.device)
        return Head.apply(x.to(dtype), weight.to(dtype), target, max(256, width), entropy)

    def predict(self, tokens: Tensor, positions: Tensor, segments: Tensor | None, cache: Tensor) -> Tensor:
        """(B, V) logits of the token after each row of tokens (B, T); other arguments as in `hidden`."""
        return self.head(self.hidden(self.embed(tokens), positions, segments, cache)[:, -1])

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
                 stop: tuple[int, ...] = (), generators: list[torch.Generator] | None = None) -> Iterator[list]:
        """Yield lists: each prompt's next token id, None once it has met a `stop` token or the last position.
        temperature 0: greedy.  Each prompt needs at least one token and a generator of its own.
        Raises BadModel if a number is out of range."""
        check(max_new_tokens >= 0 and temperature >= 0 and top_p > 0,
              f"cannot sample {max_new_tokens} tokens with temperature {temperature} and top_p {top_p}")
        c, device = self.config, self.embed.weight.device
        end, longest = c.positions, max(map(len, prompts))
        lengths, going = [len(ids) for ids in prompts], list(range(len(prompts)))        # unfinished prompts
        cache = torch.empty(c.layers, 2, len(prompts), c.kv_heads, longest + min(max_new_tokens, end), c.head_dim,
                            dtype=self.precision(device), device=device)
        pad = torch.tensor([[longest - n] for n in lengths], device=device)                          # (B, 1)
        new = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)     # (B, T)
        for step in range(max_new_tokens):                           # first the prompts, then token by token
            at = torch.arange(longest + step, device=device) - pad   # (B, S) positions; negative: padding
            segments = (at < 0) * BRANCHES if min(lengths) < longest else None      # padding: its own group
            logits = self.predict(new, at.clamp(0, end - 1), segments, cache).float()                # (B, V)
            drawn = sample(logits, temperature, top_p, generators and [generators[i] for i in going])
            found = {i: token for i, token in zip(going, drawn) if token not in stop and lengths[i] + step < end}
            if not found:
                return
            yield [found.get(i) for i in range(len(prompts))]
            rows = torch.tensor([row for row, i in enumerate(going) if i in found], device=device)
            if len(rows) < len(going):                               # drop the rows of finished prompts
                pad, cache = pad[rows], cache[:, :, rows]
                going = list(found)
            new = torch.tensor([[token] for token in found.values()], device=device)

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """The whole parameter of this name, on the CPU, with its low-rank update added."""
        module, weight = self.get_submodule(name.rpartition(".")[0]), to_cpu(self.get_parameter(name))
        if isinstance(module, LowRank) and name.endswith(".weight"):
            weight = weight.float() + module.scale * to_cpu(module.B) @ to_cpu(module.A)
        return weight

    @classmethod
    def from_config(cls, settings: dict, files: dict[str, bytes] | None = None) -> "Transformer":
        """A model with random weights (normal, std 0.02) for this config.json, to be saved with `files`."""
        family, config = read_config(settings, "config")
        model, parts = cls(config), family.parts(config.layers)
        own = dict(model.named_parameters())                         # (a tied head is not listed)
        for name, parameter in own.items():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        tensors = {name: ("model.safetensors", torch.float32) for name, ours in parts.items() if ours[0] in own}
        files = {"config.json": json.dumps(settings, indent=2).encode(), **(files or {})}
        model.origin = Origin(family, files, tensors, {}, parts)
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, shard: Callable | None = None) -> "Transformer":
        """Read a Hugging Face folder (config.json, safetensors); matrices become `dtype`, the rest float32.
        shard(model) may shard the parameters over ranks before they are read (FSDP2's fully_shard).
        Raises BadModel, naming the file or tensor: unknown family, pickles, missing or misshapen tensors."""
        folder = Path(folder)
        origin, config = read_folder(folder)
        with torch.device("meta"):
            model = cls(config)
        if shard:
            shard(model)
        model.origin = origin
        check(all(type(token) is int and token >= 0 for token in model.stop_tokens),
              f"{folder}: config.json or generation_config.json: eos_token_id {model.stop_tokens!r:.80} is no token")
        have, places = {}, dict(model.named_parameters())
        for file, name, tensor in read_tensors(folder):
            origin.tensors[name] = file, tensor.dtype
            if name.endswith(origin.family.buffers):
                origin.buffers[name] = tensor
                continue
            ours = origin.parts.get(name, ["none"])
            check(ours[0] in places, f"{folder}: tensor {name!r:.300} {tuple(tensor.shape)} has no place in this model "
                                     f"of {config.layers} layers; is config.json another model's?")
            check(tensor.is_floating_point() and tensor.itemsize > 1,
                  f"{folder}: tensor {name!r} is of {tensor.dtype}; quantised weights are not supported")
            sizes = [places[p].shape[0] for p in ours]
            shape, transposed = (sum(sizes), *places[ours[0]].shape[1:]), name.endswith(origin.family.transposed)
            shape = shape[::-1] if transposed else shape
            check(tensor.shape == shape,
                  f"{folder}: tensor {name!r} has the shape {tuple(tensor.shape)}, config.json asks for {shape}")
            tensor = tensor.t() if transposed else tensor
            if name.endswith(origin.family.by_head):
                tensor = take_turns(tensor, config.heads, len(ours))
            for p, part in zip(ours, tensor.split(sizes)):
                part = part.to(device, dtype if part.dim() > 1 else torch.float32)
                part = to_shard(part.contiguous(), places[p])
                check(p not in have or torch.equal(have[p], part),
                      f"{folder}: tensor {name!r} differs from another for the same place (a tied head?)")
                have[p] = part
        missing = sorted(places.keys() - have.keys())
        check(not missing, f"{folder}: no tensor for {len(missing)} weights, such as {', '.join(missing[:3])}")
        model.load_state_dict(have, strict=False, assign=True)
        if config.tied:
            model.head.weight = model.embed.weight
        return model

    def to_hf(self, name: str) -> Tensor:
        """The current weights as the tensor of this name in the folder, in its layout and dtype there."""
        origin = self.origin
        if name in origin.buffers:
            return origin.buffers[name]
        ours = origin.parts[name]
        tensor = torch.cat([self.merged_weight(p) for p in ours])
        if name.endswith(origin.family.by_head):
            tensor = take_turns(tensor, len(ours), self.config.heads)
        tensor = tensor.t() if name.endswith(origin.family.transposed) else tensor
        return tensor.to(origin.tensors[name][1], copy=True).contiguous()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that from_pretrained read, with these weights: same files, names, shapes, dtypes.
        Files are written in .saving, flushed to disk, then moved into place: no file is ever half written.
        If weights are sharded, the other ranks must call to_hf for each of origin.tensors, in that order."""
        folder, origin = Path(folder), self.origin
        staging = folder / ".saving"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for file in dict.fromkeys(file for file, _ in origin.tensors.values()):
            tensors = {name: self.to_hf(name) for name, (where, _) in origin.tensors.items() if where == file}
            save_file(tensors, staging / file, metadata={"format": "pt"})
            (staging / file).chmod(0o644)                            # only its owner could read it otherwise
        for name, content in origin.files.items():
            (staging / name).write_bytes(content)
        for path in staging.iterdir():
            fsync(path)
            os.replace(path, folder / path.name)
        staging.rmdir()
        fsync(folder)

    @property
    def stop_tokens(self) -> list[int]:
        """The ids of end-of-text tokens that generation_config.json and config.json name."""
        files = [json.loads(self.origin.files.get(f"{name}.json", b"{}")) for name in ("generation_config", "config")]
        ends = [file.get("eos_token_id") for file in files]
        found = [token for end in ends for token in (end if isinstance(end, list) else [end]) if token is not None]
        return [token for i, token in enumerate(found) if token not in found[:i]]

    @property
    def notes(self) -> list[str]:
        """Requests of the configuration that this model ignores or restricts; a trainer should print them."""
        settings, longest = json.loads(self.origin.files["config.json"]), self.config.positions
        notes = [f"config.json asks for {key}={settings[key]!r:.80}: ignored, as this model has no dropout"
                 for key in DROPOUTS if settings.get(key)]
        notes += [f"eos_token_id {token} is not one of the model's {self.config.vocab_size:,} tokens: ignored"
                  for token in self.stop_tokens if token not in range(self.config.vocab_size)]
        if settings.get("max_position_embeddings", longest) > longest:
            notes.append(f"its attention has a window: texts are limited to its {longest:,} tokens")
        return notes


def to_shard(tensor: Tensor, place: Tensor) -> Tensor:
    """The tensor, or this rank's shard of it if the parameter `place` is sharded."""
    if not hasattr(place, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes half a second, so only if needed
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def to_cpu(tensor: Tensor) -> Tensor:
    """The tensor on the CPU.  A sharded tensor is gathered, so all ranks must make this call."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def take_turns(stacked: Tensor, outer: int, inner: int) -> Tensor:
    """Reorder rows from (outer, inner, D) to (inner, outer, D); swap the sizes to undo it."""
    return stacked.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk; return when it is there."""
    number = os.open(path, os.O_RDONLY)                              # (open() cannot open a folder)
    os.fsync(number)
    os.close(number)


def sample(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator] | None) -> list[int]:
    """A token id for each row of (B, V) logits, drawn from the fewest likeliest tokens that reach top_p.
    Each row uses one random number from its own generator, so its token does not depend on the other rows."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    drawn, chances = [], (logits / temperature).softmax(-1)                                  # (B, V)
    points = torch.stack([torch.rand(1, generator=generators and generators[row]) for row in range(len(chances))])
    if top_p >= 1:                                                   # all tokens are kept: no need to sort
        reach = chances.cumsum(-1)
        places = torch.searchsorted(reach, points.to(reach.device) * reach[:, -1:])          # (B, 1)
        return places.clamp(max=chances.size(1) - 1).flatten().tolist()
    chances = chances.cpu()
    top, ids = chances.topk(min(LIKELIEST, chances.size(1)))                                 # (B, 256), sorted
    for row, some, names, point in zip(chances, top, ids, points):
        if some.sum() < top_p:
            some, names = row.sort(descending=True)
        reach = some.cumsum(0)
        reach = reach[:int((reach - some < top_p).sum())]            # (kept,) running sum of the kept ones
        drawn.append(int(names[torch.searchsorted(reach, point * reach[-1]).clamp(max=len(reach) - 1)]))
    return drawn


# ---------------------------------------------------------------------------------------------------------------
# 3. LoRA: train a small update beside frozen weights

class LowRank(nn.Linear):
    """A frozen projection plus a trained low-rank update:  W x + (alpha / rank) B A x  (arXiv 2106.09685).
    B starts at 0, so that at first the model computes exactly what the loaded one does, to the last bit."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        a = torch.empty(rank, base.in_features).uniform_(-1, 1, generator=generator) / base.in_features ** 0.5
        self.A = nn.Parameter(a.to(base.weight.device))                                   # (rank, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.A), self.B)    # (..., out)


def add_lora(model: Transformer, rank: int, alpha: float, targets: tuple[str, ...] = TARGETS, seed: int = 0) -> None:
    """Freeze the model and add an update of this rank to each block's projections named in `targets`."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks:
        for name, base in list(block.named_children()):
            if name in targets:
                setattr(block, name, LowRank(base, rank, alpha, generator))


def save_adapter(model: Transformer, folder: str | Path, base: str) -> None:
    """Write the updates as PEFT does: adapter_model.safetensors and adapter_config.json; `base` names the model.
    Where a family stacks projections in one matrix, A is stacked, B is block-diagonal, and ranks add up."""
    folder, family, modules = Path(folder), model.origin.family, dict(model.named_modules())
    tensors, ranks = {}, {}
    for name, ours in family.parts(model.config.layers).items():
        parts = [modules.get(each.removesuffix(".weight")) for each in ours]
        updates = [part for part in parts if isinstance(part, LowRank)]
        if updates:
            b = torch.block_diag(*(part.B if part in updates else part.weight.new_zeros(part.out_features, 0)
                                   for part in parts))
            if name.endswith(family.by_head):
                b = take_turns(b, len(parts), model.config.heads)
            name = name.removesuffix(".weight")
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat([part.A for part in updates])
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            leaf = name.split(".", 3)[3]                             # model.layers.0.mlp.up_proj -> mlp.up_proj
            ranks[leaf], scale = sum(part.A.size(0) for part in updates), updates[0].scale
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
                "r": max(ranks.values()), "rank_pattern": ranks, "lora_alpha": scale * max(ranks.values()),
                "alpha_pattern": {leaf: scale * rank for leaf, rank in ranks.items()}, "lora_dropout": 0.0,
                "target_modules": sorted(ranks), "fan_in_fan_out": bool(family.transposed)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().float().contiguous() for name, t in tensors.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)              # as in save_pretrained
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# 4. Folders: reading and checking files that may come from strangers

class Origin(NamedTuple):
    """What a folder held besides the weights, kept so that saving can restore it."""
    family: Family
    files: dict[str, bytes]                       # config, tokenizer, index: copied unchanged
    tensors: dict[str, tuple[str, torch.dtype]]   # name: (file, dtype)
    buffers: dict[str, Tensor]                    # tensors that are not parameters
    parts: dict[str, list[str]]                   # name: our parameters that are stacked in it


FILES = (".json", ".jinja", ".model", ".txt")     # suffixes of the files of a model that are not weights
LONGEST = 1 << 26                                 # most bytes of such a file
WHOLE = ("a model is a folder with config.json, *.safetensors and tokenizer.json; an adapter alone is not a model: "
         "give one that it is merged into (train.py --merge writes such a model)")
DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout")
LARGEST = {"layers": 1 << 10, "positions": 1 << 40, **dict.fromkeys(
    ("vocab_size", "dim", "heads", "kv_heads", "head_dim", "hidden"), 1 << 20)}


def read_config(settings: dict, where: str) -> tuple[Family, Config]:
    """Check config.json.  Raises BadModel, naming the setting that is unknown, unsupported or not a size."""
    kind = settings.get("model_type")
    try:                                     # transformers 5 writes rope_parameters, 4 the other places
        c = {**settings, **(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
        for key, only in {**ONLY["every"], **ONLY.get(kind, {})}.items():
            value = c.get(key, only)                                 # (null, false and 0 mean the same)
            check((value or None) == (only or None),
                  f"asks for {key}={value!r:.80}, which is not supported for {kind!r} models")
        check(kind in FAMILIES, f"model_type {kind!r} is not one of those supported ({', '.join(FAMILIES)})")
        config = FAMILIES[kind].config(c)
        if config.rope is not None:                                  # raises if a number is missing or text
            ROPE_SCALING[config.rope["rope_type"]](config.rope["rope_theta"] ** -torch.ones(1), config.rope)
        for name, most in LARGEST.items():
            value = getattr(config, name)
            check(type(value) is int and 0 < value <= most,
                  f"a {kind} model needs an integer from 1 to {most:,} for its {name}, found {value!r:.80}")
        check(config.heads % config.kv_heads == 0, f"{config.heads} heads cannot share {config.kv_heads} for keys")
        check(config.rope is None or (config.rotary % 2 == 0 and 0 < config.rotary <= config.head_dim),
              f"{config.rotary} of {config.head_dim} coordinates of a head cannot be rotated in pairs")
        check(config.activation in ACTIVATIONS,
              f"activation {config.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    except BadModel as error:
        raise BadModel(f"{where}: {error!s:.500}") from None
    except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # RuntimeError: torch's
        raise BadModel(f"{where}: this {kind!r:.80} model lacks a valid setting ({error!s:.300})") from None
    return FAMILIES[kind], config


def read_json(path: Path) -> dict:
    """Read the object in a JSON file.  Raises BadModel if the file is too long or holds no object."""
    def unique(items):
        check(len(dict(items)) == len(items), "a name appears twice in an object")
        return dict(items)
    try:
        check(path.stat().st_size <= LONGEST, f"longer than {LONGEST:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{path}: not JSON ({error})") from None
    check(isinstance(content, dict), f"{path}: not a JSON object")
    return content


def read_folder(folder: Path) -> tuple[Origin, Config]:
    """Read everything in a Hugging Face folder except the tensors."""
    check((folder / "config.json").is_file(), f"{folder}: no config.json there, or no such folder; {WHOLE}")
    family, config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    parts = family.parts(config.layers)
    if config.tied:                                                  # some files store it under both names
        parts[f"{family.head}.weight"] = ["embed.weight"]
    parts |= {name.removeprefix(family.prefix): ours for name, ours in parts.items()}  # as in the first GPT-2
    origin, home = Origin(family, {}, {}, {}, parts), folder.resolve()
    if home.parent.name == "snapshots":                              # hub cache: links to ../../blobs
        home = home.parents[1]
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (*FILES, ".safetensors"):
            check(path.resolve().is_relative_to(home),
                  f"{path}: a link that leads out of the folder; put the file itself there, or remove it")
            if path.name in ("generation_config.json", "model.safetensors.index.json"):
                read_json(path)
            if path.suffix in FILES and path.stat().st_size <= LONGEST:
                origin.files[path.name] = path.read_bytes()
    return origin, config


def read_tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (file, name, tensor) for every tensor in the model's safetensors files."""
    index, there = folder / "model.safetensors.index.json", [path.name for path in folder.iterdir() if path.is_file()]
    files = ["model.safetensors"]
    if files[0] not in there:
        check(index.name in there, f"{folder}: neither model.safetensors nor its index in {there!r:.300}; loading a "
              f"pickle (*.bin, *.pt) can run any code: convert it with transformers; {WHOLE}")
        places = read_json(index).get("weight_map")
        check(isinstance(places, dict) and places, f"{index}: has no weight_map from tensors to files")
        for name in places.values():
            check(name in there and name.endswith(".safetensors"),
                  f"{index}: its weight_map names the file {name!r:.300}, which is not a safetensors file in {folder}")
        files = sorted(set(places.values()))
    for file in files:
        try:
            with safe_open(folder / file, "pt") as tensors:
                for name in tensors.keys():                          # noqa: SIM118 (it is not a dict)
                    yield file, name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise BadModel(f"{folder / file}: not a whole safetensors file ({error})") from None


def main():
    from data import Tokenizer  # only the command line reads text; the model itself sees token ids
    parser = argparse.ArgumentParser(description="Continue a text, or answer a message.", allow_abbrev=False)
    parser.add_argument("folder", help="Hugging Face folder with config.json, *.safetensors, tokenizer.json")
    parser.add_argument("-p", "--prompt", required=True, help="the text to continue")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message: use the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling: total probability kept")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        model = Transformer.from_pretrained(args.folder, "cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Tokenizer(args.folder)
        ids = tokenizer.prompt([{"role": "user", "content": args.prompt}] if args.chat else args.prompt)
        longest, words = model.config.positions - 1, model.config.vocab_size
        check(0 < len(ids) <= longest, f"--prompt has {len(ids)} tokens; this model takes 1 to {longest}")
        check(max(ids) < words, f"--prompt has the token id {max(ids)}; the model has {words} ids, from 0")
        steps = model.generate([ids], args.max_new_tokens, args.temperature, args.top_p,
                               (tokenizer.eos, *model.stop_tokens), [torch.Generator().manual_seed(args.seed)])
        text = tokenizer.backend.decode(ids + [token for [token] in steps])[len(tokenizer.backend.decode(ids)):]
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        parser.error(f"{error!s:.2000}" or "interrupted")
    print(text if args.chat else args.prompt + text)


if __name__ == "__main__":
    main()
