# SPDX-License-Identifier: Apache-2.0
"""Loads, stores and conversions of single elements, shared by the kernels; all arithmetic between
them is in float32.

Triton's interpreter truncates on bfloat16 stores and cannot compute in it, and graphics processors
before sm_89 lack float8: `elements` passes both as integers, which are converted here bit by bit.
"""

import os

import torch
import triton
import triton.language as tl

from ..testing import poison

INTERPRETED = triton.knobs.runtime.interpret


def elements(tensor):
    """A tensor as the kernels take it: float8 as uint8, bool as uint8, and under the interpreter
    bfloat16 as int16."""
    if tensor is None:
        return None
    if tensor.dtype in (torch.float8_e4m3fn, torch.bool):
        return tensor.view(torch.uint8)
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    return tensor


def fresh(*tensors):
    """Outputs before their kernel: poisoned where LYCHEE_POISON asks for it."""
    if os.environ.get("LYCHEE_POISON", "0") != "0":
        for tensor in tensors:
            poison(tensor)
    return tensors


@triton.jit
def load_floats(pointer, mask):
    """float32 of floats, int8 codes, e4m3 as uint8, or bfloat16 as int16; 0 where masked."""
    x = tl.load(pointer, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.uint8:
        # the bits of e4m3 in the fields of a float16, whose exponent is biased by 8 more
        bits = ((x.to(tl.uint16) & 0x80) << 8) | ((x.to(tl.uint16) & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((x & 0x7F) == 0x7F, float("nan"), value)
    elif pointer.dtype.element_ty == tl.int16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def store_floats(pointer, x, mask):
    """Rounds float32 to the nearest, ties to even, and stores it in the pointer's dtype: floats,
    e4m3 as uint8 and int8, both within range, or bfloat16 as int16."""
    if pointer.dtype.element_ty == tl.uint8:
        tl.store(pointer, _e4m3_code(x), mask=mask)
    elif pointer.dtype.element_ty == tl.int8:
        # beyond 2^23 a float32 has no fraction: the addition rounds
        tl.store(pointer, ((x + 12582912.0) - 12582912.0).to(tl.int8), mask=mask)
    elif pointer.dtype.element_ty == tl.int16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        tl.store(pointer, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _e4m3_code(x):
    """Bits of the nearest e4m3 of float32 within -448 .. 448."""
    sign = (x.to(tl.uint32, bitcast=True) >> 31) << 7
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.uint32, bitcast=True)
    # three mantissa bits stay; 120 is the difference of the exponents' biases
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6, multiples of 2^-9, rounded by an addition as above
    subnormal = (magnitude * 512.0 + 8388608.0).to(tl.uint32, bitcast=True) & 0xF
    return (tl.where(magnitude < 0.015625, subnormal, normal) | sign).to(tl.uint8)
