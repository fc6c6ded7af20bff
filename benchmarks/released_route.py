# SPDX-License-Identifier: Apache-2.0
"""What the released code computes for one chunk, restated in plain PyTorch as a peer to time.

Its costs are kept on purpose: both projections for every row and one discarded, repeated key
heads, a dense additive mask, every layer in full, and vocabulary scores of every slot. Its
working class is transformers' SDPA route; eager attention is slower still.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee.decoder import Decoder, rotate


@torch.inference_mode()
def compress(decoder: Decoder, ids: Tensor, ratio: int, window: int) -> list[Tensor]:
    """Per layer [2, Hkv, M, D] of a chunk ids [C]: keys before rotation and values."""
    config = decoder.config
    memory: list[list[Tensor]] = [[] for _ in decoder.model.layers]
    for start in range(0, len(ids), window):
        raw = decoder.model.embed_tokens(ids[start : start + window]).unflatten(0, (-1, ratio))
        row = decoder.model.lychee_memory_embed_tokens.weight.expand(len(raw), 1, -1)
        x = torch.cat((raw, row), dim=1).flatten(0, 1)
        is_memory = torch.arange(len(x)) % (ratio + 1) == ratio
        earlier = start // ratio
        total = earlier + len(x)
        cos, sin = (t[:total] for t in decoder.rope_tables(total))
        mask = torch.full((len(x), total), torch.finfo(x.dtype).min).triu(earlier + 1)[None, None]
        for layer, kept in zip(decoder.model.layers, memory, strict=True):
            x = x + attend(layer, x, is_memory, kept, cos, sin, mask, config)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        scores = decoder.logits(decoder.model.norm(x)).float()
        scores[~is_memory].contiguous()
    return [torch.cat(parts, dim=2) for parts in memory]


def attend(layer, x, is_memory, kept, cos, sin, mask, config) -> Tensor:
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (
        torch.where(
            is_memory[:, None, None],
            attention.project(letter, h, memory=True),
            attention.project(letter, h),
        ).transpose(0, 1)
        for letter in "qkv"
    )
    new = torch.stack((k[:, is_memory], v[:, is_memory]))
    keys = torch.cat([part[0] for part in kept] + [k], dim=1)
    values = torch.cat([part[1] for part in kept] + [v], dim=1)
    kept.append(new)
    groups = config.num_attention_heads // config.num_key_value_heads
    q = rotate(q[None], cos[-len(x) :], sin[-len(x) :])
    keys = rotate(keys[None], cos, sin).repeat_interleave(groups, dim=1)
    values = values[None].repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return attention.o_proj(out[0].transpose(0, 1).flatten(1))
