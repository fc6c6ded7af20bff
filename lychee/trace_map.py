# SPDX-License-Identifier: Apache-2.0
"""The chunk map of a trace: a cell per chunk, coloured by gate score, with what was read on it.

Cells of one look are one path, so the drawing stays small however many chunks there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

MOST_CELLS = 4096
FEWEST_COLUMNS, MOST_COLUMNS = 8, 64
# Score classes of the legend, by their upper ends; the style sheet has a shade for each.
SHADES = (0.2, 0.4, 0.6, 0.8, 1.0)
# Cells up to which there is room for numbers, and how wide a cell is on a wide page.
MOST_NUMBERED, PIXELS = 400, 26
# Columns up to which numbers can be read on a telephone.
ROOMY_COLUMNS = 14


@dataclass
class Cell:
    """What happened at the chunks that share a cell; the span is that of the best of them."""

    document: str
    start: int
    stop: int
    score: float | None = None
    order: int = 0  # of the first reading, from 1; 0 where nothing was read
    changed: bool = False


@dataclass
class ChunkMap:
    """Cells in rows of `columns`; `share` chunks to each."""

    chunks: int
    read: int  # different chunks, of which each may be read several times
    readings: int
    share: int
    columns: int
    gated: bool
    cells: dict[int, Cell] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return -(-self.chunks // self.share)

    def cell_of(self, chunk: int) -> int:
        return chunk // self.share

    def shade(self, cell: int) -> str:
        """Class of a cell's colour."""
        found = self.cells.get(cell)
        if found is None or (found.score is None and not found.order):
            return "cell"
        if found.score is None:
            return "plain"
        bounds = enumerate(SHADES[:-1])
        return f"s{next((i for i, bound in bounds if found.score < bound), len(SHADES) - 1)}"

    def drawing(self) -> str:
        """The map as inline SVG."""
        rows = -(-self.count // self.columns)
        width = self.columns * 10
        pixels = min(self.columns * PIXELS, 800)
        shades: dict[str, list[int]] = {}
        for cell in range(self.count):
            shades.setdefault(self.shade(cell), []).append(cell)
        parts = [f'<path class="{name}" d="{self.squares(c)}"/>' for name, c in shades.items()]
        # Without a gate every chunk is read: only the changes tell one from another.
        read = [c for c, found in self.cells.items() if found.order and not found.changed]
        changed = [c for c, found in self.cells.items() if found.changed]
        if self.gated:
            parts.append(f'<path class="read" d="{self.squares(read, 0.6)}"/>')
        parts.append(f'<path class="changed" d="{self.squares(changed, 0.8)}"/>')
        if self.count <= MOST_NUMBERED:
            listed = changed if not self.gated else [*read, *changed]
            parts += (self.number(cell) for cell in sorted(listed))
        parts.append(
            '<rect class="picked" visibility="hidden" x="0.5" y="0.5" width="9" height="9" rx="1"/>'
        )
        crowded = " crowded" if self.columns > ROOMY_COLUMNS else ""
        return (
            f'<svg class="chunks{crowded}" role="img" aria-label="Map of {self.chunks} chunks" '
            f'width="{pixels}" height="{pixels * rows // self.columns}" '
            f'viewBox="0 0 {width} {rows * 10}">{"".join(parts)}</svg>'
        )

    def squares(self, cells: list[int], inset: float = 0) -> str:
        side = f"{8 - 2 * inset:g}"
        return "".join(
            f"M{cell % self.columns * 10 + 1 + inset:g} {cell // self.columns * 10 + 1 + inset:g}"
            f"h{side}v{side}h-{side}z"
            for cell in cells
        )

    def number(self, cell: int) -> str:
        """The place of a cell's first reading in the order of all readings."""
        x, y = cell % self.columns * 10 + 5, cell // self.columns * 10 + 6.7
        order = self.cells[cell].order
        return f'<text x="{x}" y="{y:g}">{order}</text>' if order < 1000 else ""

    def legend(self) -> str:
        entries = []
        if self.gated:
            swatches = "".join(swatch(f"s{index}") for index in range(len(SHADES)))
            entries.append(f"<span>gate score 0 {swatches} 1</span>")
            entries.append(f"<span>{swatch('s4', 'read')} read</span>")
            entries.append(f"<span>{swatch('s4', 'changed')} read, changed the notes</span>")
        else:
            entries.append(f"<span>{swatch('plain')} read</span>")
            entries.append(f"<span>{swatch('plain', 'changed')} changed the notes</span>")
        if len(self.cells) < self.count:
            entries.append(f"<span>{swatch('cell')} not looked at</span>")
        if self.share > 1:
            entries.append(f"<span>{self.share} chunks to a cell</span>")
        return "".join(entries)

    def summary(self) -> str:
        """What stands below the map while nothing is pointed at."""
        return (
            f"{self.read:,} of {self.chunks:,} chunks read. They stand in rows as in the text; "
            f"numbers give the order of reading. Point at a chunk to see which it is."
        )

    def data(self) -> dict[str, Any]:
        """What the page's script needs: [document, start, stop, score, order, changed] by cell."""
        names: dict[str, int] = {}
        cells = {
            str(cell): [
                names.setdefault(found.document, len(names)),
                found.start,
                found.stop,
                found.score if found.score is None else round(found.score, 3),
                found.order,
                int(found.changed),
            ]
            for cell, found in self.cells.items()
        }
        return {
            "chunks": self.chunks,
            "readings": self.readings,
            "share": self.share,
            "columns": self.columns,
            "documents": list(names),
            "cells": cells,
        }


def swatch(shade: str, outline: str = "") -> str:
    """A cell as an example for the legend."""
    square = '<path class="{}" d="M{} {}h{}v{}h-{}z"/>'
    outlined = square.format(outline, 2, 2, 8, 8, 8) if outline else ""
    return (
        f'<svg width="14" height="14" viewBox="0 0 12 12" aria-hidden="true">'
        f"{square.format(shade, 1, 1, 10, 10, 10)}{outlined}</svg>"
    )


def make_map(answer: dict[str, Any]) -> ChunkMap:
    """The map of one answer's steps."""
    chunks = answer["usage"]["chunks"]
    share = max(1, -(-chunks // MOST_CELLS))
    columns = math.ceil(2.2 * math.sqrt(max(1, -(-chunks // share))))
    columns = min(MOST_COLUMNS, max(FEWEST_COLUMNS, columns))
    gated = any(step["score"] is not None for step in answer["trace"])
    read = [step["chunk"] for step in answer["trace"] if step["read"]]
    chunk_map = ChunkMap(chunks, len(set(read)), len(read), share, columns, gated)
    order = 0
    for step in answer["trace"]:
        span = (step["document"], step["start"], step["stop"])
        cell = chunk_map.cells.setdefault(chunk_map.cell_of(step["chunk"]), Cell(*span))
        if step["score"] is not None and (cell.score is None or step["score"] > cell.score):
            cell.score = step["score"]
            cell.document, cell.start, cell.stop = span
        if step["read"]:
            order += 1
            cell.order = cell.order or order
            cell.changed |= step["changed"]
    return chunk_map
