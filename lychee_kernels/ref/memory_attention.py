# SPDX-License-Identifier: Apache-2.0
"""memory_attention and its backward in plain PyTorch: their specification."""

import torch

from ..rope import rotate
from .gather_chunks import gather_pages

# Largest number of scores the backward holds at a time (256 MiB in float32).
MAX_SCORES = 1 << 26


def memory_attention(
    q, k, v, *, kv=None, kv_scale=None, layer=0, page_table=None, page_len=None, page_base=None,
    num_pages=None, valid=None, cos=None, sin=None, rope_mode="none", query_stride=1,
    softmax_scale=None,
):  # fmt: skip
    batch, num_heads, num_queries, head_dim = q.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    pages = (kv, kv_scale, layer, page_table, page_len, page_base, num_pages)
    keys, values, visible = _all_keys(q, k, v, pages, valid, cos, sin, rope_mode, query_stride)

    # scores are [B, Hkv, G * T, N]
    scores = _by_kv_head(q, k.shape[1]).to(keys.dtype) @ keys.mT * scale
    scores = scores.unflatten(2, (-1, num_queries))
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    # a row without keys has lse -inf and weights 0
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    out = weights.flatten(2, 3) @ values
    out = out.view(batch, num_heads, num_queries, head_dim).to(q.dtype)
    # T-major memory, as the op documents
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse.reshape(batch, num_heads, num_queries).detach()


def memory_attention_backward(
    grad_out, q, k, v, out, lse, *, kv=None, kv_scale=None, layer=0, page_table=None,
    page_len=None, page_base=None, num_pages=None, valid=None, cos=None, sin=None,
    rope_mode="none", query_stride=1, softmax_scale=None,
):  # fmt: skip
    """Gradients of q, k, v and kv (None without kv or with a quantised one).

    Weights are recomputed as exp(score - lse), in blocks of queries, from the forward's results.
    """
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    pages = (kv, kv_scale, layer, page_table, page_len, page_base, num_pages)
    keys, values, visible = _all_keys(q, k, v, pages, valid, cos, sin, rope_mode, query_stride)
    compute = keys.dtype
    delta = (grad_out.to(compute) * out.to(compute)).sum(-1, keepdim=True)
    dq, dkeys, dvalues = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    step = max(1, MAX_SCORES // max(1, batch * num_heads * keys.shape[2]))
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        query, grad, delta_rows, lse_rows = (
            _by_kv_head(x[:, :, rows], num_kv_heads).to(compute)
            for x in (q, grad_out, delta, lse[..., None])
        )
        mask = visible[:, None, None, rows].expand(-1, -1, num_heads // num_kv_heads, -1, -1)
        weights = (query @ keys.mT * scale - lse_rows).exp()
        weights = torch.where(mask.flatten(2, 3), weights, 0.0)
        dvalues += weights.mT @ grad
        dscores = weights * (grad @ values.mT - delta_rows) * scale
        dkeys += dscores.mT @ query
        dq[:, :, rows] = (dscores @ keys).view(batch, num_heads, -1, head_dim).to(q.dtype)

    num_page_keys = keys.shape[2] - num_keys
    dk = dkeys[:, :, num_page_keys:].to(k.dtype)
    dv = dvalues[:, :, num_page_keys:].to(v.dtype)
    if kv is None or kv_scale is not None:
        return dq, dk, dv, None
    dpages = torch.stack((dkeys[:, :, :num_page_keys], dvalues[:, :, :num_page_keys]), dim=2)
    tables = (cos, sin) if rope_mode == "affine" else None
    dkv = _scatter_pages(dpages, kv, layer, page_table, page_base, num_pages, tables)
    return dq, dk, dv, dkv


def _by_kv_head(x, num_kv_heads):
    """[B, Hq, T, D] -> [B, Hkv, G * T, D]."""
    return x.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)


def _all_keys(q, k, v, pages, valid, cos, sin, rope_mode, query_stride):
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


def _scatter_pages(dpages, kv, layer, page_table, page_base, num_pages, tables):
    """Adds gradients [B, Hkv, 2, max_pages * P, D] up into the pages they were read from."""
    _, max_pages = page_table.shape
    page_tokens = kv.shape[4]
    # dpages becomes [B, max_pages, Hkv, 2, P, D]
    dpages = dpages.unflatten(3, (max_pages, page_tokens)).permute(0, 3, 1, 2, 4, 5)
    used = torch.arange(max_pages, device=kv.device) < num_pages[:, None]
    if tables is not None:
        position = page_base[..., None] + torch.arange(page_tokens, device=kv.device)
        # tokens beyond page_len have gradient zero, whatever their position
        position = position.clamp(0, tables[0].shape[0] - 1).long()
        cos, sin = (table[position][:, :, None].to(dpages.dtype) for table in tables)
        dkeys, dvalues = dpages.unbind(3)
        dpages = torch.stack((rotate(dkeys, cos, -sin), dvalues), dim=3)
    dpages = torch.where(used[..., None, None, None, None], dpages, 0.0)
    dkv = torch.zeros_like(kv)
    if kv.shape[0] > 0:
        page = torch.where(used, page_table, 0).flatten().long()
        layer_sum = torch.zeros(kv[:, layer].shape, dtype=dpages.dtype, device=kv.device)
        dkv[:, layer] = layer_sum.index_add(0, page, dpages.flatten(0, 1)).to(kv.dtype)
    return dkv
