# SPDX-License-Identifier: Apache-2.0
"""memory_attention: attention over pages of a memory bank and a contiguous causal segment."""

import torch

from .. import ref
from .._autograd import refuse_second_backward
from .._check import check, check_bank, check_dtype, check_page_values, check_range, check_shape
from .._loader import backend
from ..memory_attention_bwd import memory_attention_bwd

# Codes of rope_mode in the op schema.
ROPE_MODES = {"none": 0, "affine": 1}
_OP = "memory_attention"


def memory_attention(
    q, k, v, *, kv=None, kv_scale=None, layer=0, page_table=None, page_len=None, page_base=None,
    num_pages=None, valid=None, cos=None, sin=None, rope_mode="none", query_stride=1,
    softmax_scale=None,
):  # fmt: skip
    """Attention over a row's memory pages, read in place, and a contiguous causal segment.

    Query t of batch entry b sees every token of b's pages, and key j of the segment where
    j <= S - 1 - (T - 1 - t) * query_stride and valid[b, j]. Query head h reads kv head
    h // (Hq / Hkv). With T = 3, S = 5 and two page tokens:

        pages  segment
        1 1    1 1 1 0 0
        1 1    1 1 1 1 0
        1 1    1 1 1 1 1

    Args:
        q: [B, Hq, T, D], rotated; float32|bfloat16|float16; D a multiple of 8, at most 256; last
            dim contiguous, any other strides.
        k, v: [B, Hkv, S, D], keys rotated; dtype of q; strides as q, so views of a cache; S >= 0.
        kv: [num_bank_pages, L, Hkv, 2, P, D], bank with K before rotation (0) and V (1) in dim 3;
            float32|bfloat16|float16|int8|float8_e4m3fn, last dim contiguous; or None: no pages.
        kv_scale: [num_bank_pages, L, Hkv, 2, P], float32, for int8 and float8_e4m3fn banks.
        layer: int, 0 <= layer < L.
        page_table: [B, max_pages], int32, contiguous; entries at or beyond num_pages are not read.
        page_len: [B, max_pages], int32, contiguous, tokens in use of each page, 0 .. P.
        page_base: [B, max_pages], int32, contiguous, position of each page's first token; affine.
        num_pages: [B], int32, pages in use of each batch entry.
        valid: [B, S], bool, False hides a key of the segment; or None.
        cos, sin: [N, D/2], float32, contiguous, angles linear in the position, as rope_tables
            makes them; affine only.
        rope_mode: "none", page keys as stored, or "affine", the key at offset j of a page rotated
            at page_base + j.
        query_stride: int >= 0, segment keys from one query to the next.
        softmax_scale: float, or None for D ** -0.5.

    Returns:
        out: [B, Hq, T, D], dtype of q; a transposed view of contiguous [B, T, Hq, D].
        lse: [B, Hq, T], float32, natural log of the summed exponentials; not differentiable.
        A query that sees no key has out 0 and lse -inf.

    Raises:
        RuntimeError: shape, dtype, device, page or position out of range; message names the
            argument.

    Numerics: scores, softmax and sums in float32; independent of batch size and thread count. On
        CUDA, 16-bit inputs with D 64 or 128 are multiplied by tensor cores: rotated page keys and
        softmax weights are rounded to the dtype of q; at decode from 8-bit banks to float16, where
        q is limited to +-32768 and kv_scale of a value must stay below 255. On a CPU with AMX,
        bfloat16 inputs with D a multiple of 32 and 16 or more query rows per kv head are multiplied
        in tiles: softmax weights and page values are rounded to bfloat16, keys are not.
    Backward: q, k, v and float kv (rows that read one page add up, in a fixed order), once; none of
        kv_scale, cos and sin; sums in float32, bitwise repeatable on any number of threads.
    Devices: CPU, CUDA. On CUDA no value of a page table is checked: a page outside of the bank
        counts as empty.
    Source: LycheeMemory, reasoning over compressed memory and working memory.
    Reference: lychee_kernels.ref.memory_attention.
    """
    check(rope_mode in ROPE_MODES, _OP, "rope_mode", "none or affine", rope_mode)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if backend(_OP) == "ref":
        _check_inputs(
            q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, valid, cos,
            sin, ROPE_MODES[rope_mode], query_stride,
        )  # fmt: skip
        if kv is not None:
            positions = cos.shape[0] if rope_mode == "affine" else None
            check_page_values(_OP, kv, page_table, page_len, page_base, num_pages, positions)
        return ref.memory_attention(
            q, k, v, kv=kv, kv_scale=kv_scale, layer=layer, page_table=page_table,
            page_len=page_len, page_base=page_base, num_pages=num_pages, valid=valid, cos=cos,
            sin=sin, rope_mode=rope_mode, query_stride=query_stride, softmax_scale=softmax_scale,
        )  # fmt: skip
    return torch.ops.lychee.memory_attention(
        q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, valid, cos, sin,
        ROPE_MODES[rope_mode], query_stride, softmax_scale,
    )  # fmt: skip


def _check_inputs(
    q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, valid, cos, sin,
    rope_mode, query_stride,
):  # fmt: skip
    check_shape(_OP, "q", q, (None, None, None, None))
    batch, num_heads, _, head_dim = q.shape
    check_shape(_OP, "k", k, (batch, None, None, head_dim))
    check_shape(_OP, "v", v, k.shape)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(_OP, name, tensor, q.dtype)
    check(num_heads > 0, _OP, "q", "at least one head", 0)
    divides = k.shape[1] > 0 and num_heads % k.shape[1] == 0
    check(divides, _OP, "k", "a head count that divides q's", k.shape[1])
    check(
        head_dim % 8 == 0 and 8 <= head_dim <= 256,
        _OP, "q", "a head dimension that is a multiple of 8, at most 256", head_dim,
    )  # fmt: skip
    check_range(_OP, "query_stride", query_stride, 0, 2**31 - 1)
    if valid is not None:
        check_shape(_OP, "valid", valid, (batch, k.shape[2]))
        check_dtype(_OP, "valid", valid, torch.bool)
    if kv is None:
        return
    check_bank(_OP, kv, kv_scale, layer, k.shape[1], head_dim)
    pages = {"page_table": page_table, "page_len": page_len, "num_pages": num_pages}
    if rope_mode == ROPE_MODES["affine"]:
        pages["page_base"] = page_base
        got = "None"
        check(cos is not None and sin is not None, _OP, "cos",
              "cos and sin when rope_mode is affine", got)  # fmt: skip
        check_shape(_OP, "cos", cos, (None, head_dim // 2))
        check_shape(_OP, "sin", sin, cos.shape)
    for name, tensor in pages.items():
        check(tensor is not None, _OP, name, "a tensor when kv is given", "None")
        check_dtype(_OP, name, tensor, torch.int32)
        shape = (batch,) if name == "num_pages" else (batch, page_table.shape[-1])
        check_shape(_OP, name, tensor, shape)


@torch.library.register_fake("lychee::memory_attention")
def _fake(
    q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, valid, cos, sin,
    rope_mode, query_stride, softmax_scale,
):  # fmt: skip
    _check_inputs(
        q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, valid, cos, sin,
        rope_mode, query_stride,
    )  # fmt: skip
    batch, num_heads, num_queries, head_dim = q.shape
    out = q.new_empty(batch, num_queries, num_heads, head_dim).transpose(1, 2)
    return out, q.new_empty(batch, num_heads, num_queries, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    (q, k, v, kv, kv_scale, ctx.layer, page_table, page_len, page_base, num_pages, valid, cos, sin,
     ctx.rope_mode, ctx.query_stride, ctx.softmax_scale) = inputs  # fmt: skip
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(
        q, k, v, out, lse, kv, kv_scale, page_table, page_len, page_base, num_pages, valid, cos, sin
    )


def _backward(ctx, dout, _):
    q, k, v, out, lse, kv, kv_scale, *rest = ctx.saved_tensors
    bank_wanted = ctx.needs_input_grad[3] and kv_scale is None
    if dout.stride(-1) != 1:
        # as of a sum, whose gradient is one expanded number
        dout = dout.contiguous()
    dq, dk, dv, dkv = torch.ops.lychee.memory_attention_bwd(
        dout, q, k, v, out, lse, kv, kv_scale, ctx.layer, *rest, ctx.rope_mode, ctx.query_stride,
        ctx.softmax_scale, bank_wanted,
    )  # fmt: skip
    return dq, dk, dv, dkv if bank_wanted else None, *([None] * 12)


@torch.library.register_fake("lychee::memory_attention_bwd")
def _backward_fake(
    dout, q, k, v, out, lse, kv, kv_scale, layer, page_table, page_len, page_base, num_pages,
    valid, cos, sin, rope_mode, query_stride, softmax_scale, bank_wanted,
):  # fmt: skip
    dkv = kv.new_empty(kv.shape) if bank_wanted else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dkv


torch.library.register_autograd(f"lychee::{_OP}", _backward, setup_context=_setup_context)
refuse_second_backward(f"{_OP}_bwd")
torch.library.impl("lychee::memory_attention_bwd", "cuda", memory_attention_bwd)
