# SPDX-License-Identifier: Apache-2.0
"""Multi-hop question answering over invented worlds, hidden in long texts, as task samples.

All questions of a text share its world: the facts of one are distractors of the others. Facts stand
in any order and at any place.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lychee.data.filler import Count, Filler, plant
from lychee.data.task import TaskSample, of_split
from lychee.data.worlds import World, WorldQuestion
from lychee.errors import InputError

# Task names and how each one's questions are made.
TASKS = {
    "hops_1": ("bridge", 1),
    "hops_2": ("bridge", 2),
    "hops_3": ("bridge", 3),
    "hops_4": ("bridge", 4),
    "comparison": ("comparison", 2),
}
QUESTIONS_PER_WORLD = 8


@dataclass(frozen=True)
class Setting:
    """Difficulty of a task.

    Attributes:
        distractors: facts that no question needs, per question.
        surnames: share of people with two names, which others may share.
    """

    distractors: int = 2
    surnames: float = 0.2


def setting_of(task: str, difficulty: dict[str, Any]) -> Setting:
    """The settings of a task with `difficulty` in place; InputError where they do not fit."""
    if task not in TASKS:
        raise InputError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    known = [item.name for item in fields(Setting)]
    for name, value in difficulty.items():
        if name not in known:
            raise InputError(f"{task}: expected settings of {', '.join(known)}, got {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise InputError(f"{task}: {name}: expected a number from 0 on, got {value!r}")
    setting = replace(Setting(), **difficulty)
    if setting.distractors != int(setting.distractors):
        raise InputError(f"{task}: distractors: expected a whole number, got {setting.distractors}")
    if setting.surnames > 1:
        raise InputError(f"{task}: surnames: expected a share up to 1, got {setting.surnames}")
    return setting


@dataclass
class MultiHopMaker:
    """Makes samples; the same arguments give the same samples.

    Attributes:
        words: values of facts that lead to a word.
        count: tokens of a text.
        books: texts for the filler; generated sentences where there are none.
        split: train, validation or test: names and filler that no other split has.
    """

    words: Sequence[str]
    count: Count
    books: Sequence[str] = ()
    split: str = "test"
    seed: int = 0
    filler: Filler | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.words = of_split(self.words, self.split)
        if len(self.words) < 16:
            raise InputError(
                f"words: expected at least 16 of the {self.split} split, got {len(self.words)}",
                "give more or longer books",
            )

    def make(
        self, task: str, tokens: int, index: int = 0, questions: int = 1, **difficulty: Any
    ) -> list[TaskSample]:
        """`questions` about text number `index` of at most `tokens` tokens; they share it.

        `difficulty`: fields of `Setting`. Fewer than `questions` where the text does not hold so
        many.
        """
        setting = setting_of(task, difficulty)
        draw = random.Random(f"{self.seed}/{self.split}/{task}/{tokens}/{index}")
        asked, told, room = self._world(task, tokens, setting, draw)
        if not asked:
            raise InputError(f"{task}: expected a longer text, got {tokens} tokens")
        order = draw.sample(told, len(told))
        context, spans = plant(self._filler().draw(room, draw), order, draw)
        where = dict(zip(order, spans, strict=True))
        kind, hops = TASKS[task]
        details = {"tokens": tokens, "index": index, "split": self.split}
        details |= {"kind": kind, "hops": hops} | asdict(setting)
        return [
            TaskSample(
                task,
                context,
                question.text,
                (question.answer,),
                tuple(where[fact.statement] for fact in question.facts),
                "exact_match",
                details,
            )
            for question in asked[:questions]
        ]

    def _world(
        self, task: str, tokens: int, setting: Setting, draw: random.Random
    ) -> tuple[list[WorldQuestion], list[str], int]:
        """Questions, all statements of their world, and the tokens left for filler."""
        kind, hops = TASKS[task]
        world = World(self.words, draw, self.split, surnames=setting.surnames)
        asked: list[WorldQuestion] = []
        told: list[str] = []
        room = tokens
        for _ in range(QUESTIONS_PER_WORLD):
            question = world.comparison() if kind == "comparison" else world.bridge(hops)
            others = [world.distractor(question) for _ in range(int(setting.distractors))]
            statements = [fact.statement for fact in (*question.facts, *others)]
            size = sum(self.count(" " + statement) for statement in statements)
            if size > room:
                break
            room -= size
            asked.append(question)
            told += statements
        return asked, told, room

    def _filler(self) -> Filler:
        if self.filler is None:
            if self.books:
                self.filler = Filler.of_books(self.books, self.count, self.split)
            else:
                self.filler = Filler.generated(self.count, self.split, self.seed)
        return self.filler
