# SPDX-License-Identifier: Apache-2.0
"""What ops that write in place, and backwards without one of their own, owe autograd."""

import torch

from ._check import check


def check_no_grad(op, **inputs):
    """Refuses inputs whose gradient the op would lose."""
    for name, tensor in inputs.items():
        recorded = tensor is not None and torch.is_grad_enabled() and tensor.requires_grad
        check(not recorded, op, name, "a tensor without gradient", "one that requires it")


def mark_written(*tensors):
    """Raises the tensors' versions, so that a backward that saved one of them notices."""
    if torch.compiler.is_compiling():
        # compiled code counts the writes itself, from the schema
        return
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def refuse_second_backward(op):
    """Without a formula a gradient of the gradient would silently be zero."""

    def backward(ctx, *gradients):
        raise RuntimeError(f"{op}: expected one backward, got another through its gradients")

    torch.library.register_autograd(f"lychee::{op}", backward)
