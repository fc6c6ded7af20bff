# SPDX-License-Identifier: Apache-2.0
"""select_chunks: one case per documented error, from the kernel and under fake tensors."""

import pytest
import torch
from error_cases import check_fake_message, check_message

from lychee_kernels import select_chunks

SHAPE_ERRORS = {
    "scores: expected shape [*, *], got [3]": {"scores": torch.zeros(3)},
    "scores: expected dtype float32, bfloat16 or float16, got int32": {
        "scores": torch.zeros(1, 3).int()
    },
    "max_chunks: expected >= 1, got 0": {"max_chunks": 0},
    "page_tokens: expected 1 <= value <= 2147483647, got 0": {"page_tokens": 0},
    "chunk_pages: expected shape [3, *], got [2, 2]": {"chunk_pages": torch.zeros(2, 2).int()},
    "chunk_pages: expected shape [1, 3, *], got [2, 3, 2]": {
        "chunk_pages": torch.zeros(2, 3, 2).int()
    },
    "chunk_pages: expected dtype int32, got float32": {"chunk_pages": torch.zeros(3, 2)},
    "chunk_pages: expected at most 2147483647 tokens a row, got 2 pages of 1073741824": {
        "page_tokens": 1 << 30
    },
    "chunk_tokens: expected shape [3], got [4]": {"chunk_tokens": torch.zeros(4).int()},
    "chunk_tokens: expected shape [1, 3], got [2, 3]": {"chunk_tokens": torch.zeros(2, 3).int()},
    "chunk_tokens: expected dtype int32, got int64": {"chunk_tokens": torch.zeros(3).long()},
}

VALUE_ERRORS = {
    "scores: expected dtype float32, bfloat16 or float16, got float64": {
        "scores": torch.zeros(1, 3).double()
    },
    "chunk_tokens: expected 0 <= value <= 8, got 9": {
        "chunk_tokens": torch.tensor([9, 0, 0]).int()
    },
    "chunk_tokens: expected 0 <= value <= 8, got -1": {
        "chunk_tokens": torch.tensor([-1, 0, 0]).int()
    },
}


def arguments(**change):
    given = {
        "scores": torch.zeros(1, 3), "threshold": 0.0, "max_chunks": 1, "page_tokens": 4,
        "chunk_pages": torch.zeros(3, 2).int(), "chunk_tokens": torch.zeros(3).int(),
    }  # fmt: skip
    return given | change


@pytest.mark.parametrize("message", [*SHAPE_ERRORS, *VALUE_ERRORS])
def test_select_chunks_names_the_wrong_argument(message):
    wrong = arguments(**(SHAPE_ERRORS | VALUE_ERRORS)[message])
    check_message(message, select_chunks, **wrong)


@pytest.mark.parametrize("message", SHAPE_ERRORS)
def test_select_chunks_fake_says_the_same(message):
    check_fake_message(message, select_chunks, **arguments(**SHAPE_ERRORS[message]))


def test_select_chunks_runs_on_meta_tensors():
    given = arguments()
    for name in ("scores", "chunk_pages", "chunk_tokens"):
        given[name] = given[name].to("meta")
    result = select_chunks(**given)
    assert result.page_table.is_meta and result.page_table.shape == (1, 2)
    assert result.chunks.shape == (1, 1)
