# SPDX-License-Identifier: Apache-2.0
"""`lychee bench reproduce`: the paper's figures at a small scale."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import typer

from lychee.commands.apps import Model, bench
from lychee.commands.evaluate import MOST_TOKENS, digest_of
from lychee.commands.loading import load_libraries, load_model
from lychee.progress import ProgressDisplay

RATIOS, BANK_DTYPES = (2, 4, 8, 16), ("float32", "float16", "int8", "e4m3")
# Tokens: shorter than where full context is overtaken, then the paper's; --full adds more.
LENGTHS = (1024, 2048, 4096, 7168, 14336, 28672, 57344, 114688)
FULL_LENGTHS = (524288, 1792000)
SETTING_LENGTH = 7168
# Its time grows with the square of the length.
LONGEST_FULL_CONTEXT = 28672
QUESTIONS, PEER_QUESTIONS = 100, 10
QUICK_LENGTHS, QUICK_RATIOS, QUICK_DTYPES, QUICK_QUESTIONS = (512, 1024), (4, 16), ("int8",), 4
# Of a checkout; an installed package has none.
CURVES = Path(__file__).parents[2] / "benchmarks" / "results" / "rl-curves.json"


@bench.command()
def reproduce(
    out: Annotated[Path, typer.Option(metavar="DIR", help="For report, plots and records.")],
    books: Annotated[
        list[Path] | None,
        typer.Argument(metavar="BOOK", help="Text around the facts; else a novel."),
    ] = None,
    task: Annotated[str, typer.Option(help="A generated task.")] = "needles",
    length: Annotated[
        list[int] | None,
        typer.Option(min=64, max=MOST_TOKENS, metavar="N", help="Tokens; repeatable."),
    ] = None,
    ratio: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Repeatable; else 2, 4, 8 and 16.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Per length; else 100. Of other methods 10.")
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

    The same call goes on where an interrupted one stopped. With the shipped model it takes about
    half an hour of one quiet core.
    """
    load_libraries()
    from lychee.eval import harness, tasks
    from lychee.eval.reproduce import Plan
    from lychee.eval.reproduce import reproduce as run

    lengths = QUICK_LENGTHS if quick else LENGTHS + (FULL_LENGTHS if full else ())
    asked = questions or (QUICK_QUESTIONS if quick else QUESTIONS)
    plan = Plan(
        task,
        tuple(length or lengths),
        tuple(ratio or (QUICK_RATIOS if quick else RATIOS)),
        QUICK_DTYPES if quick else BANK_DTYPES,
        QUICK_LENGTHS[-1] if quick else SETTING_LENGTH,
        asked,
        min(asked, PEER_QUESTIONS),
        LONGEST_FULL_CONTEXT,
        seed,
        tuple(frozen or ()),
        tuple(trained or ()),
        field,
        CURVES if CURVES.is_file() else None,
    )
    names, books = tasks.generated_task(task), tuple(dict.fromkeys(books or ()))
    load = lru_cache(maxsize=1)(lambda at: load_model(model, at))
    tokenizer = load(None).tokenizer

    def make_cells(lengths: Sequence[int], count: int) -> list[tasks.TaskCell]:
        request = tasks.Request(books, count, seed)
        return tasks.task_cells(names, lengths, request, tokenizer)

    shared = {
        "model": harness.fingerprint(model),
        "files": {name: digest_of(book) for book, name in tasks.names_of(books).items()},
        "task": task,
        "questions": plan.questions,
        "seed": seed,
    }
    with ProgressDisplay("Reproducing", "questions") as display:
        run(
            plan,
            make_cells,
            load,
            out,
            shared,
            display,
            command=shlex.join(["lychee", *sys.argv[1:]]),
            draw=plots,
        )
    print((out / "report.md").read_text(encoding="utf-8"), end="")
