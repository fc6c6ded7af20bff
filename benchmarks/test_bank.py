# SPDX-License-Identifier: Apache-2.0
"""Banks: what writing adds to a build, opening and asking a large one, and asking again."""

import gzip
import os
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import machine
import pytest

import lychee
from lychee import LycheeMemory
from lychee.bank import BankBuilder, Document, MemoryBank
from lychee.baselines.memagent import MemAgent
from lychee.demo import hide_facts, make_facts, says

BOOK = Path(lychee.__file__).parent / "assets" / "pride-and-prejudice.txt.gz"
BUILT_CHARACTERS = 100_000
LARGE_BYTES = 1 << 30
READ_BYTES = 8 << 20
ROUNDS = 7
ASKED = 8
QUESTION = "What is the name of the house?"


@pytest.fixture(scope="module")
def model():
    return LycheeMemory.from_pretrained()


@pytest.fixture(scope="module")
def book():
    return gzip.decompress(BOOK.read_bytes()).decode()


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(function, *arguments, **options):
    """(seconds, processor seconds of all threads, result)."""
    started, used = time.perf_counter(), processor_seconds()
    result = function(*arguments, **options)
    return time.perf_counter() - started, processor_seconds() - used, result


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("threads", machine.THREADS, indirect=True)
def test_writing_adds_little_to_a_build(benchmark, model, book, tmp_path, threads, dtype):
    """Against compression into memory, in turns; by processor time, which neighbours do not move.

    A build writes on a thread of its own while the next chunks are compressed.
    """
    documents = [Document("book", book[:BUILT_CHARACTERS])]

    def build():
        with BankBuilder(model, tmp_path, bank_dtype=dtype) as builder:
            return builder.add(documents)

    def remember():
        return model.remember(documents, bank_dtype=dtype)

    pairs = []

    def turn():
        shutil.rmtree(tmp_path, ignore_errors=True)
        pairs.append((measured(build), measured(remember)))

    remember()
    benchmark.pedantic(turn, rounds=ROUNDS, iterations=1)
    built, kept = ([pair[side] for pair in pairs] for side in (0, 1))
    seconds = [median(run[0] for run in side) for side in (built, kept)]
    used = [median(run[1] for run in side) for side in (built, kept)]
    report = built[0][2]
    overhead = used[0] / used[1] - 1
    benchmark.extra_info |= {
        "threads": threads,
        "bank_dtype": dtype,
        "tokens": report.tokens,
        "file_bytes": MemoryBank.open(tmp_path).describe()["file_bytes"],
        "seconds": dict(zip(("build", "remember"), seconds, strict=True)),
        "processor_seconds": dict(zip(("build", "remember"), used, strict=True)),
        "note": f"a {dtype} bank of {report.tokens:,} tokens built on disk takes "
        f"{100 * overhead:+.1f}% processor time and {100 * (seconds[0] / seconds[1] - 1):+.1f}% "
        f"time against memory, threads {threads}",
    }
    # float32, which no build takes by itself: the shipped model makes more of it than it computes.
    if dtype != "float32":
        assert overhead < 0.05


@pytest.fixture(scope="module")
def large_bank(model, book, tmp_path_factory):
    """A bank of LARGE_BYTES of pages, as a build makes them: one text under many names."""
    path = tmp_path_factory.mktemp("large") / "bank"
    bank = model.remember(book[:BUILT_CHARACTERS], bank_dtype="float16")
    text = bank.documents[0].text
    chunks = list(bank.chunks)
    copies = -(-LARGE_BYTES // bank.nbytes)
    # the number makes each text, and with it each segment, another
    bank.documents = [Document(f"copy {i}", f"{text} {i}") for i in range(copies)]
    bank.chunks = [chunk._replace(document=i) for i in range(copies) for chunk in chunks]
    bank.save(path)
    yield path
    shutil.rmtree(path)


def evict(path):
    """Drop a folder's files from the system's cache, so that the disk must be read."""
    for file in path.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(path):
    """Read every byte of a bank's segments, and nothing more."""
    for file in path.rglob("*.safetensors"):
        with open(file, "rb", buffering=0) as opened:
            while opened.read(READ_BYTES):
                pass


@pytest.mark.parametrize("threads", [machine.THREADS[-1]], indirect=True)
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_a_large_bank_opens_at_once_and_is_asked_from_disk(benchmark, model, large_bank, threads):
    """The gate scores every chunk: all pages come from the disk, cold at first.

    The best of several turns, which neighbours disturb least.
    """
    runs = {name: [] for name in ("memory", "read", "open", "cold", "warm")}
    model.ask(model.remember("A short text to begin with."), QUESTION)

    def turn():
        kept = MemoryBank.open(large_bank, model=model, tier="cpu")
        runs["memory"].append(measured(model.ask, kept, QUESTION))
        del kept  # what is mapped cannot be evicted
        evict(large_bank)
        runs["read"].append(measured(read_files, large_bank))
        evict(large_bank)
        *opened, stored = measured(MemoryBank.open, large_bank, model=model)
        runs["open"].append(opened)
        for name in ("cold", "warm"):
            before = stored.bytes_read
            runs[name].append(measured(model.ask, stored, QUESTION))
            benchmark.extra_info["bytes_read"] = stored.bytes_read - before

    benchmark.pedantic(turn, rounds=ROUNDS)
    size = MemoryBank.open(large_bank).nbytes
    kept, warm = (runs[name][-1][2] for name in ("memory", "warm"))
    assert warm.text == kept.text
    steps, wanted = ([replace(step, score=None) for step in a.trace] for a in (warm, kept))
    assert steps == wanted
    # scored in other batches, which round differently
    scores, wanted = ([step.score or 0.0 for step in a.trace] for a in (warm, kept))
    assert scores == pytest.approx(wanted, rel=1e-3)
    seconds, used = ({k: min(r[i] for r in rs) for k, rs in runs.items()} for i in (0, 1))
    # The disk's interrupts are charged to whoever runs, so reading the bytes alone has its price.
    ratios = {
        "cold": (used["open"] + used["cold"]) / (used["memory"] + used["read"]),
        "warm": used["warm"] / used["memory"],
    }
    benchmark.extra_info |= {
        "threads": threads,
        "bank_bytes": size,
        "seconds": seconds,
        "processor_seconds": used,
        "ratio": ratios,
        "note": f"a float16 bank of {size / 1e9:.2f} GB opens in {seconds['open']:.3f} s; a "
        f"question that reads {benchmark.extra_info['bytes_read'] / 1e9:.2f} GB takes "
        f"{used['memory']:.2f} s of a processor from memory, {used['warm']:.2f} s from cached "
        f"files ({ratios['warm']:.2f} times) and {used['cold']:.2f} s from a cold disk, whose "
        f"bytes alone take {used['read']:.2f} s ({ratios['cold']:.2f} times both together)",
    }
    assert seconds["open"] < 0.2
    assert max(ratios.values()) < 1.2


@pytest.mark.parametrize("length", [32 * 1024, 128 * 1024])
@pytest.mark.parametrize("threads", [machine.THREADS[-1]], indirect=True)
def test_asking_again_against_reading_again(benchmark, request, model, book, length, threads):
    """Questions on a bank that is there, and MemAgent's, which read the text for each question.

    The shipped model throughout, ours with its gate. Its 4,096 positions cut MemAgent's sections
    of 5,000 tokens to what fits. It was never taught to read them and notes nothing, so that
    MemAgent's time is that of reading alone.
    """
    if length > 32 * 1024 and not request.config.getoption("--full"):
        pytest.skip("only with --full")
    facts = make_facts(model, "book", book, ASKED, seed=0)
    text, hidden = hide_facts(model, book, facts, length, seed=0)
    *build, bank = measured(model.remember, text, bank_dtype="float16")
    method = MemAgent(model)
    method.answer(text[: BUILT_CHARACTERS // 10], [QUESTION])
    again = [measured(model.ask, bank, fact.question) for fact, _ in hidden]
    *peer, [theirs] = benchmark.pedantic(
        measured, args=(method.answer, text, [hidden[0][0].question])
    )
    answers = [run[2] for run in again]
    right = sum(says(a.text, fact.value) for a, (fact, _) in zip(answers, hidden, strict=True))
    # The first question is not one on a bank that was asked before.
    ours = [median(run[i] for run in again[1:]) for i in (0, 1)]
    ratios = {name: peer[i] / ours[i] for i, name in enumerate(("clock", "processor"))}
    decoded = sum(len(model.tokenizer.encode(step.memory)) for step in theirs.trace)
    benchmark.extra_info |= {
        "threads": threads,
        "tokens": bank.tokens,
        "section": method.section,
        "sections": len(theirs.trace),
        "notes_tokens": {"ours": median(a.usage.new_tokens for a in answers), "memagent": decoded},
        "chunks_read": median(a.usage.chunks_read for a in answers),
        "right": right,
        "seconds": {"build": build[0], "ask": ours[0], "memagent": peer[0]},
        "processor_seconds": {"build": build[1], "ask": ours[1], "memagent": peer[1]},
        "ratio": ratios,
        "note": f"another question on a bank of {bank.tokens:,} tokens takes {ours[1]:.3f} s of a "
        f"processor, with MemAgent, which reads {len(theirs.trace)} sections of {method.section} "
        f"tokens, {peer[1]:.1f} s: {ratios['processor']:.0f} times; {right} of {ASKED} of our "
        "answers are right",
    }
    if length == 128 * 1024:
        assert ratios["processor"] > 20
