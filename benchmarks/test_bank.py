# SPDX-License-Identifier: Apache-2.0
"""Banks on disk: what writing adds to a build, opening a large bank, and asking it from there."""

import gzip
import os
import resource
import shutil
import time
from pathlib import Path

import machine
import pytest

import lychee
from lychee import LycheeMemory
from lychee.bank import BankBuilder, Document, MemoryBank

BOOK = Path(lychee.__file__).parent / "assets" / "pride-and-prejudice.txt.gz"
BUILT_CHARACTERS = 100_000
LARGE_BYTES = 1 << 30
ROUNDS = 7
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
        shutil.rmtree(tmp_path, ignore_errors=True)
        with BankBuilder(model, tmp_path, bank_dtype=dtype) as builder:
            return builder.add(documents)

    def remember():
        return model.remember(documents, bank_dtype=dtype)

    pairs = []

    def turn():
        pairs.append((measured(build), measured(remember)))

    remember()
    benchmark.pedantic(turn, rounds=ROUNDS, iterations=1)
    built, kept = ([pair[side] for pair in pairs] for side in (0, 1))
    seconds = [min(run[0] for run in side) for side in (built, kept)]
    used = [min(run[1] for run in side) for side in (built, kept)]
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
    """A bank of LARGE_BYTES of pages: one text under many names, compressed once."""
    path = tmp_path_factory.mktemp("large") / "bank"
    bank = model.remember(book[:BUILT_CHARACTERS])
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


def read_all(path):
    buffer = bytearray(8 << 20)
    for file in path.rglob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


@pytest.mark.parametrize("threads", [machine.THREADS[-1]], indirect=True)
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_a_large_bank_opens_at_once_and_is_asked_from_disk(benchmark, model, large_bank, threads):
    """The question reads every chunk: all pages come from the disk, cold at first."""
    evict(large_bank)
    opening = benchmark.pedantic(
        measured, (MemoryBank.open, large_bank), {"model": model}, rounds=1
    )
    stored = opening[2]
    in_memory = MemoryBank.open(large_bank, model=model, tier="cpu")
    model.ask(model.remember("A short text to begin with."), QUESTION)
    memory_seconds, _, wanted = measured(model.ask, in_memory, QUESTION)
    del in_memory
    evict(large_bank)
    reading_seconds, *_ = measured(read_all, large_bank)
    evict(large_bank)
    cold_seconds, _, answer = measured(model.ask, stored, QUESTION)
    asked_bytes = stored.bytes_read
    warm_seconds, *_ = measured(model.ask, stored, QUESTION)
    assert (answer.text, answer.trace) == (wanted.text, wanted.trace)
    beyond = (cold_seconds - reading_seconds) / memory_seconds
    benchmark.extra_info |= {
        "threads": threads,
        "bank_bytes": stored.nbytes,
        "bytes_read": asked_bytes,
        "open_seconds": opening[0],
        "ask_seconds": {"memory": memory_seconds, "cold": cold_seconds, "warm": warm_seconds},
        "read_files_seconds": reading_seconds,
        "note": f"a bank of {stored.nbytes / 1e9:.2f} GB opens in {opening[0]:.3f} s; a question "
        f"that reads {asked_bytes / 1e9:.2f} GB takes {memory_seconds:.1f} s from memory, "
        f"{warm_seconds / memory_seconds:.2f} times that from cached files, {beyond:.2f} times "
        f"from a cold disk less the {reading_seconds:.1f} s of reading",
    }
    assert opening[0] < 0.2
    assert warm_seconds < 1.2 * memory_seconds
    assert beyond < 1.2
