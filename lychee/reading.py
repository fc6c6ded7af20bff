# SPDX-License-Identifier: Apache-2.0
"""The reading loop: chunks are gated and read ahead, with the result of going one by one.

What the gate says of a chunk, and what a reading turn writes, depend on the chunk and the notes
before it alone. So both are asked ahead, for many chunks under the notes as they stand: the gate
for a window of chunks, then for the chunks it wants read whether a turn would leave the notes alone
(the notes are checked as a draft, in one pass). Only where it would not are notes decoded; what was
asked ahead under the earlier notes is then asked again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from lychee.bank import MemoryBank
from lychee.errors import InputError
from lychee.gate import Gate
from lychee.generate import GREEDY, Sampling
from lychee.reasoner import MAX_ROWS, Reasoner

# Tokens of one pass over all rows, which bounds memory where prompts and notes are long.
MAX_TOKENS = 4096
# Keys and values of prompts that one gating pass may copy, in tokens.
MAX_GATE_TOKENS = 16384
# Chunks gated ahead at first; twice as many each time the notes stay as they are.
FIRST_WINDOW = 64


@dataclass(frozen=True)
class ReadingOptions:
    """How a bank is read.

    Attributes:
        gate: read only what the model's gate lets through; False reads every chunk, as does a
            model without a gate.
        threshold: least gate probability at which a chunk is read; None is the model's own.
        passes: times to go over the bank at most; None is the model's own. A pass that leaves the
            notes as they were is the last.
    """

    gate: bool = True
    threshold: float | None = None
    passes: int | None = None

    def __post_init__(self):
        # Not-a-number fails every comparison.
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"threshold: expected 0 to 1, got {self.threshold}")
        if self.threshold is not None and not self.gate:
            raise InputError(f"threshold: expected none without the gate, got {self.threshold}")
        if self.passes is not None and self.passes < 1:
            raise InputError(f"passes: expected at least 1, got {self.passes}")


AS_CONFIGURED = ReadingOptions()


@dataclass(frozen=True)
class Event:
    """One chunk settled for one question.

    Attributes:
        question, chunk: indices.
        notes: token ids after it.
        read: False where the gate passed it over.
        changed: whether reading it gave other notes.
        score: the gate's probability, None where the gate was not asked.
        round: pass over the bank, from 0.
        new_tokens: decoded; a draft that was confirmed costs none.
    """

    question: int
    chunk: int
    notes: list[int]
    read: bool
    changed: bool
    score: float | None
    round: int
    new_tokens: int = 0


@dataclass
class Reading:
    """How far one question has come."""

    index: int
    question: Sequence[int]
    notes: list[int]
    round: int = 0
    chunk: int = 0  # the first one not settled
    horizon: int = 0  # chunks before it are gated under the notes as they stand
    scores: dict[int, float] = field(default_factory=dict)
    wanted: deque[int] = field(default_factory=deque)  # of the chunks before the horizon
    window: int = 1
    lookahead: int = 1
    unchanged: int = 0  # chunks settled in a row without a change of the notes
    changed: bool = False  # in this round
    done: bool = False


class ReadingLoop:
    """Reads one bank for several questions at once.

    Attributes:
        threshold: of the gate, None without one.
        chunks_gated: verdicts of the gate for each question, those asked again included.
        gate_seconds: time they all took.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        bank: MemoryBank,
        *,
        gate: Gate | None = None,
        threshold: float | None = None,
        passes: int = 1,
        sampling: Sampling = GREEDY,
    ):
        """`threshold` None is the gate's own; see `ReadingOptions` for it and for `passes`."""
        self.reasoner, self.bank, self.gate = reasoner, bank, gate
        self.passes, self.sampling = passes, sampling
        self.threshold = gate and (gate.config.threshold if threshold is None else threshold)
        # Drawn notes cannot be foreseen, nor those whose positions depend on the batch.
        self.foresees = sampling.greedy and not reasoner.padded_positions
        self.prepared = ((), None)
        self.gate_seconds = 0.0

    def run(
        self, questions: Sequence[Sequence[int]], on_event: Callable[[Event], None] | None = None
    ) -> list[list[int]]:
        """Notes of every question, given as token ids; events come in each question's order."""
        self.report = on_event or (lambda _: None)
        self.chunks_gated = [0] * len(questions)
        start = self.reasoner.prompts.no_memory
        readings = [Reading(i, question, list(start)) for i, question in enumerate(questions)]
        for reading in readings:
            reading.window = FIRST_WINDOW
            self._open(reading)
        while active := [reading for reading in readings if not reading.done][:MAX_ROWS]:
            if asking := [r for r in active if not r.wanted]:
                self._look_ahead(asking)
            if waiting := [reading for reading in active if reading.wanted]:
                if turns := self._skip_unchanged(waiting):
                    self._read(turns)
            for reading in active:
                if not reading.wanted and not reading.done:
                    self._settle(reading, reading.horizon)
        return [reading.notes for reading in readings]

    def _open(self, reading: Reading) -> None:
        """Begin a round."""
        reading.chunk = reading.horizon = 0
        reading.changed = reading.done = False
        if not len(self.bank):
            reading.done = True
        elif self.gate is not None and reading.round == 0:
            reading.horizon = min(self.gate.config.opening, len(self.bank))
            reading.wanted.extend(range(reading.horizon))

    def _look_ahead(self, readings: list[Reading]) -> None:
        """Move horizons on: to the end without a gate, by a window of verdicts with one."""
        if self.gate is None:
            for reading in readings:
                reading.wanted.extend(range(reading.chunk, len(self.bank)))
                reading.horizon = len(self.bank)
            return
        started = perf_counter()
        key = tuple((tuple(r.question), tuple(r.notes)) for r in readings)
        if self.prepared[0] != key:
            render = self.reasoner.prompts.update.render
            prompts = [render(r.question, r.notes) for r in readings]
            notes = [reading.notes for reading in readings]
            self.prepared = key, self.gate.prepare(prompts, notes, self.reasoner.memory.slots)
        prompts = self.prepared[1]
        width = prompts.keys[0].shape[2] + self.gate.config.tail
        room = min(MAX_TOKENS // self.gate.config.tail, MAX_GATE_TOKENS // width)
        share = max(1, room // len(readings))
        rows = []
        for place, reading in enumerate(readings):
            reading.horizon = min(reading.chunk + min(reading.window, share), len(self.bank))
            rows += [(place, chunk) for chunk in range(reading.chunk, reading.horizon)]
        with torch.inference_mode():
            logits = self.gate.score(
                prompts,
                torch.tensor([place for place, _ in rows], device=self.reasoner.decoder.device),
                self.bank.page_table([[chunk] for _, chunk in rows]),
            )
            scores = logits.sigmoid().tolist()
        for (place, chunk), score in zip(rows, scores, strict=True):
            readings[place].scores[chunk] = score
            if score >= self.threshold:
                readings[place].wanted.append(chunk)
        for reading in readings:
            reading.window *= 2
            self.chunks_gated[reading.index] += reading.horizon - reading.chunk
        self.gate_seconds += perf_counter() - started

    def _skip_unchanged(self, readings: list[Reading]) -> list[Reading]:
        """Settle wanted chunks that leave the notes alone; return readings whose next may not."""
        turns = [r for r in readings if not self.foresees or r.lookahead == 1]
        checked = [reading for reading in readings if reading not in turns]
        if not checked:
            return turns
        # A row is the prompt, the notes in it, and the notes again as the draft.
        frame = len(self.reasoner.prompts.update)
        width = max(frame + len(r.question) + 2 * len(r.notes) for r in checked)
        share = max(1, min(MAX_ROWS, MAX_TOKENS // width) // len(checked))
        blocks = [list(r.wanted)[: min(r.lookahead, share)] for r in checked]
        rows = [(r, chunk) for r, block in zip(checked, blocks, strict=True) for chunk in block]
        same = iter(
            self.reasoner.leaves_notes(
                [reading.question for reading, _ in rows],
                [reading.notes for reading, _ in rows],
                self.bank.page_table([[chunk] for _, chunk in rows]),
            )
        )
        for reading, block in zip(checked, blocks, strict=True):
            verdicts = [next(same) for _ in block]
            length = verdicts.index(False) if False in verdicts else len(block)
            for chunk in block[:length]:
                self._settle(reading, chunk)
                self._note(reading, chunk, reading.notes, 0)
            if reading.done:
                continue
            if length < len(block):
                reading.lookahead = max(1, reading.lookahead // 2)
                turns.append(reading)
            else:
                reading.lookahead *= 2
        return turns

    def _read(self, readings: list[Reading]) -> None:
        """One reading turn for each of `readings`, at the next chunk it wants."""
        chunks = [reading.wanted[0] for reading in readings]
        # As large as the turn's own cache, and of no use once the notes change.
        self.prepared = ((), None)
        written = self.reasoner.update(
            [reading.question for reading in readings],
            [reading.notes for reading in readings],
            self.bank.page_table([[chunk] for chunk in chunks]),
            self.sampling,
        )
        for reading, chunk, notes in zip(readings, chunks, written, strict=True):
            self._settle(reading, chunk)
            same = notes == reading.notes
            reading.lookahead = reading.lookahead * 2 if same else max(1, reading.lookahead // 2)
            self._note(reading, chunk, notes, len(notes))

    def _settle(self, reading: Reading, stop: int) -> None:
        """Pass over the chunks before `stop`; at the end of the bank, end or begin a round."""
        round = reading.round
        while reading.chunk < stop and reading.round == round and not reading.done:
            chunk = reading.chunk
            score = reading.scores.get(chunk)
            self.report(
                Event(reading.index, chunk, reading.notes, False, False, score, reading.round)
            )
            self._advance(reading)

    def _note(self, reading: Reading, chunk: int, notes: list[int], new_tokens: int) -> None:
        """Settle a chunk that was read, with the notes after it."""
        if reading.done:
            return
        changed = notes != reading.notes
        score = reading.scores.get(chunk)
        reading.wanted.popleft()
        if changed:
            reading.notes, reading.changed, reading.unchanged = notes, True, -1
            if self.gate is not None and score is not None:
                reading.wanted.clear()
                reading.scores.clear()
                reading.horizon = chunk + 1
                reading.window = max(FIRST_WINDOW, reading.window // 4)
        self.report(
            Event(reading.index, chunk, notes, True, changed, score, reading.round, new_tokens)
        )
        self._advance(reading)

    def _advance(self, reading: Reading) -> None:
        """Go on to the next chunk, or end: where every chunk was settled under the same notes,
        going on would settle each one the same way again."""
        reading.chunk += 1
        reading.unchanged += 1
        if reading.chunk == len(self.bank):
            reading.done = not reading.changed or reading.round + 1 == self.passes
            if not reading.done:
                reading.round += 1
                reading.scores.clear()
                self._open(reading)
        if self.foresees and reading.unchanged >= len(self.bank):
            reading.done = True
        if reading.done:
            reading.wanted.clear()
