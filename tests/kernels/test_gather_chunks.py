# SPDX-License-Identifier: Apache-2.0
"""gather_chunks: by a loop, against the reference and reading in place, edges, registration."""

import dataclasses

import pytest
import torch
from attention_cases import BY_NAME, QUANTISED, Case, make_inputs, to_double

from lychee_kernels import gather_chunks, memory_attention, ref
from lychee_kernels.rope import rotate
from lychee_kernels.testing import compare, poison

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TABLE = ("page_table", "page_len", "page_base", "num_pages")
PAGED = ["pages", "prefix", "decode", "long_page", "int8", "float8"]
# one token, a prime head count, pages shorter than a vector, half a head of 12 dimensions
ODD = [
    Case("one", batch=1, kv_heads=1, pages=1, page_tokens=1, dim=8, rope_mode="affine"),
    Case("primes", batch=3, kv_heads=3, pages=5, page_tokens=3, dim=24, rope_mode="affine"),
]
cases = pytest.mark.parametrize("case", [*map(BY_NAME.get, PAGED), *ODD], ids=lambda c: c.name)


def bank_of(options):
    return [options[name] for name in ("kv", "kv_scale", *TABLE, "cos", "sin")]


def options_of(case, dtype=torch.float32, double=False):
    inputs = make_inputs(case, dtype)
    return (to_double(*inputs) if double else inputs)[3]


@pytest.mark.parametrize("name", PAGED)
def test_reference_of_gather_chunks_matches_a_loop_over_tokens(name):
    options = options_of(BY_NAME[name], double=True)
    kv, kv_scale, table, length, base, num_pages, cos, sin = bank_of(options)
    k, v, valid = ref.gather_chunks(
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


@cases
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_gather_chunks_matches_reference(case, out_dtype):
    options = options_of(case)
    rotated = {"rope_mode": case.rope_mode, "out_dtype": out_dtype}
    k, v, valid = gather_chunks(*bank_of(options), **rotated)
    baseline = ref.gather_chunks(*bank_of(options), **rotated)
    rotated["out_dtype"] = torch.float64
    exact = ref.gather_chunks(*bank_of(options_of_double(options)), **rotated)
    compare(k, exact[0], baseline[0])
    assert torch.equal(v, baseline[1])
    assert torch.equal(valid, baseline[2])
    assert k.is_contiguous() and v.is_contiguous()


def options_of_double(options):
    nothing = torch.zeros(0)
    return to_double(nothing, nothing, nothing, options)[3]


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("bank_dtype", [*FLOATS, *QUANTISED])
def test_gather_chunks_without_rotation_equals_reference(bank_dtype, out_dtype):
    options = options_of(dataclasses.replace(BY_NAME["primes"], pages=5, bank_dtype=bank_dtype))
    actual = gather_chunks(*bank_of(options), out_dtype=out_dtype)
    expected = ref.gather_chunks(*bank_of(options), out_dtype=out_dtype)
    assert actual[0].dtype == out_dtype and actual[0].abs().sum() > 0
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("bank_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_gather_chunks_matches_reference_at_every_head_dimension(dim, bank_dtype):
    case = Case("dim", batch=1, kv_heads=1, pages=1, page_tokens=2, dim=dim, bank_dtype=bank_dtype)
    options = options_of(case)
    rotated = {"rope_mode": "affine", "out_dtype": torch.bfloat16}
    actual = gather_chunks(*bank_of(options), **rotated)
    baseline = ref.gather_chunks(*bank_of(options), **rotated)
    exact = ref.gather_chunks(
        *bank_of(options_of_double(options)), rope_mode="affine", out_dtype=torch.float64
    )
    compare(actual[0], exact[0], baseline[0])
    assert torch.equal(actual[1], baseline[1])


@pytest.mark.parametrize("bank_dtype", [*FLOATS, torch.float8_e4m3fn])
def test_gather_chunks_keeps_special_values_of_every_bank(bank_dtype):
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 448.0, 2.0**-9, 65504.0, 1e-7, 3e38]
    if bank_dtype == torch.float8_e4m3fn:
        # every code there is, both NaNs among them
        rows = torch.arange(256, dtype=torch.uint8).view(bank_dtype)
    else:
        rows = torch.tensor(special).repeat(26)[:256].to(bank_dtype)
    kv = rows.expand(1, 1, 1, 2, 1, 256).contiguous()
    scale = torch.full((1, 1, 1, 2, 1), 1.5) if bank_dtype in QUANTISED else None
    table = [torch.zeros(1, 1).int(), torch.ones(1, 1).int(), None, torch.ones(1).int()]
    for out_dtype in FLOATS:
        actual = gather_chunks(kv, scale, *table, out_dtype=out_dtype)
        expected = ref.gather_chunks(kv, scale, *table, out_dtype=out_dtype)
        for pair in zip(actual, expected, strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


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


def test_gather_chunks_takes_a_range_of_layers():
    bank = bank_of(options_of(BY_NAME["int8"]))
    k, v, valid = gather_chunks(*bank, rope_mode="affine")
    for first, last in [(0, 1), (1, 3), (2, 2)]:
        some = gather_chunks(*bank, layer_range=(first, last), rope_mode="affine")
        assert torch.equal(some[0], k[first:last]) and torch.equal(some[1], v[first:last])
        assert torch.equal(some[2], valid)


def test_gather_chunks_dtypes():
    for name, bank, wanted in [
        ("prefix", None, torch.bfloat16), ("int8", None, torch.float32),
        ("int8", torch.float16, torch.float16),
    ]:  # fmt: skip
        options = options_of(BY_NAME[name], torch.bfloat16)
        assert gather_chunks(*bank_of(options), out_dtype=bank)[0].dtype == wanted


@pytest.mark.parametrize("name", ["prefix", "int8"])
def test_gather_chunks_reads_a_strided_bank(name):
    options = options_of(BY_NAME[name])
    kv, kv_scale, *rest = bank_of(options)
    expected = gather_chunks(kv, kv_scale, *rest, rope_mode="affine")
    pages, layers, heads, _, tokens, dim = kv.shape
    wide = poison(
        torch.empty(pages + 2, heads + 1, layers + 2, 2, tokens + 3, dim + 5).to(kv.dtype)
    )
    inside = wide[1:-1, 1:, 1:-1, :, 2:-1, 3:-2].transpose(1, 2)
    inside.copy_(kv)
    if kv_scale is not None:
        wide_scale = poison(torch.empty(pages, 2, layers + 1, heads, tokens + 3))
        inside_scale = wide_scale[:, :, 1:, :, 2:-1].permute(0, 2, 3, 1, 4)
        kv_scale = inside_scale.copy_(kv_scale)
    actual = gather_chunks(inside, kv_scale, *rest, rope_mode="affine")
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_gather_chunks_of_an_empty_bank_is_empty():
    options = options_of(BY_NAME["prefix"])
    options["kv"] = options["kv"][:0]
    options["num_pages"].zero_()
    k, v, valid = gather_chunks(*bank_of(options))
    assert k.numel() > 0
    assert not k.any() and not v.any() and not valid.any()


def test_gather_chunks_of_no_rows_or_no_pages():
    bank = bank_of(options_of(BY_NAME["prefix"]))
    rows = [x[:0] for x in bank[2:6]]
    k, _, valid = gather_chunks(*bank[:2], *rows, *bank[6:], rope_mode="affine")
    assert k.shape == (3, 0, 2, 6 * 64, 64) and valid.shape == (0, 6 * 64)
    columns = [x[:, :0].contiguous() for x in bank[2:5]]
    k, _, valid = gather_chunks(*bank[:2], *columns, bank[5] * 0, *bank[6:], rope_mode="affine")
    assert k.shape == (3, 2, 2, 0, 64) and valid.shape == (2, 0)


def test_gather_chunks_does_not_depend_on_batch_or_threads():
    bank = bank_of(options_of(BY_NAME["decode"]))
    table = [x.repeat(3, *[1] * (x.dim() - 1)) for x in bank[2:6]]
    expected = gather_chunks(*bank, rope_mode="affine")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        actual = gather_chunks(*bank[:2], *table, *bank[6:], rope_mode="affine")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(actual[0], expected[0].expand_as(actual[0]))
    assert torch.equal(actual[1], expected[1].expand_as(actual[1]))


def test_gather_chunks_reads_beyond_two_to_the_31_elements(tmp_path):
    pages, shape = 2**31 // (2 * 64 * 128) + 3, (1, 1, 2, 64, 128)
    count = pages * 2 * 64 * 128
    # a sparse file: only the pages that are written take room
    kv = torch.from_file(str(tmp_path / "bank"), shared=True, size=count, dtype=torch.bfloat16)
    kv = kv.view(pages, *shape)
    kv[-1], kv[0] = torch.randn(shape), torch.randn(shape)
    table = torch.tensor([[pages - 1, 0]]).int(), torch.full((1, 2), 64).int(), None
    k, v, _ = gather_chunks(kv, None, *table, torch.tensor([2]).int())
    assert torch.equal(k[0, 0, 0], torch.cat((kv[-1, 0, 0, 0], kv[0, 0, 0, 0])))
    assert torch.equal(v[0, 0, 0], torch.cat((kv[-1, 0, 0, 1], kv[0, 0, 0, 1])))


@pytest.mark.parametrize("name", ["pages", "int8"])
def test_gather_chunks_passes_opcheck(name):
    bank = bank_of(options_of(BY_NAME[name]))
    bank[0] = bank[0].nan_to_num() if bank[1] is None else bank[0]
    bank[1] = None if bank[1] is None else bank[1].nan_to_num()
    arguments = *bank, 1, 3, 1, torch.float32
    torch.library.opcheck(torch.ops.lychee.gather_chunks.default, arguments)


def test_gather_chunks_compiles_to_one_graph():
    bank = bank_of(options_of(BY_NAME["int8"]))

    def total(factor):
        k, v, valid = gather_chunks(*bank, rope_mode="affine", out_dtype=torch.bfloat16)
        return (k + v) * factor, valid

    factor = torch.tensor(2.0)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(factor), total(factor), strict=True):
        assert torch.equal(actual, expected)
