# SPDX-License-Identifier: Apache-2.0
"""`lychee bench reproduce`: the paper's figures at a small scale."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated

import typer

from lychee.commands.apps import Model, bench
from lychee.commands.evaluate import MOST_TOKENS, digest_of
from lychee.commands.loading import load_libraries, load_model
from lychee.progress import ProgressDisplay

RATIOS = (2, 4, 8, 16)
# Tokens: from what full context still takes with the shipped model, up to 128K; --full adds more.
LENGTHS = (1024, 2048, 7168, 28672, 131072)
FULL_LENGTHS = (524288, 1792000)
RATIO_LENGTH = 7168
QUESTIONS = 100
QUICK_LENGTHS, QUICK_RATIOS, QUICK_QUESTIONS = (512, 1024), (4, 16), 4


@bench.command()
def reproduce(
    out: Annotated[Path, typer.Option(metavar="DIR", help="For report, plots and records.")],
    books: Annotated[
        list[Path] | None,
        typer.Argument(metavar="BOOK", help="Text around the facts; else a novel."),
    ] = None,
    task: Annotated[str, typer.Option(help="A generated task.")] = "niah_multikey_1",
    length: Annotated[
        list[int] | None,
        typer.Option(min=64, max=MOST_TOKENS, metavar="N", help="Tokens; repeatable."),
    ] = None,
    ratio: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Repeatable; else 2, 4, 8 and 16.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Per length and method; else 100.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of texts, facts and places.")] = 0,
    frozen: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Metrics of training with the compressor frozen."),
    ] = None,
    trained: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="The same with it trained.")
    ] = None,
    field: Annotated[str, typer.Option(help="Of those files' lines.")] = "reward",
    model: Model = None,
    quick: Annotated[bool, typer.Option("--quick", help="Very short; to try it.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Up to 1.75M tokens.")] = False,
    plots: Annotated[bool, typer.Option(help="Draw the figures.")] = True,
) -> None:
    """Make a small version of each of the paper's figures, beside the paper's numbers.

    The same call goes on where an interrupted one stopped.
    """
    load_libraries()
    from lychee.eval import harness, tasks
    from lychee.eval.reproduce import Plan
    from lychee.eval.reproduce import reproduce as run

    lengths = QUICK_LENGTHS if quick else LENGTHS + (FULL_LENGTHS if full else ())
    plan = Plan(
        task,
        tuple(length or lengths),
        tuple(ratio or (QUICK_RATIOS if quick else RATIOS)),
        QUICK_LENGTHS[-1] if quick else RATIO_LENGTH,
        questions or (QUICK_QUESTIONS if quick else QUESTIONS),
        seed,
        tuple(frozen or ()),
        tuple(trained or ()),
        field,
    )
    request = tasks.Request(tuple(books or ()), plan.questions, seed)
    names = tasks.generated_task(task)
    load = lru_cache(maxsize=1)(lambda at: load_model(model, at))
    tokenizer = load(None).tokenizer
    shared = {
        "model": harness.fingerprint(model),
        "files": {book.name: digest_of(book) for book in books or ()},
        "task": task,
        "questions": plan.questions,
        "seed": seed,
    }
    with ProgressDisplay("Reproducing", "questions") as display:
        run(
            plan,
            lambda lengths: tasks.task_cells(names, lengths, request, tokenizer),
            load,
            out,
            shared,
            display,
            draw=plots,
        )
    print((out / "report.md").read_text(encoding="utf-8"), end="")
