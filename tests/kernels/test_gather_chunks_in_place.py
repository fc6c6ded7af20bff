# SPDX-License-Identifier: Apache-2.0
"""gather_chunks_: what it writes and what it leaves alone, large outputs, registration, errors."""

import pytest
import torch
from attention_cases import BY_NAME, Case, make_inputs
from error_cases import check_fake_message, check_message

from lychee_kernels import gather_chunks, gather_chunks_, ref

TABLE = ("page_table", "page_len", "page_base", "num_pages")
ODD = Case("odd", batch=3, kv_heads=3, pages=5, page_tokens=3, dim=24, rope_mode="affine")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def bank_of(options):
    return [options[name] for name in ("kv", "kv_scale", *TABLE, "cos", "sin")]


def room_for(bank, layers=3, extra=0, dtype=torch.float32):
    (batch, max_pages), shape = bank[2].shape, bank[0].shape
    sizes = (layers, batch, shape[2], max_pages * shape[4] + extra, shape[5])
    return torch.full(sizes, 7.0, dtype=dtype), torch.full(sizes, 8.0, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [BY_NAME["prefix"], BY_NAME["int8"], ODD], ids=lambda c: c.name)
def test_gather_chunks_in_place_equals_gather_chunks(case, dtype):
    bank = bank_of(make_inputs(case)[3])
    expected = gather_chunks(*bank, rope_mode="affine", out_dtype=dtype)
    k, v = room_for(bank, dtype=dtype)
    valid = gather_chunks_(k, v, *bank, rope_mode="affine")
    for actual, wanted in zip((k, v, valid), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_reference_of_gather_chunks_in_place_equals_reference_of_gather_chunks():
    bank = bank_of(make_inputs(ODD)[3])
    expected = ref.gather_chunks(*bank, layer_range=(1, 3), rope_mode="affine")
    k, v = room_for(bank, layers=2, extra=2)
    valid = ref.gather_chunks_(k, v, *bank, layer_range=(1, 3), rope_mode="affine")
    assert torch.equal(valid, expected[2])
    assert torch.equal(k[:, :, :, :-2], expected[0]) and (k[:, :, :, -2:] == 7).all()
    assert torch.equal(v[:, :, :, :-2], expected[1]) and (v[:, :, :, -2:] == 8).all()


@pytest.mark.parametrize("case", [BY_NAME["prefix"], BY_NAME["int8"], ODD], ids=lambda c: c.name)
def test_gather_chunks_in_place_leaves_the_rest_of_a_cache_alone(case):
    bank = bank_of(make_inputs(case)[3])
    expected = gather_chunks(*bank, layer_range=(1, 3), rope_mode="affine")
    _, batch, heads, tokens, dim = expected[0].shape
    # a token-major cache of five layers, and one of keys and values side by side
    caches = (
        torch.full((5, batch, tokens + 9, heads, dim + 3), 7.0),
        torch.full((batch, 2, heads, tokens + 2, 2, dim), 8.0),
    )
    k = caches[0][1:3, ..., 2:-1].transpose(2, 3)
    v = caches[1].permute(1, 0, 2, 3, 4, 5)[..., 1, :]
    gather_chunks_(k, v, *bank, layer_range=(1, 3), rope_mode="affine")
    for cache, view, wanted, fill in zip(caches, (k, v), expected, (7.0, 8.0), strict=False):
        assert torch.equal(view[:, :, :, :tokens], wanted)
        view[:, :, :, :tokens] = fill
        assert (cache == fill).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bank_dtype", [torch.int8, torch.bfloat16])
def test_gather_chunks_of_many_tokens_matches_reference(bank_dtype, offset):
    # outputs this large are written past the caches where they are aligned: not at offset 1
    case = Case("large", batch=1, heads=4, kv_heads=4, pages=90, page_tokens=61, dim=128,
                rope_mode="affine", bank_dtype=bank_dtype)  # fmt: skip
    options = make_inputs(case)[3]
    options["num_pages"].fill_(91)
    for name, value in (("page_table", 0), ("page_len", 60), ("page_base", 5)):
        options[name][options[name] != options[name].clamp(0, 4000)] = value
    bank = bank_of(options)
    bank[0] = bank[0].nan_to_num() if bank[1] is None else bank[0]
    bank[1] = None if bank[1] is None else bank[1].nan_to_num()
    wanted = ref.gather_chunks(*bank, rope_mode="none", out_dtype=torch.bfloat16)
    count = wanted[0].numel()
    flat = torch.full((2, count + 64), 7.0, dtype=torch.bfloat16)
    k, v = (row[offset : offset + count].view(wanted[0].shape) for row in flat)
    valid = gather_chunks_(k, v, *bank, rope_mode="none")
    for actual, expected in zip((k, v, valid), wanted, strict=True):
        assert torch.equal(actual, expected)
    assert (flat[:, :offset] == 7).all() and (flat[:, offset + count :] == 7).all()


@pytest.mark.parametrize("case", [BY_NAME["int8"], ODD], ids=lambda c: c.name)
def test_gather_chunks_in_place_passes_opcheck(case):
    bank = bank_of(make_inputs(case)[3])
    k, v = room_for(bank, layers=2, extra=1)
    torch.library.opcheck(torch.ops.lychee.gather_chunks_.default, (k, v, *bank, 0, 2, 1))


def test_gather_chunks_in_place_compiles_to_one_graph():
    bank = bank_of(make_inputs(BY_NAME["int8"])[3])

    def fill(k, v):
        valid = gather_chunks_(k, v, *bank, rope_mode="affine")
        return k.sum() + v.sum(), valid

    eager, compiled = room_for(bank, extra=4), room_for(bank, extra=4)
    expected = fill(*eager)
    actual = torch.compile(fill, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])


ERRORS = {
    "k: expected shape [3, 2, 2, *, 64], got [2, 2, 2, 384, 64]": lambda k, v: (k[1:], v),
    "v: expected shape [3, 2, 2, *, 64], got [3, 2, 1, 384, 64]": lambda k, v: (k, v[:, :, 1:]),
    "v: expected room for 384 tokens, got 383": lambda k, v: (k, v[:, :, :, 1:]),
    "k: expected dtype float32, bfloat16 or float16, got int32": lambda k, v: (k.int(), v.int()),
    "v: expected dtype float32, got bfloat16": lambda k, v: (k, v.bfloat16()),
    "k: expected a tensor without gradient": lambda k, v: (k.requires_grad_(), v),
}
STRIDE_ERRORS = {
    "v: expected a contiguous last dimension, got stride 384": lambda k, v: (
        k, v.mT.contiguous().mT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", [*ERRORS, *STRIDE_ERRORS])
def test_gather_chunks_in_place_names_the_wrong_argument(message):
    bank = bank_of(make_inputs(BY_NAME["prefix"])[3])
    k, v = (ERRORS | STRIDE_ERRORS)[message](*room_for(bank))
    check_message(message, gather_chunks_, k, v, *bank, rope_mode="affine")


@pytest.mark.parametrize("message", ERRORS)
def test_gather_chunks_in_place_fake_says_the_same(message):
    bank = bank_of(make_inputs(BY_NAME["prefix"])[3])
    k, v = ERRORS[message](*room_for(bank))
    check_fake_message(message, gather_chunks_, k, v, *bank, rope_mode="affine")


def test_gather_chunks_in_place_refuses_what_it_could_not_differentiate():
    bank = bank_of(make_inputs(BY_NAME["prefix"])[3])
    k, v = room_for(bank)
    bank[0].requires_grad_()
    message = "kv: expected a tensor without gradient, got one that requires it"
    check_message(message, gather_chunks_, k, v, *bank)
    with torch.no_grad():
        gather_chunks_(k, v, *bank)
    assert torch.equal(k, gather_chunks(*bank)[0])
