# SPDX-License-Identifier: Apache-2.0
"""One lean decoder for Qwen2, Qwen3 and Llama 3, with `transformers`' parameter names."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_kernels as lk
from lychee.config import ModelConfig
from lychee.projection import BLOCK_ROWS, Linear, RMSNorm, fused, linear_into


class Pages(Protocol):
    """What a decoder reads of a memory bank: page tables for one batch, see `lychee.bank`."""

    def attention_arguments(self, layer: int) -> dict: ...


class KVCache:
    """Preallocated keys and values [L, B, Hkv, capacity, D] of one batch of prompts."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity)
        self.k = torch.empty(*shape, config.head_dim, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, T, D] behind what is there; return views of all [B, Hkv, S, D]."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache: expected at most {self.capacity} tokens, got {end}")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D] by half-split RoPE with cos, sin [B or 1, 1, T, D/2] (fp32 inside)."""
    first, second = x.float().chunk(2, dim=-1)
    out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return out.to(x.dtype)


class Attention(nn.Module):
    """Projections of one layer, with a second set for memory tokens where the config asks."""

    def __init__(self, config: ModelConfig, memory_param: tuple[str, ...]):
        super().__init__()
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        shapes = {
            "q": (config.hidden_size, query, config.attention_bias),
            "k": (config.hidden_size, key, config.attention_bias),
            "v": (config.hidden_size, key, config.attention_bias),
            "o": (query, config.hidden_size, config.output_bias),
        }
        for letter, (inputs, outputs, bias) in shapes.items():
            setattr(self, f"{letter}_proj", Linear(inputs, outputs, bias=bias))
            if letter in memory_param:
                memory = Linear(inputs, outputs, bias=bias)
                setattr(self, f"lychee_memory_{letter}_proj", memory)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.head_dim = config.head_dim

    def project(self, letter: str, x: Tensor, memory: bool = False) -> Tensor:
        """Rows x [..., E] -> q, k or v [..., heads, D], Qwen3's norm included; see `linear`."""
        return self.split_heads(letter, self.linear(letter, memory)(x))

    def split_heads(self, letter: str, rows: Tensor) -> Tensor:
        """Projected rows [..., heads * D] -> [..., heads, D], Qwen3's norm included."""
        heads = rows.unflatten(-1, (-1, self.head_dim))
        norm = getattr(self, f"{letter}_norm", None)
        return heads if norm is None else norm(heads)

    def width(self, letter: str) -> int:
        """Output features of projection q, k or v."""
        return self.linear(letter).out_features

    def linear(self, letter: str, memory: bool = False) -> nn.Linear:
        """The projection q, k, v or o, the memory tokens' own if asked for and present."""
        own = getattr(self, f"lychee_memory_{letter}_proj", None) if memory else None
        return own if own is not None else getattr(self, f"{letter}_proj")


class MLP(nn.Module):
    """Gated feed-forward block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.down_proj(self.activate(x))
        # In blocks: all rows' inner values would take more than the rest of a layer.
        blocks = x.flatten(0, -2).split(BLOCK_ROWS)
        return torch.cat([self.down_proj(self.activate(rows)) for rows in blocks]).view_as(x)

    def activate(self, x: Tensor) -> Tensor:
        """silu(gate(x)) * up(x); without gradients in the memory of gate(x)."""
        if torch.is_grad_enabled():
            return F.silu(self.gate_proj(x)) * self.up_proj(x)
        return F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer: parameters only; `Decoder` and `Compressor` order the computation."""

    def __init__(self, config: ModelConfig, memory_param: tuple[str, ...]):
        super().__init__()
        self.self_attn = Attention(config, memory_param)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def add_mlp(self, x: Tensor) -> None:
        """x += mlp(norm(x)) for many rows x [rows, E], in place, without gradients."""
        mlp, norm = self.mlp, self.post_attention_layernorm
        if fused(x) and mlp.up_proj.bias is None:
            weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
            lk.gated_mlp_(x, norm.weight, *weights, eps=norm.eps)
            return
        for rows in x.split(BLOCK_ROWS):
            linear_into(mlp.down_proj, mlp.activate(norm(rows)), rows, add=True)


class MemoryEmbedding(nn.Module):
    """The one embedding row that all memory tokens share; named as in released checkpoints."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden))


class Backbone(nn.Module):
    """Embedding, layers and final norm, named as in `transformers`."""

    def __init__(self, config: ModelConfig, memory_param: tuple[str, ...]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lychee_memory_embed_tokens = MemoryEmbedding(config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, memory_param) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Causal language model that can also read pages of compressed memory."""

    def __init__(self, config: ModelConfig, memory_param: tuple[str, ...] = ()):
        super().__init__()
        self.config, self.folder = config, None  # folder: where the parameters were loaded from
        self.model = Backbone(config, memory_param)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [N >= length, D/2] float32, computed in float64 and grown by doubling."""
        table = (self.cos.device, self.cos.dtype)  # a module's `to(dtype)` casts its buffers too
        if self.cos.shape[0] < length or table != (self.device, torch.float32):
            size = max(512, 1 << (length - 1).bit_length())
            cos, sin = lk.rope_tables(size, self.config.inverse_frequencies())
            self.cos, self.sin = cos.to(self.device), sin.to(self.device)
        return self.cos, self.sin

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(self.config, batch, capacity, self.device, self.dtype)

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor,
        max_position: int,
        cache: KVCache | None = None,
        pages: Pages | None = None,
        valid: Tensor | None = None,
        select: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            ids: [B, T] int64 token ids.
            positions: [B or 1, T] int64 rotary positions.
            max_position: upper bound of `positions`, known on the host (no device sync).
            cache: keys and values of earlier tokens; these T tokens are appended.
            pages: pages of compressed memory that every token sees before its own text.
            valid: [B, S] bool over cached and new tokens; False hides padding.
            select: index of the [B, T] tokens to return; the last layer's MLP runs on them alone.
                () selects none: only the cache is filled.

        Returns:
            [B, T, E], or [N, E] for N selected tokens; `logits` turns rows of it into scores.
        """
        cos, sin = (table[positions][:, None] for table in self.rope_tables(max_position + 1))
        x = self.model.embed_tokens(ids)
        for index, layer in enumerate(self.model.layers):
            last = index == len(self.model.layers) - 1
            attention, h = layer.self_attn, layer.input_layernorm(x)
            k, v = (attention.project(letter, h).transpose(1, 2) for letter in "kv")
            k = rotate(k, cos, sin)
            if cache is not None:
                k, v = cache.append(index, k, v)
            if last and select == ():
                x = x[:, :0]
                break
            q = rotate(attention.project("q", h).transpose(1, 2), cos, sin)
            arguments = pages.attention_arguments(index) if pages is not None else {}
            out, _ = lk.memory_attention(q, k, v, valid=valid, **arguments)
            out = out.transpose(1, 2).flatten(2)
            x, out = (x[select], out[select]) if last and select is not None else (x, out)
            x = x + attention.o_proj(out)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        if cache is not None:
            cache.length += ids.shape[1]
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores of final hidden states [..., E] -> [..., V]."""
        return self.lm_head(hidden)
