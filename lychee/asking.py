# SPDX-License-Identifier: Apache-2.0
"""One round of questions: reads the bank, records every step, answers, and adds up the costs."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lychee.bank import MemoryBank
from lychee.errors import InputError
from lychee.generate import Sampling
from lychee.reading import Event, ReadingLoop, ReadingOptions
from lychee.trace import Answer, Source, Step, Usage, tells

if TYPE_CHECKING:
    from lychee.memory_model import LycheeMemory

OnStep = Callable[[int, Step], None]


class Asking:
    """Questions on their way through one bank."""

    def __init__(
        self,
        model: LycheeMemory,
        bank: MemoryBank,
        options: ReadingOptions,
        sampling: Sampling,
        on_step: OnStep | None,
    ):
        self.model, self.bank, self.sampling, self.on_step = model, bank, sampling, on_step
        gate = model.gate if options.gate else None
        if gate is None and options.threshold is not None:
            raise InputError(
                f"threshold: expected a model with a gate, got {options.threshold} for one without"
            )
        self.loop = ReadingLoop(
            model.reasoner,
            bank,
            gate=gate,
            threshold=options.threshold,
            passes=options.passes or model.memory.passes,
            together=options.together or model.memory.together,
            sampling=sampling,
        )
        self.started, self.last_notes = time.perf_counter(), ([], "")

    def record(self, event: Event) -> None:
        """Keep a step of one question, and pass it on."""
        if event.notes is not self.last_notes[0]:
            self.last_notes = event.notes, self.text(event.notes)
        piece = self.bank.chunks[event.chunk]
        step = Step(
            event.chunk,
            self.bank.documents[piece.document].name,
            piece.start,
            piece.stop,
            self.last_notes[1],
            event.changed,
            score=event.score,
            read=event.read,
            round=event.round,
            new_tokens=event.new_tokens,
            turn=event.turn,
            seconds=round(time.perf_counter() - self.started, 6),
        )
        self.traces[event.question].append(step)
        if self.on_step is not None:
            self.on_step(event.question, step)

    def run(
        self, questions: Sequence[str], on_token: Callable[[int, str], None] | None
    ) -> list[Answer]:
        """An answer per question."""
        model, device = self.model, self.model.decoder.device
        ids = [model.encode_question(question) for question in questions]
        self.traces: list[list[Step]] = [[] for _ in questions]
        write = None
        if on_token is not None:
            write = lambda index, token: on_token(index, model.tokenizer.decode([token]))  # noqa: E731
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        bytes_read = self.bank.bytes_read
        started = time.perf_counter()
        notes = self.loop.run(ids, self.record)
        read = time.perf_counter()
        answers = model.reasoner.answer(ids, notes, self.sampling, write)
        finished = time.perf_counter()
        shared = Usage(
            self.bank.tokens,
            self.bank.memory_tokens,
            self.bank.nbytes,
            len(self.bank),
            len(self.bank),
            read - started,
            finished - read,
            gate_seconds=self.loop.gate_seconds,
            threshold=self.loop.threshold,
            bytes_read=self.bank.bytes_read - bytes_read,
            peak_bytes=peak_bytes(device),
        )
        return [
            Answer(
                question,
                self.text(answers[index]),
                self.sources(question, self.traces[index], self.text(notes[index])),
                self.traces[index],
                replace(shared, **self.counts(index, len(answers[index]))),
            )
            for index, question in enumerate(questions)
        ]

    def counts(self, index: int, answer_tokens: int) -> dict[str, int]:
        """What one question cost."""
        reads = [step for step in self.traces[index] if step.read]
        return {
            "chunks_read": len({step.chunk for step in reads}),
            "reads": len(reads),
            "chunks_gated": self.loop.chunks_gated[index],
            "new_tokens": answer_tokens + sum(step.new_tokens for step in reads),
        }

    def sources(self, question: str, trace: list[Step], final: str) -> list[Source]:
        """Chunks that the gate chose, and those that told something that is still in the notes.

        `changed` says which of the first belong to the second; it is not known which chunk of one
        turn told it, so all do. Notes that change in form alone, as when the question's own words
        enter them, make no source.
        """
        found: dict[int, Source] = {}
        before = start = self.text(self.model.reasoner.prompts.no_memory)
        telling = set()
        for step in trace:
            if step.changed and tells(before, step.memory, f"{question} {start}", final):
                telling.add(step.turn)
            before = step.memory
        for step in trace:
            told = step.turn in telling
            if not told and (not step.read or step.score is None):
                continue
            earlier = found.get(step.chunk)
            found[step.chunk] = Source(
                step.document,
                step.start,
                step.stop,
                self.bank.text(step.chunk),
                chunk=step.chunk,
                score=step.score,
                changed=told or (earlier is not None and earlier.changed),
            )
        return list(found.values())

    def text(self, ids: Sequence[int]) -> str:
        return self.model.tokenizer.decode(ids).strip()


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of these questions on a GPU, of the process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
