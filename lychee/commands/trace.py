# SPDX-License-Identifier: Apache-2.0
"""`lychee trace`: what led to an answer, in a few lines or as a web page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lychee.commands.apps import AsJson, app
from lychee.quantities import counted


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(metavar="TRACE", help="Made by 'lychee ask --trace'.")],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a web page that needs no network.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which chunks were read for an answer, in what order, and how the notes changed."""
    from lychee.trace_file import PAGE_MARK, check_writable, read_trace, write_text
    from lychee.trace_page import make_page

    if html is not None:
        check_writable(html, PAGE_MARK, "a page of lychee trace")
    found = read_trace(file)
    if html is not None:
        write_text(html, make_page(found))
    answers = [outline(answer) for answer in found["answers"]]
    if as_json:
        print(json.dumps({"page": None if html is None else str(html), "answers": answers}))
        return
    for answer in answers:
        print_outline(answer)
    if html is not None:
        print(f"written to {html}")


def outline(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer and the readings that changed its notes."""
    readings = [step for step in answer["trace"] if step["read"]]
    changes = [
        {name: step[name] for name in ("chunk", "document", "start", "stop", "score", "memory")}
        | {"reading": order}
        for order, step in enumerate(readings, 1)
        if step["changed"]
    ]
    return {
        "question": answer["question"],
        "text": answer["text"],
        "chunks": answer["usage"]["chunks"],
        "readings": len(readings),
        "changes": changes,
    }


def print_outline(answer: dict[str, Any]) -> None:
    print(answer["question"])
    print(f"  {answer['text']}")
    print(f"  {counted(answer['readings'], 'reading')} in {counted(answer['chunks'], 'chunk')}")
    for change in answer["changes"]:
        score = "" if change["score"] is None else f", gate {change['score']:.3f}"
        print(
            f"  {change['document']}, characters {change['start']:,} to {change['stop']:,}{score}: "
            f"{' '.join((change['memory'] or '').split())}"
        )
