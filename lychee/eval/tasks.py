# SPDX-License-Identifier: Apache-2.0
"""What `lychee eval` knows by name: generated tasks at given lengths, and formats of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from lychee.data.filler import read_books
from lychee.data.needles import word_list
from lychee.data.readers import FORMATS, read_samples
from lychee.data.ruler import METRIC, RulerMaker, setting_of
from lychee.data.ruler import TASKS as RULER_TASKS
from lychee.data.task import TaskSample
from lychee.demo import read_book
from lychee.errors import InputError
from lychee.eval.needles import BREAKDOWN, NeedleTexts
from lychee.tokenizer import TextTokenizer

Texts = Iterator[list[TaskSample]]
QUESTIONS = 100


@dataclass(frozen=True)
class Request:
    """What is asked of every task.

    Attributes:
        files: books of generated tasks, data files of the others.
        questions: per cell; None is QUESTIONS, or all that a file holds.
        split: of names, values and filler of RULER's tasks; None draws from everything.
        difficulty: settings of RULER's tasks by name.
    """

    files: tuple[Path, ...] = ()
    questions: int | None = None
    seed: int = 0
    split: str | None = "test"
    difficulty: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskCell:
    """Questions of one task at one length, or of one file (`length` is None then).

    Attributes:
        texts: gives the samples anew, text by text; those of one text share their context.
        metric: what ranks where the user names no other; "score" if questions differ in it.
        breakdown: columns of the table, each a choice of questions by their details.
    """

    task: str
    source: str
    length: int | None
    questions: int
    texts: Callable[[], Texts]
    metric: str = "score"
    breakdown: dict[str, dict[str, Any]] = field(default_factory=dict)


def task_names(names: str) -> list[str]:
    """Tasks of a list with commas, where "ruler" is all of RULER's; InputError for unknown ones."""
    known = ["needles", *RULER_TASKS, *FORMATS]
    found: list[str] = []
    for name in names.split(","):
        if name != "ruler" and name not in known:
            raise InputError(f"task: expected one of ruler, {', '.join(known)}, got {name!r}")
        found += RULER_TASKS if name == "ruler" else [name]
    return list(dict.fromkeys(found))


def generated_names(name: str) -> list[str]:
    """One task that can be made at any length; InputError for any other."""
    if name not in (known := ["needles", *RULER_TASKS]):
        raise InputError(f"task: expected one of {', '.join(known)}, got {name!r}")
    return [name]


def task_cells(
    tasks: Sequence[str], lengths: Sequence[int], request: Request, tokenizer: TextTokenizer
) -> list[TaskCell]:
    """The cells of several tasks; what cannot be made is refused before anything runs."""
    from_files = [task for task in tasks if task in FORMATS]
    if from_files and len(from_files) < len(tasks):
        raise InputError(
            f"task: expected tasks that are generated or tasks of files, got both: "
            f"{', '.join(tasks)}"
        )
    if from_files:
        return file_cells(from_files, request)
    books = read_books(request.files) if request.files else [read_book(None)[1]]
    cells, needed = [], request.questions or QUESTIONS
    if "needles" in tasks:
        needles = NeedleTexts(tokenizer, books)
        for length in lengths:
            texts = lambda length=length: needles.texts(length, needed, request.seed)  # noqa: E731
            cells.append(TaskCell("needles", "", length, needed, texts, "exact", BREAKDOWN))
    ruler = [task for task in tasks if task in RULER_TASKS]
    for task in ruler:
        setting_of(task, request.difficulty)
    if ruler:
        words = word_list(books, tokenizer.encode)
        count = lambda text: len(tokenizer.encode(text))  # noqa: E731
        maker = RulerMaker(words, count, books, request.split, request.seed)
        for task in ruler:
            for length in lengths:
                cells.append(ruler_cell(maker, task, length, needed, request.difficulty))
    return cells


def ruler_cell(
    maker: RulerMaker, task: str, length: int, questions: int, difficulty: dict[str, Any]
) -> TaskCell:
    """One of RULER's tasks at one length; a text is asked all that it holds."""

    def texts() -> Texts:
        index, left = 0, questions
        while left > 0:
            samples = maker.make(task, length, index, left, **difficulty)
            yield samples
            index, left = index + 1, left - len(samples)

    return TaskCell(task, "", length, questions, texts, METRIC)


def file_cells(tasks: Sequence[str], request: Request) -> list[TaskCell]:
    """One cell per file; reads them all, so that a broken record stops the run at once."""
    if not request.files:
        raise InputError(f"{tasks[0]}: expected a data file, got none", "name it behind the task")
    if request.difficulty:
        raise InputError(f"{tasks[0]}: expected no settings, got {', '.join(request.difficulty)}")
    cells = []
    for task in tasks:
        for path in request.files:
            samples = list(read_samples(path, task))[: request.questions]
            groups = [list(group) for _, group in groupby(samples, key=lambda s: s.context)]
            used = {sample.metric for sample in samples}
            metric = used.pop() if len(used) == 1 else "score"
            texts = lambda groups=groups: iter(groups)  # noqa: E731
            cells.append(TaskCell(task, path.name, None, len(samples), texts, metric))
    return cells
