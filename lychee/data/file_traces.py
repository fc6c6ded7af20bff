# SPDX-License-Identifier: Apache-2.0
"""Working-memory traces from files of questions whose supporting sentences are known, as HotpotQA.

The notes are the supporting sentences read so far, in the order of the text. A chunk adds those
that stand whole in it, and leaves the notes of every other question alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lychee.config import MemoryConfig
from lychee.data.recall import RecallBatch, Turn, make_batch
from lychee.data.task import TaskSample, tokens_of
from lychee.errors import InputError
from lychee.prompts import ReadingPrompts
from lychee.tokenizer import TextTokenizer

# Share of chunks that are placed around a supporting sentence.
SUPPORTED = 0.7
# Share of turns about the chunk's own question; the others ask another record's.
OWN_QUESTION = 0.6
# Share of final turns whose notes are complete; the others have none and must say so.
COMPLETE = 0.8


@dataclass(frozen=True)
class Trace:
    """A record as token ids; `spans` are the places of its supporting sentences in `text`."""

    text: list[int]
    question: list[int]
    answer: list[int]
    sentences: list[list[int]]
    spans: list[tuple[int, int]]


class FileTraces:
    """Draws batches in the form of `RecallSampler`; one seeded generator decides everything."""

    def __init__(
        self,
        samples: Sequence[TaskSample],
        tokenizer: TextTokenizer,
        prompts: ReadingPrompts,
        memory: MemoryConfig,
        draw: random.Random,
        margin: Sequence[int] = (),
    ):
        """`margin`: what a bank compresses behind a chunk's text, as a part of the chunk.

        Records whose notes, question or answer exceed the memory's limits are left out.

        Raises:
            InputError: a record without supporting sentences, or none that fits.
        """
        self.tokenizer, self.prompts, self.random = tokenizer, prompts, draw
        self.end, self.margin = prompts.end, list(margin)
        traces = [self.trace(sample) for sample in samples]
        self.traces = [trace for trace in traces if fits(trace, memory)]
        left_out = len(traces) - len(self.traces)
        if not self.traces:
            raise InputError(
                f"data: expected notes of at most {memory.size} tokens, questions of at most "
                f"{memory.question} and answers of at most {memory.answer}, got no such record"
            )
        if left_out:
            print(
                f"data: {left_out} of {len(traces)} records exceed the limits of [memory]",
                flush=True,
            )

    def trace(self, sample: TaskSample) -> Trace:
        if not sample.support:
            place = sample.details.get("place", sample.task)
            raise InputError(f"{place}: expected supporting sentences to train on, got none")
        text, offsets = self.tokenizer.encode_with_offsets(sample.context)
        sentences, spans = [], []
        for span in sorted(set(sample.support)):
            spans.append(tokens_of(span, offsets) or (0, 0))
            sentences.append(self.encode(sample.context[slice(*span)]))
        question = self.tokenizer.encode(sample.question.strip())
        return Trace(list(text), question, self.encode(sample.answers[0]), sentences, spans)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(" " + text.strip())

    def batch(self, size: int, chunk: int, questions: int) -> RecallBatch:
        """`size` chunks of `chunk` tokens, `questions` update turns about each, and final turns."""
        chunks, turns, final = [], [], []
        for _ in range(size):
            trace = self.random.choice(self.traces)
            ids, told = self.place(trace, chunk)
            chunks.append(ids)
            turns += [self.update_turn(trace, told) for _ in range(questions)]
        for _ in range(max(1, len(turns) // 8)):
            final.append(self.final_turn())
        return make_batch(chunks, turns, final)

    def place(self, trace: Trace, length: int) -> tuple[list[int], list[bool]]:
        """`length` tokens: part of a record, longer by others' texts, and the margin; and which
        sentences it holds."""
        text, length = trace.text, length - len(self.margin)
        while len(text) < length:
            text = text + self.random.choice(self.traces).text
        low, high = 0, len(text) - length
        if self.random.random() < SUPPORTED:
            start, stop = self.random.choice(trace.spans)
            low, high = max(low, min(stop - length, high)), min(high, max(start, low))
        first = self.random.randint(min(low, high), max(low, high))
        told = [first <= a < b <= first + length for a, b in trace.spans]
        return text[first : first + length] + self.margin, told

    def update_turn(self, own: Trace, told: list[bool]) -> Turn:
        """The chunk's question or another one, at some state of its notes."""
        trace = own
        if len(self.traces) > 1 and self.random.random() >= OWN_QUESTION:
            while trace is own:
                trace = self.random.choice(self.traces)
        known = [self.random.random() < 0.5 for _ in trace.spans]
        after = [k or t for k, t in zip(known, told, strict=True)] if trace is own else known
        prompt = self.prompts.update.render(trace.question, self.notes(trace, known))
        case = ("extended" if any(known) else "found") if after != known else "kept"
        return Turn(prompt, [*self.notes(trace, after), self.end], case)

    def final_turn(self) -> Turn:
        """The answer from complete notes, or that nothing was found."""
        trace = self.random.choice(self.traces)
        complete = self.random.random() < COMPLETE
        notes = self.notes(trace, [complete] * len(trace.spans))
        answer = trace.answer if complete else self.prompts.no_memory
        return Turn(self.prompts.answer.render(trace.question, notes), [*answer, self.end], "final")

    def notes(self, trace: Trace, known: list[bool]) -> list[int]:
        sentences = [ids for ids, k in zip(trace.sentences, known, strict=True) if k]
        return sum(sentences, []) if sentences else self.prompts.no_memory


def fits(trace: Trace, memory: MemoryConfig) -> bool:
    notes = sum(map(len, trace.sentences))
    return (
        notes <= memory.size
        and len(trace.question) <= memory.question
        and len(trace.answer) <= memory.answer
    )
