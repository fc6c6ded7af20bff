# SPDX-License-Identifier: Apache-2.0
"""linear_: a projection of many rows, with the norm before it and the residual behind it."""

import torch

from .. import ref
from .._autograd import check_no_grad, mark_written
from .._check import check_dtype, check_shape
from .._loader import backend

_OP = "linear_"


def linear_(out, x, weight, *, bias=None, norm_weight=None, eps=0.0, add=False):
    """out = h @ weight.T + bias, or out += that, with h = rms_norm(x) or x, for inference.

    In float32 made for the many rows of a compressor window: the weight is packed anew in each
    call, and rows may be taken from strided groups, such as the raw or the memory rows among
    interleaved ones. In bfloat16 and float16 made for the few rows of a decoding step: the weight
    is read once for up to 84 rows, as it lies; on cores with AMX torch's own products are faster
    from about eight rows on.

    Args:
        out: [N, O], dtype of `weight`, last dim contiguous, overwritten; must not overlap `x`.
        x: [N, I], or [G, R, I] with G * R = N; dtype of `weight`, last dim contiguous.
        weight: [O, I], float32, bfloat16 or float16, last dim contiguous.
        bias: [O], dtype of `weight`, or None.
        norm_weight: [I], dtype of `weight`, or None: x is used as it is.
        eps: float, added to the mean square of the norm.
        add: whether to add to what `out` holds.

    Returns:
        None.

    Raises:
        RuntimeError: shape, dtype or device; an input that requires gradients while gradients are
            enabled; message names the argument.

    Numerics: float32 throughout, rounded once, at the end; each row's result is
        independent of the others and of threads.
    Backward: not defined. Devices: CPU.
    Source: the attention projections of Llama and Qwen.
    Reference: lychee_kernels.ref.linear_.
    """
    check_no_grad(_OP, out=out, x=x, weight=weight, bias=bias, norm_weight=norm_weight)
    if backend(_OP) == "ref":
        _check_inputs(out, x, weight, bias, norm_weight)
        ref.linear_(out, x, weight, bias=bias, norm_weight=norm_weight, eps=eps, add=add)
        return
    torch.ops.lychee.linear_(out, x, norm_weight, eps, weight, bias, add)
    mark_written(out)


def _check_inputs(out, x, weight, bias, norm_weight):
    check_dtype(_OP, "weight", weight, torch.float32, torch.bfloat16, torch.float16)
    check_shape(_OP, "x", x, (None,) * (3 if x.dim() == 3 else 2))
    check_shape(_OP, "weight", weight, (None, x.shape[-1]))
    if norm_weight is not None:
        check_shape(_OP, "norm_weight", norm_weight, (x.shape[-1],))
    if bias is not None:
        check_shape(_OP, "bias", bias, (weight.shape[0],))
    check_shape(_OP, "out", out, (x.shape[:-1].numel(), weight.shape[0]))
    given = {"x": x, "weight": weight, "norm_weight": norm_weight, "bias": bias, "out": out}
    for name, tensor in given.items():
        if tensor is not None:
            check_dtype(_OP, name, tensor, weight.dtype)


@torch.library.register_fake("lychee::linear_")
def _fake(out, x, norm_weight, eps, weight, bias, add):
    _check_inputs(out, x, weight, bias, norm_weight)
