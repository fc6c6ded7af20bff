# SPDX-License-Identifier: Apache-2.0
"""One entry per op: its cases, inputs, bytes and operations, our call, and the peers by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import exact
import inputs
import peers
import shapes
from shapes import PAGE, Case

import lychee_kernels as lk


@dataclass(frozen=True, eq=False)
class Entry:
    """What is timed of one op, with what, and against whom."""

    op: str
    cases: tuple[Case, ...]
    inputs: Callable[[Case], inputs.Arguments]
    ours: Callable
    # name -> function and the role of its arguments in `inputs`; "compile" is made from "eager"
    # unless it is named here
    peers: dict[str, tuple[Callable, str]]
    # the result in float64, from the case and the first arguments of ours
    exact: Callable[..., exact.Exact]
    # bytes that must move between memory and processor, and floating-point operations
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    # which measured peak the bytes are compared with: "read" or "copy"
    traffic: str
    # the tensors of our result that peers and the reference return too
    comparable: Callable[[Any], tuple] = tuple


def compress_pack(**arguments):
    rotated = lk.compress_pack_(**arguments, ratio=shapes.RATIO, layer=0)
    return *rotated, arguments["kv"], arguments["kv_scale"]


def compress_pack_bytes(case: Case) -> int:
    shape = case.shape
    row = (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim * case.dtype.itemsize
    return shape.batch * (2 * shape.rows * row + bank_bytes(case, shape.memory))


def bank_bytes(case: Case, tokens: int) -> int:
    """Keys, values and scales of so many tokens of one layer."""
    row = case.shape.head_dim * case.bank_dtype.itemsize + (
        4 if case.bank_dtype.itemsize == 1 else 0
    )
    return tokens * case.shape.kv_heads * 2 * row


def gated_mlp(x, scratch, **arguments):
    """Copies x first, less than a hundredth of the work, so that every call has the same input."""
    lk.gated_mlp_(scratch.copy_(x), **arguments)
    return (scratch,)


def gated_mlp_bytes(case: Case) -> int:
    shape = case.shape
    return shape.hidden * (2 * shape.rows + 3 * shape.intermediate) * case.dtype.itemsize


def gated_mlp_flops(case: Case) -> int:
    return 6 * case.shape.rows * case.shape.hidden * case.shape.intermediate


def linear(x, out, **arguments):
    """One projection behind its norm, as the compressor calls it."""
    lk.linear_(out, x, **arguments)
    return (out,)


def linear_bytes(case: Case) -> int:
    shape = case.shape
    numbers = shape.rows * (shape.hidden + shape.outputs) + shape.hidden * shape.outputs
    return numbers * case.dtype.itemsize


def linear_flops(case: Case) -> int:
    return 2 * case.shape.rows * case.shape.hidden * case.shape.outputs


def select_chunks_bytes(case: Case) -> int:
    pages = inputs.CHUNK_TOKENS // PAGE
    per_selected = 4 * (pages * 4 + 1)  # pages read, and four results written
    return 8 * case.shape.chunks + case.shape.budget * per_selected


def gather_chunks(**arguments):
    return lk.gather_chunks(**arguments, rope_mode="affine")


def gather_chunks_bytes(case: Case) -> int:
    shape = case.shape
    out = shape.tokens * shape.kv_heads * 2 * shape.head_dim * case.dtype.itemsize
    return shape.layers * (bank_bytes(case, shape.tokens) + out)


def attention_bytes(case: Case) -> int:
    shape = case.shape
    segment = shape.segment * shape.kv_heads * 2 * shape.head_dim
    q_and_out = 2 * shape.queries * shape.query_heads * shape.head_dim
    moved = bank_bytes(case, shape.memory) + (segment + q_and_out) * case.dtype.itemsize
    return shape.batch * moved


def attention_flops(case: Case) -> int:
    """Two products per query-key pair that is seen; rotation and dequantisation do not count."""
    return 4 * case.shape.query_heads * case.shape.head_dim * case.shape.pairs


READY = {
    "sdpa_ready": (peers.sdpa, "ready"),
    "grouped_matmul_ready": (peers.grouped_matmul, "ready"),
}

REGISTRY = (
    Entry(
        op="compress_pack",
        cases=shapes.COMPRESS_PACK,
        inputs=inputs.compress_pack,
        ours=compress_pack,
        peers={"eager": (peers.compress_pack, "eager")},
        exact=exact.compress_pack,
        bytes=compress_pack_bytes,
        flops=lambda case: 0,
        traffic="copy",
        comparable=lambda result: (*result[:3], result[3][:, 0], result[4][:, 0]),
    ),
    Entry(
        op="gated_mlp",
        cases=shapes.GATED_MLP,
        inputs=inputs.gated_mlp,
        ours=gated_mlp,
        peers={"eager": (peers.gated_mlp, "eager")},
        exact=exact.gated_mlp,
        bytes=gated_mlp_bytes,
        flops=gated_mlp_flops,
        traffic="copy",
    ),
    Entry(
        op="linear",
        cases=shapes.LINEAR,
        inputs=inputs.linear,
        exact=exact.linear,
        ours=linear,
        peers={"eager": (peers.linear, "eager")},
        bytes=linear_bytes,
        flops=linear_flops,
        traffic="copy",
    ),
    Entry(
        op="select_chunks",
        cases=shapes.SELECT_CHUNKS,
        inputs=inputs.select_chunks,
        ours=lk.select_chunks,
        peers={"eager": (peers.select_chunks, "eager")},
        exact=exact.select_chunks,
        bytes=select_chunks_bytes,
        flops=lambda case: 0,
        traffic="copy",
        comparable=exact.selected_pages,
    ),
    Entry(
        op="gather_chunks",
        cases=shapes.GATHER_CHUNKS,
        inputs=inputs.gather_chunks,
        ours=gather_chunks,
        peers={"eager": (peers.gather_chunks, "eager")},
        exact=exact.gather_chunks,
        bytes=gather_chunks_bytes,
        flops=lambda case: 0,
        traffic="copy",
        comparable=lambda result: result[:2],
    ),
    Entry(
        op="memory_attention",
        cases=shapes.DECODE + shapes.PREFILL,
        inputs=inputs.attention_inputs,
        ours=lk.memory_attention,
        peers={"eager": (peers.attention, "eager")} | READY,
        exact=exact.memory_attention,
        bytes=attention_bytes,
        flops=attention_flops,
        traffic="read",
        comparable=lambda result: result[:1],
    ),
    Entry(
        op="memory_attention_bwd",
        cases=shapes.TRAINING,
        inputs=inputs.attention_backward,
        ours=peers.backward,
        peers={
            "eager": (peers.backward, "eager"),
            "compile": (peers.backward, "compile"),
            "sdpa_ready": (peers.backward, "ready"),
        },
        exact=exact.memory_attention_backward,
        bytes=attention_bytes,
        # scores once more, then one product each for dv, dp, dq and dk
        flops=lambda case: attention_flops(case) * 5 // 2,
        traffic="read",
    ),
)
