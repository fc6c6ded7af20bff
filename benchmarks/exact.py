# SPDX-License-Identifier: Apache-2.0
"""Every op's result in float64, by its reference, and the check of ours and of a peer against it.

Of a cold case only the last layer or the last kv head is computed, of a prefill every few queries:
all of it would take gigabytes in float64, and longer than the timing.
"""

from dataclasses import dataclass
from functools import partial

import torch
from peers import Recorded, backward
from shapes import RATIO, Case

from lychee_kernels import ref
from lychee_kernels.testing import compare, error_vs

# Largest error of ours, as a share of the largest value, however large the peer's is.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# The same of a peer: what rounding at every step costs a composition, 2.3e-2 at most where it was
# measured. A peer that is worse computes something else.
PEER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
# Levels that a peer's quantised value may be off; other integers are equal.
PEER_LEVELS = {torch.int8: 1}
# Queries of a prefill that are computed, about.
QUERIES = 128


@dataclass(frozen=True)
class Exact:
    """The float64 result, integers as they are, at index `part` of the tensors it stands for."""

    tensors: tuple[torch.Tensor, ...]
    part: tuple = (...,)


def check(exact: Exact, ours, theirs, name: str) -> None:
    """Asserts that our error is at most twice the peer's, and that rounding explains the peer's.

    Compares the tensors that both return, in order; our integers equal the reference's.
    """
    for mine, other, wanted in zip(ours, theirs, exact.tensors, strict=False):
        mine, other = mine[exact.part], other.reshape(mine.shape)[exact.part]
        if mine.dtype.is_floating_point:
            wanted = wanted.double()
            largest = wanted.abs().max().item()
            expect(other, wanted, PEER_TOLERANCE[mine.dtype] * largest, name)
            expect(mine, wanted, TOLERANCE[mine.dtype] * largest, "ours")
            compare(mine, wanted, other)
        else:
            assert torch.equal(mine, wanted), "ours: differs from the reference"
            expect(other, wanted.double(), PEER_LEVELS.get(mine.dtype, 0), name)


def expect(actual, wanted, allowed, name):
    error = error_vs(actual, wanted)
    assert error <= allowed, f"{name}: differs from float64 by {error:.3e}, not {allowed:.3e}"


def compress_pack(case: Case, q, k, v, kv, kv_scale, **arguments) -> Exact:
    part = (...,)
    if case.shape.cold:
        part = (slice(None), slice(-1, None))
        q, k, v = (x[:, -1:] for x in (q, k, v))
        kv, kv_scale = kv[:, :, -1:], kv_scale[:, :, -1:]
    kv, kv_scale = kv.clone(), kv_scale.clone()
    rows = (x.double() for x in (q, k, v))
    rotated = ref.compress_pack_(*rows, kv=kv, kv_scale=kv_scale, **arguments, ratio=RATIO, layer=0)
    return Exact((*rotated, kv[:, 0], kv_scale[:, 0]), part)


def gated_mlp(case: Case, x, scratch, eps, **weights) -> Exact:
    x = x.double()
    ref.gated_mlp_(x, **{name: weight.double() for name, weight in weights.items()}, eps=eps)
    return Exact((x,))


def linear(case: Case, x, out, eps, **weights) -> Exact:
    out = torch.empty(out.shape, dtype=torch.float64)
    weights = {name: weight.double() for name, weight in weights.items()}
    ref.linear_(out, x.double(), eps=eps, **weights)
    return Exact((out,))


def select_chunks(case: Case, **arguments) -> Exact:
    return Exact(selected_pages(ref.select_chunks(**arguments)))


def selected_pages(selection) -> tuple:
    """What is in use of the first row's selection."""
    pages, chunks = selection.num_pages[0], selection.num_chunks[0]
    lists = (selection.page_table, selection.page_len, selection.page_base)
    return *(x[0, :pages] for x in lists), selection.chunks[0, :chunks]


def gather_chunks(case: Case, out_dtype, **arguments) -> Exact:
    layers = case.shape.layers
    first = layers - 1 if case.shape.cold else 0
    k, v, _ = ref.gather_chunks(
        **arguments, layer_range=(first, layers), rope_mode="affine", out_dtype=torch.float64
    )
    return Exact((k, v), (slice(first, None),))


def memory_attention(case: Case, q, k, v, kv, kv_scale, **arguments) -> Exact:
    heads, queries = slice(None), slice(None)
    if case.shape.cold:
        group = case.shape.query_heads // case.shape.kv_heads
        heads = slice(-group, None)
        k, v, kv = k[:, -1:], v[:, -1:], kv[:, :, -1:]
        kv_scale = None if kv_scale is None else kv_scale[:, :, -1:]
    # odd, so that the queries fall on all places of the kernel's blocks
    stride = case.shape.queries // QUERIES | 1
    if case.shape.queries > QUERIES:
        # up to the last one, as query_stride counts
        queries = slice((case.shape.queries - 1) % stride, None, stride)
    part = (slice(None), heads, queries)
    q, k, v = q[part].double(), k.double(), v.double()
    out, _ = ref.memory_attention(
        q, k, v, kv=kv, kv_scale=kv_scale, query_stride=stride, **arguments
    )
    return Exact((out,), part)


def memory_attention_backward(case: Case, recorded, grad, skip) -> Exact:
    inputs = tuple(x.double() for x in recorded.inputs)
    forward = partial(recorded.forward, attention=ref.memory_attention)
    return Exact(backward(Recorded(forward, inputs), grad.double(), skip))
