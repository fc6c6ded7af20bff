# SPDX-License-Identifier: Apache-2.0
"""select_chunks: by hand, against a loop and the reference, edges, registration, strides."""

import pytest
import torch

from lychee_kernels import memory_attention, ref, select_chunks
from lychee_kernels.testing import poison

NAN = float("nan")


def select_by_loop(scores, threshold, max_chunks, pages, tokens, page_tokens):
    """The definition, one chunk at a time: chunks, and (page, length, base) of their pages."""
    passing = [c for c, score in enumerate(scores) if score >= threshold]
    chosen = sorted(sorted(passing, key=lambda c: (-scores[c], c))[:max_chunks])
    entries, base = [], 0
    for c in chosen:
        for i, start in enumerate(range(0, tokens[c], page_tokens)):
            entries.append((pages[c][i], min(page_tokens, tokens[c] - start), base + start))
        base += tokens[c]
    return chosen, entries, base


def check_against_loop(scores, threshold, max_chunks, pages, tokens, page_tokens):
    result = select_chunks(scores, threshold, max_chunks, pages, tokens, page_tokens)
    width = min(max_chunks, scores.shape[1]) * pages.shape[-1]
    assert result.page_table.shape == (scores.shape[0], width)
    for b in range(scores.shape[0]):
        own_pages = pages[b] if pages.dim() == 3 else pages
        own_tokens = tokens[b] if tokens.dim() == 2 else tokens
        chosen, entries, total = select_by_loop(
            scores[b].tolist(), threshold, max_chunks, own_pages.tolist(), own_tokens.tolist(),
            page_tokens,
        )  # fmt: skip
        count = len(entries)
        assert result.num_chunks[b] == len(chosen)
        assert result.chunks[b, : len(chosen)].tolist() == chosen
        assert (result.chunks[b, len(chosen) :] == -1).all()
        assert result.num_pages[b] == count
        assert result.num_tokens[b] == total
        fields = result.page_table, result.page_len, result.page_base
        actual = torch.stack([field[b] for field in fields], 1)
        assert actual[:count].tolist() == [list(entry) for entry in entries]
        assert (actual[count:] == torch.tensor([-1, 0, 0])).all()
    assert all(field.dtype == torch.int32 for field in result)


def check_against_reference(*arguments):
    actual, expected = select_chunks(*arguments), ref.select_chunks(*arguments)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(actual, name), value, rtol=0, atol=0, msg=name)
    return actual


def chunks_of(num_chunks, width, page_tokens):
    """Page lists and token counts of chunks whose last page is partly filled."""
    pages = torch.randperm(num_chunks * width).view(num_chunks, width).int()
    tokens = torch.randint(0, width * page_tokens + 1, (num_chunks,)).int()
    return pages, tokens


def test_select_chunks_by_hand():
    scores = torch.tensor([[0.9, 0.2, 0.7, 0.7, NAN], [0.1, 0.2, 0.3, 0.4, 0.4]])
    pages = torch.tensor([[10, 11], [20, 21], [30, -1], [40, 41], [50, 51]], dtype=torch.int32)
    tokens = torch.tensor([100, 128, 30, 128, 128], dtype=torch.int32)
    result = select_chunks(scores, 0.5, 2, pages, tokens, 64)
    # 0.9 and, of the two 0.7, the lower index
    assert result.chunks.tolist() == [[0, 2], [-1, -1]]
    assert result.page_table.tolist() == [[10, 11, 30, -1], [-1] * 4]
    assert result.page_len.tolist() == [[64, 36, 30, 0], [0] * 4]
    assert result.page_base.tolist() == [[0, 64, 100, 0], [0] * 4]
    assert result.num_pages.tolist() == [3, 0]
    assert result.num_tokens.tolist() == [130, 0]
    assert result.num_chunks.tolist() == [2, 0]


@pytest.mark.parametrize("seed", range(20))
def test_select_chunks_matches_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    batch, chunks, width, page_tokens = (integers(1, high, 1).item() for high in (4, 12, 4, 9))
    # few distinct scores, so that ties are common
    scores = integers(-3, 4, batch, chunks) / 2
    scores[integers(0, 5, batch, chunks) == 0] = NAN
    scores[integers(0, 9, batch, chunks) == 0] = -torch.inf
    threshold = [-torch.inf, -1.0, 0.5, 9.0][seed % 4]
    batched = (batch,) if seed % 2 else ()
    pages = integers(0, 99, *batched, chunks, width).int()
    tokens = integers(0, width * page_tokens + 1, *batched, chunks).int()
    max_chunks = integers(1, chunks + 2, 1).item()
    check_against_loop(scores, threshold, max_chunks, pages, tokens, page_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_chunks", [1, 37, 996, 5000])
def test_select_chunks_matches_reference(dtype, max_chunks):
    # in 16 bits, 997 scores within [0, 1) hold many ties and the threshold's own neighbours
    scores = torch.rand(3, 997).to(dtype)
    scores[:, ::7] = NAN
    scores[1, ::5] = torch.inf
    scores[2, ::3] = -torch.inf
    result = check_against_reference(scores, 0.3, max_chunks, *chunks_of(997, 3, 5), 5)
    assert (result.num_chunks > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_select_chunks_rounds_the_threshold_as_pytorch_does(dtype):
    # no number of any of these types, which round one of them up and another down: the score
    # nearest to the threshold passes, the one below not
    thresholds = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64)
    assert {True, False} == set((thresholds.to(dtype) > thresholds).tolist())
    for threshold in thresholds.tolist():
        nearest = torch.tensor(threshold, dtype=dtype)
        scores = torch.stack((nearest, torch.nextafter(nearest, torch.zeros_like(nearest))))[None]
        result = check_against_reference(scores, threshold, 2, *chunks_of(2, 1, 4), 4)
        assert result.chunks.tolist() == [[0, -1]]


@pytest.mark.parametrize("threshold", [NAN, torch.inf, 1e300, 0.0, -1e300, -torch.inf])
def test_select_chunks_of_special_scores_and_thresholds(threshold):
    scores = torch.tensor([[NAN, torch.inf, -torch.inf, 0.0, -0.0, 1e38, -1e38]])
    for max_chunks in (1, 2, 7):
        check_against_reference(scores, threshold, max_chunks, *chunks_of(7, 2, 3), 3)


@pytest.mark.parametrize("batch, num_chunks, width", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (1, 1, 1)])
def test_select_chunks_of_nothing_or_one(batch, num_chunks, width):
    pages, tokens = chunks_of(num_chunks, width, 4)
    check_against_reference(torch.ones(batch, num_chunks), 0.5, 2, pages, tokens, 4)


def test_select_chunks_reads_no_tokens_of_chunks_not_selected():
    scores = torch.tensor([[1.0, NAN, 0.0, 1.0, 1.0]])
    pages, tokens = chunks_of(5, 2, 4)
    expected = select_chunks(scores, 0.5, 2, pages, tokens, 4)
    pages[[1, 2, 4]], tokens[[1, 2, 4]] = -(2**31), 2**31 - 1
    actual = select_chunks(scores, 0.5, 2, pages, tokens, 4)
    assert expected.num_chunks == 2
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_select_chunks_reads_strided_inputs():
    scores = torch.rand(4, 11)
    pages, tokens = torch.randint(0, 99, (4, 11, 3)).int(), torch.randint(0, 13, (4, 11)).int()
    expected = select_chunks(scores, 0.5, 6, pages, tokens, 4)
    wide_scores = poison(torch.empty(11, 9))
    wide_scores[:, 1::2] = scores.T
    wide_pages = torch.full((4, 5, 13), -7, dtype=torch.int32)
    wide_pages[:, 1:4, 1:12] = pages.mT
    wide_tokens = torch.full((4, 22), -7, dtype=torch.int32)
    wide_tokens[:, ::2] = tokens
    actual = select_chunks(
        wide_scores[:, 1::2].T, 0.5, 6, wide_pages[:, 1:4, 1:12].mT, wide_tokens[:, ::2], 4
    )
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_select_chunks_does_not_depend_on_batch_or_threads():
    scores, chunks = torch.randn(5, 20_011), chunks_of(20_011, 1, 64)
    expected = select_chunks(scores, 0.5, 100, *chunks, 64)
    alone = select_chunks(scores[3:4], 0.5, 100, *chunks, 64)
    assert all(torch.equal(a[0], e[3]) for a, e in zip(alone, expected, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        again = select_chunks(scores, 0.5, 100, *chunks, 64)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_select_chunks_passes_opcheck():
    arguments = torch.rand(2, 5), 0.4, 3, *chunks_of(5, 2, 4), 4
    torch.library.opcheck(torch.ops.lychee.select_chunks.default, arguments)


def test_select_chunks_compiles_to_one_graph():
    chunks = chunks_of(7, 2, 4)

    def pages_to_read(scores):
        chosen = select_chunks(scores.sigmoid(), 0.5, 3, *chunks, 4)
        return chosen.page_table, chosen.num_pages + 1

    scores = torch.randn(2, 7)
    compiled = torch.compile(pages_to_read, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(scores), pages_to_read(scores), strict=True):
        assert torch.equal(actual, expected)


def test_selected_pages_feed_memory_attention():
    kv = torch.randn(6, 1, 1, 2, 4, 8)
    pages = torch.arange(6, dtype=torch.int32).view(3, 2)
    tokens = torch.tensor([8, 5, 8], dtype=torch.int32)
    chosen = select_chunks(torch.tensor([[1.0, 0.0, 2.0]]), 0.5, 3, pages, tokens, 4)
    q, empty = torch.randn(1, 1, 2, 8), torch.zeros(1, 1, 0, 8)
    table = {name: getattr(chosen, name) for name in ("page_table", "page_len", "num_pages")}
    out, _ = memory_attention(q, empty, empty, kv=kv, query_stride=0, **table)
    k, v = kv[[0, 1, 4, 5], 0, 0].transpose(0, 1).flatten(1, 2)[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected)
