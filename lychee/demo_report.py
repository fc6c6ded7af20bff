# SPDX-License-Identifier: Apache-2.0
"""The demonstration's result: as plain values for JSON, and as a table for people."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lychee.bank import MemoryBank
from lychee.demo import Outcome
from lychee.quantities import counted

WIDTH_OFF_TERMINAL = 120
MOST_LISTED = 6


def as_dict(
    setting: dict[str, Any], bank: MemoryBank, build_seconds: float, outcomes: list[Outcome]
) -> dict[str, Any]:
    """Everything the demonstration found out."""
    return setting | {
        "tokens": bank.tokens,
        "memory_tokens": bank.memory_tokens,
        "memory_bytes": bank.nbytes,
        "chunks": len(bank),
        "build_seconds": round(build_seconds, 2),
        "facts": [asdict(outcome) for outcome in outcomes],
        "right": sum(outcome.right for outcome in outcomes),
        "asked": len(outcomes),
    }


def print_report(report: dict[str, Any]) -> None:
    """A table of the facts on standard output; chunks count from 1 here."""
    width = None if sys.stdout.isatty() else WIDTH_OFF_TERMINAL
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    megabytes = report["memory_bytes"] / 2**20
    console.print(
        f"Model {report['model']}: ratio {report['ratio']}, window {report['window']}, "
        f"chunk {report['chunk']} tokens."
    )
    console.print(
        f"Text {report['text']}: {counted(report['tokens'], 'token')} with "
        f"{counted(report['asked'], 'fact')} hidden (--seed {report['seed']}), remembered in "
        f"{report['build_seconds']:.1f} s as "
        f"{counted(report['memory_tokens'], 'memory token')} in "
        f"{counted(report['chunks'], 'chunk')}, "
        f"{megabytes:.0f} MiB."
    )
    console.print(make_table(report))
    console.print(f"{report['right']} of {report['asked']} right")


def make_table(report: dict[str, Any]) -> Table:
    table = Table(show_lines=True)
    table.add_column("Hidden at")
    table.add_column("Fact and question", ratio=2)
    table.add_column("Answer", ratio=1)
    table.add_column("")
    table.add_column("Notes changed")
    table.add_column("Seconds", justify="right")
    for fact in report["facts"]:
        changed = ", ".join(str(chunk + 1) for chunk in fact["changed_chunks"][:MOST_LISTED])
        if len(fact["changed_chunks"]) > MOST_LISTED:
            changed += ", ..."
        verdict = Text("right", "green") if fact["right"] else Text("wrong", "bold red")
        table.add_row(
            Text(f"token {fact['token']:,}\n{fact['percent']:.0f}%, chunk {fact['chunk'] + 1}"),
            Text(f"{fact['statement']}\n{fact['question']}"),
            Text(fact["answer"]),
            verdict,
            Text(f"{f'at chunk {changed}' if changed else 'nowhere'}\n{fact['chunks_read']} read"),
            f"{fact['seconds']:.1f}",
        )
    return table
