# SPDX-License-Identifier: Apache-2.0
"""What kernels need of their arguments beyond the checks of fake tensors: device, dtype, strides.

Values on a graphics processor are not read, so that no call waits for it: pages and positions
outside their range are left out by the kernels. Under the interpreter they are checked.
"""

import torch
import triton

from .._check import check, check_dtype
from ._elements import INTERPRETED

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BANKS = (*FLOATS, torch.int8, torch.float8_e4m3fn)
ROPE_MODES = ("none", "affine")


def check_rows(op, **tensors):
    """Float tensors whose last dimension is contiguous; None passes."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_device(op, name, tensor)
            check_dtype(op, name, tensor, *FLOATS)
            _check_last_dim(op, name, tensor)


def check_bank_layout(op, kv, kv_scale):
    _check_device(op, "kv", kv)
    check_dtype(op, "kv", kv, *BANKS)
    _check_last_dim(op, "kv", kv)
    if kv_scale is not None:
        _check_device(op, "kv_scale", kv_scale)
        check_dtype(op, "kv_scale", kv_scale, torch.float32)
        _check_last_dim(op, "kv_scale", kv_scale)


def check_tables(op, **tensors):
    """Contiguous tensors; None passes."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_device(op, name, tensor)
            check(tensor.is_contiguous(), op, name, "a contiguous tensor", "a strided view")
            if name in ("cos", "sin"):
                check_dtype(op, name, tensor, torch.float32)


def readable(tensor):
    """Whether the values of a tensor can be checked without waiting for a device."""
    return tensor.device.type == "cpu"


def _check_device(op, argument, tensor):
    device = tensor.device.type
    ready = device == "cuda" or (INTERPRETED and device == "cpu")
    check(ready, op, argument, "a CUDA tensor for the Triton kernels", f"one on {device}")


def _check_last_dim(op, argument, tensor):
    contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
    check(contiguous, op, argument, "a contiguous last dimension", f"stride {tensor.stride(-1)}")


def half_block(head_dim):
    """Elements of a block that holds half a head: a power of two that tl.dot accepts."""
    return max(16, triton.next_power_of_2(head_dim // 2))
