# SPDX-License-Identifier: Apache-2.0
"""`lychee train ...`: one command per training stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lychee.commands.apps import train
from lychee.commands.loading import load_libraries


@train.command()
def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML recipe.")],
    books: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the recipe's books.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save.")] = False,
) -> None:
    """Train compressor and reader together; prints one JSON line per logged step."""
    load_libraries()
    from lychee.train.pretrain import pretrain as run_pretraining

    run_pretraining(config, books, out, resume=resume)
