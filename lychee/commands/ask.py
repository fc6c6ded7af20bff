# SPDX-License-Identifier: Apache-2.0
"""`lychee ask`: questions about texts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from lychee.commands.apps import AsJson, Model, Ratio, app
from lychee.commands.loading import check_question, describe, load_libraries, load_model
from lychee.progress import ProgressDisplay

MOST_NEW_TOKENS = 65_536


@app.command()
def ask(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="UTF-8 text files; - is standard input.")
    ],
    question: Annotated[str, typer.Option("--question", "-q", help="What to find out.")],
    model: Model = None,
    ratio: Ratio = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among tokens of this total share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the drawing.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST_NEW_TOKENS, help="Longest answer in tokens.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about texts: the answer on standard output, its sources on standard error.

    The texts are compressed into a memory once; then every piece is read from that memory.
    """
    check_question(question)
    load_libraries()
    from lychee.documents import read_documents
    from lychee.generate import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    documents = read_documents(files)
    memory_model = load_model(model, ratio, max_new_tokens)
    # `ask` refuses a question that is too long as well, but only after the memory is built.
    memory_model.encode_question(question)
    started = time.perf_counter()
    with ProgressDisplay("Remembering", "tokens") as display:
        bank = memory_model.remember(documents, progress=display)
    build_seconds = time.perf_counter() - started
    with ProgressDisplay("Reading", "chunks") as display:
        answer = memory_model.ask(
            bank,
            question,
            sampling=sampling,
            on_step=lambda _, step: display(step.chunk + 1, len(bank)),
        )
    if as_json:
        details = answer.to_dict() | describe(memory_model, model)
        print(json.dumps(details | {"build_seconds": round(build_seconds, 3)}))
        return
    print(answer.text, flush=True)
    report_sources(answer, build_seconds)


def report_sources(answer, build_seconds: float) -> None:
    """Where the notes changed, and what it cost, for a human."""
    for source in answer.sources:
        where = f"{source.document}, characters {source.start:,} to {source.stop:,}"
        print(f"  notes changed at {where}{excerpt(source.quote, answer.text)}", file=sys.stderr)
    usage = answer.usage
    print(
        f"  {usage.text_tokens:,} tokens remembered in {build_seconds:.1f} s as "
        f"{usage.memory_tokens:,} memory tokens; {usage.chunks_read} of {usage.chunks} chunks read "
        f"in {usage.read_seconds:.1f} s, answered in {usage.answer_seconds:.1f} s",
        file=sys.stderr,
    )


def excerpt(quote: str, answer: str, margin: int = 60) -> str:
    """The answer as it stands in a source, with some text around it; nothing if it does not."""
    place = quote.find(answer) if answer else -1
    if place < 0:
        return ""
    around = quote[max(0, place - margin) : place + len(answer) + margin]
    return f': "... {" ".join(around.split())} ..."'
