# SPDX-License-Identifier: Apache-2.0
"""The backward of memory_attention from gathered pages and matrix products, for devices without a
kernel of their own for it."""

import torch

from ._check import check, check_dtype, check_shape

_OP = "memory_attention_bwd"

# Scores held at once, in float32; the products of several tensors of this size need a few times it.
MAX_SCORES = 1 << 25


def memory_attention_bwd(
    dout, q, k, v, out, lse, kv, kv_scale, layer, page_table, page_len, page_base, num_pages,
    valid, cos, sin, rope_mode, query_stride, softmax_scale, bank_wanted,
):  # fmt: skip
    """Gradients of q, k, v and of the bank, which is empty unless bank_wanted.

    Softmax weights are computed again from the saved lse, for blocks of queries; all sums are in
    float32. Nothing depends on values that lie on the device, shapes included.
    """
    _check_inputs(dout, q, out, lse, kv, kv_scale, bank_wanted)
    num_queries, num_keys = q.shape[2], k.shape[2]
    delta = (dout.float() * out.float()).sum(-1)
    # without a visible key every weight is 0, whatever lse says
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    rows = (q, dout, lse, delta, softmax_scale)

    t = torch.arange(num_queries, device=q.device)[:, None]
    j = torch.arange(num_keys, device=q.device)
    seen = (j <= num_keys - 1 - (num_queries - 1 - t) * query_stride)[None]
    keys, values = k.float(), v.float()
    if valid is not None:
        seen = seen & valid[:, None]
        # a hidden row may hold anything, NaN included
        keys, values = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (keys, values))
    dq, dk, dv = _part(rows, keys, values, seen)
    dkv = q.new_empty(0)
    if kv is not None:
        # as the forward has it, a page outside of the bank is empty
        outside = (page_table < 0) | (page_table >= kv.shape[0])
        page_table, page_len = (x.masked_fill(outside, 0) for x in (page_table, page_len))
        tables = (page_table, page_len, page_base, num_pages, cos, sin)
        keys, values, in_use = torch.ops.lychee.gather_chunks(
            kv, kv_scale, *tables, layer, layer + 1, rope_mode, torch.float32
        )
        page_dq, page_dk, page_dv = _part(rows, keys[0], values[0], in_use[:, None])
        dq += page_dq
        if bank_wanted:
            dkv = torch.ops.lychee.gather_chunks_bwd(
                page_dk[None], page_dv[None], *tables, kv.shape[0], kv.shape[1], layer,
                kv.shape[4], rope_mode, kv.dtype,
            )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dkv


def _check_inputs(dout, q, out, lse, kv, kv_scale, bank_wanted):
    for name, tensor in (("dout", dout), ("out", out)):
        check_shape(_OP, name, tensor, q.shape)
        check_dtype(_OP, name, tensor, q.dtype)
    check_shape(_OP, "lse", lse, q.shape[:3])
    check_dtype(_OP, "lse", lse, torch.float32)
    got = "None" if kv is None else "a quantised one"
    wanted = not bank_wanted or (kv is not None and kv_scale is None)
    check(wanted, _OP, "kv", "a float bank", got)


def _part(rows, keys, values, seen):
    """Gradients through some of the keys [B, Hkv, N, D]; seen [1 or B, 1 or T, N]."""
    q, dout, lse, delta, softmax_scale = rows
    (batch, num_heads, num_queries, head_dim), num_kv_heads = q.shape, keys.shape[1]
    seen = seen.expand(-1, num_queries, -1)
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    block = max(1, MAX_SCORES // max(1, batch * num_heads * keys.shape[2]))
    for first in range(0, num_queries, block):
        tokens = slice(first, min(first + block, num_queries))

        def grouped(x, tokens=tokens):
            """[B, Hq, T, ...] -> [B, Hkv, G * t, ...]."""
            return x[:, :, tokens].float().unflatten(1, (num_kv_heads, -1)).flatten(2, 3)

        block_q, block_dout = grouped(q), grouped(dout)
        scores = block_q @ keys.mT * softmax_scale
        hidden = ~seen[:, None, None, tokens]
        scores = scores.unflatten(2, (-1, tokens.stop - first)).masked_fill(hidden, -torch.inf)
        weights = (scores.flatten(2, 3) - grouped(lse)[..., None]).exp()
        dscores = weights * (block_dout @ values.mT - grouped(delta)[..., None]) * softmax_scale
        dv += weights.mT @ block_dout
        dk += dscores.mT @ block_q
        dq[:, :, tokens] = (dscores @ keys).view(batch, num_heads, tokens.stop - first, head_dim)
    return dq, dk, dv
