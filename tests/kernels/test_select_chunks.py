# SPDX-License-Identifier: Apache-2.0
"""select_chunks: hand-made examples, a loop over random scores, use by memory_attention, errors."""

import pytest
import torch

from lychee_kernels import memory_attention, select_chunks

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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scores": torch.zeros(3)}, "scores: expected shape [*, *], got [3]"),
        ({"scores": torch.zeros(1, 3).int()}, "scores: expected a float tensor"),
        ({"max_chunks": 0}, "max_chunks: expected >= 1, got 0"),
        ({"page_tokens": 0}, "page_tokens: expected >= 1, got 0"),
        ({"chunk_pages": torch.zeros(2, 2).int()}, "chunk_pages: expected shape [3, *]"),
        ({"chunk_pages": torch.zeros(3, 2)}, "chunk_pages: expected dtype int32, got float32"),
        ({"chunk_tokens": torch.zeros(2, 3).int()}, "chunk_tokens: expected shape [1, 3]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_select_chunks_names_the_wrong_argument(change, message):
    given = {
        "scores": torch.zeros(1, 3), "threshold": 0.0, "max_chunks": 1, "page_tokens": 4,
        "chunk_pages": torch.zeros(3, 2).int(), "chunk_tokens": torch.zeros(3).int(),
    }  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        select_chunks(**given | change)
    assert f"select_chunks: {message}" in str(caught.value)
