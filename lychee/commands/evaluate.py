# SPDX-License-Identifier: Apache-2.0
"""`lychee eval ...`: one command per task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lychee.commands.apps import Model, Ratio, evaluation
from lychee.commands.loading import load_libraries, load_model


@evaluation.command()
def needles(
    books: Annotated[list[Path], typer.Argument(metavar="BOOK", help="UTF-8 text files.")],
    length: Annotated[
        list[int] | None, typer.Option(min=512, metavar="N", help="Tokens per text; repeatable.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Per length.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of texts, facts and places.")] = 0,
    model: Model = None,
    ratio: Ratio = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every question as JSON, too.")
    ] = None,
) -> None:
    """Hide facts in spans of books, half of the texts with one and half with four; ask for all."""
    load_libraries()
    from lychee.eval.needles import evaluate
    from lychee.eval.report import HEADER, table_row, write_json

    cells = []
    lengths = length or [4096, 16384, 65536, 131072]
    print(HEADER, flush=True)
    for cell in evaluate(load_model(model, ratio), books, lengths, questions, seed):
        cells.append(cell)
        print(table_row(cell), flush=True)
        if out is not None:
            write_json(out, " ".join(["lychee", *sys.argv[1:]]), cells)
