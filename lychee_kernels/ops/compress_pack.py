# SPDX-License-Identifier: Apache-2.0
"""compress_pack, compress_pack_, write_memory_: rotate and interleave a window, keep its memory."""

import torch

from .. import ref
from .._autograd import check_no_grad, mark_written, refuse_second_backward
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
    Backward: q, k, v (k and v collect both of their outputs). Devices: CPU, CUDA. On CUDA no value
        of an index tensor is checked: a position outside of the tables gives NaN.
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
    Backward: not defined. Devices: CPU, CUDA. On CUDA no value of an index tensor is checked: a
        position outside of the tables gives NaN, a row for a slot outside is not written.
    Source: LycheeMemory, dynamic compression; paged bank of this project.
    Reference: lychee_kernels.ref.compress_pack_.
    """
    check_no_grad("compress_pack_", q=q, k=k, v=v, kv=kv, kv_scale=kv_scale)
    if backend("compress_pack_") == "ref":
        _check_inputs("compress_pack_", q, k, v, cos, sin, batch, ratio, positions)
        _check_positions("compress_pack_", k.shape[0] // batch, cos, positions, pos0)
        memory = k.shape[0] // batch // (ratio + 1)
        _check_memory(
            "compress_pack_", k, v, kv, kv_scale, page_table, slot0, mem_valid, batch, layer, memory
        )
        check_slots("compress_pack_", kv, page_table, slot0, mem_valid, batch, memory)
        return ref.compress_pack_(
            q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch=batch, ratio=ratio,
            layer=layer, mem_valid=mem_valid, positions=positions, pos0=pos0,
        )  # fmt: skip
    rotated = torch.ops.lychee.compress_pack_(
        q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch, ratio, layer, mem_valid,
        positions, pos0,
    )  # fmt: skip
    mark_written(kv, kv_scale)
    return rotated


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

    Numerics: as compress_pack_. Backward: not defined. Devices: CPU, CUDA, as compress_pack_.
    Source: LycheeMemory, dynamic compression; paged bank of this project.
    Reference: lychee_kernels.ref.write_memory_.
    """
    check_no_grad("write_memory_", k=k, v=v, kv=kv, kv_scale=kv_scale)
    if backend("write_memory_") == "ref":
        _check_memory(
            "write_memory_", k, v, kv, kv_scale, page_table, slot0, mem_valid, batch, layer
        )
        memory = k.shape[0] // batch
        check_slots("write_memory_", kv, page_table, slot0, mem_valid, batch, memory)
        ref.write_memory_(
            k, v, kv, kv_scale, page_table, slot0, batch=batch, layer=layer, mem_valid=mem_valid
        )
        return
    torch.ops.lychee.write_memory_(k, v, kv, kv_scale, page_table, slot0, batch, layer, mem_valid)
    mark_written(kv, kv_scale)


def _check_inputs(op, q, k, v, cos, sin, batch, ratio, positions):
    """Returns (rows, memory) of one batch entry."""
    _check_devices(op, k, q=q, v=v, cos=cos, sin=sin, positions=positions)
    check_range(op, "batch", batch, 1, 2**31 - 1)
    check_range(op, "ratio", ratio, 1, 2**31 - 1)
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
    for name, table in (("cos", cos), ("sin", sin)):
        check_dtype(op, name, table, torch.float32)
    if positions is not None:
        check_shape(op, "positions", positions, (batch, rows))
        check_dtype(op, "positions", positions, torch.int64)
    return rows, memory


def _check_devices(op, k, **others):
    for name, tensor in others.items():
        same = tensor is None or tensor.device == k.device
        check(same, op, name, f"a tensor on the device of k, {k.device}", same or tensor.device)


def _check_memory(
    op, k, v, kv, kv_scale, page_table, slot0, mem_valid, batch, layer, memory=None
):  # fmt: skip
    """What compress_pack_ and write_memory_ need of the bank; reads no values.

    Without `memory`, k holds memory rows only."""
    _check_devices(
        op, k, v=v, kv=kv, kv_scale=kv_scale, page_table=page_table, slot0=slot0,
        mem_valid=mem_valid,
    )  # fmt: skip
    check_range(op, "batch", batch, 1, 2**31 - 1)
    check_shape(op, "k", k, (None, None, None))
    if memory is None:
        memory = k.shape[0] // batch
        check_shape(op, "k", k, (batch * memory, *k.shape[1:]))
    # the reference takes float64 as well
    got = str(k.dtype).removeprefix("torch.")
    check(k.is_floating_point(), op, "k", "dtype float32, bfloat16 or float16", got)
    check_shape(op, "v", v, k.shape)
    check_dtype(op, "v", v, k.dtype)
    check_bank(op, kv, kv_scale, layer, *k.shape[1:])
    check(kv.shape[4] > 0, op, "kv", "at least one token per page", list(kv.shape))
    if kv_scale is not None:
        check_dtype(op, "kv_scale", kv_scale, torch.float32)
    check_shape(op, "page_table", page_table, (batch, None))
    check_shape(op, "slot0", slot0, (batch,))
    for name, tensor in (("page_table", page_table), ("slot0", slot0)):
        check_dtype(op, name, tensor, torch.int32)
    if mem_valid is not None:
        check_shape(op, "mem_valid", mem_valid, (batch, memory))
        check_dtype(op, "mem_valid", mem_valid, torch.bool)


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
    _check_memory(
        "compress_pack_", k, v, kv, kv_scale, page_table, slot0, mem_valid, batch, layer, memory
    )
    return _rotated_fake(q, k, batch, rows, memory)


@torch.library.register_fake("lychee::write_memory_")
def _write_memory_fake(k, v, kv, kv_scale, page_table, slot0, batch, layer, mem_valid):
    _check_memory("write_memory_", k, v, kv, kv_scale, page_table, slot0, mem_valid, batch, layer)


@torch.library.register_fake("lychee::compress_pack_bwd")
def _compress_pack_bwd_fake(grad, mem_grad, cos, sin, batch, ratio, positions, pos0, memory_only):
    like = mem_grad if grad is None else grad
    rows = like.shape[2] * (ratio + 1 if grad is None and not memory_only else 1)
    return like.new_empty(batch * rows, like.shape[1], like.shape[3])


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
    ctx.memory_only = q.shape[0] != k.shape[0]


def _backward(ctx, dq_rot, dk_rot, dv_out, dmem_k, dmem_v):
    """Rotation backwards, rows back to segment order, memory rows' two gradients summed."""
    cos, sin, positions = ctx.saved_tensors

    def gradient(grad, mem_grad, tables, memory_only=False):
        if grad is None and mem_grad is None:
            return None
        grad, mem_grad = (
            x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (grad, mem_grad)
        )
        return torch.ops.lychee.compress_pack_bwd(
            grad, mem_grad, *tables, ctx.batch, ctx.ratio, positions, ctx.pos0, memory_only
        )

    dq = gradient(dq_rot, None, (cos, sin), memory_only=ctx.memory_only)
    dk = gradient(dk_rot, dmem_k, (cos, sin))
    dv = gradient(dv_out, dmem_v, (None, None))
    return dq, dk, dv, *([None] * 6)


torch.library.register_autograd("lychee::compress_pack", _backward, setup_context=_setup_context)
refuse_second_backward("compress_pack_bwd")
