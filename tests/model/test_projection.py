# SPDX-License-Identifier: Apache-2.0
"""A decoder's linear layers: which products they take, and that these are torch's."""

import pytest
import torch
import torch.nn.functional as F

import lychee_kernels as lk
from lychee.projection import FEW_ROWS, Linear
from lychee_kernels.testing import compare


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_few_rows_of_half_precision_go_through_our_product(rows, dtype, monkeypatch):
    """They give what torch gives, rounded once; gradients and many rows are left to torch."""
    calls, product = [], lk.linear_
    monkeypatch.setattr(lk, "linear_", lambda *a, **k: calls.append(1) or product(*a, **k))
    linear, x = Linear(40, 24).to(dtype), torch.randn(rows, 1, 40).to(dtype)
    recorded = linear(x)
    assert recorded.requires_grad and not calls
    with torch.no_grad():
        result = linear(x)
    assert len(calls) == (rows <= FEW_ROWS)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    compare(result, exact, recorded.detach())
