# SPDX-License-Identifier: Apache-2.0
"""Inputs of the compress_pack tests: windows of every shape, poisoned banks, gradients."""

from dataclasses import dataclass

import torch

from lychee_kernels import rope_tables
from lychee_kernels.ref.compress_pack import QUANT_LEVEL
from lychee_kernels.testing import poison

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BANK_DTYPES = [*FLOATS, *QUANT_LEVEL]
POSITIONS = 1000


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    groups: int = 6  # memory rows of a window
    ratio: int = 4
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    memory_queries_only: bool = False
    scattered: bool = False  # positions given instead of pos0


def make_inputs(case, dtype=torch.float32):
    """(q, k, v, cos, sin) and the options of compress_pack."""
    rows = case.groups * (case.ratio + 1)
    query_rows = case.groups if case.memory_queries_only else rows
    q = torch.randn(case.batch * query_rows, case.heads, case.dim).to(dtype)
    k, v = torch.randn(2, case.batch * rows, case.kv_heads, case.dim).to(dtype)
    tables = rope_tables(POSITIONS, 10000.0 ** -(torch.arange(0, case.dim, 2) / case.dim))
    options = {"batch": case.batch, "ratio": case.ratio, "pos0": 11}
    if case.scattered:
        options["positions"] = torch.randint(0, POSITIONS, (case.batch, rows))
    return (q, k, v, *tables), options


def make_bank(case, dtype, page_tokens=4):
    """A poisoned bank, its scales, and a table whose rows start in the middle of a page; entries
    beyond the pages that are needed hold garbage."""
    needed = (case.groups + 2) // page_tokens + 1
    shape = (case.batch * needed + 1, 3, case.kv_heads, 2, page_tokens, case.dim)
    quantised = dtype in QUANT_LEVEL
    kv = torch.full(shape, 7.0 if quantised else torch.nan).to(dtype)
    kv_scale = poison(torch.empty(shape[:5])) if quantised else None
    table = torch.full((case.batch, needed + 2), -(2**31), dtype=torch.int32)
    table[:, :needed] = torch.randperm(shape[0])[: case.batch * needed].view(case.batch, -1)
    table[:, -1] = 2**31 - 1
    return kv, kv_scale, table, torch.full((case.batch,), 2, dtype=torch.int32)


def gradients(function, inputs, options, weights):
    """Gradients of q, k and v; `weights` are those of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    outputs = function(*leaves, *inputs[3:], **options)
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, leaves)
