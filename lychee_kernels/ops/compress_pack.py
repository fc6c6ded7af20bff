# SPDX-License-Identifier: Apache-2.0
"""compress_pack, compress_pack_, write_memory_: rotate and interleave a window, keep its memory."""

import torch

from .. import ref
from .._check import (
    check,
    check_all,
    check_bank,
    check_dtype,
    check_range,
    check_shape,
    check_slots,
)
from .._loader import backend
from ..rope import rotate


def compress_pack(q, k, v, cos, sin, *, batch, ratio, positions=None, pos0=0):
    """Rotate and interleave one compressor window; return its memory keys and values.

    B batch, W raw rows of a window, r ratio, m = W / r memory rows, n = W + m. Rows arrive in
    segment order, all raw rows (row b * W + i) before all memory rows (row B * W + b * m + j), and
    leave interleaved: raw row i at index i + i // r, memory row j at index j * (r + 1) + r.

    Args:
        q: [B*n, Hq, D] or, memory rows only, [B*m, Hq, D]; float32|bfloat16|float16; D a multiple
            of 8, at most 256; last dim contiguous, any other strides.
        k, v: [B*n, Hkv, D], dtype of q, last dim contiguous.
        cos, sin: [N, D/2], float32, contiguous; see rope_tables.
        batch: int, B.
        ratio: int, r >= 1.
        positions: [B, n], int64, 0 <= positions < N, of the interleaved rows; or None.
        pos0: int, without positions the row at index s has position pos0 + s.

    Returns:
        q_rot: [B, Hq, n, D], or [B, Hq, m, D] where q holds memory rows only; rotated.
        k_rot: [B, Hkv, n, D], rotated.  v_out: [B, Hkv, n, D].
        mem_k, mem_v: [B, Hkv, m, D], the memory rows of k before rotation, and of v.
        All contiguous, dtype of q.

    Raises:
        RuntimeError: shape, dtype, device or position out of range; message names the argument.

    Numerics: rotation in float32, rounded once; everything else is an exact copy.
    Backward: q, k, v (k and v collect both of their outputs). Devices: CPU.
    Source: LycheeMemory, dynamic compression with interleaved memory tokens.
    Reference: lychee_kernels.ref.compress_pack.
    """
    if backend("compress_pack") == "ref":
        _check_inputs("compress_pack", q, k, v, cos, sin, batch, ratio, positions)
        _check_positions("compress_pack", k.shape[0] // batch, cos, positions, pos0)
        return ref.compress_pack(
            q, k, v, cos, sin, batch=batch, ratio=ratio, positions=positions, pos0=pos0
        )
    return torch.ops.lychee.compress_pack(q, k, v, cos, sin, batch, ratio, positions, pos0)


def compress_pack_(
    q, k, v, cos, sin, kv, kv_scale, page_table, slot0,
    *, batch, ratio, layer, mem_valid=None, positions=None, pos0=0,
):  # fmt: skip
    """compress_pack that writes the memory rows into a bank, in place, instead of returning them.

    The g-th valid memory row of batch entry b goes to slot slot0[b] + g of its pages: page
    page_table[b, slot // P], offset slot % P. No two rows may share a slot.

    Args:
        q, k, v, cos, sin: as in compress_pack; without gradient.
        kv: [num_pages, L, Hkv, 2, P, D], the whole bank, float32|bfloat16|float16|int8|
            float8_e4m3fn, last dim contiguous; index 0 of dim 3 is K before rotation, 1 is V.
        kv_scale: [num_pages, L, Hkv, 2, P], float32, for int8 and float8_e4m3fn banks; else None.
        page_table: [B, pages], int32, contiguous.
        slot0: [B], int32, first free slot of each batch entry, >= 0.
        batch, ratio: as in compress_pack.
        layer: int, 0 <= layer < L.
        mem_valid: [B, m], bool, contiguous, rows to write; or None: all of them.
        positions, pos0: as in compress_pack.

    Returns:
        q_rot, k_rot, v_out as compress_pack.

    Raises:
        RuntimeError: as compress_pack; a page or slot outside the bank or the table; an input that
            requires gradients while gradients are enabled.

    Numerics: float banks round once. int8: scale = amax / 127 per token and head, rounded to
        nearest even; float8_e4m3fn: scale = amax / 448, clamped before the cast; a row with amax
        below 1e-30 is stored as zeros with scale 0. Inputs are finite.
    Backward: not defined. Devices: CPU.
    Source: LycheeMemory, dynamic compression; paged bank of this project.
    Reference: lychee_kernels.ref.compress_pack_.
    """
    _check_no_grad("compress_pack_", q=q, k=k, v=v)
    if backend("compress_pack_") == "ref":
        _check_inputs("compress_pack_", q, k, v, cos, sin, batch, ratio, positions)
        _check_positions("compress_pack_", k.shape[0] // batch, cos, positions, pos0)
        check_bank("compress_pack_", kv, kv_scale, layer, *k.shape[1:])
        memory = k.shape[0] // batch // (ratio + 1)
        check_slots("compress_pack_", kv, page_table, slot0, mem_valid, batch, memory)
        return ref.compress_pack_(
            q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch=batch, ratio=ratio,
            layer=layer, mem_valid=mem_valid, positions=positions, pos0=pos0,
        )  # fmt: skip
    return torch.ops.lychee.compress_pack_(
        q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch, ratio, layer, mem_valid,
        positions, pos0,
    )  # fmt: skip


def write_memory_(k, v, kv, kv_scale, page_table, slot0, *, batch, layer, mem_valid=None):
    """Write memory rows into a bank, in place; for the last layer, where nothing is rotated.

    Args:
        k, v: [B*m, Hkv, D], memory rows only (row b * m + j), without gradient.
        kv, kv_scale, page_table, slot0: as in compress_pack_; kv and kv_scale written in place.
        batch, layer, mem_valid: as in compress_pack_.

    Returns:
        None.

    Raises:
        RuntimeError: as compress_pack_.

    Numerics: as compress_pack_. Backward: not defined. Devices: CPU.
    Source: LycheeMemory, dynamic compression; paged bank of this project.
    Reference: lychee_kernels.ref.write_memory_.
    """
    _check_no_grad("write_memory_", k=k, v=v)
    if backend("write_memory_") == "ref":
        check_shape("write_memory_", "k", k, (None, None, None))
        check_shape("write_memory_", "v", v, k.shape)
        check_bank("write_memory_", kv, kv_scale, layer, *k.shape[1:])
        memory = k.shape[0] // batch
        check_slots("write_memory_", kv, page_table, slot0, mem_valid, batch, memory)
        ref.write_memory_(
            k, v, kv, kv_scale, page_table, slot0, batch=batch, layer=layer, mem_valid=mem_valid
        )
        return
    torch.ops.lychee.write_memory_(k, v, kv, kv_scale, page_table, slot0, batch, layer, mem_valid)


def _check_no_grad(op, **inputs):
    for name, tensor in inputs.items():
        recorded = torch.is_grad_enabled() and tensor.requires_grad
        check(not recorded, op, name, "a tensor without gradient", "one that requires it")


def _check_inputs(op, q, k, v, cos, sin, batch, ratio, positions):
    """Returns (rows, memory) of one batch entry."""
    check_shape(op, "k", k, (None, None, None))
    rows = k.shape[0] // batch
    whole = k.shape[0] % batch == 0 and rows % (ratio + 1) == 0
    check(whole, op, "k", "batch * (window + window / ratio) rows", k.shape[0])
    memory, head_dim = rows // (ratio + 1), k.shape[2]
    check(
        head_dim % 8 == 0 and 8 <= head_dim <= 256,
        op, "k", "a head dimension that is a multiple of 8, at most 256", head_dim,
    )  # fmt: skip
    check_shape(op, "v", v, k.shape)
    check_shape(op, "q", q, (None, None, head_dim))
    fits = q.shape[0] in (k.shape[0], batch * memory)
    expected = f"{k.shape[0]} rows (all) or {batch * memory} rows (memory only)"
    check(fits, op, "q", expected, q.shape[0])
    for name, tensor in (("q", q), ("v", v)):
        check_dtype(op, name, tensor, k.dtype)
    check_shape(op, "cos", cos, (None, head_dim // 2))
    check_shape(op, "sin", sin, cos.shape)
    if positions is not None:
        check_shape(op, "positions", positions, (batch, rows))
    return rows, memory


def _check_positions(op, rows, cos, positions, pos0):
    if positions is None:
        check_range(op, "pos0", pos0, 0, cos.shape[0] - rows)
    else:
        check_all(op, "positions", positions, 0, cos.shape[0] - 1)


@torch.library.register_fake("lychee::compress_pack")
def _compress_pack_fake(q, k, v, cos, sin, batch, ratio, positions, pos0):
    rows, memory = _check_inputs("compress_pack", q, k, v, cos, sin, batch, ratio, positions)
    return *_rotated_fake(q, k, batch, rows, memory), *(
        k.new_empty(batch, k.shape[1], memory, k.shape[2]) for _ in range(2)
    )


@torch.library.register_fake("lychee::compress_pack_")
def _compress_pack_write_fake(
    q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch, ratio, layer, mem_valid, positions,
    pos0,
):  # fmt: skip
    rows, memory = _check_inputs("compress_pack_", q, k, v, cos, sin, batch, ratio, positions)
    check_bank("compress_pack_", kv, kv_scale, layer, *k.shape[1:])
    return _rotated_fake(q, k, batch, rows, memory)


@torch.library.register_fake("lychee::write_memory_")
def _write_memory_fake(k, v, kv, kv_scale, page_table, slot0, batch, layer, mem_valid):
    check_shape("write_memory_", "v", v, k.shape)
    check_bank("write_memory_", kv, kv_scale, layer, *k.shape[1:])


def _rotated_fake(q, k, batch, rows, memory):
    query_rows = rows if q.shape[0] == k.shape[0] else memory
    return (
        q.new_empty(batch, q.shape[1], query_rows, q.shape[2]),
        k.new_empty(batch, k.shape[1], rows, k.shape[2]),
        k.new_empty(batch, k.shape[1], rows, k.shape[2]),
    )


def _setup_context(ctx, inputs, output):
    q, k, _, cos, sin, ctx.batch, ctx.ratio, positions, ctx.pos0 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin, positions)
    ctx.shapes = q.shape, k.shape


def _backward(ctx, dq_rot, dk_rot, dv_out, dmem_k, dmem_v):
    """Rotation backwards, rows back to segment order, memory rows' two gradients summed."""
    cos, sin, positions = ctx.saved_tensors
    q_shape, k_shape = ctx.shapes
    rows = k_shape[0] // ctx.batch
    if positions is None:
        positions = torch.arange(ctx.pos0, ctx.pos0 + rows, device=cos.device)[None]
    memory_only = q_shape[0] != k_shape[0]

    def unrotate(x, at):
        compute = torch.promote_types(x.dtype, torch.float32)
        return rotate(x.to(compute), cos[at][:, None], -sin[at][:, None]).to(x.dtype)

    def segment_order(x, dmem):
        # [B, H, m, r + 1, D] -> raw rows, then memory rows
        groups = x.unflatten(2, (-1, ctx.ratio + 1))
        raw, mem = groups[..., :-1, :].flatten(2, 3), groups[..., -1, :]
        if dmem is not None:
            mem = mem + dmem
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in (raw, mem)])

    def kv_gradient(dx, dmem, shape):
        if dx is None and dmem is None:
            return None
        if dx is None:
            dx = dmem.new_zeros(ctx.batch, shape[1], rows, shape[2])
        return segment_order(dx, dmem)

    dq = None
    if dq_rot is not None:
        at = positions[:, ctx.ratio :: ctx.ratio + 1] if memory_only else positions
        dq = unrotate(dq_rot, at)
        dq = dq.transpose(1, 2).flatten(0, 1) if memory_only else segment_order(dq, None)
    dk = kv_gradient(None if dk_rot is None else unrotate(dk_rot, positions), dmem_k, k_shape)
    dv = kv_gradient(dv_out, dmem_v, k_shape)
    return dq, dk, dv, *([None] * 6)


torch.library.register_autograd("lychee::compress_pack", _backward, setup_context=_setup_context)
