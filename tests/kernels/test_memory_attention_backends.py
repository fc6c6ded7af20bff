# SPDX-License-Identifier: Apache-2.0
"""memory_attention on every backend, against the float64 reference; and what holds for the kernels
of a GPU alone."""

import dataclasses

import pytest
import torch
from attention_cases import BY_NAME, Case, make_inputs, to_double
from test_memory_attention_errors import SHAPE_ERRORS, VALUE_ERRORS

from lychee_kernels import ref
from lychee_kernels.testing import compare, poison

DECODE = [
    Case("g7_rotated", batch=2, heads=14, dim=128, pages=5, keys=70, rope_mode="affine"),
    Case("g1_small_dim", batch=3, heads=2, dim=64, pages=3, keys=0, rope_mode="affine"),
    Case("g8_holes", batch=1, heads=8, kv_heads=1, dim=64, pages=3, keys=131, holes=True),
    Case("g3_long_pages", heads=3, kv_heads=1, dim=128, pages=2, page_tokens=148, keys=9),
]
DECODE = [dataclasses.replace(case, queries=1) for case in DECODE]
# up to 16 rows (query tokens x heads of a kv head) are decoded together
DECODE += [
    Case("g4_tokens", queries=4, keys=67, dim=64, heads=8, pages=2, rope_mode="affine"),
    Case("g2_strided", queries=3, keys=40, dim=128, pages=3, query_stride=13),
]
PREFILL = [
    Case("prefill", queries=21, keys=90, heads=8, dim=64, pages=3, rope_mode="affine"),
    Case("small", batch=1, queries=9, keys=20, dim=64, pages=3, rope_mode="affine"),
    Case("g7", batch=1, queries=19, keys=19, heads=7, kv_heads=1, dim=128, pages=2),
    Case("holes", queries=40, keys=150, heads=2, dim=64, holes=True, query_stride=3),
    Case("pages_only", batch=1, queries=18, keys=0, kv_heads=4, dim=128, pages=3,
         page_tokens=80, rope_mode="affine"),
]  # fmt: skip
BY_NAME = BY_NAME | {case.name: case for case in DECODE + PREFILL}
PAGE_NAMES = ("page_table", "page_len", "page_base", "num_pages")
# dtypes of the inputs and of the bank
DTYPES = {
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "int8": (torch.bfloat16, torch.int8),
    "float8": (torch.float16, torch.float8_e4m3fn),
}


def plain_attention(q, k, v, options):
    """Gathers the pages in the dtype of q, then multiplies in it, softmax in float32: what a model
    in plain PyTorch does."""
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    t, j = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    seen = j <= num_keys - 1 - (num_queries - 1 - t) * options["query_stride"]
    seen = seen.expand(batch, num_queries, num_keys)
    if options.get("valid") is not None:
        valid = options["valid"][:, None]
        seen = seen & valid
        k, v = (x.masked_fill(~valid[..., None], 0.0) for x in (k, v))
    if options.get("kv") is not None:
        names = ("kv", "kv_scale", "page_table", "page_len", "page_base", "num_pages", "cos", "sin")
        page_k, page_v, in_use = ref.gather_chunks(
            *(options[name] for name in names), rope_mode=options["rope_mode"], out_dtype=q.dtype,
            layer_range=(options["layer"], options["layer"] + 1),
        )  # fmt: skip
        k, v = torch.cat((page_k[0], k), 2), torch.cat((page_v[0], v), 2)
        seen = torch.cat((in_use[:, None].expand(-1, num_queries, -1), seen), 2)
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, 1) for x in (k, v))
    scores = (q @ k.mT * head_dim**-0.5).masked_fill(~seen[:, None], -torch.inf).float()
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    return weights.to(q.dtype) @ v, lse


def check(backend, q, k, v, options):
    out, lse = backend.memory_attention(q, k, v, **options)
    double_q, double_k, double_v, double_options = to_double(q, k, v, options)
    exact, exact_lse = ref.memory_attention(double_q, double_k, double_v, **double_options)
    if q.dtype == torch.float32:
        plain, plain_lse = ref.memory_attention(q, k, v, **options)
    else:
        plain, plain_lse = plain_attention(q, k, v, options)
    compare(out, exact, plain)
    compare(lse, exact_lse, plain_lse)
    return out, lse


def inputs_of(name, dtypes="bfloat16", **changes):
    dtype, bank_dtype = DTYPES[dtypes]
    case = dataclasses.replace(BY_NAME[name], **{"bank_dtype": bank_dtype} | changes)
    return make_inputs(case, dtype)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", DECODE + PREFILL, ids=lambda case: case.name)
def test_16_bit_attention_matches_reference(backend, case, dtypes):
    if DTYPES[dtypes][1] is not None and not case.pages:
        pytest.skip("no bank")
    backend.leave_out(dtypes != "bfloat16" and case.name not in ("g4_tokens", "small"))
    check(backend, *inputs_of(case.name, dtypes))


@pytest.mark.parametrize("name", ["one", "primes", "pages", "long_page", "int8", "float8"])
def test_float32_attention_matches_reference(backend, name):
    backend.leave_out(name != "long_page")  # the others: test_triton.py
    check(backend, *make_inputs(BY_NAME[name]))


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("queries", [1, 20])
def test_mixed_dtypes_match_reference(backend, bank_dtype, queries):
    check(backend, *inputs_of("g4_tokens", bank_dtype=bank_dtype, queries=queries))


@pytest.mark.parametrize("name", ["g7_rotated", "prefill"])
@pytest.mark.parametrize("dtypes", ["bfloat16", "int8"])
def test_tables_may_be_scaled_and_start_later(backend, name, dtypes):
    # as YaRN scales them, and as a slice of longer tables
    q, k, v, options = inputs_of(name, dtypes)
    options["page_base"] = options["page_base"].clamp(max=4000)
    options |= {name: (options[name] * 1.25)[16:].contiguous() for name in ("cos", "sin")}
    check(backend, q, k, v, options)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", ["g7_rotated", "small"])
def test_every_schedule_gives_the_same_bits_without_bank_conflicts(backend, name, dtypes):
    if len(backend.seeds) == 1:
        pytest.skip("has one schedule")
    q, k, v, options = inputs_of(name, dtypes)
    results = []
    for seed in backend.seeds:
        backend.use_seed(seed)
        results.append(backend.memory_attention(q, k, v, **options))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
    if backend.name == "emulated":
        counts = backend.take_statistics()
        assert counts["matrix_loads"] > 0 and counts["mma"] > 0
        assert counts["bank_conflicts"] == 0


def long_inputs(dtype, bank_dtype):
    """Three rows of 70, 3 and 0 pages; the first takes many splits, the last sees no key."""
    case = Case("long", batch=3, queries=1, keys=0, heads=7, kv_heads=1, dim=64, pages=9,
                rope_mode="affine", bank_dtype=bank_dtype)  # fmt: skip
    q, k, v, options = make_inputs(case, dtype)
    kv = options["kv"]
    options["kv"] = kv.nan_to_num() if kv.is_floating_point() and kv.dtype == dtype else kv
    if options["kv_scale"] is not None:
        options["kv_scale"] = options["kv_scale"].nan_to_num()
    options["page_table"] = torch.randint(0, 9, (3, 70)).int()
    options["page_base"] = torch.randint(0, 4000, (3, 70)).int()
    options["page_len"] = torch.randint(1, 65, (3, 70)).int()
    options["num_pages"] = torch.tensor([70, 3, 0]).int()
    for b, count in enumerate(options["num_pages"].tolist()):
        options["page_table"][b, count:] = 2**31 - 1
    return q, k, v, options


@pytest.mark.parametrize("dtypes", ["bfloat16", "int8"])
def test_splits_of_long_rows_merge_and_do_not_depend_on_the_batch(backend, dtypes):
    q, k, v, options = long_inputs(*DTYPES[dtypes])
    out, lse = check(backend, q, k, v, options)
    assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()
    if backend.name == "reference":
        return
    for b in range(3):
        row = {name: options[name][b : b + 1] for name in PAGE_NAMES}
        parts = [x[b : b + 1] for x in (q, k, v)]
        alone, alone_lse = backend.memory_attention(*parts, **options | row)
        assert torch.equal(alone, out[b : b + 1]) and torch.equal(alone_lse, lse[b : b + 1])


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_see_gives_zero_and_minus_infinity(backend, queries, dtype):
    q = torch.randn(2, 4, queries, 64).to(dtype)
    k = torch.full((2, 2, 5, 64), torch.nan, dtype=dtype)
    out, lse = backend.memory_attention(q, k, k, valid=torch.zeros(2, 5, dtype=torch.bool))
    assert (out == 0).all() and (lse == -torch.inf).all()
    # more queries than keys: the first ones see nothing
    k = torch.randn(2, 2, 1, 64).to(dtype)
    out, lse = backend.memory_attention(q, k, k)
    assert (out[:, :, :-1] == 0).all() and (lse[:, :, :-1] == -torch.inf).all()
    assert out[:, :, -1].abs().sum() > 0 and lse[:, :, -1].isfinite().all()
    if backend.name != "reference":
        out, lse = backend.memory_attention(q[:, :, :0], k, k)
        assert out.shape == (2, 4, 0, 64) and lse.shape == (2, 4, 0)


@pytest.mark.parametrize("name", ["g4_tokens", "prefill"])
@pytest.mark.parametrize("dtypes", ["bfloat16", "int8"])
def test_nan_queries_reach_their_own_rows_only(backend, name, dtypes):
    backend.leave_out(dtypes != "bfloat16")
    q, k, v, options = inputs_of(name, dtypes)
    expected, expected_lse = backend.memory_attention(q, k, v, **options)
    q[0, 1, 2] = torch.nan
    out, lse = backend.memory_attention(q, k, v, **options)
    assert out[0, 1, 2].isnan().all() and lse[0, 1, 2].isnan()
    out[0, 1, 2], lse[0, 1, 2] = expected[0, 1, 2], expected_lse[0, 1, 2]
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


# 72: rows stay aligned to 16 bytes; 65: they do not
@pytest.mark.parametrize("width", [72, 65])
@pytest.mark.parametrize("name", ["g4_tokens", "prefill"])
def test_strided_inputs_match_reference(backend, name, width):
    backend.leave_out(name != "g4_tokens")
    q, k, v, options = inputs_of(name)
    strided = []
    for x in (q, k, v, options["kv"]):
        wide = poison(x.new_empty(*x.shape[:-2], x.shape[-2] + 3, width))
        view = wide[..., : x.shape[-2], :64]
        view.copy_(x)
        strided.append(view)
    options["kv"] = strided.pop()
    check(backend, *strided, options)


@pytest.mark.parametrize("queries", [1, 20])
def test_offsets_beyond_two_billion_elements(backend, queries, tmp_path):
    if backend.name in ("reference", "triton", "cuda"):
        pytest.skip("would copy the whole bank")
    pages = 2**31 // (2 * 64 * 128) + 3
    size = pages * 2 * 64 * 128
    # a sparse file: only the page that is written takes room on disk
    storage = torch.from_file(str(tmp_path / "bank"), shared=True, size=size, dtype=torch.int8)
    kv = storage.view(pages, 1, 1, 2, 64, 128)
    kv[-1:] = torch.randint(-127, 128, (1, 1, 1, 2, 64, 128), dtype=torch.int8)
    scale = torch.rand(1, 1, 1, 2, 64)
    q, k = torch.randn(1, 7, queries, 128).bfloat16(), torch.empty(1, 1, 0, 128).bfloat16()
    options = {"page_len": torch.tensor([[64]]).int(), "num_pages": torch.tensor([1]).int()}
    first, last = (torch.tensor([[page]]).int() for page in (0, pages - 1))
    expected, _ = backend.memory_attention(
        q, k, k, kv=kv[-1:].clone(), kv_scale=scale, page_table=first, **options
    )
    out, _ = backend.memory_attention(
        q, k, k, kv=kv, kv_scale=scale.expand(pages, -1, -1, -1, -1), page_table=last, **options
    )
    assert torch.equal(out, expected) and expected.abs().sum() > 0


@pytest.mark.parametrize("name", ["g7_rotated", "prefill", "int8"])
def test_wrong_table_entries_count_as_empty_pages(backend, name):
    # a GPU does not report them, as that would have to wait for it; it may not follow them either
    if backend.name not in ("emulated", "cuda"):
        pytest.skip("raises, or is checked before")
    dtype = torch.float32 if name == "int8" else torch.bfloat16
    q, k, v, options = make_inputs(BY_NAME[name], dtype)
    options["kv_scale" if name == "int8" else "kv"].nan_to_num_()
    options["num_pages"].fill_(3)
    for entry, page in enumerate((0, 1, 1)):
        options["page_table"][:, entry] = page
    options["page_len"][:, :3], options["page_base"][:, :3] = 5, 7
    options["page_len"][:, 2] = 0
    expected = backend.memory_attention(q, k, v, **options)
    for wrong in (-1, options["kv"].shape[0], 2**31 - 1):
        options["page_table"][:, 2] = wrong
        options["page_len"][:, 2] = 64
        options["page_base"][:, 2] = wrong
        actual = backend.memory_attention(q, k, v, **options)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


TENSOR_ERRORS = SHAPE_ERRORS | {m: VALUE_ERRORS[m] for m in VALUE_ERRORS if m.startswith("q:")}


@pytest.mark.parametrize("message", TENSOR_ERRORS)
def test_a_gpu_names_the_wrong_argument_as_a_cpu_does(backend, message):
    if backend.name not in ("emulated", "cuda"):
        pytest.skip("tested beside")
    q, k, v, options = make_inputs(BY_NAME["prefix"])
    wrong = TENSOR_ERRORS[message]({"q": q, "k": k, "v": v} | options)
    with pytest.raises(RuntimeError) as caught:
        backend.memory_attention(**wrong)
    assert f"memory_attention: {message}" in str(caught.value)
