# SPDX-License-Identifier: Apache-2.0
"""The demonstration: hides facts in a long text, asks for them and keeps what came of each."""

from __future__ import annotations

import gzip
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lychee.bank import MemoryBank
from lychee.data.needles import KINDS, Needle, NeedleMaker, hide_needles, word_list
from lychee.documents import read_file
from lychee.errors import InputError
from lychee.memory_model import LycheeMemory

SHIPPED_BOOK = Path(__file__).parent / "assets" / "pride-and-prejudice.txt.gz"
FEWEST_WORDS = 16


@dataclass(frozen=True)
class Outcome:
    """One hidden fact and what the model made of it; chunks count from 0."""

    statement: str
    question: str
    expected: str
    answer: str
    right: bool
    token: int
    percent: float
    chunk: int
    chunks_read: int
    changed_chunks: list[int]
    seconds: float


def read_book(path: Path | None) -> tuple[str, str]:
    """Name and text of a file, or of the shipped book."""
    if path is not None:
        document = read_file(path)
        return document.name, document.text
    try:
        return SHIPPED_BOOK.name, gzip.decompress(SHIPPED_BOOK.read_bytes()).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{SHIPPED_BOOK}: expected the book that comes with the project, got: {error}",
            "name another text with --text",
        ) from error


def make_facts(model: LycheeMemory, name: str, text: str, count: int, seed: int) -> list[Needle]:
    """Different facts, about numbers and words by turns, made of common words of the text."""
    words = word_list([text], model.tokenizer.encode)
    if len(words) < FEWEST_WORDS:
        raise InputError(
            f"{name}: expected English prose with at least {FEWEST_WORDS} common words of one "
            f"token each, got {len(words)}",
            "use a longer text",
        )
    maker = NeedleMaker(words, seed)
    facts: dict[tuple[str, str], Needle] = {}
    while len(facts) < count:
        fact = maker.make(KINDS[len(facts) % len(KINDS)])
        facts.setdefault((fact.attribute, fact.key), fact)
    return list(facts.values())


def hide_facts(
    model: LycheeMemory, text: str, facts: list[Needle], tokens: int, seed: int
) -> tuple[str, list[tuple[Needle, int]]]:
    """`tokens` tokens of the text, repeated if it is shorter, with facts behind random sentences.

    Returns:
        The text, and each fact with the character its statement starts at, in order.
    """
    statements = sum(len(model.tokenizer.encode(" " + fact.statement)) for fact in facts)
    room = tokens - statements
    if room < statements:
        raise InputError(
            f"tokens: expected at least {2 * statements} for {len(facts)} facts, got {tokens}", ""
        )
    ids, offsets = model.tokenizer.encode_with_offsets(text)
    if not ids:
        raise InputError("text: expected prose, got nothing to read")
    if len(ids) < room:
        text = "\n\n".join([text] * -(-room // len(ids)))
        ids, offsets = model.tokenizer.encode_with_offsets(text)
    return hide_needles(text[: offsets[room - 1][1]], facts, random.Random(seed))


def place_of(model: LycheeMemory, bank: MemoryBank, character: int) -> tuple[int, int]:
    """(token, chunk) of a character of the bank's only document."""
    before = 0
    for index, chunk in enumerate(bank.chunks):
        if character < chunk.stop:
            inside = bank.documents[0].text[chunk.start : character]
            return before + len(model.tokenizer.encode(inside)), index
        before += chunk.tokens
    raise ValueError(f"character: expected one of the document's, got {character}")


def says(answer: str, value: str) -> bool:
    """Whether `value` stands in the answer as a word or number of its own, in any case."""
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", answer, re.IGNORECASE) is not None


def ask_for(
    model: LycheeMemory,
    bank: MemoryBank,
    fact: Needle,
    character: int,
    progress: Callable[[int, int], None],
) -> Outcome:
    """Ask for one hidden fact, whose statement starts at `character`."""
    started = time.perf_counter()
    answer = model.ask(
        bank, fact.question, on_step=lambda _, step: progress(step.chunk + 1, len(bank))
    )
    seconds = time.perf_counter() - started
    token, chunk = place_of(model, bank, character)
    return Outcome(
        fact.statement,
        fact.question,
        fact.value,
        answer.text,
        says(answer.text, fact.value),
        token,
        round(100 * token / bank.tokens, 1),
        chunk,
        answer.usage.chunks_read,
        [step.chunk for step in answer.trace if step.changed],
        round(seconds, 2),
    )
