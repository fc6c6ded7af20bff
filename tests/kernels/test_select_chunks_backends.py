# SPDX-License-Identifier: Apache-2.0
"""select_chunks on every backend, against the reference: ties, NaN, budgets, several tiles."""

import pytest
import torch

from lychee_kernels import ref
from lychee_kernels.testing import poison

NAN = float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def check(backend, *arguments):
    actual, expected = backend.select_chunks(*arguments), ref.select_chunks(*arguments)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(actual, name), value, rtol=0, atol=0, msg=name)
    return actual


def chunks_of(num_chunks, width, page_tokens, batch=()):
    """Page lists and token counts of chunks whose last page is partly filled; some hold nothing."""
    pages = torch.randint(0, 10**6, (*batch, num_chunks, width)).int()
    tokens = torch.randint(0, width * page_tokens + 1, (*batch, num_chunks)).int()
    return pages, tokens


def few_scores(batch, num_chunks, dtype=torch.float32):
    """Scores with many ties, NaN, both zeros and both infinities."""
    values = torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.5, 0.5, 1.0, 3.0, NAN, torch.inf, -torch.inf])
    return values[torch.randint(len(values), (batch, num_chunks))].to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ties_nan_and_infinities(backend, dtype):
    for seed in backend.seeds:
        backend.use_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        chunks, width, page_tokens, budget = (
            torch.randint(1, high, (1,), generator=generator).item() for high in (45, 4, 9, 50)
        )
        threshold = [-torch.inf, -1.0, 0.0, 0.5, 9.0, NAN][seed % 6]
        batch = (3,) if seed % 2 else ()
        check(
            backend, few_scores(3, chunks, dtype), threshold, budget,
            *chunks_of(chunks, width, page_tokens, batch), page_tokens,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_zeros_are_equal(backend, dtype):
    scores = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0, 0.0]]).to(dtype)
    assert check(backend, scores, -0.5, 2, *chunks_of(6, 1, 4), 4).chunks.tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("budget", [1, 37, 300, 5000])
def test_budgets(backend, dtype, budget):
    backend.leave_out(dtype != torch.float32 and budget != 37)
    # scores of every magnitude, so that each digit of the radix select decides somewhere
    scores = (torch.randn(2, 301) * 10.0 ** torch.randint(-4, 4, (2, 301))).to(dtype)
    scores[:, ::7] = NAN
    result = check(backend, scores, 0.0001, budget, *chunks_of(301, 3, 5), 5)
    assert (result.num_chunks > 0).all()


@pytest.mark.parametrize("budget", [1100, 3000])
def test_more_chunks_than_threads(backend, budget):
    if backend.name == "triton":
        pytest.skip("slow under the interpreter")
    scores = few_scores(1, 2500)
    result = check(backend, scores, -1.0, budget, *chunks_of(2500, 2, 4), 4)
    assert result.num_chunks > 1024


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threshold_is_rounded_to_the_dtype_of_the_scores(backend, dtype):
    nearest = torch.tensor(0.3, dtype=dtype)
    scores = torch.stack((nearest, torch.nextafter(nearest, torch.zeros_like(nearest))))[None]
    assert check(backend, scores, 0.3, 2, *chunks_of(2, 1, 4), 4).chunks.tolist() == [[0, -1]]


@pytest.mark.parametrize("batch, chunks, width", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (1, 1, 1)])
def test_nothing_or_one(backend, batch, chunks, width):
    check(backend, torch.ones(batch, chunks), 0.5, 2, *chunks_of(chunks, width, 4), 4)


def test_an_empty_selection(backend):
    result = check(backend, few_scores(2, 50), torch.inf, 8, *chunks_of(50, 2, 4), 4)
    nothing = check(backend, few_scores(2, 50), NAN, 8, *chunks_of(50, 2, 4), 4)
    assert (result.page_table >= 0).sum(1).tolist() == result.num_pages.tolist()
    assert not nothing.num_pages.any() and (nothing.page_table == -1).all()


def test_tokens_of_chunks_not_selected_are_not_read(backend):
    scores = torch.tensor([[1.0, NAN, 0.0, 1.0, 1.0]])
    pages, tokens = chunks_of(5, 2, 4)
    expected = ref.select_chunks(scores, 0.5, 2, pages, tokens, 4)
    pages[[1, 2, 4]], tokens[[1, 2, 4]] = -(2**31), 2**31 - 1
    actual = backend.select_chunks(scores, 0.5, 2, pages, tokens, 4)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_strided_inputs(backend):
    scores = torch.rand(4, 11)
    pages, tokens = chunks_of(11, 3, 4, (4,))
    wide_scores = poison(torch.empty(11, 9))
    wide_scores[:, 1::2] = scores.T
    wide_pages = torch.full((4, 5, 13), -7, dtype=torch.int32)
    wide_pages[:, 1:4, 1:12] = pages.mT
    wide_tokens = torch.full((4, 22), -7, dtype=torch.int32)
    wide_tokens[:, ::2] = tokens
    check(
        backend, wide_scores[:, 1::2].T, 0.5, 6, wide_pages[:, 1:4, 1:12].mT, wide_tokens[:, ::2], 4
    )


def test_impossible_token_counts_stay_inside_the_table(backend):
    if backend.name not in ("emulated", "cuda"):
        pytest.skip("values are checked on the host")
    # they are cut to what the pages of a chunk hold
    pages = torch.arange(6).view(3, 2).int()
    scores, wrong = torch.ones(2, 3), torch.tensor([2**31 - 1, -(2**31), 5]).int()
    result = backend.select_chunks(scores, 0.5, 3, pages, wrong, 4)
    assert result.num_tokens.tolist() == [13, 13] and result.num_pages.tolist() == [4, 4]
    assert result.page_table.tolist() == [[0, 1, 4, 5, -1, -1]] * 2
    assert result.page_len.tolist() == [[4, 4, 4, 1, 0, 0]] * 2
