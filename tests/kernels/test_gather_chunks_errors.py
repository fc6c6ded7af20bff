# SPDX-License-Identifier: Apache-2.0
"""gather_chunks: one case per documented error, from the kernel and under fake tensors."""

import pytest
import torch
from attention_cases import BY_NAME, make_inputs
from error_cases import check_fake_message, check_message, replaced, set_first

from lychee_kernels import gather_chunks


@pytest.fixture
def inputs():
    options = make_inputs(BY_NAME["prefix"])[3]
    return {name: x for name, x in options.items() if name not in ("layer", "query_stride")}


def layers(*layer_range):
    return lambda inputs: inputs | {"layer_range": layer_range}


SHAPE_ERRORS = {
    "kv: expected shape [*, *, *, 2, *, *], got [3, 2, 2, 64, 64]": replaced("kv", lambda x: x[0]),
    "kv: expected at least one layer, got 0": replaced("kv", lambda x: x[:, :0]),
    "kv: expected a head dimension that is a multiple of 8, at most 256, got 60": replaced(
        "kv", lambda x: x[..., :60]
    ),
    "kv: expected dtype float32, bfloat16, float16, int8": replaced(
        "kv", lambda x: torch.zeros(x.shape, dtype=torch.int16)
    ),
    "kv_scale: expected None with this bank dtype, got a tensor": replaced(
        "kv_scale", lambda _: torch.ones(4, 3, 2, 2, 64)
    ),
    "kv_scale: expected a tensor with this bank dtype, got None": replaced(
        "kv", lambda x: torch.zeros(x.shape, dtype=torch.int8)
    ),
    "kv_scale: expected shape [4, 3, 2, 2, 64], got [4, 3, 2, 2, 63]": lambda inputs: (
        inputs
        | {
            "kv": torch.zeros(inputs["kv"].shape, dtype=torch.int8),
            "kv_scale": torch.ones(4, 3, 2, 2, 63),
        }
    ),  # fmt: skip
    "layer_range: expected 1 <= value <= 3, got 4": layers(1, 4),
    "layer_range: expected 0 <= value <= 1, got 2": layers(2, 1),
    "layer_range: expected 0 <= value <= 1, got -1": layers(-1, 1),
    "page_table: expected shape [*, *], got [12]": replaced("page_table", torch.flatten),
    "page_table: expected dtype int32, got int64": replaced("page_table", torch.Tensor.long),
    "page_len: expected shape [2, 6], got [2, 5]": replaced("page_len", lambda x: x[:, 1:]),
    "page_len: expected dtype int32, got float32": replaced("page_len", torch.Tensor.float),
    "page_base: expected shape [2, 6], got [1, 6]": replaced("page_base", lambda x: x[1:]),
    "page_base: expected dtype int32, got int64": replaced("page_base", torch.Tensor.long),
    "num_pages: expected shape [2], got [2, 1]": replaced("num_pages", lambda x: x[:, None]),
    "num_pages: expected dtype int32, got int64": replaced("num_pages", torch.Tensor.long),
    "cos: expected cos, sin and page_base when rope_mode is affine, got None": replaced(
        "page_base", lambda _: None
    ),
    "cos: expected shape [*, 32], got [4096, 16]": replaced("cos", lambda x: x[:, :16]),
    "sin: expected shape [4096, 32], got [4095, 32]": replaced("sin", lambda x: x[1:]),
    "out_dtype: expected dtype float32, bfloat16 or float16, got int8": lambda inputs: (
        inputs | {"out_dtype": torch.int8}
    ),
}

VALUE_ERRORS = {
    "kv: expected dtype float32, bfloat16, float16, int8 or float8_e4m3fn, got float64": replaced(
        "kv", torch.Tensor.double
    ),
    "out_dtype: expected dtype float32, bfloat16 or float16, got float64": lambda inputs: (
        inputs | {"out_dtype": torch.float64}
    ),
    "cos: expected dtype float32, got float64": replaced("cos", torch.Tensor.double),
    "kv: expected a contiguous last dimension, got stride 64": replaced(
        "kv", lambda x: x.mT.contiguous().mT
    ),
    "sin: expected a contiguous tensor, got a strided view": replaced(
        "sin", lambda x: x.T.contiguous().T
    ),
    "page_len: expected a contiguous tensor, got a strided view": replaced(
        "page_len", lambda x: x.T.contiguous().T
    ),
    "num_pages: expected 0 <= value <= 6, got 7": set_first("num_pages", 7),
    "num_pages: expected 0 <= value <= 6, got -1": set_first("num_pages", -1),
    "page_table: expected 0 <= value <= 3, got -1": set_first("page_table", -1),
    "page_table: expected 0 <= value <= 3, got 4": set_first("page_table", 4),
    "page_len: expected 0 <= value <= 64, got 65": set_first("page_len", 65),
    "page_base: expected 0 <= value <= 4032, got 4033": set_first("page_base", 4033),
    "page_base: expected 0 <= value <= 4032, got -1": set_first("page_base", -1),
}


@pytest.mark.parametrize("message", [*SHAPE_ERRORS, *VALUE_ERRORS])
def test_gather_chunks_names_the_wrong_argument(inputs, message):
    wrong = (SHAPE_ERRORS | VALUE_ERRORS)[message](inputs)
    check_message(message, gather_chunks, **wrong)


@pytest.mark.parametrize("message", SHAPE_ERRORS)
def test_gather_chunks_fake_says_the_same(inputs, message):
    check_fake_message(message, gather_chunks, **SHAPE_ERRORS[message](inputs))


def test_gather_chunks_refuses_an_unknown_rope_mode(inputs):
    inputs["rope_mode"] = "local"
    check_message("rope_mode: expected none or affine, got local", gather_chunks, **inputs)


def test_gather_chunks_runs_on_meta_tensors(inputs):
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    k, v, valid = gather_chunks(**meta, out_dtype=torch.float16)
    assert k.is_meta and k.shape == v.shape == (3, 2, 2, 384, 64) and k.dtype == torch.float16
    assert valid.shape == (2, 384) and valid.dtype == torch.bool
