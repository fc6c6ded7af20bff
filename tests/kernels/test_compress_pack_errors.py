# SPDX-License-Identifier: Apache-2.0
"""compress_pack, compress_pack_ and write_memory_: one case per documented error."""

import pytest
import torch

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
    "layer: expected 0 <= value <= 1, got 2": {"layer": 2},
    "page_table: expected shape [2, *], got [2]": {"page_table": int32(0, 2)},
    "page_table: expected dtype int32, got int64": {"page_table": torch.tensor([[0], [2]])},
    "page_table: expected 0 <= value <= 2, got 3": {"page_table": int32([0], [3])},
    "page_table: expected 0 <= value <= 2, got -1": {"page_table": int32([-1], [2])},
    "page_table: expected at least 2 pages per row, got 1": {"slot0": int32(0, 3)},
    "slot0: expected 0 <= value <= 2147483647, got -1": {"slot0": int32(0, -1)},
    "mem_valid: expected shape [2, 2], got [2, 8]": {
        "mem_valid": torch.ones(2, 8, dtype=torch.bool)
    },
}


def check_message(op, function, message, given, names):
    with pytest.raises(RuntimeError) as caught:
        function(**{name: given[name] for name in given if name in names})
    assert f"{op}: {message}" in str(caught.value)


ROWS = ("q", "k", "v", "cos", "sin", "batch", "ratio", "positions", "pos0")
BANK = ("kv", "kv_scale", "page_table", "slot0", "layer", "mem_valid")


@pytest.mark.parametrize("message", ROW_ERRORS)
def test_compress_pack_names_the_wrong_argument(message):
    given = arguments() | ROW_ERRORS[message]
    check_message("compress_pack", compress_pack, message, given, ROWS)


@pytest.mark.parametrize("message", [*ROW_ERRORS, *BANK_ERRORS])
def test_compress_pack_write_names_the_wrong_argument(message):
    given = arguments() | (ROW_ERRORS | BANK_ERRORS)[message]
    before = given["kv"].clone()
    check_message("compress_pack_", compress_pack_, message, given, ROWS + BANK)
    assert torch.equal(given["kv"], before)


@pytest.mark.parametrize("message", BANK_ERRORS)
def test_write_memory_names_the_wrong_argument(message):
    given = arguments() | {"k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 2, 16)}
    names = ("k", "v", "batch", *BANK)
    check_message("write_memory_", write_memory_, message, given | BANK_ERRORS[message], names)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_writing_ops_refuse_to_lose_a_gradient(name):
    given = arguments()
    given[name].requires_grad_()
    message = f"{name}: expected a tensor without gradient, got one that requires it"
    check_message("compress_pack_", compress_pack_, message, given, ROWS + BANK)
    with torch.no_grad():
        compress_pack_(**given)
