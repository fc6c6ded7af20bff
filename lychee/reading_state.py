# SPDX-License-Identifier: Apache-2.0
"""How far a question has come through a bank: chunks gated, wanted, read together and settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice


@dataclass(frozen=True)
class Event:
    """One chunk settled for one question.

    Attributes:
        question, chunk: indices.
        notes: token ids after it.
        read: False where the gate passed it over.
        changed: whether reading it gave other notes; of chunks read in one turn, the last one.
        score: the gate's probability, None where the gate was not asked.
        round: pass over the bank, from 0.
        new_tokens: decoded; a draft that was confirmed costs none.
        turn: number of the question's reading turn that read it, None where none did.
    """

    question: int
    chunk: int
    notes: list[int]
    read: bool
    changed: bool
    score: float | None
    round: int
    new_tokens: int = 0
    turn: int | None = None


@dataclass(frozen=True)
class Rules:
    """What all questions' readings of one bank go by.

    Attributes:
        chunks: of the bank.
        passes: times to go over it at most.
        together: chunks that one turn reads at most.
        opening: chunks read before the gate is asked; None without a gate.
        first_window: chunks gated ahead at first, and at least behind a change of the notes.
        repeats: what was settled under the same notes would be settled the same way again.
    """

    chunks: int
    passes: int
    together: int
    opening: int | None
    first_window: int
    repeats: bool


@dataclass
class Reading:
    """The way of one question through the bank.

    Attributes:
        chunk: the first one not settled.
        horizon: chunks before it are gated under the notes as they stand.
        wanted: chunks before the horizon that are to be read.
        window: chunks to gate ahead next.
        lookahead: turns to check in one go.
        unchanged: chunks settled in a row without a change of the notes.
    """

    rules: Rules
    report: Callable[[Event], None]
    index: int
    question: Sequence[int]
    notes: list[int]
    round: int = 0
    chunk: int = 0
    horizon: int = 0
    scores: dict[int, float] = field(default_factory=dict)
    wanted: deque[int] = field(default_factory=deque)
    window: int = 1
    lookahead: int = 1
    unchanged: int = 0
    turn: int = 0
    changed: bool = False  # in this round
    done: bool = False

    def __post_init__(self):
        self.window = self.rules.first_window
        self._open()

    def _open(self) -> None:
        """Begin a round."""
        self.chunk = self.horizon = 0
        self.changed = False
        self.scores.clear()
        self.done = not self.rules.chunks
        if self.rules.opening is not None and self.round == 0:
            self.want_until(min(self.rules.opening, self.rules.chunks))

    def want_until(self, stop: int) -> None:
        """Move the horizon to `stop` without a gate."""
        self.wanted.extend(range(self.horizon, stop))
        self.horizon = stop

    def want(self, scores: Sequence[float], threshold: float) -> None:
        """Move the horizon over chunks that were gated."""
        for chunk, score in enumerate(scores, start=self.horizon):
            self.scores[chunk] = score
            if score >= threshold:
                self.wanted.append(chunk)
        self.horizon += len(scores)
        self.window *= 2

    @property
    def ready(self) -> bool:
        """Whether it is known which chunks the next turn reads."""
        gated = self.horizon == self.rules.chunks
        return len(self.wanted) >= (1 if gated else self.rules.together)

    def turns(self, limit: int) -> list[list[int]]:
        """Chunks of each of the next turns, at most `limit`, if none of them changes the notes."""
        size = self.rules.together
        wanted = list(islice(self.wanted, limit * size))
        turns = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        if turns and len(turns[-1]) < size and self.horizon < self.rules.chunks:
            turns.pop()
        return turns

    def pass_over(self, stop: int) -> None:
        """Settle the chunks before `stop` unread."""
        round = self.round
        while self.chunk < stop and self.round == round and not self.done:
            self._settle(read=False)

    def finish(self, turn: list[int], notes: list[int], new_tokens: int) -> None:
        """Settle the chunks of a turn that gave `notes`, and those before and between them.

        The turn stands at its last chunk: up to there the notes are the old ones.
        """
        *others, last = turn
        for chunk in others:
            self.pass_over(chunk)
            self._settle(read=True)
        self.pass_over(last)
        if self.done:
            return
        for _ in turn:
            self.wanted.popleft()
        changed = notes != self.notes
        if changed:
            self.notes, self.changed, self.unchanged = notes, True, -1
            if last in self.scores:
                # What the gate said of later chunks under the earlier notes is void.
                self.wanted.clear()
                self.scores = {last: self.scores[last]}
                self.horizon = last + 1
                self.window = max(self.rules.first_window, self.window // 4)
        self._settle(read=True, changed=changed, new_tokens=new_tokens)
        self.turn += 1

    def _settle(self, *, read: bool, changed: bool = False, new_tokens: int = 0) -> None:
        """Report the next chunk and go on; at the end of the bank, end or begin a round.

        Where every chunk was settled under the same notes, going on would only repeat it.
        """
        score, turn = self.scores.get(self.chunk), self.turn if read else None
        self.report(
            Event(
                self.index, self.chunk, self.notes, read, changed, score, self.round, new_tokens,
                turn,
            )
        )  # fmt: skip
        self.chunk += 1
        self.unchanged += 1
        if self.chunk == self.rules.chunks:
            self.done = not self.changed or self.round + 1 == self.rules.passes
            if not self.done:
                self.round += 1
                self._open()
        if self.rules.repeats and self.unchanged >= self.rules.chunks:
            self.done = True
        if self.done:
            self.wanted.clear()
