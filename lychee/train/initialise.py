# SPDX-License-Identifier: Apache-2.0
"""Initial weights under which a small model learns to find facts in minutes instead of days.

Two structured starts, both plain values of ordinary Qwen2 parameters:
* mimetic: queries partly equal to keys and output projections partly the transposed values, so
  that attention starts near matching of equal content (arXiv:2305.09828);
* offset heads: biases of q and k in the first two layers set so that head h starts by attending
  to the token h + 1 places back.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lychee.config import ModelConfig
from lychee.decoder import Decoder

MIMETIC = 0.8
OFFSET_LAYERS = 2
# Squared norm that the biases give to a matching pair of frequencies: how sharp offset heads start.
OFFSET_STRENGTH = 24.0


@torch.no_grad()
def new_decoder(config: ModelConfig, memory_param: tuple[str, ...], seed: int) -> Decoder:
    """A decoder ready for training, its memory projections copies of the ordinary ones."""
    torch.manual_seed(seed)
    decoder = Decoder(config, memory_param)
    for module in decoder.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for index, layer in enumerate(decoder.model.layers):
        attention = layer.self_attn
        nn.init.normal_(attention.o_proj.weight, std=0.5 * config.hidden_size**-0.5)
        nn.init.normal_(layer.mlp.down_proj.weight, std=0.5 * config.intermediate_size**-0.5)
        mix_queries_with_keys(attention, config)
        copy_memory_projections(attention, memory_param)
        if index < OFFSET_LAYERS and config.attention_bias:
            # Raw tokens keep half the heads of the first layer, and all later ones, for content.
            set_offset_heads(attention, config, config.num_attention_heads // 2 * (index == 0))
    start_memory_embedding(decoder, config.eos_token_ids[0])
    return decoder


def mix_queries_with_keys(attention: nn.Module, config: ModelConfig) -> None:
    groups = config.num_attention_heads // config.num_key_value_heads
    shape = (config.num_key_value_heads, config.head_dim, config.hidden_size)
    keys, values = (
        projection.weight.view(shape).repeat_interleave(groups, dim=0).flatten(0, 1)
        for projection in (attention.k_proj, attention.v_proj)
    )
    attention.q_proj.weight.mul_(1 - MIMETIC).add_(keys, alpha=MIMETIC)
    attention.o_proj.weight.mul_(1 - MIMETIC).add_(values.T, alpha=MIMETIC)


def set_offset_heads(attention: nn.Module, config: ModelConfig, raw_heads: int) -> None:
    """Let head h attend to offset -(h + 1) through the highest rotary frequencies alone.

    All heads of memory tokens do so, and the first `raw_heads` of raw tokens.
    """
    half = config.head_dim // 2
    pairs = max(2, config.head_dim // 5)
    frequency = config.inverse_frequencies()[:pairs].float()
    strength = math.sqrt(OFFSET_STRENGTH)
    groups = config.num_attention_heads // config.num_key_value_heads
    for head in range(config.num_attention_heads):
        key = (head // groups) * config.head_dim + torch.arange(pairs)
        for projection in {attention.linear("k"), attention.linear("k", memory=True)}:
            projection.weight[torch.cat((key, key + half))] = 0
            projection.bias[key] = strength
        query = head * config.head_dim + torch.arange(pairs)
        angle = -(head + 1) * frequency
        queries = {attention.linear("q", memory=True)}
        if head < raw_heads:
            queries.add(attention.linear("q"))
        for projection in queries:
            projection.weight[torch.cat((query, query + half))] = 0
            projection.bias[query] = strength * torch.cos(angle)
            projection.bias[query + half] = strength * torch.sin(angle)


def copy_memory_projections(attention: nn.Module, memory_param: tuple[str, ...]) -> None:
    """Start the memory tokens' projections as copies of the ordinary ones."""
    for letter in memory_param:
        ordinary = attention.linear(letter)
        memory = attention.linear(letter, memory=True)
        memory.load_state_dict(ordinary.state_dict())


def start_memory_embedding(decoder: Decoder, token_id: int) -> None:
    """Start the shared memory embedding as an ordinary token's row."""
    row = decoder.model.embed_tokens.weight[token_id]
    decoder.model.lychee_memory_embed_tokens.weight.copy_(row[None])
