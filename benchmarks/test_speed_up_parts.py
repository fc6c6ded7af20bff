# SPDX-License-Identifier: Apache-2.0
"""Where the speed-up over MemAgent comes from: one change after the other, summed from passes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import machine
from reading import QUESTION, chosen_chunks, count_chunks
from reading_parts import TOGETHER, Parts

from lychee.baselines.memagent import SECTION_TOKENS
from lychee.reading import FIRST_WINDOW, MAX_GATE_TOKENS

LENGTH, MEMORY_TOKENS, BATCH = 128 * 1024, 1024, 8
PROMPT = 100 + QUESTION  # tokens of a reading turn's prompt besides the notes


def measure(batch: int, backend: str = "auto") -> Parts:
    """In a fresh process, as the backend is chosen once per process."""
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, here / "reading_parts.py", str(batch), str(MEMORY_TOKENS),
         str(machine.THREADS[-1])],
        env=os.environ
        | {"LYCHEE_BACKEND": backend, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent)))},
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    return Parts(**json.loads(run.stdout))


def scored_pairs(questions: int) -> int:
    """Pairs that the gate scores: as far ahead as its memory allows, again after each chunk read.

    Empty notes leave room for the whole window, full ones for `ahead` chunks of each question.
    """
    chunks, pairs, start = count_chunks(LENGTH), 0, 0
    ahead = min(FIRST_WINDOW, max(1, MAX_GATE_TOKENS // (2 * MEMORY_TOKENS + PROMPT) // questions))
    for place, chosen in enumerate([*chosen_chunks(LENGTH), chunks]):
        step = ahead if place else FIRST_WINDOW
        while start <= min(chosen, chunks - 1):
            pairs += min(step, chunks - start)
            start += step
        start = chosen + 1
    return pairs * questions


def memagent(parts: Parts, written: int | None = None, read: float | None = None) -> float:
    """Seconds of MemAgent that writes its notes so many times and reads so many sections."""
    sections = LENGTH / SECTION_TOKENS
    written = math.ceil(sections) if written is None else written
    read = sections if read is None else read
    return read * parts.raw_prompt + written * MEMORY_TOKENS * parts.raw_step + parts.answer


def gating(parts: Parts, questions: int = 1) -> float:
    reads = len(chosen_chunks(LENGTH))
    pairs = scored_pairs(questions)
    return parts.gate_start + reads * parts.gate_prompt + pairs * parts.gate_pair


def asking(parts: Parts, questions: int = 1) -> float:
    turn = parts.compressed_prompt + MEMORY_TOKENS * parts.compressed_step
    return gating(parts, questions) + len(chosen_chunks(LENGTH)) * turn + parts.answer


def asking_together(parts: Parts, questions: int = 1) -> float:
    """All chosen chunks in one turn: the gate has seen them under the same, empty notes."""
    pairs = count_chunks(LENGTH) * questions
    turn = parts.together_prompt + MEMORY_TOKENS * parts.together_step
    return parts.gate_start + pairs * parts.gate_pair + turn + parts.answer


def test_parts_of_the_speed_up(benchmark):
    one = benchmark.pedantic(measure, args=(1,))
    assert len(chosen_chunks(LENGTH)) == TOGETHER
    many, plain = measure(BATCH), measure(1, "ref")
    reads, build = len(chosen_chunks(LENGTH)), count_chunks(LENGTH) * one.build
    rows = {
        "MemAgent": memagent(one),
        "... that writes notes at chosen sections only": memagent(one, reads),
        "... and passes over the others, at our gate's cost": (
            memagent(one, reads, reads) + gating(one)
        ),
        "... and reads compressed chunks: ours, bank at hand": asking(one),
        "ours, from nothing": build + asking(one),
        "ours, bank at hand, chosen chunks in one turn": asking_together(one),
        "ours, from nothing, chosen chunks in one turn": build + asking_together(one),
        "ours, from nothing, plain kernels": count_chunks(LENGTH) * plain.build + asking(plain),
        f"MemAgent, {BATCH} questions together, each": memagent(many) / BATCH,
        f"ours, bank at hand, {BATCH} questions together, each": asking(many, BATCH) / BATCH,
        f"ours, bank at hand, chosen chunks in one turn, {BATCH} questions together, each": (
            asking_together(many, BATCH) / BATCH
        ),
        f"ours, from nothing, {BATCH} questions together, each": (
            (build + asking(many, BATCH)) / BATCH
        ),
    }
    benchmark.extra_info |= {
        "parts_of": {"length": LENGTH, "memory_tokens": MEMORY_TOKENS, "selected": reads},
        "rows": rows,
        "passes": {"1": vars(one), str(BATCH): vars(many), "plain kernels": vars(plain)},
    }
