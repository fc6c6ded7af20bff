# SPDX-License-Identifier: Apache-2.0
"""Time from a text and a question to the answer: ours, MemAgent and full context, whole runs."""

import functools
import math

import machine
import pytest
import torch
from reading import (
    LENGTHS,
    MEMORY_TOKENS,
    Run,
    chosen_chunks,
    count_chunks,
    crossover,
    make_questions,
    make_text,
    run_full_context,
    run_in_one_turn,
    run_memagent,
    run_ours,
)

# The rows of a run without --full: lengths up to 32K with short notes, one of them with all notes.
SHORT = [length for length in LENGTHS if length <= 32 * 1024]
DEFAULT = {(length, MEMORY_TOKENS[0]) for length in SHORT} | {
    (SHORT[1], tokens) for tokens in MEMORY_TOKENS
}


@pytest.fixture(autouse=True)
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(machine.THREADS[-1])
    yield
    torch.set_num_threads(before)


@functools.cache
def full_context(length: int):
    return run_full_context(make_text(length), make_questions(1))


@functools.cache
def warm_up() -> None:
    """First calls of every kind, which load libraries and take memory from the system."""
    text, questions = make_text(4096), make_questions(1)
    run_ours(16, text, questions)
    run_memagent(16, text, questions)
    run_full_context(text, questions)


@pytest.mark.parametrize("memory_tokens", MEMORY_TOKENS)
@pytest.mark.parametrize("length", LENGTHS)
def test_time_to_answer(benchmark, request, length, memory_tokens):
    if not request.config.getoption("--full") and (length, memory_tokens) not in DEFAULT:
        pytest.skip("only with --full")
    warm_up()
    text, questions = make_text(length), make_questions(1)
    ours = benchmark.pedantic(run_ours, args=(memory_tokens, text, questions), iterations=1)
    runs = {"ours": ours, "memagent": run_memagent(memory_tokens, text, questions)}
    runs["full_context"] = full_context(length)
    together = run_in_one_turn(memory_tokens, ours, questions)
    benchmark.extra_info |= summarise(length, memory_tokens, runs, together)


@pytest.mark.parametrize("memory_tokens", MEMORY_TOKENS)
def test_full_context_crossover(benchmark, request, memory_tokens):
    """The least text, in whole steps, that ours answers faster from nothing."""
    if not request.config.getoption("--full") and memory_tokens != MEMORY_TOKENS[0]:
        pytest.skip("only with --full")
    warm_up()
    tried = {}

    def faster(length: int) -> bool:
        ours = run_ours(memory_tokens, make_text(length), make_questions(1))
        tried[length] = {"ours": ours.total, "full_context": full_context(length).total}
        return tried[length]["ours"] < tried[length]["full_context"]

    found = benchmark.pedantic(crossover, args=(faster,))
    benchmark.extra_info |= {
        "crossover": found,
        "memory_tokens": memory_tokens,
        "batch": 1,
        "threads": torch.get_num_threads(),
        "tried": tried,
    }


def summarise(length: int, memory_tokens: int, runs: dict, together: Run) -> dict:
    """Columns of the row that reads turn by turn, and of the one that does so in one turn."""
    peers = {name: run for name, run in runs.items() if name != "ours"}
    return {
        "length": length,
        "memory_tokens": memory_tokens,
        "selected": len(chosen_chunks(length)),
        "chunks": count_chunks(length),
        "batch": 1,
        "threads": torch.get_num_threads(),
        "seconds": {name: run.seconds for name, run in runs.items()},
        "cpu_seconds": {name: run.cpu for name, run in runs.items()},
        **compare(runs["ours"], peers),
        "in_one_turn": {
            "seconds": together.seconds,
            "cpu_seconds": together.cpu,
            **compare(together, peers),
        },
    }


def compare(ours: Run, peers: dict[str, Run]) -> dict:
    """Ratios are the peer's seconds over ours, above 1 we are faster."""
    asking = ours.total - ours.seconds["build"]
    return {
        "ratio": {name: run.total / ours.total for name, run in peers.items()},
        # a second question: the bank, or the text's cache, is there already
        "ratio_at_hand": {name: run.seconds["ask"] / asking for name, run in peers.items()},
        "ratio_cpu": {name: run.total_cpu / ours.total_cpu for name, run in peers.items()},
        "questions_until_paid": {
            name: questions_until_paid(ours, run) for name, run in peers.items()
        },
    }


def questions_until_paid(ours, peer) -> int | None:
    """Number of questions on one text from which on ours is faster in all; None: never."""
    ours_build, peer_build = ours.seconds["build"], peer.seconds.get("build", 0.0)
    saved = peer.seconds["ask"] - (ours.total - ours_build)
    if saved <= 0:
        return 1 if ours.total < peer.total else None
    return max(1, math.ceil((ours_build - peer_build) / saved))
