# SPDX-License-Identifier: Apache-2.0
"""What `lychee eval` knows by name: generated tasks at given lengths, and formats of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any

from lychee.data.filler import Count, read_books
from lychee.data.hotpotqa import lengthened
from lychee.data.multihop import TASKS as MULTI_HOP_TASKS
from lychee.data.multihop import MultiHopMaker
from lychee.data.multihop import setting_of as multi_hop_setting
from lychee.data.needles import word_list
from lychee.data.readers import FORMATS, read_samples
from lychee.data.ruler import METRIC, RulerMaker
from lychee.data.ruler import TASKS as RULER_TASKS
from lychee.data.ruler import setting_of as ruler_setting
from lychee.data.task import SPLITS, TaskSample
from lychee.demo import read_book
from lychee.errors import InputError
from lychee.eval.needles import BREAKDOWN, NeedleTexts
from lychee.tokenizer import TextTokenizer

Texts = Iterator[list[TaskSample]]
QUESTIONS = 100
LENGTHS = (4096, 16384, 65536, 131072)
# Texts up to so many tokens may be too short for a task; the first ones are made to find out.
SHORT, TRIED = 4096, 2


@dataclass(frozen=True)
class Request:
    """What is asked of every task.

    Attributes:
        files: books of generated tasks, data files of the others.
        questions: per cell; None is QUESTIONS, or all that a file holds.
        split: of names, values and filler; None draws from everything. Needles know no split.
        difficulty: settings of the tasks by name.
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


# Names that stand for several tasks.
GROUPS = {"ruler": list(RULER_TASKS), "multihop": list(MULTI_HOP_TASKS)}
# The tasks that take a split: what makes them, what checks their difficulty, and their metric.
MAKERS = dict.fromkeys(RULER_TASKS, (RulerMaker, ruler_setting, METRIC)) | dict.fromkeys(
    MULTI_HOP_TASKS, (MultiHopMaker, multi_hop_setting, "exact_match")
)
GENERATED = ["needles", *MAKERS]


def names_of(files: Sequence[Path]) -> dict[Path, str]:
    """What results call each file: its name, or all of its path where others have that name."""
    taken = Counter(file.name for file in files)
    return {file: file.name if taken[file.name] == 1 else str(file) for file in files}


def task_names(names: str) -> list[str]:
    """Tasks of a list with commas, groups taken apart; InputError for unknown ones."""
    known = [*GROUPS, *GENERATED, *FORMATS]
    found: list[str] = []
    for name in names.split(","):
        if name not in known:
            raise InputError(f"task: expected one of {', '.join(known)}, got {name!r}")
        found += GROUPS.get(name, [name])
    return list(dict.fromkeys(found))


def generated_task(name: str) -> list[str]:
    """One task that can be made at any length; InputError for any other."""
    if name not in GENERATED:
        raise InputError(f"task: expected one of {', '.join(GENERATED)}, got {name!r}")
    return [name]


def task_cells(
    tasks: Sequence[str],
    lengths: Sequence[int] | None,
    request: Request,
    tokenizer: TextTokenizer,
) -> list[TaskCell]:
    """The cells of several tasks; what cannot be made is refused before anything runs.

    `lengths` None is LENGTHS for generated tasks, and for files the texts as they are.
    """
    from_files = [task for task in tasks if task in FORMATS]
    if from_files and len(from_files) < len(tasks):
        raise InputError(
            f"task: expected tasks that are generated or tasks of files, got both: "
            f"{', '.join(tasks)}"
        )
    count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    if from_files:
        return file_cells(from_files, lengths, request, count)
    for task in tasks:
        if task in MAKERS:
            MAKERS[task][1](task, request.difficulty)
        elif request.difficulty:
            raise InputError(f"{task}: expected no settings, got {', '.join(request.difficulty)}")
        if task in MULTI_HOP_TASKS and request.split is None:
            raise InputError(f"{task}: split: expected one of {', '.join(SPLITS)}, got all of them")
    books = read_books(request.files) if request.files else [read_book(None)[1]]
    lengths, questions = lengths or LENGTHS, request.questions or QUESTIONS
    cells = []
    if "needles" in tasks:
        needles = NeedleTexts(tokenizer, books)
        for length in lengths:
            texts = partial(needles.texts, length, questions, request.seed)
            cells.append(TaskCell("needles", "", length, questions, texts, "exact", BREAKDOWN))
    made = [task for task in tasks if task in MAKERS]
    words = word_list(books, tokenizer.encode) if made else []
    makers = {
        kind: kind(words, count, books, request.split, request.seed)
        for kind in dict.fromkeys(MAKERS[task][0] for task in made)
    }
    for task, length in product(made, lengths):
        kind, _, metric = MAKERS[task]
        texts = partial(make_texts, makers[kind], task, length, questions, request)
        cells.append(TaskCell(task, "", length, questions, texts, metric))
    for cell in cells:
        if cell.length <= SHORT:
            for _ in islice(cell.texts(), TRIED):
                pass
    return cells


def make_texts(
    maker: RulerMaker | MultiHopMaker, task: str, length: int, questions: int, request: Request
) -> Texts:
    """Texts until `questions` are asked, each text as many as it holds."""
    index, left = 0, questions
    while left > 0:
        samples = maker.make(task, length, index, left, **request.difficulty)
        yield samples
        index, left = index + 1, left - len(samples)


def file_cells(
    tasks: Sequence[str], lengths: Sequence[int] | None, request: Request, count: Count
) -> list[TaskCell]:
    """One cell per file, and length; reads all, so that a broken record stops the run at once."""
    if not request.files:
        raise InputError(f"{tasks[0]}: expected a data file, got none", "name it behind the task")
    if request.difficulty:
        raise InputError(f"{tasks[0]}: expected no settings, got {', '.join(request.difficulty)}")
    for task in tasks:
        if lengths and task != "hotpotqa":
            raise InputError(f"{task}: length: expected none, as texts stay as they are in files")
    cells, names = [], names_of(request.files)
    for task, path, length in product(tasks, request.files, lengths or [None]):
        samples = list(read_samples(path, task))[: request.questions]
        used = {sample.metric for sample in samples}
        metric = used.pop() if len(used) == 1 else "score"
        groups = [list(group) for _, group in groupby(samples, key=lambda s: s.context)]
        texts = partial(iter, groups)
        if length is not None:
            texts = partial(longer_texts, path, length, request, count)
        cells.append(TaskCell(task, names[path], length, len(samples), texts, metric))
    return cells


def longer_texts(path: Path, length: int, request: Request, count: Count) -> Texts:
    """HotpotQA's questions, each about a text of its own."""
    for sample in lengthened(path, length, count, request.questions, request.seed):
        yield [sample]
