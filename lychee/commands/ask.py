# SPDX-License-Identifier: Apache-2.0
"""`lychee ask`: questions about texts, or about a memory bank."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lychee.commands.apps import AsJson, BankDtype, Dtype, Model, Ratio, app
from lychee.commands.loading import (
    check_bank_dtype,
    check_question,
    describe,
    load_libraries,
    load_model,
    load_model_of,
)
from lychee.errors import InputError
from lychee.progress import ProgressDisplay
from lychee.quantities import counted

MOST_NEW_TOKENS = 65_536


@app.command()
def ask(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="DOCS",
            help="Text files, JSON lines, folders, patterns, - for standard input; or one bank.",
        ),
    ],
    questions: Annotated[
        list[str], typer.Option("--question", "-q", help="What to find out; repeatable.")
    ],
    model: Model = None,
    ratio: Ratio = None,
    dtype: Dtype = "auto",
    bank_dtype: BankDtype = "auto",
    tier: Annotated[
        str,
        typer.Option(help="Where a bank's pages are kept: disk, cpu or gpu; auto leaves them."),
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among tokens of this total share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the drawing.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST_NEW_TOKENS, help="Longest answer in tokens.")
    ] = None,
    gate_threshold: Annotated[
        float | None,
        typer.Option(help="Least gate probability, 0 to 1, of a chunk to read; else the model's."),
    ] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Read every chunk, as without a gate.")
    ] = False,
    passes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Times to go over the text, while notes change; else the model's."
        ),
    ] = None,
    together: Annotated[
        int | None,
        typer.Option(min=1, help="Chunks that one reading turn takes at most; else the model's."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what 'lychee trace' shows.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print every event as a line of JSON as it happens.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer questions about texts: answers on standard output, their sources on standard error.

    Texts are compressed into a memory once, or are there as a bank that 'lychee build' made; then
    all questions are answered in one pass over that memory.
    """
    for question in questions:
        check_question(question)
    load_libraries()
    check_bank_dtype(bank_dtype)
    from lychee.generate import Sampling
    from lychee.reading import ReadingOptions
    from lychee.trace_file import TRACE_MARK, check_writable, trace_of, write_text

    sampling = Sampling(temperature, top_k, top_p, seed)
    reading = ReadingOptions(not no_gate, gate_threshold, passes, together)
    if trace is not None:
        check_writable(trace, TRACE_MARK, "a trace")
    memory_model, bank, seconds = prepare(
        sources, questions, model, ratio, max_new_tokens, dtype, bank_dtype, tier
    )
    events = EventLines() if stream else None
    with ProgressDisplay("Reading", "chunks") as display:
        answers = memory_model.ask_many(
            bank,
            questions,
            sampling=sampling,
            reading=reading,
            on_step=reporter(events, display, len(bank), len(questions)),
            on_token=None if events is None else events.token,
        )
    made_with = describe(memory_model, model) | seconds
    if trace is not None:
        write_text(trace, json.dumps(trace_of(answers, made_with)))
    if events is not None:
        events.close(answers, made_with)
    elif as_json:
        plain = [answer.to_dict() for answer in answers]
        print(json.dumps((plain[0] if len(plain) == 1 else {"answers": plain}) | made_with))
    else:
        print_answers(answers, seconds)


def prepare(
    sources: list[Path],
    questions: list[str],
    folder: Path | None,
    ratio: int | None,
    max_new_tokens: int | None,
    dtype: str,
    bank_dtype: str,
    tier: str,
):
    """Model, bank and the seconds that making or opening the bank took."""
    from lychee.bank import MemoryBank, is_bank
    from lychee.documents import is_missing, read_documents

    banks = [path for path in sources if is_bank(path)]
    if banks and len(sources) > 1:
        raise InputError(
            f"{banks[0]}: expected texts or one bank alone, got a bank among {len(sources)} paths",
            "put the texts in with 'lychee add'",
        )
    if banks:
        started = time.perf_counter()
        bank = MemoryBank.open(banks[0], tier=tier)
        opened = time.perf_counter() - started
        if not len(bank):
            begun = bank.describe()["unfinished"]
            state = "unfinished" if begun else "empty"
            raise InputError(
                f"{bank.path}: expected documents, got an {state} bank",
                "go on with 'lychee build --resume'" if begun else "put some in with 'lychee add'",
            )
        if bank_dtype not in ("auto", bank.dtype):
            raise InputError(
                f"bank-dtype: expected {bank.dtype}, which {bank.path} has, got {bank_dtype}"
            )
        memory_model = load_model_of(bank, folder, ratio, max_new_tokens, dtype)
        check_lengths(memory_model, questions)
        bank.attach(memory_model)
        return memory_model, bank, {"open_seconds": round(opened, 3)}
    if len(sources) == 1 and is_missing(sources[0]):
        raise InputError(f"{sources[0]}: expected texts or a bank, got nothing of that name")
    documents = read_documents(sources)
    memory_model = load_model(folder, ratio, max_new_tokens, dtype)
    check_lengths(memory_model, questions)
    started = time.perf_counter()
    with ProgressDisplay("Remembering", "tokens") as display:
        bank = memory_model.remember(documents, bank_dtype=bank_dtype, tier=tier, progress=display)
    return memory_model, bank, {"build_seconds": round(time.perf_counter() - started, 3)}


def check_lengths(memory_model, questions: list[str]) -> None:
    """Refuse a question that is too long before the memory is built, not only after it."""
    for question in questions:
        memory_model.encode_question(question)


def reporter(
    events: EventLines | None, display: ProgressDisplay, chunks: int, questions: int
) -> Callable:
    """What is called at each step of each question."""
    reached = [0] * questions

    def on_step(index: int, step) -> None:
        reached[index] = max(reached[index], step.chunk + 1)
        display(sum(reached), chunks * questions)
        if events is not None:
            events.step(index, step)

    return on_step


class EventLines:
    """Events as lines of JSON: gated, read, updated, token, and one answer per question."""

    def step(self, index: int, step) -> None:
        """A chunk was gated or read; where reading changed the notes, they follow."""
        details = asdict(step)
        notes = details.pop("memory")
        changed = details.pop("changed")
        read = details.pop("read", True)
        if details.get("score") is not None:
            self.print("gated", index, **details, passed=read)
        if read:
            self.print("read", index, **details)
        if changed:
            self.print("updated", index, chunk=step.chunk, memory=notes)

    def token(self, index: int, text: str) -> None:
        self.print("token", index, text=text)

    def close(self, answers: list, made_with: dict[str, Any]) -> None:
        for index, answer in enumerate(answers):
            details = answer.to_dict()
            del details["trace"]
            self.print("answer", index, **details, **made_with)

    def print(self, event: str, index: int, **details: Any) -> None:
        print(json.dumps({"event": event, "question_index": index} | details), flush=True)


def print_answers(answers: list, seconds: dict[str, float]) -> None:
    """Each answer, under its question where there are several, with its sources."""
    for answer in answers:
        if len(answers) > 1:
            print(f"{answer.question}", file=sys.stderr, flush=True)
        print(answer.text, flush=True)
        for source in answer.sources:
            if getattr(source, "changed", True):
                where = f"{source.document}, characters {source.start:,} to {source.stop:,}"
                quote = excerpt(source.quote, answer.text)
                print(f"  notes changed at {where}{quote}", file=sys.stderr)
    usage = answers[0].usage
    read = {step.chunk for answer in answers for step in answer.trace if step.read}
    tokens = counted(usage.text_tokens, "token")
    made = (
        f"{tokens} remembered in {seconds['build_seconds']:.1f} s as"
        if "build_seconds" in seconds
        else f"{tokens} in the bank, opened in {seconds['open_seconds']:.2f} s, as"
    )
    print(
        f"  {made} {counted(usage.memory_tokens, 'memory token')}; {len(read)} of "
        f"{counted(usage.chunks, 'chunk')} read in {usage.read_seconds:.1f} s, answered in "
        f"{usage.answer_seconds:.1f} s",
        file=sys.stderr,
    )


def excerpt(quote: str, answer: str, margin: int = 60) -> str:
    """The answer as it stands in a source, with some text around it; nothing if it does not."""
    place = quote.find(answer) if answer else -1
    if place < 0:
        return ""
    around = quote[max(0, place - margin) : place + len(answer) + margin]
    return f': "... {" ".join(around.split())} ..."'
