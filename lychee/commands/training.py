# SPDX-License-Identifier: Apache-2.0
"""`lychee train ...`: one command per kind of training, all with the same options.

Each also runs in several processes: `accelerate launch --multi_gpu --num_processes 2 -m lychee
train ...`, or `torchrun --nproc_per_node 2 -m -- lychee train ...`; both do on CPUs as well.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lychee.commands.apps import train
from lychee.commands.loading import load_libraries


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """Of a written model folder."""

    half = "float16"
    brain = "bfloat16"
    single = "float32"


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML recipe.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")]
Books = Annotated[
    Path | None,
    typer.Option("--books", metavar="DIR", help="Folder of texts, and of the recipe's data files."),
]
Start = Annotated[
    Path | None, typer.Option("--start", metavar="DIR", help="Model folder to start from.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Shard = Annotated[
    bool, typer.Option("--shard", help="Spread the weights over the processes (FSDP2).")
]
Freeze = Annotated[
    bool, typer.Option("--freeze-compressor", help="Learn from memory as it is at the start.")
]
Where = Annotated[Device, typer.Option("--device", help="auto is a GPU where there is one.")]


def run_kind(kind: str, config: Path, out: Path, **options) -> None:
    """Import a kind of training and run it."""
    load_libraries()
    from lychee.train.reproduce import training_class

    training_class(kind).train(config, out, **options)


# Kinds whose commands take the common options alone.
PLAIN_KINDS = {
    "pretrain": "Train compressor and reader together: next tokens, reciting, continuing, recall "
    "of facts.",
    "sft": "Train the reading loop on traces of working memory, over several hops.",
    "gate": "Train the gate that says which chunks a question needs.",
}


def add_command(kind: str, text: str) -> None:
    """Register `lychee train <kind>`."""

    @train.command(kind, help=text)
    def run(
        config: Config,
        out: Out,
        books: Books = None,
        start: Start = None,
        resume: Resume = False,
        device: Where = Device.auto,
        shard: Shard = False,
    ) -> None:
        run_kind(
            kind, config, out, books=books, start=start, resume=resume, device=device, shard=shard
        )


for kind, text in PLAIN_KINDS.items():
    add_command(kind, text)


@train.command()
def rl(
    config: Config,
    out: Out,
    books: Books = None,
    start: Start = None,
    resume: Resume = False,
    device: Where = Device.auto,
    shard: Shard = False,
    freeze_compressor: Freeze = False,
) -> None:
    """Train compressor and reader end to end by the reward of the final answer."""
    options = {"books": books, "start": start, "resume": resume, "device": device, "shard": shard}
    # Without the flag it is the recipe that says.
    changes = {"freeze_compressor": True} if freeze_compressor else {}
    run_kind("rl", config, out, **options, **changes)


@train.command("reproduce")
def run_plan(
    out: Out = Path("reproduction"),
    books: Books = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="TOML of stages; else the shipped one."),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="STAGE", help="Run this stage alone.")
    ] = None,
    device: Where = Device.auto,
) -> None:
    """Train the shipped model from nothing, stage by stage; the same call goes on where it was."""
    load_libraries()
    from lychee.train.reproduce import SHIPPED_RECIPE, reproduce

    print(f"model: {reproduce(plan or SHIPPED_RECIPE, out, books, only, device)}")


@train.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA run.")],
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="Folder of its base.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the written weights.")] = Dtype.half,
) -> None:
    """Write the model that a base and a trained adapter make together."""
    load_libraries()
    import torch

    from lychee.train.adapters import merge_adapter_folder

    merge_adapter_folder(model, adapter, out, getattr(torch, dtype))
