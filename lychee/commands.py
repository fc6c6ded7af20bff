# SPDX-License-Identifier: Apache-2.0
"""What `lychee` can do: ask about texts, a demonstration, training.

Modules that import torch are imported inside the commands, so that help comes at once.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lychee.cli import leaving_at_once
from lychee.errors import InputError
from lychee.progress import ProgressDisplay

MOST_NEW_TOKENS = 65_536
MOST_DEMO_TOKENS = 16_777_216
# Typer carries its own copy of click; this is the base of its usage errors under any version.
UsageProblem, Aborted = typer.BadParameter.__mro__[2], typer.Abort

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train = typer.Typer(help="Train a model.")
app.add_typer(train, name="train")
evaluation = typer.Typer(help="Evaluate a model.")
app.add_typer(evaluation, name="eval")

Model = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="Hugging Face model folder; else the shipped one."),
]
Ratio = Annotated[
    int | None, typer.Option(metavar="N", help="Raw tokens per memory token; else the model's own.")
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


@app.command()
def demo(
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST_DEMO_TOKENS, help="Length of the text.")
    ] = 131_072,
    facts: Annotated[int, typer.Option(min=1, max=1000, help="Facts to hide and ask for.")] = 5,
    seed: Annotated[int | None, typer.Option(help="Of facts and places; else drawn.")] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to hide them in; else a novel.")
    ] = None,
    model: Model = None,
    ratio: Ratio = None,
    as_json: AsJson = False,
) -> None:
    """Hide facts at random places of a long text, then ask for each one."""
    load_libraries()
    import random

    from lychee.demo import ask_for, hide_facts, make_facts, read_book
    from lychee.demo_report import as_dict, print_report

    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    name, book = read_book(text)
    memory_model = load_model(model, ratio)
    chosen = make_facts(memory_model, name, book, facts, seed)
    long_text, hidden = hide_facts(memory_model, book, chosen, tokens, seed)
    started = time.perf_counter()
    with ProgressDisplay("Remembering", "tokens") as display:
        bank = memory_model.remember(long_text, progress=display)
    build_seconds = time.perf_counter() - started
    outcomes = []
    for index, (fact, character) in enumerate(hidden):
        with ProgressDisplay(f"Question {index + 1} of {len(hidden)}", "chunks") as display:
            outcomes.append(ask_for(memory_model, bank, fact, character, display))
    setting = describe(memory_model, model) | {"text": name, "seed": seed}
    report = as_dict(setting, bank, build_seconds, outcomes)
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)


@train.command()
def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML recipe.")],
    books: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the recipe's books.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save.")] = False,
) -> None:
    """Train compressor and reader together; prints one JSON line per logged step."""
    load_libraries()
    from lychee.train.pretrain import Pretraining

    Pretraining.train(config, out, books=books, resume=resume)


@evaluation.command()
def needles(
    books: Annotated[list[Path], typer.Argument(metavar="BOOK", help="UTF-8 text files.")],
    length: Annotated[
        list[int] | None, typer.Option(min=512, metavar="N", help="Tokens per text; repeatable.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Per length.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of texts, facts and places.")] = 0,
    model: Model = None,
    ratio: Ratio = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every question as JSON, too.")
    ] = None,
) -> None:
    """Hide facts in spans of books, half of the texts with one and half with four; ask for all."""
    load_libraries()
    from lychee.eval.needles import evaluate
    from lychee.eval.report import HEADER, table_row, write_json

    cells = []
    lengths = length or [4096, 16384, 65536, 131072]
    print(HEADER, flush=True)
    for cell in evaluate(load_model(model, ratio), books, lengths, questions, seed):
        cells.append(cell)
        print(table_row(cell), flush=True)
        if out is not None:
            write_json(out, " ".join(["lychee", *sys.argv[1:]]), cells)


def load_libraries() -> None:
    """Import what takes seconds: torch, above all."""
    with leaving_at_once():
        import lychee.memory_model  # noqa: F401


def check_question(question: str) -> None:
    """Refuse, before any work, what no tokenizer takes."""
    if not question.strip():
        raise InputError("question: expected text, got nothing")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"question: expected UTF-8 text, got {question!r}") from error


def load_model(folder: Path | None, ratio: int | None, max_new_tokens: int | None = None):
    """The model of a command, with a warning where it was never trained to remember."""
    from lychee.memory_model import LycheeMemory

    with leaving_at_once():
        model = LycheeMemory.from_pretrained(folder, ratio=ratio)
    if not model.trained:
        warning = f"lychee: warning: {folder}: has no trained memory; its answers mean little"
        print(warning, file=sys.stderr, flush=True)
    if max_new_tokens is None:
        return model
    memory = replace(model.memory, answer=max_new_tokens)
    limited = LycheeMemory(model.decoder, model.tokenizer, model.raw_config, memory)
    limited.trained = model.trained
    return limited


def describe(model, folder: Path | None) -> dict[str, Any]:
    """What a result was made with."""
    memory = model.memory
    return {
        "model": "shipped" if folder is None else str(folder),
        "trained": model.trained,
        "ratio": memory.ratio,
        "window": memory.window,
        "chunk": memory.chunk,
    }


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
