# SPDX-License-Identifier: Apache-2.0
"""`lychee train ...`: one command per kind of training, all with the same options.

Each also runs in several processes: `accelerate launch -m lychee train ...`, or by torchrun.
"""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from lychee.commands.apps import train
from lychee.commands.loading import load_libraries

# The class of each kind, in lychee.train.
KINDS = {
    "pretrain": "pretrain.Pretraining",
    "sft": "sft.SupervisedTraining",
    "rl": "rl.Reinforcement",
    "gate": "gate.GateTraining",
}


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML recipe.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")]
Books = Annotated[Path | None, typer.Option("--books", metavar="DIR", help="Folder of texts.")]
Start = Annotated[
    Path | None, typer.Option("--start", metavar="DIR", help="Model folder to start from.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Shard = Annotated[
    bool, typer.Option("--shard", help="Spread the weights over the processes (FSDP2).")
]
Where = Annotated[Device, typer.Option("--device", help="auto is a GPU where there is one.")]


def run_kind(kind: str, config: Path, out: Path, **options) -> None:
    """Import a kind of training and run it."""
    load_libraries()
    module, name = KINDS[kind].split(".")
    getattr(import_module(f"lychee.train.{module}"), name).train(config, out, **options)


@train.command()
def pretrain(
    config: Config,
    out: Out,
    books: Books = None,
    start: Start = None,
    resume: Resume = False,
    device: Where = Device.auto,
    shard: Shard = False,
) -> None:
    """Train compressor and reader together: language model, reconstruction, recall of facts."""
    options = {"books": books, "start": start, "resume": resume, "device": device, "shard": shard}
    run_kind("pretrain", config, out, **options)


@train.command()
def rl(
    config: Config,
    out: Out,
    books: Books = None,
    start: Start = None,
    resume: Resume = False,
    device: Where = Device.auto,
    shard: Shard = False,
    freeze_compressor: Annotated[
        bool, typer.Option("--freeze-compressor", help="Keep the starting model's memory rows.")
    ] = False,
) -> None:
    """Reinforcement learning of the whole reading loop from the answers alone."""
    options = {"books": books, "start": start, "resume": resume, "device": device, "shard": shard}
    changes = {"freeze_compressor": True} if freeze_compressor else {}
    run_kind("rl", config, out, **options, **changes)
