# SPDX-License-Identifier: Apache-2.0
"""compress_pack, compress_pack_ and write_memory_: one case per documented error."""

import pytest
import torch
from error_cases import check_fake_message, check_message

from lychee_kernels import compress_pack, compress_pack_, rope_tables, write_memory_


def arguments():
    """B = 2, W = 8, r = 4: ten rows per batch entry, two of them memory."""
    cos, sin = rope_tables(20, torch.ones(8))
    return {
        "q": torch.zeros(20, 4, 16), "k": torch.zeros(20, 2, 16), "v": torch.zeros(20, 2, 16),
        "cos": cos, "sin": sin, "kv": torch.zeros(3, 2, 2, 2, 4, 16), "kv_scale": None,
        "page_table": torch.tensor([[0], [2]], dtype=torch.int32),
        "slot0": torch.zeros(2, dtype=torch.int32), "batch": 2, "ratio": 4, "layer": 0,
    }  # fmt: skip


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


INT8 = {"kv": torch.zeros(3, 2, 2, 2, 4, 16, dtype=torch.int8)}

ROW_ERRORS = {
    "k: expected shape [*, *, *], got [20, 16]": {"k": torch.zeros(20, 16)},
    "k: expected batch * (window + window / ratio) rows, got 20": {"batch": 4, "ratio": 2},
    "v: expected shape [20, 2, 16], got [19, 2, 16]": {"v": torch.zeros(19, 2, 16)},
    "v: expected dtype float32, got bfloat16": {"v": torch.zeros(20, 2, 16).bfloat16()},
    "q: expected 20 rows (all) or 4 rows (memory only), got 6": {"q": torch.zeros(6, 4, 16)},
    "q: expected shape [*, *, 16], got [20, 4, 8]": {"q": torch.zeros(20, 4, 8)},
    "q: expected a contiguous last dimension, got stride 2": {
        "q": torch.zeros(20, 4, 32)[..., ::2]
    },
    "k: expected dtype float32, bfloat16 or float16, got float64": {
        "k": torch.zeros(20, 2, 16).double()
    },
    "q: expected dtype float32, got bfloat16": {"q": torch.zeros(20, 4, 16).bfloat16()},
    "k: expected a contiguous last dimension, got stride 2": {
        "k": torch.zeros(20, 2, 32)[..., ::2]
    },
    "v: expected a contiguous last dimension, got stride 40": {
        "v": torch.zeros(16, 2, 20).permute(2, 1, 0)
    },
    "k: expected a head dimension that is a multiple of 8, at most 256, got 12": {
        name: torch.zeros(20, 2, 12) for name in "qkv"
    },
    "k: expected a head dimension that is a multiple of 8, at most 256, got 264": {
        name: torch.zeros(20, 2, 264) for name in "qkv"
    },
    "batch: expected 1 <= value <= 2147483647, got 0": {"batch": 0},
    "ratio: expected 1 <= value <= 2147483647, got 0": {"ratio": 0},
    "cos: expected dtype float32, got bfloat16": {"cos": torch.zeros(20, 8).bfloat16()},
    "sin: expected dtype float32, got float16": {"sin": torch.zeros(20, 8).half()},
    "cos: expected a contiguous tensor, got a strided view": {"cos": torch.zeros(8, 20).T},
    "sin: expected a contiguous tensor, got a strided view": {"sin": torch.zeros(20, 9)[:, 1:]},
    "positions: expected dtype int64, got int32": {"positions": torch.zeros(2, 10).int()},
    "positions: expected a contiguous tensor, got a strided view": {
        "positions": torch.zeros(10, 2, dtype=torch.int64).T
    },
    "positions: expected 0 <= value <= 19, got -1": {"positions": torch.full((2, 10), -1)},
    "positions: expected 0 <= value <= 19, got 9223372036854775807": {
        "positions": torch.full((2, 10), 2**63 - 1)
    },
    "q: expected a tensor on the device of k, cpu, got meta": {
        "q": torch.zeros(20, 4, 16, device="meta")
    },
    "q: expected a tensor on the device of k, meta, got cpu": {
        "k": torch.zeros(20, 2, 16, device="meta")
    },
    "v: expected a tensor on the device of k, cpu, got meta": {
        "v": torch.zeros(20, 2, 16, device="meta")
    },
    "cos: expected a tensor on the device of k, cpu, got meta": {
        "cos": torch.zeros(20, 8, device="meta")
    },
    "positions: expected a tensor on the device of k, cpu, got meta": {
        "positions": torch.zeros(2, 10, dtype=torch.int64, device="meta")
    },
    "cos: expected shape [*, 8], got [20, 4]": {"cos": torch.zeros(20, 4)},
    "sin: expected shape [20, 8], got [21, 8]": {"sin": torch.zeros(21, 8)},
    "pos0: expected 0 <= value <= 10, got 11": {"pos0": 11},
    "pos0: expected 0 <= value <= 10, got -1": {"pos0": -1},
    "positions: expected shape [2, 10], got [20]": {"positions": torch.arange(20)},
    "positions: expected 0 <= value <= 19, got 20": {"positions": torch.full((2, 10), 20)},
}

BANK_ERRORS = {
    "kv: expected shape [*, *, 2, 2, *, 16]": {"kv": torch.zeros(3, 2, 1, 2, 4, 16)},
    "kv: expected dtype float32, bfloat16, float16, int8 or float8_e4m3fn, got float64": {
        "kv": torch.zeros(3, 2, 2, 2, 4, 16).double()
    },
    "kv_scale: expected a tensor with this bank dtype, got None": {
        "kv": torch.zeros(3, 2, 2, 2, 4, 16, dtype=torch.int8)
    },
    "kv_scale: expected None with this bank dtype, got a tensor": {
        "kv_scale": torch.zeros(3, 2, 2, 2, 4)
    },
    "kv: expected at least one token per page, got [3, 2, 2, 2, 0, 16]": {
        "kv": torch.zeros(3, 2, 2, 2, 0, 16)
    },
    "kv: expected a contiguous last dimension, got stride 2": {
        "kv": torch.zeros(3, 2, 2, 2, 4, 32)[..., ::2]
    },
    "kv: expected a tensor on the device of k, cpu, got meta": {
        "kv": torch.zeros(3, 2, 2, 2, 4, 16, device="meta")
    },
    "kv_scale: expected shape [3, 2, 2, 2, 4], got [3, 2, 2, 2, 5]": INT8
    | {"kv_scale": torch.zeros(3, 2, 2, 2, 5)},
    "kv_scale: expected dtype float32, got bfloat16": INT8
    | {"kv_scale": torch.zeros(3, 2, 2, 2, 4).bfloat16()},
    "kv_scale: expected a contiguous last dimension, got stride 2": INT8
    | {"kv_scale": torch.zeros(3, 2, 2, 2, 8)[..., ::2]},
    "kv_scale: expected a tensor on the device of k, cpu, got meta": INT8
    | {"kv_scale": torch.zeros(3, 2, 2, 2, 4, device="meta")},
    "layer: expected 0 <= value <= 1, got -1": {"layer": -1},
    "layer: expected 0 <= value <= 1, got 2": {"layer": 2},
    "page_table: expected shape [2, *], got [2]": {"page_table": int32(0, 2)},
    "page_table: expected dtype int32, got int64": {"page_table": torch.tensor([[0], [2]])},
    "page_table: expected 0 <= value <= 2, got 3": {"page_table": int32([0], [3])},
    "page_table: expected 0 <= value <= 2, got -1": {"page_table": int32([-1], [2])},
    "page_table: expected at least 2 pages per row, got 1": {"slot0": int32(0, 3)},
    "slot0: expected 0 <= value <= 2147483647, got -1": {"slot0": int32(0, -1)},
    "page_table: expected shape [2, *], got [3, 1]": {"page_table": int32([0], [1], [2])},
    "page_table: expected a contiguous tensor, got a strided view": {
        "page_table": torch.zeros(2, 2, dtype=torch.int32)[:, ::2]
    },
    "page_table: expected a tensor on the device of k, cpu, got meta": {
        "page_table": torch.zeros(2, 1, dtype=torch.int32, device="meta")
    },
    "page_table: expected 0 <= value <= 2, got -2147483648": {"page_table": int32([-(2**31)], [2])},
    "page_table: expected 0 <= value <= 2, got 2147483647": {"page_table": int32([0], [2**31 - 1])},
    "page_table: expected at least 536870912 pages per row, got 1": {"slot0": int32(0, 2**31 - 3)},
    "slot0: expected shape [2], got [1]": {"slot0": int32(0)},
    "slot0: expected dtype int32, got int64": {"slot0": torch.zeros(2, dtype=torch.int64)},
    "slot0: expected a contiguous tensor, got a strided view": {
        "slot0": torch.zeros(4, dtype=torch.int32)[::2]
    },
    "slot0: expected a tensor on the device of k, cpu, got meta": {
        "slot0": torch.zeros(2, dtype=torch.int32, device="meta")
    },
    "mem_valid: expected dtype bool, got int8": {"mem_valid": torch.ones(2, 2, dtype=torch.int8)},
    "mem_valid: expected a contiguous tensor, got a strided view": {
        "mem_valid": torch.ones(2, 4, dtype=torch.bool)[:, ::2]
    },
    "mem_valid: expected shape [2, 2], got [2, 8]": {
        "mem_valid": torch.ones(2, 8, dtype=torch.bool)
    },
}


def only(names, given):
    """The arguments that an op has."""
    return {name: given[name] for name in names if name in given}


ROWS = ("q", "k", "v", "cos", "sin", "batch", "ratio", "positions", "pos0")
BANK = ("kv", "kv_scale", "page_table", "slot0", "layer", "mem_valid")


@pytest.mark.parametrize("message", ROW_ERRORS)
def test_compress_pack_names_the_wrong_argument(message):
    given = arguments() | ROW_ERRORS[message]
    check_message(message, compress_pack, **only(ROWS, given))


@pytest.mark.parametrize("message", [*ROW_ERRORS, *BANK_ERRORS])
def test_compress_pack_write_names_the_wrong_argument(message):
    given = arguments() | (ROW_ERRORS | BANK_ERRORS)[message]
    before = given["kv"].clone()
    check_message(message, compress_pack_, **only(ROWS + BANK, given))
    assert before.is_meta or torch.equal(given["kv"], before)


@pytest.mark.parametrize("message", BANK_ERRORS)
def test_write_memory_names_the_wrong_argument(message):
    given = arguments() | {"k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 2, 16)}
    names = ("k", "v", "batch", *BANK)
    check_message(message, write_memory_, **only(names, given | BANK_ERRORS[message]))


# What only the values, the strides or the kernels' own dtypes tell; fakes have none of these.
UNSEEN = ("contiguous", "0 <= value", "pages per row", "float16, ", "meta")
SEEN = [m for m in (*ROW_ERRORS, *BANK_ERRORS) if not any(word in m for word in UNSEEN)]


@pytest.mark.parametrize("message", SEEN)
def test_compress_pack_write_fake_says_the_same(message):
    given = arguments() | (ROW_ERRORS | BANK_ERRORS)[message]
    check_fake_message(message, compress_pack_, **only(ROWS + BANK, given))


WRITE_ERRORS = {
    "k: expected shape [*, *, *], got [4, 16]": {"k": torch.zeros(4, 16)},
    "k: expected shape [4, 2, 16], got [5, 2, 16]": {"k": torch.zeros(5, 2, 16)},
    "v: expected shape [4, 2, 16], got [4, 1, 16]": {"v": torch.zeros(4, 1, 16)},
    "v: expected dtype float32, got float16": {"v": torch.zeros(4, 2, 16).half()},
    "k: expected dtype float32, bfloat16 or float16, got int8": {
        "k": torch.zeros(4, 2, 16, dtype=torch.int8)
    },
    "v: expected a contiguous last dimension, got stride 2": {"v": torch.zeros(4, 2, 32)[..., ::2]},
    "batch: expected 1 <= value <= 2147483647, got -1": {"batch": -1},
    "v: expected a tensor on the device of k, cpu, got meta": {
        "v": torch.zeros(4, 2, 16, device="meta")
    },
}


@pytest.mark.parametrize("message", WRITE_ERRORS)
def test_write_memory_names_the_wrong_row_argument(message):
    given = arguments() | {"k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 2, 16)}
    names = ("k", "v", "batch", *BANK)
    check_message(message, write_memory_, **only(names, given | WRITE_ERRORS[message]))


GRADIENT_ERRORS = {
    "grad: expected a tensor, or one as mem_grad, got None": {"grad": None, "mem_grad": None},
    "grad: expected shape [2, *, *, *], got [4, 10, 16]": {"grad": torch.zeros(4, 10, 16)},
    "grad: expected shape [2, 2, 10, 16], got [2, 2, 11, 16]": {"grad": torch.zeros(2, 2, 11, 16)},
    "grad: expected dtype float32, bfloat16 or float16, got int32": {
        "grad": torch.zeros(2, 2, 10, 16).int()
    },
    "grad: expected a contiguous last dimension": {"grad": torch.zeros(2, 2, 10, 32)[..., ::2]},
    "mem_grad: expected shape [2, 2, 2, 16], got [2, 2, 3, 16]": {
        "mem_grad": torch.zeros(2, 2, 3, 16)
    },
    "mem_grad: expected dtype float32, got bfloat16": {
        "mem_grad": torch.zeros(2, 2, 2, 16).bfloat16()
    },
    "sin: expected a tensor where cos is one, got None": {"sin": None},
    "pos0: expected 0 <= value <= 10, got 11": {"pos0": 11},
    "ratio: expected 1 <= value <= 2147483647, got 0": {"ratio": 0},
}


@pytest.mark.parametrize("message", GRADIENT_ERRORS)
def test_compress_pack_backward_refuses_what_does_not_fit(message):
    cos, sin = rope_tables(20, torch.ones(8))
    given = {
        "grad": torch.zeros(2, 2, 10, 16), "mem_grad": torch.zeros(2, 2, 2, 16), "cos": cos,
        "sin": sin, "batch": 2, "ratio": 4, "positions": None, "pos0": 0, "memory_only": False,
    } | GRADIENT_ERRORS[message]  # fmt: skip
    check_message(message, torch.ops.lychee.compress_pack_bwd, **given)


def test_compress_pack_runs_on_meta_tensors():
    given = {
        name: x.to("meta") if isinstance(x, torch.Tensor) else x
        for name, x in arguments().items()
    }  # fmt: skip
    outputs = compress_pack_(**given)
    assert [x.shape for x in outputs] == [(2, 4, 10, 16), (2, 2, 10, 16), (2, 2, 10, 16)]
    assert all(x.is_meta for x in outputs)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_writing_ops_refuse_to_lose_a_gradient(name):
    given = arguments()
    given[name].requires_grad_()
    message = f"{name}: expected a tensor without gradient, got one that requires it"
    check_message(message, compress_pack_, **only(ROWS + BANK, given))
    with torch.no_grad():
        compress_pack_(**given)
