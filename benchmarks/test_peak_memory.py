# SPDX-License-Identifier: Apache-2.0
"""Peak memory of answering eight questions together on one text, each method in a fresh process."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import machine
import pytest
from reading import CUDA, LENGTHS, MEMORY_TOKENS, crossover
from reading_peak import BATCH

# The lengths whose difference shows what grows with the text.
SHORT, LONG = (28 * 1024, 112 * 1024) if CUDA else (32 * 1024, 128 * 1024)
# A run without --full has the shortest and the longest notes, and no full context.
DEFAULT = {(length, notes) for length in (SHORT, LONG) for notes in MEMORY_TOKENS[::2]}
# The text: its characters, and its chunks' spans.
ALLOWED_MIB = 4
# Bytes from which glibc gives a freed block back at once. It would raise that by itself, up to
# 32 MiB, as larger blocks are freed, and the peak would hang on which were freed first.
MMAP_THRESHOLD = 128 << 10
OURS = ("ours", "ours_int8", "ours_disk")


needs_peaks = pytest.mark.skipif(
    not CUDA and not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)


@functools.cache
def measure(method: str, length: int, memory_tokens: int) -> dict[str, float]:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, here / "reading_peak.py", method, str(length), str(memory_tokens),
         str(machine.THREADS[-1])],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent)))}
        | {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)},
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    return json.loads(run.stdout)


@needs_peaks
@pytest.mark.parametrize("memory_tokens", MEMORY_TOKENS)
@pytest.mark.parametrize("length", LENGTHS)
def test_peak_memory(benchmark, request, length, memory_tokens):
    full = request.config.getoption("--full")
    if not full and (length, memory_tokens) not in DEFAULT:
        pytest.skip("only with --full")
    ours = benchmark.pedantic(measure, args=("ours", length, memory_tokens))
    # MemAgent's sections are of one size, so its peak is the same at every length.
    results = {"ours": ours, "memagent": measure("memagent", LENGTHS[0], memory_tokens)}
    for variant in OURS[1:]:
        results[variant] = measure(variant, length, memory_tokens)
    if full:
        # its peak does not depend on notes
        results["full_context"] = measure("full_context", length, MEMORY_TOKENS[0])
    peaks = {name: result["peak_mib"] for name, result in results.items()}
    benchmark.extra_info |= {
        "length": length,
        "memory_tokens": memory_tokens,
        "selected": 1,  # a longer run's turns are like this one's
        "batch": BATCH,
        "threads": machine.THREADS[-1],
        "peak_mib": peaks,
        "bank_mib": {name: result["bank_mib"] for name, result in results.items()},
        "ratio": {
            name: peaks[name] / peaks["ours"]
            for name in ("memagent", "full_context")
            if name in peaks
        },
    }
    if length == LONG:
        assert_growth(memory_tokens)
        assert peaks["ours_disk"] <= peaks["memagent"] / 2


@needs_peaks
@pytest.mark.parametrize("memory_tokens", MEMORY_TOKENS)
def test_full_context_peak_crossover(benchmark, request, memory_tokens):
    """The least text, in whole steps, that ours takes less memory for, its bank included."""
    if not request.config.getoption("--full") and memory_tokens != MEMORY_TOKENS[0]:
        pytest.skip("only with --full")
    tried = {}

    def smaller(length: int) -> bool:
        ours = measure("ours", length, memory_tokens)
        # its peak does not depend on notes
        full_context = measure("full_context", length, MEMORY_TOKENS[0])
        tried[length] = {"ours": ours["peak_mib"], "full_context": full_context["peak_mib"]}
        return tried[length]["ours"] < tried[length]["full_context"]

    found = benchmark.pedantic(crossover, args=(smaller,))
    benchmark.extra_info |= {
        "peak_crossover": found,
        "memory_tokens": memory_tokens,
        "batch": BATCH,
        "threads": machine.THREADS[-1],
        "tried": tried,
    }


def assert_growth(memory_tokens: int) -> None:
    """From SHORT to LONG ours grows by no more than its bank, and with the bank on disk not at
    all, up to the text itself."""
    for variant in OURS:
        short, long = (measure(variant, length, memory_tokens) for length in (SHORT, LONG))
        grown = long["peak_mib"] - short["peak_mib"]
        bank = long["bank_mib"] - short["bank_mib"] if variant != "ours_disk" else 0
        assert grown <= bank + ALLOWED_MIB, (variant, grown, bank)
