# SPDX-License-Identifier: Apache-2.0
"""memory_attention for one query token: every number of heads, bank dtype and page shape."""

import dataclasses

import pytest
import torch
from attention_cases import Case, check_forward, make_inputs

from lychee_kernels import memory_attention

CASES = [
    Case("g1_float32", heads=2, kv_heads=2, dim=32, pages=4, keys=0, page_tokens=7),
    Case("g2_float8", heads=4, kv_heads=2, dim=64, pages=3, bank_dtype=torch.float8_e4m3fn),
    Case("g3_float16", heads=3, kv_heads=1, dim=96, pages=3, bank_dtype=torch.float16),
    Case("g4_holes", heads=8, kv_heads=2, dim=128, keys=131, holes=True),
    Case("g5_unrotated", heads=5, kv_heads=1, dim=64, pages=4, rope_mode="none", keys=1),
    Case("g7_int8", heads=28, kv_heads=4, dim=128, pages=9, bank_dtype=torch.int8, keys=2),
    Case("g7_bfloat16", heads=7, kv_heads=1, dim=128, pages=5, bank_dtype=torch.bfloat16),
    Case(
        "g8_long_page",
        heads=8,
        kv_heads=1,
        dim=64,
        pages=2,
        page_tokens=150,
        keys=65,
        bank_dtype=torch.int8,
    ),
    Case("g7_odd_dim", heads=7, kv_heads=1, dim=40, pages=3, bank_dtype=torch.int8),
    Case("g9", heads=9, kv_heads=1, dim=64, pages=3),
]
CASES = [
    dataclasses.replace(case, queries=1, rope_mode="affine" if case.pages else "none")
    if case.name != "g5_unrotated"
    else dataclasses.replace(case, queries=1)
    for case in CASES
]
BY_NAME = {case.name: case for case in CASES}
PAGE_NAMES = ("page_table", "page_len", "page_base", "num_pages")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode_matches_reference(case):
    check_forward(*make_inputs(case))


def test_a_block_of_many_rows_shares_its_keys_among_few_splits():
    """More keys than splits of the least size hold, and a row of the batch with few of them."""
    case = Case("wide", queries=64, heads=8, kv_heads=1, keys=70, pages=24, page_tokens=2000)
    q, k, v, options = make_inputs(case)
    options["kv"].nan_to_num_()
    options["page_table"].clamp_(min=0)
    options["page_len"].fill_(2000)
    options["num_pages"][:] = torch.tensor([24, 1])
    check_forward(q, k, v, options)
    tables = {name: options[name][1:] for name in PAGE_NAMES}
    alone = memory_attention(q[1:], k[1:], v[1:], **options | tables)
    both = memory_attention(q, k, v, **options)
    assert all(torch.equal(one[0], two[1]) for one, two in zip(alone, both, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["g4_holes", "g7_int8"])
def test_decode_matches_reference_in_16_bits(name, dtype):
    check_forward(*make_inputs(BY_NAME[name], dtype))


def test_decode_matches_reference_with_scaled_tables_that_start_later():
    # as YaRN scales them, and as a slice of longer tables
    q, k, v, options = make_inputs(BY_NAME["g7_int8"])
    options["page_base"] = options["page_base"].clamp(max=4000)
    options |= {name: (options[name] * 1.25)[9:].contiguous() for name in ("cos", "sin")}
    check_forward(q, k, v, options)


def long_inputs():
    """Three rows of 20, 3 and 0 pages; the first takes two splits."""
    case = Case("long", batch=3, queries=1, keys=0, heads=14, dim=64, pages=20, rope_mode="affine",
                bank_dtype=torch.int8)  # fmt: skip
    q, k, v, options = make_inputs(case)
    options["page_table"] = torch.randint(0, 20, (3, 20)).int()
    options["page_base"] = (torch.arange(20) * 64).expand(3, 20).int().contiguous()
    options["page_len"] = torch.full((3, 20), 64).int()
    options["num_pages"] = torch.tensor([20, 3, 0]).int()
    options["kv_scale"] = torch.rand(options["kv_scale"].shape)
    return q, k, v, options


def test_decode_does_not_depend_on_batch_or_threads():
    q, k, v, options = long_inputs()
    expected, expected_lse = memory_attention(q, k, v, **options)
    assert torch.equal(memory_attention(q, k, v, **options)[0], expected)
    for b in range(3):
        row = {name: options[name][b : b + 1] for name in PAGE_NAMES}
        parts = [x[b : b + 1] for x in (q, k, v)]
        out, lse = memory_attention(*parts, **options | row)
        assert torch.equal(out, expected[b : b + 1]) and torch.equal(lse, expected_lse[b : b + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(memory_attention(q, k, v, **options)[0], expected)
    finally:
        torch.set_num_threads(threads)


def test_decode_of_an_empty_selection_is_zero_and_minus_infinity():
    q, k, v, options = long_inputs()
    out, lse = memory_attention(q, k, v, **options)
    assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()
    assert out[:2].abs().sum() > 0 and lse[:2].isfinite().all()
    hidden = torch.zeros(1, 5, dtype=torch.bool)
    k = torch.full((1, 2, 5, 64), torch.nan)
    out, lse = memory_attention(q[:1], k, k, valid=hidden)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("queries", [1, 3])
def test_attention_reads_pages_beyond_two_billion_elements(tmp_path, queries):
    # a sparse file: only the page that is written takes room on disk
    pages = 2**31 // (2 * 64 * 128) + 3
    storage = torch.from_file(
        str(tmp_path / "bank"), shared=True, size=pages * 2 * 64 * 128, dtype=torch.int8
    )
    kv = storage.view(pages, 1, 1, 2, 64, 128)
    page = torch.randint(-127, 128, (1, 1, 1, 2, 64, 128), dtype=torch.int8)
    kv[-1:] = page
    scale = torch.rand(1, 1, 1, 2, 64)
    q, k = torch.randn(1, 7, queries, 128), torch.empty(1, 1, 0, 128)
    options = {name: torch.tensor([[64]]).int() for name in ("page_len", "page_base")}
    options |= {"num_pages": torch.tensor([1]).int()}
    expected = memory_attention(
        q, k, k, kv=page, kv_scale=scale, page_table=torch.tensor([[0]]).int(), **options
    )
    table = torch.tensor([[pages - 1]]).int()
    actual = memory_attention(
        q, k, k, kv=kv, kv_scale=scale.expand(pages, -1, -1, -1, -1), page_table=table, **options
    )
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert expected[0].abs().sum() > 0
