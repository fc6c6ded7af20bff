# SPDX-License-Identifier: Apache-2.0
"""memory_attention: one case per documented error, from the kernel and under fake tensors."""

import pytest
import torch
from attention_cases import BY_NAME, make_inputs
from error_cases import check_fake_message, check_message, replaced, set_first

from lychee_kernels import memory_attention


@pytest.fixture
def inputs():
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    return {"q": q, "k": k, "v": v} | options


SHAPE_ERRORS = {
    "q: expected shape [*, *, *, *]": replaced("q", lambda q: q[0]),
    "k: expected shape [2, *, *, 64], got [2, 2, 70, 63]": replaced("k", lambda k: k[..., 1:]),
    "v: expected shape [2, 2, 70, 64], got [2, 2, 69, 64]": replaced("v", lambda v: v[:, :, 1:]),
    "k: expected dtype float32, got bfloat16": replaced("k", lambda k: k.bfloat16()),
    "k: expected a head count that divides q's, got 2": replaced("q", lambda q: q[:, :7]),
    "q: expected at least one head, got 0": replaced("q", lambda q: q[:, :0]),
    "query_stride: expected 0 <= value": lambda inputs: inputs | {"query_stride": -1},
    "kv: expected shape [*, *, 2, 2, *, 64]": replaced("kv", lambda kv: kv[:, :, :1]),
    "layer: expected 0 <= value <= 2, got 3": lambda inputs: inputs | {"layer": 3},
    "kv_scale: expected None with this bank dtype, got a tensor": lambda inputs: (
        inputs | {"kv_scale": torch.ones(inputs["kv"].shape[:5])}
    ),
    "kv_scale: expected a tensor with this bank dtype, got None": replaced(
        "kv", lambda kv: torch.zeros(kv.shape, dtype=torch.int8)
    ),
    "page_len: expected dtype int32, got int64": replaced("page_len", lambda x: x.long()),
    "page_base: expected shape [2, 6], got [2, 5]": replaced("page_base", lambda x: x[:, 1:]),
    "num_pages: expected a tensor when kv is given, got None": replaced(
        "num_pages", lambda x: None
    ),
    "cos: expected cos and sin when rope_mode is affine, got None": replaced("cos", lambda x: None),
    "valid: expected shape [2, 70], got [2, 3]": lambda inputs: (
        inputs | {"valid": torch.ones(2, 3, dtype=torch.bool)}
    ),
    "q: expected a head dimension that is a multiple of 8, at most 256, got 12": lambda inputs: {
        name: torch.zeros(1, 1, 2, 12) for name in "qkv"
    },
}

VALUE_ERRORS = {
    "q: expected dtype float32, bfloat16 or float16, got float64": lambda inputs: {
        name: inputs[name].double() for name in "qkv"
    },
    "q: expected a contiguous last dimension, got stride 70": replaced(
        "q", lambda q: q.mT.contiguous().mT
    ),
    "num_pages: expected 0 <= value <= 6, got 7": set_first("num_pages", 7),
    "page_table: expected 0 <= value <= 3, got -1": set_first("page_table", -1),
    "page_table: expected 0 <= value <= 3, got 4": set_first("page_table", 4),
    "page_len: expected 0 <= value <= 64, got 65": set_first("page_len", 65),
    "page_base: expected 0 <= value <= 4032, got 4033": set_first("page_base", 4033),
    "page_base: expected 0 <= value <= -64": lambda inputs: (
        inputs | {name: inputs[name][:0] for name in ("cos", "sin")}
    ),
}


@pytest.mark.parametrize("message", [*SHAPE_ERRORS, *VALUE_ERRORS])
def test_memory_attention_names_the_wrong_argument(inputs, message):
    wrong = (SHAPE_ERRORS | VALUE_ERRORS)[message](inputs)
    check_message(message, memory_attention, **wrong)


@pytest.mark.parametrize("message", SHAPE_ERRORS)
def test_memory_attention_fake_says_the_same(inputs, message):
    check_fake_message(message, memory_attention, **SHAPE_ERRORS[message](inputs))


def test_memory_attention_refuses_an_unknown_rope_mode(inputs):
    inputs["rope_mode"] = "local"
    check_message("rope_mode: expected none or affine, got local", memory_attention, **inputs)


def test_memory_attention_runs_on_meta_tensors():
    meta = {name: torch.empty(1, 1, 1, 8, device="meta") for name in "qkv"}
    out, lse = memory_attention(**meta)
    assert out.is_meta and lse.shape == (1, 1, 1)
