# SPDX-License-Identifier: Apache-2.0
"""A decoder's norm and linear layers; on a CPU, without gradients, by `lychee_kernels`' ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_kernels as lk

# Rows per block of row-wise work: a block's activations stay in cache, and peak memory stays flat.
BLOCK_ROWS = 512
# Up to so many rows our product reads half-precision weights faster than torch's.
FEW_ROWS = 8


class RMSNorm(nn.Module):
    """Root-mean-square norm; normalises in fp32, casts, then scales, as the model families do."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
            # One pass for the sum of squares where F.rms_norm makes three.
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
            scale = square.div_(x.shape[-1]).add_(self.eps).rsqrt_()
            return torch.mul(x, scale).mul_(self.weight)
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class Linear(nn.Linear):
    """nn.Linear whose weights in half precision stay so on a CPU when few rows are multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        half = x.dtype in (torch.bfloat16, torch.float16) and x.dtype == self.weight.dtype
        if rows > FEW_ROWS or not half or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        lk.linear_(out.view(rows, -1), x.reshape(rows, -1), self.weight, bias=self.bias)
        return out


def linear_into(
    linear: nn.Linear, x: Tensor, out: Tensor, *, norm: RMSNorm | None = None, add: bool = False
) -> None:
    """Write linear(norm(x)) into `out` [rows, N], or add it to what is there; without gradients.

    x: [rows, E], or strided groups of rows [G, R, E].
    """
    if fused(x):
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        lk.linear_(
            out, x, linear.weight, bias=linear.bias, norm_weight=norm_weight, eps=eps, add=add
        )
        return
    per_group = x[:1].shape[:-1].numel()
    for groups in range(0, x.shape[0], max(1, BLOCK_ROWS // per_group)):
        rows = x[groups : groups + max(1, BLOCK_ROWS // per_group)].flatten(0, -2)
        target = out[groups * per_group :][: len(rows)]
        rows = rows if norm is None else norm(rows)
        if add and linear.bias is not None:
            target += linear.bias
        if add:
            target.addmm_(rows, linear.weight.t())
        elif linear.bias is not None:
            torch.addmm(linear.bias, rows, linear.weight.t(), out=target)
        else:
            torch.mm(rows, linear.weight.t(), out=target)


def fused(x: Tensor) -> bool:
    """Whether the row-wise ops of lychee_kernels take x."""
    return x.device.type == "cpu" and x.dtype == torch.float32
