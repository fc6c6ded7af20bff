# SPDX-License-Identifier: Apache-2.0
"""The reading loop: chunks are gated and read ahead, with the result of going one by one.

What the gate says of a chunk, and what a reading turn writes, depend on the chunk and the notes
before it alone. So both are asked ahead, for many chunks under the notes as they stand: the gate
for a window of chunks, then for the chunks it wants read whether a turn would leave the notes alone
(the notes are checked as a draft, in one pass). Only where it would not are notes decoded; what was
asked ahead under the earlier notes is then asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from lychee.bank import MemoryBank
from lychee.errors import InputError
from lychee.gate import Gate
from lychee.generate import GREEDY, Sampling, check_scores
from lychee.reading_state import Event, Reading, Rules
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
        together: chunks that one turn reads at most; None is the model's own. They are gated under
            the same notes, which are rewritten once, from all of them.
    """

    gate: bool = True
    threshold: float | None = None
    passes: int | None = None
    together: int | None = None

    def __post_init__(self):
        # Not-a-number fails every comparison.
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"threshold: expected 0 to 1, got {self.threshold}")
        if self.threshold is not None and not self.gate:
            raise InputError(f"threshold: expected none without the gate, got {self.threshold}")
        for name in ("passes", "together"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")


AS_CONFIGURED = ReadingOptions()


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
        together: int = 1,
        sampling: Sampling = GREEDY,
    ):
        """`threshold` None is the gate's own; see `ReadingOptions` for the others."""
        self.reasoner, self.bank, self.gate = reasoner, bank, gate
        self.passes, self.together, self.sampling = passes, together, sampling
        self.threshold = gate and (gate.config.threshold if threshold is None else threshold)
        # Drawn notes cannot be foreseen, nor those whose positions depend on the batch.
        self.foresees = sampling.greedy and not reasoner.padded_positions
        self.prepared = ((), None)
        self.gate_seconds = 0.0

    def run(
        self, questions: Sequence[Sequence[int]], on_event: Callable[[Event], None] | None = None
    ) -> list[list[int]]:
        """Notes of every question, given as token ids; events come in each question's order."""
        self.chunks_gated = [0] * len(questions)
        rules = Rules(
            len(self.bank),
            self.passes,
            self.together,
            None if self.gate is None else self.gate.config.opening,
            FIRST_WINDOW,
            # Chunks are grouped from where the notes last changed, so otherwise in a later round.
            repeats=self.foresees and self.together == 1,
        )
        report = on_event or (lambda _: None)
        start = self.reasoner.prompts.no_memory
        readings = [
            Reading(rules, report, index, question, list(start))
            for index, question in enumerate(questions)
        ]
        while active := [reading for reading in readings if not reading.done][:MAX_ROWS]:
            if asking := [reading for reading in active if not reading.ready]:
                self._look_ahead(asking)
            if waiting := [reading for reading in active if reading.ready]:
                if changing := self._skip_unchanged(waiting):
                    self._read(changing)
            for reading in active:
                if not reading.wanted:
                    reading.pass_over(reading.horizon)
        return [reading.notes for reading in readings]

    def _look_ahead(self, readings: list[Reading]) -> None:
        """Move horizons on: to the end without a gate, by a window of verdicts with one."""
        if self.gate is None:
            for reading in readings:
                reading.want_until(len(self.bank))
            return
        started = perf_counter()
        key = tuple((tuple(r.question), tuple(r.notes)) for r in readings)
        if self.prepared[0] != key:
            render = self.reasoner.prompts.update.render
            prompts = [render(r.question, r.notes) for r in readings]
            notes = [reading.notes for reading in readings]
            self.prepared = key, self.gate.prepare(prompts, notes, self.reasoner.memory.slots)
        prompts = self.prepared[1]
        width = prompts.keys[0].shape[2]
        room = min(MAX_TOKENS // self.gate.config.tail, MAX_GATE_TOKENS // width)
        share = max(1, room // len(readings))
        ahead = [
            range(r.horizon, min(r.horizon + min(r.window, share), len(self.bank)))
            for r in readings
        ]
        rows = [(place, chunk) for place, chunks in enumerate(ahead) for chunk in chunks]
        scores: dict[int, float] = {}
        with torch.inference_mode():
            for group, pages in self.bank.chunk_tables([chunk for _, chunk in rows]):
                of = torch.tensor([rows[row][0] for row in group], device=pages.kv.device)
                found = self.gate.score(prompts, of, pages).sigmoid().tolist()
                check_scores(found, "gate: expected finite scores, got others")
                scores.update(zip(group, found, strict=True))
        ordered = iter(range(len(rows)))
        for reading, chunks in zip(readings, ahead, strict=True):
            reading.want([scores[next(ordered)] for _ in chunks], self.threshold)
            self.chunks_gated[reading.index] += len(chunks)
        self.gate_seconds += perf_counter() - started

    def _skip_unchanged(self, readings: list[Reading]) -> list[Reading]:
        """Settle turns that leave the notes alone; return the readings whose next one may not."""
        changing = [r for r in readings if not self.foresees or r.lookahead == 1]
        checked = [reading for reading in readings if reading not in changing]
        if not checked:
            return changing
        # A row is the prompt, the notes in it, and the notes again as the draft.
        frame = len(self.reasoner.prompts.update)
        width = max(frame + len(r.question) + 2 * len(r.notes) for r in checked)
        share = max(1, min(MAX_ROWS, MAX_TOKENS // width) // len(checked))
        blocks = [reading.turns(min(reading.lookahead, share)) for reading in checked]
        rows = [(r, turn) for r, block in zip(checked, blocks, strict=True) for turn in block]
        same = iter(
            self.reasoner.leaves_notes(
                [reading.question for reading, _ in rows],
                [reading.notes for reading, _ in rows],
                self.bank.page_table([turn for _, turn in rows], in_place=True),
            )
        )
        for reading, block in zip(checked, blocks, strict=True):
            verdicts = [next(same) for _ in block]
            length = verdicts.index(False) if False in verdicts else len(block)
            for turn in block[:length]:
                reading.finish(turn, reading.notes, 0)
            if reading.done:
                continue
            if length < len(block):
                reading.lookahead = max(1, reading.lookahead // 2)
                changing.append(reading)
            else:
                reading.lookahead *= 2
        return changing

    def _read(self, readings: list[Reading]) -> None:
        """The next turn of each of `readings`."""
        turns = [reading.turns(1)[0] for reading in readings]
        # As large as the turn's own cache, and of no use once the notes change.
        self.prepared = ((), None)
        written = self.reasoner.update(
            [reading.question for reading in readings],
            [reading.notes for reading in readings],
            self.bank.page_table(turns, in_place=True),
            self.sampling,
        )
        for reading, turn, notes in zip(readings, turns, written, strict=True):
            same = notes == reading.notes
            reading.lookahead = reading.lookahead * 2 if same else max(1, reading.lookahead // 2)
            reading.finish(turn, notes, len(notes))
