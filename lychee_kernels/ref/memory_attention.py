# SPDX-License-Identifier: Apache-2.0
"""memory_attention in plain PyTorch: its specification, gradients by autograd."""

import torch

from .gather_chunks import gather_pages


def memory_attention(
    q, k, v, *, kv=None, kv_scale=None, layer=0, page_table=None, page_len=None, page_base=None,
    num_pages=None, valid=None, cos=None, sin=None, rope_mode="none", query_stride=1,
    softmax_scale=None,
):  # fmt: skip
    batch, num_heads, num_queries, head_dim = q.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    pages = (kv, kv_scale, layer, page_table, page_len, page_base, num_pages)
    keys, values, visible = all_keys(q, k, v, pages, valid, cos, sin, rope_mode, query_stride)

    # scores are [B, Hkv, G * T, N]
    scores = by_kv_head(q, k.shape[1]).to(keys.dtype) @ keys.mT * scale
    scores = scores.unflatten(2, (num_heads // k.shape[1], num_queries))
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    # a row without keys has lse -inf and weights 0
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    out = weights.flatten(2, 3) @ values
    out = out.view(batch, num_heads, num_queries, head_dim).to(q.dtype)
    # T-major memory, as the op documents
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse.reshape(batch, num_heads, num_queries).detach()


def by_kv_head(x, num_kv_heads):
    """[B, Hq, T, D] -> [B, Hkv, G * T, D]."""
    return x.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)


def all_keys(q, k, v, pages, valid, cos, sin, rope_mode, query_stride):
    """Keys and values of pages and segment [B, Hkv, N, D], and who sees them [B, T, N]."""
    compute = torch.promote_types(q.dtype, torch.float32)
    (batch, _, num_queries, _), num_keys = q.shape, k.shape[2]
    t = torch.arange(num_queries, device=q.device)[:, None]
    j = torch.arange(num_keys, device=q.device)
    visible = j <= num_keys - 1 - (num_queries - 1 - t) * query_stride
    visible = visible.expand(batch, num_queries, num_keys)
    keys, values = k.to(compute), v.to(compute)
    if valid is not None:
        visible = visible & valid[:, None]
        # a masked row may hold anything, NaN included
        keys, values = (torch.where(valid[:, None, :, None], x, 0.0) for x in (keys, values))
    kv, kv_scale, layer, page_table, page_len, page_base, num_pages = pages
    if kv is None:
        return keys, values, visible
    page_keys, page_values, in_use = gather_pages(
        kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin,
        layer_range=(layer, layer + 1), rope_mode=rope_mode, out_dtype=compute,
    )  # fmt: skip
    in_use = in_use[:, None].expand(batch, num_queries, -1)
    return (
        torch.cat((page_keys[0], keys), 2),
        torch.cat((page_values[0], values), 2),
        torch.cat((in_use, visible), 2),
    )
