# SPDX-License-Identifier: Apache-2.0
"""`lychee build`, `add`, `rm`, `info` and `verify`: memory banks on disk."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lychee.commands.apps import AsJson, BankDtype, Dtype, Model, Ratio, app
from lychee.commands.loading import (
    check_bank_dtype,
    load_libraries,
    load_model,
    load_model_of,
)
from lychee.errors import BankError, InputError
from lychee.progress import ProgressDisplay
from lychee.quantities import as_duration, as_size, counted

FAILED = 1
MOST_LISTED = 1000

Bank = Annotated[Path, typer.Argument(metavar="BANK", help="Folder of a memory bank.")]
Documents = Annotated[
    list[Path],
    typer.Argument(
        metavar="DOCS", help="Text files, JSON lines, folders or patterns; - is standard input."
    ),
]


@app.command()
def build(
    documents: Documents,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BANK", help="Folder to make.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a bank that was begun; skip what it has.")
    ] = False,
    bank_dtype: BankDtype = "auto",
    model: Model = None,
    dtype: Dtype = "auto",
    ratio: Ratio = None,
    as_json: AsJson = False,
) -> None:
    """Compress documents once into a memory bank on disk, to ask them as often as you like.

    What an interrupted build has finished is kept: the same command with --resume goes on from it.
    """
    load_libraries()
    from lychee.bank import BankBuilder, is_bank
    from lychee.documents import read_documents

    check_bank_dtype(bank_dtype)
    refuse_banks(documents)
    if not resume and is_bank(out):
        raise InputError(
            f"{out}: expected a new folder, got a bank",
            "go on with --resume, or put documents in with 'lychee add'",
        )
    texts = read_documents(documents)
    memory_model = load_model(model, ratio, dtype=dtype)
    with ProgressDisplay("Building", "tokens") as display:
        with BankBuilder(memory_model, out, bank_dtype=bank_dtype, resume=resume) as builder:
            try:
                report = builder.add(texts, progress=shown_by(display))
            except KeyboardInterrupt:
                print(f"lychee: {out}: go on with the same command and --resume", file=sys.stderr)
                raise
    print_report(out, report, as_json)


@app.command()
def add(
    bank: Bank,
    documents: Documents,
    model: Model = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Put documents into a bank; one of a name that is there takes the other's place."""
    load_libraries()
    from lychee.documents import read_documents

    opened = open_bank(bank)
    refuse_banks(documents)
    texts = read_documents(documents)
    opened.attach(load_model_of(opened, model, dtype=dtype))
    with ProgressDisplay("Adding", "tokens") as display:
        report = opened.add(texts, progress=shown_by(display))
    print_report(bank, report, as_json)


@app.command()
def rm(
    bank: Bank,
    names: Annotated[list[str], typer.Argument(metavar="ID", help="As 'lychee info' lists them.")],
    as_json: AsJson = False,
) -> None:
    """Remove documents from a bank, so that nothing of them stays in its folder."""
    load_libraries()
    opened = open_bank(bank)
    names = list(dict.fromkeys(names))
    opened.remove(names)
    if as_json:
        print(json.dumps({"removed": names} | summary(opened.describe())))
    else:
        print(f"removed {', '.join(names)}")
        print(as_line(opened.describe()))


@app.command()
def info(bank: Bank, as_json: AsJson = False) -> None:
    """Say what a bank holds: documents, sizes, and the model it belongs to."""
    load_libraries()
    details = open_bank(bank).describe()
    if as_json:
        print(json.dumps(details))
        return
    print(as_line(details))
    model = details["model"]
    print(
        f"  made by {model['name']} ({str(model['fingerprint'])[:12]}); ratio {details['ratio']}, "
        f"window {details['window']}, chunk {details['chunk']}; {details['dtype']} in "
        f"{counted(details['segments'], 'segment')}, {as_size(details['file_bytes'])} on disk"
    )
    if details["unfinished"]:
        print(f"  interrupted within {details['unfinished']}: go on with 'lychee build --resume'")
    documents = details["documents"]
    width = max((len(document["name"]) for document in documents), default=0)
    for document in documents[:MOST_LISTED]:
        print(
            f"  {document['name']:{min(width, 60)}}  {document['tokens']:>11,} tokens  "
            f"{counted(document['chunks'], 'chunk'):>14}"
        )
    if len(documents) > MOST_LISTED:
        print(f"  and {len(documents) - MOST_LISTED:,} more; --json lists all")


@app.command()
def verify(bank: Bank, as_json: AsJson = False) -> None:
    """Check every byte of a bank against its checksums; exit code 1 if any is damaged."""
    load_libraries()
    from lychee.bank import verify_bank

    expect_bank(bank)
    with ProgressDisplay("Verifying", "bytes") as display:
        damage = verify_bank(bank, progress=display)
    if as_json:
        print(json.dumps({"path": str(bank), "sound": not damage, "damage": damage}))
    else:
        print("\n".join(damage or [f"{bank}: sound"]))
        if damage:
            print("lychee: restore these from a copy, or build the bank anew", file=sys.stderr)
    if damage:
        raise typer.Exit(FAILED)


def open_bank(path: Path):
    """The bank at a path; what else there is instead is said in one line."""
    from lychee.bank import MemoryBank

    expect_bank(path)
    return MemoryBank.open(path)


def expect_bank(path: Path) -> None:
    from lychee.bank import is_bank

    if not is_bank(path):
        found = "a folder of other things" if path.is_dir() else "a file"
        raise BankError(
            f"{path}: expected a memory bank, got {found if path.exists() else 'nothing'}",
            "make one with 'lychee build'",
        )


def refuse_banks(documents: list[Path]) -> None:
    """Refuse banks among texts to remember."""
    from lychee.bank import is_bank

    for path in documents:
        if is_bank(path):
            raise InputError(f"{path}: expected texts, got a memory bank")


def shown_by(display: ProgressDisplay):
    """A display as the callback of a build."""
    return lambda done: display(done.tokens, done.tokens_total, done.tokens_per_second)


def summary(details: dict[str, Any]) -> dict[str, Any]:
    """A bank's description without its list of documents, which may be long."""
    return details | {"documents": len(details["documents"])}


def as_line(details: dict[str, Any]) -> str:
    count = len(details["documents"])
    return (
        f"{details['path']}: {counted(count, 'document')}, "
        f"{counted(details['tokens'], 'token')} as "
        f"{counted(details['memory_tokens'], 'memory token')} in "
        f"{counted(details['chunks'], 'chunk')}, {as_size(details['memory_bytes'])}"
    )


def print_report(path: Path, report, as_json: bool) -> None:
    """What a build or addition did, and what the bank holds now."""
    details = open_bank(path).describe()
    if as_json:
        done = asdict(report)
        print(json.dumps(done | {"compressed_tokens": done.pop("tokens")} | summary(details)))
        return
    counts = (f"{len(getattr(report, name)):,} {name}" for name in ("added", "replaced", "skipped"))
    rate = f" at {report.tokens / report.seconds:,.0f} tokens/s" if report.tokens else ""
    print(as_line(details))
    print(f"  {', '.join(counts)} in {as_duration(report.seconds)}{rate}", file=sys.stderr)
