# SPDX-License-Identifier: Apache-2.0
"""Prompt templates of the reading loop: named constants, overridable per checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lychee.errors import MemoryConfigError
from lychee.tokenizer import TextTokenizer

# The update turn sees one chunk's memory; its output replaces the working memory.
UPDATE = (
    "You are reading a long text piece by piece. The piece itself is in your memory; you also see "
    "the question and your notes so far.\n"
    "<question>{question}</question>\n<notes>{memory}</notes>\n"
    "Write the complete new notes: keep what still helps to answer, add what this piece tells, "
    "leave out the rest.\nNew notes:"
)

# The final turn sees no text, only the working memory.
ANSWER = (
    "You have read a long text. Answer the question from your notes, in as few words as possible.\n"
    "<question>{question}</question>\n<notes>{memory}</notes>\nAnswer:"
)

NO_MEMORY = "nothing yet"

DEFAULTS = {"update": UPDATE, "answer": ANSWER, "no_memory": NO_MEMORY}


class PromptTemplate:
    """Token ids around a question, a working memory and a text, spliced in as ids.

    Sections are tokenized once, one by one, and the memory's ids are never re-tokenized, so a
    memory survives any number of turns unchanged.
    """

    def __init__(self, sections: Sequence[tuple[str | None, Sequence[int]]], tail: Sequence[int]):
        """`sections`: (placeholder, ids before it) in order; `tail`: ids after the last one."""
        self.sections = [(name, list(ids)) for name, ids in sections]
        self.tail = list(tail)

    @classmethod
    def from_text(
        cls,
        text: str,
        encode: Callable[[str], list[int]],
        names: Sequence[str] = ("question", "memory"),
    ) -> PromptTemplate:
        """`names`: the placeholders {name} that `text` has, of question, memory and text."""
        sections, rest = [], text
        while True:
            found = [(rest.find("{" + n + "}"), n) for n in names]
            found = sorted(pair for pair in found if pair[0] >= 0)
            if not found:
                break
            place, name = found[0]
            sections.append((name, encode(rest[:place])))
            rest = rest[place + len(name) + 2 :]
        if sorted(name for name, _ in sections) != sorted(names):
            wanted = " and ".join(f"{{{name}}}" for name in names)
            raise MemoryConfigError(f"prompt template: expected {wanted} once each, got {text!r}")
        return cls(sections, encode(rest))

    def render(
        self, question: Sequence[int], memory: Sequence[int] = (), text: Sequence[int] = ()
    ) -> list[int]:
        """Ids of the whole prompt."""
        values = {"question": question, "memory": memory, "text": text}
        ids: list[int] = []
        for name, before in self.sections:
            ids += before
            ids += values[name]
        return ids + self.tail

    def split(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Question and working memory of a rendered prompt, as long as neither contains the ids
        that stand between them."""
        (first, before), (second, between) = self.sections
        if not between:
            raise MemoryConfigError(
                "prompt template: expected text between {question} and {memory}, got none"
            )
        start = len(before)
        places = range(start, len(ids) - len(between) + 1)
        end = next(p for p in places if list(ids[p : p + len(between)]) == between)
        behind = list(ids[end + len(between) : len(ids) - len(self.tail)])
        values = {first: list(ids[start:end]), second: behind}
        return values["question"], values["memory"]

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self.sections) + len(self.tail)


@dataclass(frozen=True)
class ReadingPrompts:
    """The two prompts and the initial notes as token ids, and the ids that end a turn."""

    update: PromptTemplate
    answer: PromptTemplate
    no_memory: list[int]
    stop: frozenset[int]

    @property
    def end(self) -> int:
        """The id that training puts at the end of a turn: the lowest where several end it."""
        if not self.stop:
            raise MemoryConfigError(
                "config: eos_token_id: expected a token that ends a turn, got none",
                "add it to the model's config.json",
            )
        return min(self.stop)

    @classmethod
    def of_checkpoint(
        cls, tokenizer: TextTokenizer, templates: dict[str, str], stop: Iterable[int]
    ) -> ReadingPrompts:
        """The checkpoint's own prompts, or the defaults in the tokenizer's chat template."""
        texts = dict(DEFAULTS)
        if not templates:
            for name in ("update", "answer"):
                texts[name] = tokenizer.chat(texts[name])
        texts |= templates
        return cls(
            PromptTemplate.from_text(texts["update"], tokenizer.encode),
            PromptTemplate.from_text(texts["answer"], tokenizer.encode),
            tokenizer.encode(texts["no_memory"]),
            frozenset(stop),
        )
