# SPDX-License-Identifier: Apache-2.0
"""The synthetic tasks of RULER (arXiv:2404.06654) with their settings, seeds and splits.

Needles, variable tracking, common and frequent words. Task names, counts and answer prefixes are
the benchmark's; needles are worded as in `lychee.data.needles`. QA is read from files instead.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from lychee.data.filler import Count, Filler, plant
from lychee.data.needles import QUESTIONS, STATEMENTS
from lychee.data.task import Span, TaskSample, of_split
from lychee.data.word_counts import CommonWords, FrequentWords, Query, too_short
from lychee.errors import InputError

METRIC = "string_match_all"
MANY = "What are all the special {attribute}s for {key} mentioned in the provided text?"
PREFIX = "The special {attribute} for {key} mentioned in the provided text is"
MANY_PREFIX = "The special {attribute}s for {key} mentioned in the provided text are"
VARIABLES_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assigned the value {value}, they are:"
)
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HAYSTACKS = ("noise", "essay", "needles")
KINDS = ("word", "number", "uuid")
EXPECTED = {int: "a positive integer", float: "a positive number", str: "text", bool: "a boolean"}


@dataclass(frozen=True)
class Needles:
    """Keys with values, of which some are asked for.

    Attributes:
        haystack: noise (few sentences, repeated), essay (books, or generated) or needles.
        key, value: word, number or uuid.
        keys, values: keys in the text, values of each.
        queries: keys asked for in one question.
    """

    haystack: str = "essay"
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1


@dataclass(frozen=True)
class Variables:
    """Chains of assignments; the question wants all variables of one chain.

    Attributes:
        chains: in the text, one of which is asked for.
        hops: assignments from variable to variable after the first.
        shuffled: whether a chain's statements may stand in any order.
    """

    haystack: str = "noise"
    chains: int = 1
    hops: int = 4
    shuffled: bool = False


Setting = Needles | Variables | CommonWords | FrequentWords

TASKS: dict[str, Setting] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuid"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(haystack="needles"),
    "niah_multikey_3": Needles(haystack="needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
    "vt": Variables(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}


def setting_of(task: str, difficulty: dict[str, Any]) -> Setting:
    """The task's settings with `difficulty` in place; InputError where they do not fit."""
    if task not in TASKS:
        raise InputError(f"task: expected one of {', '.join(TASKS)}, got {task!r}", "")
    known = {item.name: type(getattr(TASKS[task], item.name)) for item in fields(TASKS[task])}
    for name, value in difficulty.items():
        if name not in known:
            raise InputError(f"{task}: expected settings of {', '.join(known)}, got {name!r}", "")
        kind = known[name]
        if type(value) is not kind or (kind in (int, float) and value <= 0):
            raise InputError(f"{task}: {name}: expected {EXPECTED[kind]}, got {value!r}", "")
    setting = replace(TASKS[task], **difficulty)
    choices = {"haystack": HAYSTACKS, "key": KINDS, "value": KINDS}
    for name in choices.keys() & known.keys():
        if (value := getattr(setting, name)) not in choices[name]:
            expected = ", ".join(choices[name])
            raise InputError(f"{task}: {name}: expected one of {expected}, got {value!r}", "")
    if isinstance(setting, Variables) and setting.haystack == "needles":
        raise InputError(f"{task}: haystack: expected noise or essay, got 'needles'", "")
    if isinstance(setting, Needles) and setting.queries > setting.keys:
        raise InputError(
            f"{task}: queries: expected at most {setting.keys} (keys), got {setting.queries}", ""
        )
    return setting


@dataclass
class RulerMaker:
    """Makes samples; the same arguments give the same samples.

    Attributes:
        words: to draw keys and values from.
        count: tokens of a text.
        books: texts for the essay haystack; generated sentences where there are none.
        split: train, validation or test: names, values and filler that no other split has; None
            draws from everything.
    """

    words: Sequence[str]
    count: Count
    books: Sequence[str] = ()
    split: str | None = "test"
    seed: int = 0
    fillers: dict[str, Filler] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.words = list(dict.fromkeys(of_split(self.words, self.split)))
        if len(self.words) < 16:
            raise InputError(
                f"words: expected at least 16 of the {self.split or 'whole'} split, got "
                f"{len(self.words)}",
                "give more or longer books",
            )

    def make(
        self, task: str, tokens: int, index: int = 0, questions: int = 1, **difficulty: Any
    ) -> list[TaskSample]:
        """Questions about text number `index` of at most `tokens` tokens; they share its context.

        Fewer than `questions` where the text does not hold as many that differ.
        """
        setting = setting_of(task, difficulty)
        draw = random.Random(f"{self.seed}/{self.split}/{task}/{tokens}/{index}")
        if isinstance(setting, Needles):
            context, asked = self._needles(task, setting, tokens, draw)
        elif isinstance(setting, Variables):
            context, asked = self._variables(task, setting, tokens, draw)
        else:
            context, asked = setting.make(task, self.words, self.split, self.count, tokens, draw)
        details = {"tokens": tokens, "index": index, "split": self.split} | asdict(setting)
        return [
            TaskSample(
                task,
                context,
                query.question,
                tuple(query.answers),
                tuple(query.support),
                METRIC,
                details | {"answer_prefix": query.prefix},
            )
            for query in asked[:questions]
        ]

    def _needles(
        self, task: str, setting: Needles, tokens: int, draw: random.Random
    ) -> tuple[str, list[Query]]:
        """RULER's eight retrieval tasks."""
        attribute = f"magic {setting.value}"
        facts: dict[str, list[str]] = {}  # key to values
        statements: dict[tuple[str, str], str] = {}

        def add_key() -> int:
            """A new key with its values; the tokens of its statements."""
            key, tries = "", 0
            while not key or key in facts:
                # Where a long text has used up the keys of two words, they become longer.
                key = self._draw(setting.key, draw, draw.randint(1, 2) + tries // 8)
                tries += 1
            facts[key] = []
            while len(facts[key]) < setting.values:
                value = self._draw(setting.value, draw)
                if value not in facts[key] and value not in key:
                    facts[key].append(value)
            told = {
                (key, value): STATEMENTS[0].format(attribute=attribute, key=key, value=value)
                for value in facts[key]
            }
            statements.update(told)
            return sum(self.count(" " + statement) for statement in told.values())

        room = tokens - sum(add_key() for _ in range(setting.keys))
        if room < 0:
            raise too_short(task, tokens, tokens - room)
        keys = draw.sample(list(facts), len(facts))
        while setting.haystack == "needles" and room > 0:
            room -= add_key()
        if setting.haystack == "needles" and len(facts) > setting.keys:
            last, _ = facts.popitem()
            statements = {pair: text for pair, text in statements.items() if pair[0] != last}
        order = draw.sample(list(statements), len(statements))
        context, spans = self._hide(setting.haystack, [statements[f] for f in order], room, draw)
        where = dict(zip(order, spans, strict=True))
        asked = []
        for first in range(0, setting.keys - setting.queries + 1, setting.queries):
            group = keys[first : first + setting.queries]
            wanted = [(key, value) for key in group for value in facts[key]]
            many = len(wanted) > 1
            names = f"{', '.join(group[:-1])} and {group[-1]}" if len(group) > 1 else group[0]
            question = (MANY if many else QUESTIONS[0]).format(attribute=attribute, key=names)
            prefix = (MANY_PREFIX if many else PREFIX).format(attribute=attribute, key=names)
            values = [value for _, value in wanted]
            asked.append(Query(question, values, [where[fact] for fact in wanted], prefix))
        return context, asked

    def _variables(
        self, task: str, setting: Variables, tokens: int, draw: random.Random
    ) -> tuple[str, list[Query]]:
        """Variable tracking."""
        chains: dict[str, list[str]] = {}  # value to variables
        taken: set[str] = set()
        while len(chains) < setting.chains:
            chain = chains.setdefault(self._of_split(lambda: str(draw.randrange(10**4, 10**5))), [])
            while len(chain) <= setting.hops:
                name = self._of_split(lambda: "".join(draw.choices(CAPITALS, k=5)))
                if name not in taken:
                    taken.add(name)
                    chain.append(name)
        told = [
            [f"VAR {chain[0]} = {value}."]
            + [f"VAR {new} = VAR {old}." for old, new in pairwise(chain)]
            for value, chain in chains.items()
        ]
        room = tokens - sum(self.count(" " + text) for texts in told for text in texts)
        if room < 0:
            raise too_short(task, tokens, tokens - room)
        left = [draw.sample(texts, len(texts)) if setting.shuffled else texts[:] for texts in told]
        turns = [index for index, texts in enumerate(told) for _ in texts]
        order = [left[index].pop(0) for index in draw.sample(turns, len(turns))]
        context, spans = self._hide(setting.haystack, order, room, draw)
        where = dict(zip(order, spans, strict=True))
        asked = [
            Query(
                f"Find all variables that are assigned the value {value} in the text above.",
                chain,
                [where[text] for text in texts],
                VARIABLES_PREFIX.format(count=len(chain), value=value),
            )
            for (value, chain), texts in zip(chains.items(), told, strict=True)
        ]
        return context, asked

    def _hide(
        self, haystack: str, statements: list[str], room: int, draw: random.Random
    ) -> tuple[str, list[Span]]:
        """Statements in their order, in `room` tokens of the haystack's text."""
        if haystack == "needles":
            return plant("", statements, draw)
        if haystack not in self.fillers:
            if haystack == "noise":
                self.fillers[haystack] = Filler.noise(self.count, self.split, self.seed)
            elif self.books:
                self.fillers[haystack] = Filler.of_books(self.books, self.count, self.split)
            else:
                self.fillers[haystack] = Filler.generated(self.count, self.split, self.seed)
        return plant(self.fillers[haystack].draw(room, draw), statements, draw)

    def _draw(self, kind: str, draw: random.Random, words: int = 1) -> str:
        """Words, a number or a uuid of the split."""
        if kind == "word":
            return " ".join(draw.choices(self.words, k=words))
        if kind == "number":
            return self._of_split(lambda: str(draw.randrange(10**6, 10**7)))
        return self._of_split(lambda: str(uuid.UUID(int=draw.getrandbits(128), version=4)))

    def _of_split(self, make: Callable[[], str]) -> str:
        """What `make` gives, once it belongs to the split."""
        while not of_split([made := make()], self.split):
            continue
        return made
