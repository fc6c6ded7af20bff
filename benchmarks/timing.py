# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing of one op and its peers, over buffers that rotate or that stay in cache."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

# A method faster than this is called once untimed before each timed run of calls: its code and
# the threads' wake-up then cost it nothing, whichever method ran before.
PRIME_BELOW = 0.02
# Seconds that a peer, and that ours, may take of one round, if several calls fit into it.
PEER_SLICE, OUR_SLICE = 0.05, 0.3
ROUNDS = range(3, 21)
CALLS = range(1, 11)


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3])


class Method:
    """A function, the arguments it is called with in turn, and how long its calls took."""

    def __init__(self, function: Callable, arguments: list[dict], *, compiles: bool = False):
        self.function, self.arguments, self.compiles = function, arguments, compiles
        self.slice = PEER_SLICE
        self.turn = count()
        self.samples: list[float] = []
        self.seconds = 0.0

    def __call__(self):
        return self.function(**self.arguments[next(self.turn) % len(self.arguments)])

    def calibrate(self):
        """Calls once, for the result, and estimates the time of a call."""
        started = time.perf_counter()
        result = self()
        self.seconds = time.perf_counter() - started
        # a first call of more than a second is mostly the work itself, unless it compiled
        if self.compiles or self.seconds < 1:
            self.seconds = timed(self)
        return result

    @property
    def calls(self) -> int:
        """Timed calls per round."""
        return clamp(self.slice / self.seconds, CALLS)

    def prime(self):
        if self.seconds < PRIME_BELOW:
            self()

    def sample(self):
        self.prime()
        self.samples += [timed(self) for _ in range(self.calls)]


def timed(work: Callable) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def clamp(value: float, allowed: range) -> int:
    return min(max(int(value), allowed[0]), allowed[-1])


def interleave(benchmark, ours: Method, peers: list[Method], seconds: float) -> list[Timing]:
    """Times calibrated methods in turns for about `seconds`; ours first in the result, which is
    empty under --benchmark-disable.

    Ours runs as the timed function of pytest-benchmark, so that its statistics are of the same
    calls; every `ours.calls` calls, all peers have their turn.
    """
    methods = [ours, *peers]
    ours.slice = OUR_SLICE
    one_round = sum(m.seconds * (m.calls + (m.seconds < PRIME_BELOW)) for m in methods)
    rounds = clamp(seconds / one_round, ROUNDS)
    turn = count()

    def before_each_call():
        if next(turn) % ours.calls == 0:
            for peer in peers:
                peer.sample()
            ours.prime()

    benchmark.pedantic(ours, setup=before_each_call, rounds=rounds * ours.calls, iterations=1)
    if benchmark.disabled:
        return []
    ours.samples = list(benchmark.stats.stats.data)
    return [Timing.of(method.samples) for method in methods]
