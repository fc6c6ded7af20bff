# SPDX-License-Identifier: Apache-2.0
"""The end-to-end benchmarks' own sums and tables, on a model of a few thousand parameters."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import reading  # noqa: E402
import reading_parts  # noqa: E402
import reading_peak  # noqa: E402
import reading_table  # noqa: E402
import table  # noqa: E402
import test_speed_up_parts  # noqa: E402
import test_time_to_answer  # noqa: E402

from lychee.bank import BankBuilder, Document, MemoryBank  # noqa: E402

TINY = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 6144}
NOTES, LENGTH = 20, 1900


@pytest.fixture
def tiny(monkeypatch):
    """Chunks of 256 tokens and answers of 8, in place of the benchmarks' own sizes."""
    monkeypatch.setattr(reading, "SMALL", reading.SMALL | TINY)
    for module in (reading, reading_parts):
        monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(reading, "WINDOW", 128)
    for function in (reading.make_model, reading.make_decoder):
        function.cache_clear()
    yield
    for function in (reading.make_model, reading.make_decoder):
        function.cache_clear()


def test_time_to_answer_rows(tiny):
    """8 chunks, of which the gate lets one through; the loop reads that one and no other."""
    text, questions = reading.make_text(LENGTH), reading.make_questions(3)
    runs = {
        "ours": reading.run_ours(NOTES, text, questions),
        "memagent": reading.run_memagent(NOTES, text, questions),
        "full_context": reading.run_full_context(text, questions),
    }
    assert list(runs["ours"].seconds) == ["build", "read", "answer"]
    assert runs["ours"].results["scored"] >= 3 * 8
    together = reading.run_in_one_turn(NOTES, runs["ours"], questions)
    info = test_time_to_answer.summarise(LENGTH, NOTES, runs, together)
    assert (info["selected"], info["chunks"]) == (1, 8)
    assert set(info["ratio"]) == {"memagent", "full_context"}
    (title, rows, _), *rest = reading_table.sections([info, {"unrelated": 1}])
    assert title == "time to answer" and not rest
    assert len(rows) == 2 and len(rows[0]) == len(rows[1])
    assert len(table.aligned(rows)) == 2 and len(table.aligned(rows, markdown=True)) == 3


@pytest.mark.parametrize(
    ("chunks", "expected"), [(1, [0]), (8, [4]), (15, [3, 11]), (32, [5, 16, 26])]
)
def test_chosen_chunks(chunks, expected):
    assert reading.chosen_chunks(chunks * reading.CHUNK) == expected
    assert reading.chosen_chunks((chunks - 1) * reading.CHUNK + 1) == expected


def run(**seconds):
    return SimpleNamespace(seconds=seconds, total=sum(seconds.values()))


def test_questions_until_paid():
    """By hand: ours 10 s to build and 2 s a question."""
    ours = run(build=10.0, gate=0.5, read=1.0, answer=0.5)
    paid = test_time_to_answer.questions_until_paid
    assert paid(ours, run(ask=4.0)) == 5  # 10 + 2 * 5 <= 4 * 5
    assert paid(ours, run(ask=13.0)) == 1
    assert paid(ours, run(build=6.0, ask=4.0)) == 2
    assert paid(ours, run(build=20.0, ask=4.0)) == 1
    assert paid(ours, run(ask=1.0)) is None


@pytest.mark.parametrize("least", [1, 5, reading.STEPS, None])
def test_crossover_is_the_least_length(least):
    tried = {}

    def better(length):
        tried[length] = {"ours": 2.0, "full_context": 1.0}
        return least is not None and length >= least * reading.STEP

    found = reading.crossover(better)
    assert found == (None if least is None else least * reading.STEP)
    info = {"memory_tokens": NOTES, "tried": tried, "crossover": found}
    ((title, rows, _),) = reading_table.sections([info])
    assert title == "full context crossover, from nothing"
    assert rows[1][1] == ("none tried" if found is None else f"{found:,} tokens")
    assert rows[1][2].count("2.0, 1.0") == len(tried)


def test_chosen_chunks_of_a_bank_on_disk_are_refused(tiny, tmp_path):
    """Its tables number pages anew, so another chunk would be let through."""
    model = reading.make_model(NOTES)
    with BankBuilder(model, tmp_path / "bank") as builder:
        builder.add([Document("text", reading.make_text(LENGTH))])
    loaded = MemoryBank.open(tmp_path / "bank", model=model, tier="cpu")
    reading.ChosenGate(model.decoder, loaded, [4])
    on_disk = MemoryBank.open(tmp_path / "bank", model=model, tier="disk")
    with pytest.raises(ValueError, match="bank: expected pages in the model's memory"):
        reading.ChosenGate(model.decoder, on_disk, [4])


def test_parts_measure_every_pass(tiny):
    parts = reading_parts.Parts.measure(2, NOTES)
    assert all(seconds > 0 for seconds in vars(parts).values())


def test_sums_of_parts():
    """Passes of one second each: the sums count turns, tokens and pairs."""
    parts = reading_parts.Parts(*[1.0] * 11)
    sections = 131072 / 5000
    assert test_speed_up_parts.memagent(parts) == pytest.approx(sections + 27 * 1024 + 1)
    assert test_speed_up_parts.memagent(parts, 3, 3) == 3 + 3 * 1024 + 1
    # Chunks 5, 16 and 26 of 32 pass. The gate scores all 32 at first, then with full notes seven
    # at a time: from 6 on 14, from 17 on 14, and from 27 on the last five.
    assert test_speed_up_parts.scored_pairs(1) == 32 + 14 + 14 + 5
    assert test_speed_up_parts.gating(parts) == 1 + 3 + 65
    assert test_speed_up_parts.asking(parts) == 69 + 3 * 1025 + 1
    assert test_speed_up_parts.asking_together(parts) == 1 + 32 + 1025 + 1
    # Eight questions with full notes: chunk by chunk.
    assert test_speed_up_parts.scored_pairs(8) == 8 * (32 + 11 + 10 + 5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("method", reading_peak.METHODS)
def test_peak_memory_of_every_method(tiny, method):
    measured = reading_peak.measure(method, LENGTH, NOTES)
    assert measured["peak_mib"] >= 0
    # 475 memory tokens in 8 pages, 16 KiB each in float32
    page = {"ours": 16, "ours_disk": 16, "ours_int8": 4.5}.get(method, 0)
    assert measured["bank_mib"] * 1024 >= 8 * page * 0.9
