# SPDX-License-Identifier: Apache-2.0
"""Makes the page tables by which attention reads chunks of a bank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lychee.bank.pages import PAGE_TOKENS, PageStore, PageTable

if TYPE_CHECKING:
    from lychee.bank.memory_bank import Chunk

# Fewer rows cost more as a pass of their own than by a copy of their pages.
WORTHWHILE_ROWS = 16


def make_table(store: PageStore, rows: Sequence[Sequence[Chunk]], in_place: bool) -> PageTable:
    """See MemoryBank.page_table."""
    lists = []
    for chunks in rows:
        pages, base = [], 0
        for chunk in chunks:
            base *= not in_place
            for place, page in enumerate(chunk.pages):
                used = min(PAGE_TOKENS, chunk.memory_tokens - place * PAGE_TOKENS)
                pages.append((page, used, base))
                base += used
        lists.append(pages)
    needed = sorted({page for pages in lists for page, *_ in pages})
    kv, scale, places = store.bring(needed)
    place_of = dict(zip(needed, places, strict=True))
    width = max(1, max(map(len, lists)))
    padded = [
        [(place_of[page], used, base) for page, used, base in pages]
        + [(-1, 0, 0)] * (width - len(pages))
        for pages in lists
    ]
    table = torch.tensor(padded, dtype=torch.int32, device=kv.device)
    count = torch.tensor([len(p) for p in lists], dtype=torch.int32, device=kv.device)
    return PageTable(kv, scale, *(t.contiguous() for t in table.unbind(2)), count)


def group_rows(store: PageStore, chunks: Sequence[Chunk]) -> list[list[int]]:
    """Rows of one chunk each, those together whose pages can be read where they lie."""
    homes: defaultdict[int, list[int]] = defaultdict(list)
    for row, chunk in enumerate(chunks):
        homes[store.home(chunk.pages[0])].append(row)
    groups = [rows for rows in homes.values() if len(rows) >= WORTHWHILE_ROWS]
    few = [row for rows in homes.values() if len(rows) < WORTHWHILE_ROWS for row in rows]
    return [*groups, few] if few else groups
