# SPDX-License-Identifier: Apache-2.0
"""The Typer applications that the commands register with, and the options many of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Typer carries its own copy of click; this is the base of its usage errors under any version.
UsageProblem, Aborted = typer.BadParameter.__mro__[2], typer.Abort

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train = typer.Typer(help="Train a model.")
app.add_typer(train, name="train")
bench = typer.Typer(help="Run whole series of measurements.")
app.add_typer(bench, name="bench")

Model = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="Hugging Face model folder; else the shipped one."),
]
Ratio = Annotated[
    int | None, typer.Option(metavar="N", help="Raw tokens per memory token; else the model's own.")
]
BankDtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE", help="float32, float16, bfloat16, int8 or e4m3; auto is the model's own."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="Of the weights: float32, bfloat16 or float16; auto is float32 on a CPU, as stored "
        "on a GPU. On a CPU with AMX bfloat16 is the fastest.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            version = metadata.version("lychee-memory")
        except metadata.PackageNotFoundError:
            from lychee_kernels import __version__ as version
        print(f"lychee {version}")
        raise typer.Exit


@app.callback()
def lychee(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Ask questions about texts far longer than a model's window."""
