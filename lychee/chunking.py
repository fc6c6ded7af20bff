# SPDX-License-Identifier: Apache-2.0
"""Cuts token ids into chunks, at fixed lengths or at the ends of sentences."""

from __future__ import annotations

from collections.abc import Container, Sequence

# A chunk may end this share of its length early to end with a sentence.
SEARCH_SHARE = 4


def cut_chunks(
    ids: Sequence[int], chunk: int, sentence_ends: Container[int] | None = None
) -> list[tuple[int, int]]:
    """Spans (start, stop) that cover `ids` in order, each of at most `chunk` tokens.

    With `sentence_ends`, a span stops behind the last such token in its final quarter, if there
    is one, so that no statement is torn between two chunks.
    """
    spans = []
    start = 0
    while start < len(ids):
        stop = min(start + chunk, len(ids))
        if sentence_ends is not None and stop < len(ids):
            for place in range(stop, stop - chunk // SEARCH_SHARE, -1):
                if ids[place - 1] in sentence_ends:
                    stop = place
                    break
        spans.append((start, stop))
        start = stop
    return spans
