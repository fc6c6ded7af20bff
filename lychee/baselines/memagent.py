# SPDX-License-Identifier: Apache-2.0
"""MemAgent: reads raw text section by section and rewrites its notes after every section.

Every section of 5,000 tokens stands in the prompt, behind the question and the notes so far. The
answer is given from question and notes alone. All questions on a text go through it together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lychee.errors import InputError
from lychee.generate import GREEDY, Sampling, generate
from lychee.memory_model import LycheeMemory
from lychee.prompts import PromptTemplate
from lychee.trace import Answer, Step, Usage

SECTION_TOKENS = 5000
# Questions that read a section together; each has a cache of its own for the whole prompt.
MAX_ROWS = 8

# The only turn that sees text; its output replaces the notes.
SECTION = (
    "You are reading a long text section by section. You see the question, your notes so far and "
    "the next section.\n"
    "<question>{question}</question>\n<notes>{memory}</notes>\n<section>{text}</section>\n"
    "Write the complete new notes: keep what still helps to answer, add what this section tells, "
    "leave out the rest.\nNew notes:"
)

OnRead = Callable[[int, int, list[int], bool], None]


class MemAgent:
    """Questions answered by reading the whole text, over a LycheeMemory's decoder.

    Attributes:
        build_seconds, at_hand: of a text before its questions; there is nothing to do or to keep.
    """

    build_seconds, at_hand = 0.0, False

    def __init__(
        self, model: LycheeMemory, *, section: int | None = None, sampling: Sampling = GREEDY
    ):
        """
        Args:
            model: whose decoder, tokenizer, limits of notes and answers, and prompt of the final
                turn are used; its checkpoint may carry a template "section" of its own.
            section: raw tokens per turn; 5,000, or as many as the model's positions leave room for.
            sampling: for notes and answers alike.

        Raises:
            InputError: a turn would be longer than the model's positions.
        """
        self.model, self.sampling = model, sampling
        encode, memory = model.tokenizer.encode, model.memory
        text = memory.templates.get("section")
        if text is None:
            text = SECTION if memory.templates else model.tokenizer.chat(SECTION)
        self.prompt = PromptTemplate.from_text(text, encode, ("question", "memory", "text"))
        positions = model.decoder.config.max_position_embeddings
        room = positions - len(self.prompt) - memory.question - 2 * memory.size
        self.section = min(SECTION_TOKENS, room) if section is None else section
        if not 1 <= self.section <= room:
            raise InputError(
                f"section: expected 1 to {room} tokens, which leave room for prompt, question and "
                f"notes in the model's {positions} positions, got {self.section}"
            )

    def update(
        self, section: Sequence[int], questions: Sequence[Sequence[int]], notes: list[list[int]]
    ) -> list[list[int]]:
        """One turn per row: new notes from a question, old notes and a section's ids."""
        pairs = zip(questions, notes, strict=True)
        return generate(
            self.model.decoder,
            [self.prompt.render(question, old, section) for question, old in pairs],
            max_new_tokens=self.model.memory.size,
            stop=self.model.reasoner.prompts.stop,
            sampling=self.sampling,
        )

    def read(
        self,
        text: Sequence[int],
        questions: Sequence[Sequence[int]],
        on_read: OnRead | None = None,
    ) -> list[list[int]]:
        """Notes of every question after the whole text.

        Args:
            text: token ids.
            questions: token ids per question.
            on_read: called with (question index, section index, notes, changed).
        """
        notes = [list(self.model.reasoner.prompts.no_memory) for _ in questions]
        for index, start in enumerate(range(0, len(text), self.section)):
            section = list(text[start : start + self.section])
            for first in range(0, len(questions), MAX_ROWS):
                rows = slice(first, first + MAX_ROWS)
                for row, new in enumerate(self.update(section, questions[rows], notes[rows])):
                    if on_read is not None:
                        on_read(first + row, index, new, new != notes[first + row])
                    notes[first + row] = new
        return notes

    def answer_from(
        self, questions: Sequence[Sequence[int]], notes: Sequence[list[int]]
    ) -> list[list[int]]:
        """The final turn per row: answer ids from question and notes alone."""
        return self.model.reasoner.answer(questions, notes, self.sampling)

    def answer(self, context: str, questions: Sequence[str]) -> list[Answer]:
        """Answer questions on one text.

        Raises:
            InputError: an empty text, an empty question, or one longer than the limit.
        """
        tokenizer = self.model.tokenizer
        text, offsets = tokenizer.encode_with_offsets(context)
        if not text:
            raise InputError("context: expected text, got nothing to read")
        ids = [self.model.encode_question(question) for question in questions]
        traces: list[list[Step]] = [[] for _ in questions]

        def on_read(row: int, section: int, notes: list[int], changed: bool) -> None:
            start = section * self.section
            stop = min(start + self.section, len(text))
            span = offsets[start][0], offsets[stop - 1][1]
            step = Step(section, "text", *span, tokenizer.decode(notes).strip(), changed)
            traces[row].append(step)

        started = time.perf_counter()
        notes = self.read(text, ids, on_read)
        read = time.perf_counter()
        answers = self.answer_from(ids, notes)
        sections = -(-len(text) // self.section)
        usage = Usage(
            len(text), 0, 0, sections, sections, read - started, time.perf_counter() - read
        )
        return [
            Answer(question, tokenizer.decode(answer).strip(), [], trace, usage)
            for question, answer, trace in zip(questions, answers, traces, strict=True)
        ]
