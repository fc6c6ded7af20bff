# SPDX-License-Identifier: Apache-2.0
"""Rounding of stored rows, bit by bit: exact ties and their neighbours, empty rows, bfloat16."""

import bisect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lychee_kernels import compress_pack, cpu_isa, write_memory_
from lychee_kernels.ref.compress_pack import quantise

LEVELS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
quantised = pytest.mark.parametrize("dtype", LEVELS, ids=str)


def decode_float8(code):
    """Value of an e4m3 code below 127: 4 bits of exponent with bias 7, 3 of fraction."""
    exponent, fraction = divmod(code, 8)
    return fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)


FLOAT8 = [decode_float8(code) for code in range(127)]


def float8_code(x):
    """The nearest code, the even one of two equally near; every float32 is exact in Python."""
    magnitude = abs(x)
    above = bisect.bisect_left(FLOAT8, magnitude)
    code = above
    if above > 0:
        down, up = magnitude - FLOAT8[above - 1], FLOAT8[above] - magnitude
        code = above if up < down or (up == down and above % 2 == 0) else above - 1
    return code + (128 if np.signbit(x) else 0)


def expected_bits(rows, dtype):
    """Bytes and scales of float32 rows: each step in float32, the last rounding by search."""
    level = np.float32(LEVELS[dtype])
    amax = np.abs(rows).max(1)
    empty = amax < np.float32(1e-30)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(empty, np.float32(0), level / amax)
        scale = np.where(empty, np.float32(0), amax / level)
    scaled = np.clip(rows * inverse[:, None], -level, level)
    assert scaled.dtype == scale.dtype == np.float32
    if dtype == torch.int8:
        return np.rint(scaled).astype(np.int8).view(np.uint8), scale
    codes = [float8_code(float(x)) for x in scaled.ravel()]
    return np.array(codes, dtype=np.uint8).reshape(rows.shape), scale


def stored_bits(rows, dtype, input_dtype=torch.float32):
    """What write_memory_ makes of them: one head, one row per slot; V gets the negated rows."""
    count, dim = rows.shape
    k = torch.from_numpy(rows).to(input_dtype)[:, None]
    kv = torch.full((1, 1, 1, 2, count, dim), 99).to(dtype)
    kv_scale = torch.full(kv.shape[:5], torch.nan)
    table, slot0 = torch.zeros(2, 1, dtype=torch.int32)
    write_memory_(k, -k, kv, kv_scale, table[None], slot0, batch=1, layer=0)
    return kv[0, 0, 0].view(torch.uint8).numpy(), kv_scale[0, 0, 0].numpy()


def check_rows(rows, dtype, input_dtype=torch.float32):
    bits, scales = stored_bits(rows, dtype, input_dtype)
    for part, signed in enumerate((rows, -rows)):
        expected, scale = expected_bits(signed, dtype)
        np.testing.assert_array_equal(bits[part], expected)
        np.testing.assert_array_equal(scales[part], scale)


def around(values):
    """Each value with its two float32 neighbours."""
    x = np.array(values, dtype=np.float32)
    return np.concatenate([x, np.nextafter(x, np.float32(-1e9)), np.nextafter(x, np.float32(1e9))])


def tie_rows(dtype, dim):
    """Rows that hold the level itself, so that scale is 1, and every tie between two codes."""
    if dtype == torch.int8:
        ties = np.arange(-127, 127) + 0.5
    else:
        ties = [(low + high) / 2 for low, high in zip(FLOAT8, FLOAT8[1:], strict=False)]
        ties = np.array([*ties, *(-x for x in ties)])
    values = np.concatenate([around(ties), [0.0, -0.0, 2.0**-30, -(2.0**-30)]]).astype(np.float32)
    values = values[np.abs(values) <= LEVELS[dtype]]
    rows = np.zeros((-(-len(values) // (dim - 1)), dim), dtype=np.float32)
    rows[:, 0] = LEVELS[dtype]
    rows[:, 1:].flat[: len(values)] = values
    return rows


@quantised
@pytest.mark.parametrize("dim", [8, 40, 128])
def test_ties_round_to_even(dtype, dim):
    check_rows(tie_rows(dtype, dim), dtype)


@quantised
def test_random_rows_are_stored_bit_by_bit(dtype):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((200, 72)).astype(np.float32)
    rows *= (10.0 ** generator.uniform(-25, 25, (200, 1))).astype(np.float32)
    check_rows(rows, dtype)
    half = torch.from_numpy(rows).bfloat16()
    check_rows(half.float().numpy(), dtype, torch.bfloat16)


def test_reference_divides_once():
    # rows around every tie of many scales: 1 / amax * 127 differs from 127 / amax in the last bit
    # of a quarter of them
    rows = np.repeat(np.linspace(1, 2, 99, dtype=np.float32)[:, None], 1 + 3 * 127, axis=1)
    for row in rows:
        row[1:] = around((np.arange(127) + 0.5) / (np.float32(127) / row[0]))
    rows[:, 1:] = np.minimum(rows[:, 1:], rows[:, :1])
    stored, scale = quantise(torch.from_numpy(rows), torch.int8)
    expected, expected_scale = expected_bits(rows, torch.int8)
    np.testing.assert_array_equal(stored.view(torch.uint8).numpy(), expected)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)


@quantised
def test_rows_of_almost_nothing(dtype):
    largest = [0.0, 1e-45, 9e-31, 1e-30, 1.1e-30, 3e38, np.finfo(np.float32).max]
    rows = np.linspace(-1, 1, 24, dtype=np.float32) * np.array(largest, dtype=np.float32)[:, None]
    check_rows(rows, dtype)
    bits, scales = stored_bits(rows[:3], dtype)
    assert (scales == 0).all() and (bits & 0x7F == 0).all()


@pytest.mark.parametrize("dim", [24, 64, 128])
def test_rotated_bfloat16_rounds_to_even(dim):
    # every bfloat16 there is, times factors that make ties; sin = 0 leaves one product
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[: x.numel() // dim * dim].view(-1, 1, dim)
    x = x[: x.shape[0] // 2 * 2]
    factors = torch.tensor([1.0, 1.5, 1.0 + 2**-8, 1.0 + 2**-7 + 2**-8, 0.75])
    cos = factors[torch.arange(x.shape[0]) % 5][:, None].repeat(1, dim // 2)
    q_rot, _, rows, *_ = compress_pack(x, x, x, cos, torch.zeros_like(cos), batch=1, ratio=1)
    a, b = rows[0, 0].float().chunk(2, 1)
    # times 0, because 0 * inf is NaN in the kernel too
    exact = torch.cat((a * cos - b * 0, b * cos + a * 0), 1).bfloat16()
    actual, number = q_rot[0, 0], ~exact.isnan()
    assert torch.equal(actual.isnan(), exact.isnan())
    assert torch.equal(actual[number].view(torch.int16), exact[number].view(torch.int16))


@pytest.mark.parametrize("dim", [24, 64, 128])
def test_any_nan_stays_nan_in_bfloat16(dim):
    # every bit of the payload set, as in poisoned memory, and hidden in the lower half
    bits = torch.tensor([-1, 2**31 - 1, 0x7F800001, 0x7F80FFFF, 0x7FC00000])
    cos = torch.ones(10, dim // 2)
    cos[:5, 1] = bits.int().view(torch.float32)
    x = torch.ones(10, 1, dim, dtype=torch.bfloat16)
    x[9, 0, 3] = torch.tensor(-1).to(torch.int16).view(torch.bfloat16)
    q_rot = compress_pack(x, x, x, cos, cos * 0, batch=1, ratio=9)[0][0, 0]
    expected = torch.zeros(10, dim, dtype=torch.bool)
    expected[:5, [1, 1 + dim // 2]] = True
    expected[9, [3, 3 + dim // 2]] = True
    assert torch.equal(q_rot.isnan(), expected)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_every_instruction_set_rounds_the_same(isa):
    order = ["generic", "avx2", "avx512", "amx"]
    if order.index(isa) >= order.index(cpu_isa()):
        pytest.skip(f"this processor uses {cpu_isa()} already")
    # cacheprovider off: the two pytest processes would share one cache folder
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        [*command, "-k", "not instruction_set"], env=os.environ | {"LYCHEE_CPU_ISA": isa},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout
