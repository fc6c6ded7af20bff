# SPDX-License-Identifier: Apache-2.0
"""gather_chunks: against a loop over tokens and against reading in place, gradients, errors."""

import dataclasses

import pytest
import torch
from attention_cases import BY_NAME, QUANTISED, make_inputs, to_double

from lychee_kernels import gather_chunks, memory_attention
from lychee_kernels.ref.compress_pack import rotate

TABLE = ("page_table", "page_len", "page_base", "num_pages")
PAGED = ["pages", "prefix", "decode", "int8", "float8"]


def bank_of(options):
    return [options[name] for name in ("kv", "kv_scale", *TABLE, "cos", "sin")]


@pytest.mark.parametrize("name", PAGED)
def test_gather_chunks_matches_a_loop_over_tokens(name):
    options = to_double(*make_inputs(BY_NAME[name]))[3]
    kv, kv_scale, table, length, base, num_pages, cos, sin = bank_of(options)
    k, v, valid = gather_chunks(
        *bank_of(options), rope_mode=options["rope_mode"], out_dtype=torch.float64
    )
    page_tokens = kv.shape[4]
    assert k.shape == (3, table.shape[0], kv.shape[2], table.shape[1] * page_tokens, kv.shape[5])
    expected_k, expected_v = torch.zeros_like(k), torch.zeros_like(v)
    expected_valid = torch.zeros_like(valid)
    for b, count in enumerate(num_pages.tolist()):
        for i in range(count):
            for j in range(length[b, i]):
                at = i * page_tokens + j
                rows = kv[table[b, i], :, :, :, j].double()
                if kv_scale is not None:
                    rows = rows * kv_scale[table[b, i], :, :, :, j, None]
                expected_k[:, b, :, at], expected_v[:, b, :, at] = rows.unbind(2)
                if options["rope_mode"] == "affine":
                    position = base[b, i] + j
                    expected_k[:, b, :, at] = rotate(rows[:, :, 0], cos[position], sin[position])
                expected_valid[b, at] = True
    assert torch.equal(valid, expected_valid)
    assert torch.equal(v, expected_v)
    torch.testing.assert_close(k, expected_k, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAGED)
def test_gathered_chunks_attend_like_pages_in_place(name):
    q, _, _, options = make_inputs(BY_NAME[name])
    empty = torch.zeros(q.shape[0], options["kv"].shape[2], 0, q.shape[3])
    options["query_stride"] = 0
    in_place = memory_attention(q, empty, empty, **options)
    k, v, valid = gather_chunks(
        *bank_of(options), layer_range=(1, 2), rope_mode=options["rope_mode"]
    )
    gathered = memory_attention(q, k[0], v[0], valid=valid, query_stride=0)
    torch.testing.assert_close(gathered[0], in_place[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gathered[1], in_place[1], rtol=1e-5, atol=1e-5)


def test_gather_chunks_dtypes():
    for name, bank, wanted in [
        ("prefix", None, torch.bfloat16), ("int8", None, torch.float32),
        ("int8", torch.float16, torch.float16),
    ]:  # fmt: skip
        options = make_inputs(BY_NAME[name], torch.bfloat16)[3]
        assert gather_chunks(*bank_of(options), out_dtype=bank)[0].dtype == wanted


def test_gather_chunks_passes_gradcheck():
    case = dataclasses.replace(BY_NAME["pages"], pages=2, page_tokens=3)
    options = to_double(*make_inputs(case))[3]
    bank = bank_of(options)
    assert bank[0].dtype not in QUANTISED
    kv = bank[0][..., :2].nan_to_num().requires_grad_()
    tables = [bank[i][:, :1].double() for i in (6, 7)]

    def gather(kv):
        return gather_chunks(kv, *bank[1:6], *tables, rope_mode="affine")[:2]

    assert torch.autograd.gradcheck(gather, (kv,))


def test_gather_chunks_of_an_empty_bank_is_empty():
    options = make_inputs(BY_NAME["prefix"])[3]
    options["kv"] = options["kv"][:0]
    options["num_pages"].zero_()
    k, v, valid = gather_chunks(*bank_of(options))
    assert not k.any() and not v.any() and not valid.any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv": torch.zeros(2, 2)}, "kv: expected 6 dimensions, got 2"),
        ({"kv_scale": torch.zeros(1)}, "kv_scale: expected None with this bank dtype"),
        ({"rope_mode": "local"}, "rope_mode: expected none or affine, got local"),
        ({"layer_range": (1, 4)}, "layer_range: expected 1 <= value <= 3, got 4"),
        ({"layer_range": (2, 1)}, "layer_range: expected 0 <= value <= 1, got 2"),
        ({"cos": None}, "cos: expected cos, sin and page_base when rope_mode is affine"),
        ({"page_table": torch.full((2, 6), 4)}, "page_table: expected 0 <= value <= 3, got 4"),
        ({"num_pages": torch.tensor([7, 1])}, "num_pages: expected 0 <= value <= 6, got 7"),
        ({"page_len": torch.full((2, 6), 65)}, "page_len: expected 0 <= value <= 64, got 65"),
        (
            {"page_base": torch.full((2, 6), 4033), "page_len": torch.full((2, 6), 64)},
            "page_base: expected 0 <= value <= 4032, got 4033",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_gather_chunks_names_the_wrong_argument(change, message):
    options = make_inputs(BY_NAME["prefix"])[3]
    for name in ("layer", "query_stride"):
        options.pop(name)
    with pytest.raises(RuntimeError) as caught:
        gather_chunks(**options | change)
    assert f"gather_chunks: {message}" in str(caught.value)
