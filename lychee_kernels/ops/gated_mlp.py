# SPDX-License-Identifier: Apache-2.0
"""gated_mlp_: a layer's norm, gated feed-forward block and residual in one pass over its rows."""

import torch

from .. import ref
from .._autograd import check_no_grad, mark_written
from .._check import check_dtype, check_shape
from .._loader import backend

_OP = "gated_mlp_"


def gated_mlp_(x, norm_weight, gate, up, down, *, eps):
    """x += down(silu(gate(h)) * up(h)) with h = rms_norm(x), in place, for inference.

    Rows are worked on in blocks whose intermediate values stay in cache. Made for the many rows of
    a compressor window: weights are packed anew in each call.

    Args:
        x: [N, E], float32, last dim contiguous, overwritten.
        norm_weight: [E], float32.
        gate, up: [I, E], float32, last dim contiguous.
        down: [E, I], float32, last dim contiguous.
        eps: float, added to the mean square.

    Returns:
        None.

    Raises:
        RuntimeError: shape, dtype or device; an input that requires gradients while gradients are
            enabled; message names the argument.

    Numerics: float32 throughout; each row's result is independent of the others and of threads.
    Backward: not defined. Devices: CPU.
    Source: the feed-forward block of Llama and Qwen, which is most of what compression computes.
    Reference: lychee_kernels.ref.gated_mlp_.
    """
    check_no_grad(_OP, x=x, norm_weight=norm_weight, gate=gate, up=up, down=down)
    if backend(_OP) == "ref":
        _check_inputs(x, norm_weight, gate, up, down)
        ref.gated_mlp_(x, norm_weight, gate, up, down, eps=eps)
        return
    torch.ops.lychee.gated_mlp_(x, norm_weight, eps, gate, up, down)
    mark_written(x)


def _check_inputs(x, norm_weight, gate, up, down):
    check_shape(_OP, "x", x, (None, None))
    hidden = x.shape[1]
    check_shape(_OP, "norm_weight", norm_weight, (hidden,))
    check_shape(_OP, "gate", gate, (None, hidden))
    check_shape(_OP, "up", up, gate.shape)
    check_shape(_OP, "down", down, (hidden, gate.shape[0]))
    for name, tensor in (("x", x), ("norm_weight", norm_weight), ("gate", gate), ("up", up)):
        check_dtype(_OP, name, tensor, torch.float32)
    check_dtype(_OP, "down", down, torch.float32)


@torch.library.register_fake("lychee::gated_mlp_")
def _fake(x, norm_weight, eps, gate, up, down):
    _check_inputs(x, norm_weight, gate, up, down)
