# SPDX-License-Identifier: Apache-2.0
"""gather_chunks and gather_chunks_: pages of a bank as contiguous keys and values."""

import torch

from .. import ref
from .._autograd import check_no_grad, mark_written, refuse_second_backward
from .._check import (
    check,
    check_bank,
    check_dtype,
    check_page_values,
    check_range,
    check_shape,
)
from .._loader import backend

# The integers of the schema.
ROPE_MODES = {"none": 0, "affine": 1}

_OP = "gather_chunks"


def gather_chunks(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos=None, sin=None,
    *, layer_range=None, rope_mode="none", out_dtype=None,
):  # fmt: skip
    """Gather, dequantise and rotate the pages of each row, all layers at once.

    Token j of a row's page i goes to index i * P + j, so that shapes do not depend on the data;
    pages in use come first, and `valid` marks the indices that hold a token. The result can be
    passed to memory_attention as k, v and valid. Where room for k and v exists already,
    gather_chunks_ is several times faster: a large fresh tensor costs more than filling it.

    Args:
        kv: [num_pages, L, Hkv, 2, P, D], float32|bfloat16|float16|int8|float8_e4m3fn, last dim
            contiguous; index 0 of dim 3 is K before rotation, 1 is V; D a multiple of 8, at most
            256.
        kv_scale: [num_pages, L, Hkv, 2, P], float32, last dim contiguous, for int8 and
            float8_e4m3fn banks; else None.
        page_table: [B, max_pages], int32, contiguous; entries at or beyond num_pages are never
            read.
        page_len: [B, max_pages], int32, contiguous, tokens in use of each page, 0 .. P.
        page_base: [B, max_pages], int32, contiguous, position of each page's first token; affine
            only, else anything or None.
        num_pages: [B], int32, pages in use of each row.
        cos, sin: [N, D/2], float32, contiguous; affine only.
        layer_range: (first, last), layers first .. last - 1; or None: all of them.
        rope_mode: "none", keys as stored, or "affine", the key at offset j of a page rotated at
            page_base + j.
        out_dtype: torch.float32, bfloat16 or float16, dtype of k and v; or None: that of a float
            bank, float32 of a quantised one.

    Returns:
        k, v: [layers, B, Hkv, max_pages * P, D], contiguous, out_dtype; zeros where not valid.
        valid: [B, max_pages * P], bool.

    Raises:
        RuntimeError: shape, dtype, device, page, layer or position out of range; message names
            the argument.

    Numerics: dequantisation and rotation in float32, rounded once; without either, a copy.
    Backward: float kv (rows that read one page add up, in float32), once; none of cos and sin.
    Devices: CPU, CUDA. On CUDA no value of a page table is checked: a page or position outside
        gives NaN.
    Source: LycheeMemory, selective activation of compressed memory.
    Reference: lychee_kernels.ref.gather_chunks.
    """
    mode = _rope_code(_OP, rope_mode)
    if out_dtype is None:
        out_dtype = kv.dtype if kv_scale is None else torch.float32
    first, last = (0, kv.shape[1]) if layer_range is None else layer_range
    arguments = kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin
    if backend(_OP) == "ref":
        _check_inputs(_OP, *arguments, first, last, mode)
        _check_out_dtype(out_dtype)
        positions = cos.shape[0] if mode == ROPE_MODES["affine"] else None
        check_page_values(_OP, kv, page_table, page_len, page_base, num_pages, positions)
        return ref.gather_chunks(
            *arguments, layer_range=(first, last), rope_mode=rope_mode, out_dtype=out_dtype
        )
    return torch.ops.lychee.gather_chunks(*arguments, first, last, mode, out_dtype)


def gather_chunks_(
    k, v, kv, kv_scale, page_table, page_len, page_base, num_pages, cos=None, sin=None,
    *, layer_range=None, rope_mode="none",
):  # fmt: skip
    """gather_chunks into keys and values that exist already, say those of a decoder's cache.

    Args:
        k, v: [layers, B, Hkv, S, D], float32|bfloat16|float16, last dim contiguous, any other
            strides, S >= max_pages * P; the first max_pages * P tokens are written in place, zeros
            where not valid.
        kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin: as in gather_chunks;
            kv without gradient, and no memory in common with k and v.
        layer_range, rope_mode: as in gather_chunks.

    Returns:
        valid: [B, max_pages * P], bool.

    Raises:
        RuntimeError: as gather_chunks; too few tokens in k or v; an input that requires gradients
            while gradients are enabled.

    Numerics: as gather_chunks. Backward: not defined. Devices: CPU, CUDA, as gather_chunks.
    Source: LycheeMemory, selective activation of compressed memory.
    Reference: lychee_kernels.ref.gather_chunks_.
    """
    op = "gather_chunks_"
    mode = _rope_code(op, rope_mode)
    check_no_grad(op, k=k, v=v, kv=kv)
    first, last = (0, kv.shape[1]) if layer_range is None else layer_range
    arguments = kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin
    if backend(op) == "ref":
        _check_inputs(op, *arguments, first, last, mode)
        _check_room(op, k, v, kv, page_table, last - first)
        positions = cos.shape[0] if mode == ROPE_MODES["affine"] else None
        check_page_values(op, kv, page_table, page_len, page_base, num_pages, positions)
        return ref.gather_chunks_(k, v, *arguments, layer_range=(first, last), rope_mode=rope_mode)
    valid = torch.ops.lychee.gather_chunks_(k, v, *arguments, first, last, mode)
    mark_written(k, v)
    return valid


def _rope_code(op, rope_mode):
    check(rope_mode in ROPE_MODES, op, "rope_mode", " or ".join(ROPE_MODES), rope_mode)
    return ROPE_MODES[rope_mode]


def _check_out_dtype(out_dtype):
    # float64 is for the reference only; the kernels refuse it
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    got = str(out_dtype).removeprefix("torch.")
    check(out_dtype in allowed, _OP, "out_dtype", "dtype float32, bfloat16 or float16", got)


def _check_room(op, k, v, kv, page_table, layers):
    (batch, max_pages), (_, _, num_kv_heads, _, page_tokens, head_dim) = page_table.shape, kv.shape
    tokens = max_pages * page_tokens
    for name, tensor in (("k", k), ("v", v)):
        check_shape(op, name, tensor, (layers, batch, num_kv_heads, None, head_dim))
        room = tensor.shape[3] >= tokens
        check(room, op, name, f"room for {tokens} tokens", tensor.shape[3])
        check_dtype(op, name, tensor, k.dtype)
    check(k.is_floating_point(), op, "k", "dtype float32, bfloat16 or float16",
          str(k.dtype).removeprefix("torch."))  # fmt: skip


def _check_inputs(
    op, kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer,
    last_layer, rope_mode,
):  # fmt: skip
    check_shape(op, "kv", kv, (None, None, None, 2, None, None))
    check(kv.shape[1] > 0, op, "kv", "at least one layer", 0)
    head_dim = kv.shape[5]
    check(
        head_dim % 8 == 0 and 8 <= head_dim <= 256,
        op, "kv", "a head dimension that is a multiple of 8, at most 256", head_dim,
    )  # fmt: skip
    check_range(op, "layer_range", first_layer, 0, last_layer)
    check_range(op, "layer_range", last_layer, first_layer, kv.shape[1])
    check_bank(op, kv, kv_scale, 0, kv.shape[2], head_dim)
    check_shape(op, "page_table", page_table, (None, None))
    tables = {"page_table": page_table, "page_len": page_len, "num_pages": num_pages}
    if rope_mode == ROPE_MODES["affine"]:
        given = cos is not None and sin is not None and page_base is not None
        check(given, op, "cos", "cos, sin and page_base when rope_mode is affine", "None")
        tables["page_base"] = page_base
        check_shape(op, "cos", cos, (None, head_dim // 2))
        check_shape(op, "sin", sin, cos.shape)
    for name, tensor in tables.items():
        sizes = page_table.shape[:1] if name == "num_pages" else page_table.shape
        check_shape(op, name, tensor, sizes)
        check_dtype(op, name, tensor, torch.int32)


@torch.library.register_fake(f"lychee::{_OP}")
def _fake(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer, last_layer,
    rope_mode, out_dtype,
):  # fmt: skip
    _check_inputs(
        _OP, kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer,
        last_layer, rope_mode,
    )  # fmt: skip
    _check_out_dtype(out_dtype)
    (batch, max_pages), (_, _, num_kv_heads, _, page_tokens, head_dim) = page_table.shape, kv.shape
    tokens = max_pages * page_tokens
    shape = (last_layer - first_layer, batch, num_kv_heads, tokens, head_dim)
    return (
        kv.new_empty(shape, dtype=out_dtype),
        kv.new_empty(shape, dtype=out_dtype),
        kv.new_empty(batch, tokens, dtype=torch.bool),
    )


@torch.library.register_fake(f"lychee::{_OP}_")
def _write_fake(
    k, v, kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer,
    last_layer, rope_mode,
):  # fmt: skip
    op = "gather_chunks_"
    _check_inputs(
        op, kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer,
        last_layer, rope_mode,
    )  # fmt: skip
    _check_room(op, k, v, kv, page_table, last_layer - first_layer)
    return kv.new_empty(page_table.shape[0], page_table.shape[1] * kv.shape[4], dtype=torch.bool)


@torch.library.register_fake(f"lychee::{_OP}_bwd")
def _backward_fake(
    dk, dv, page_table, page_len, page_base, num_pages, cos, sin, bank_pages, bank_layers,
    first_layer, page_tokens, rope_mode, bank_dtype,
):  # fmt: skip
    shape = (bank_pages, bank_layers, dk.shape[2], 2, page_tokens, dk.shape[4])
    return dk.new_empty(shape, dtype=bank_dtype)


def _setup_context(ctx, inputs, output):
    (kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, ctx.first_layer, _,
     ctx.rope_mode, _) = inputs  # fmt: skip
    ctx.mark_non_differentiable(output[2])
    # the bank itself is not needed: it may change before the backward runs
    ctx.kv_shape, ctx.kv_dtype, ctx.quantised = kv.shape, kv.dtype, kv_scale is not None
    ctx.save_for_backward(page_table, page_len, page_base, num_pages, cos, sin)


def _backward(ctx, dk, dv, _):
    if ctx.quantised:
        return (None,) * 12
    bank_pages, bank_layers, _, _, page_tokens, _ = ctx.kv_shape
    dkv = torch.ops.lychee.gather_chunks_bwd(
        dk.contiguous(), dv.contiguous(), *ctx.saved_tensors, bank_pages, bank_layers,
        ctx.first_layer, page_tokens, ctx.rope_mode, ctx.kv_dtype,
    )  # fmt: skip
    return dkv, *([None] * 11)


torch.library.register_autograd(f"lychee::{_OP}", _backward, setup_context=_setup_context)
refuse_second_backward(f"{_OP}_bwd")
