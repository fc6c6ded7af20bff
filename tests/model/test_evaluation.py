# SPDX-License-Identifier: Apache-2.0
"""The evaluation harness on a tiny random model: counts, records, resuming, errors."""

import json
import random

import pytest

from lychee.data.needles import NeedleMaker
from lychee.data.task import TaskSample
from lychee.errors import InputError, LycheeError
from lychee.eval import methods
from lychee.eval.harness import Setting, check_settings, run, settings_of, support_read
from lychee.eval.methods import check_methods
from lychee.eval.needles import BREAKDOWN, NeedleTexts, key_counts
from lychee.eval.records import CELL, RECORDS, RecordFile, cell_key
from lychee.eval.report import Table, summarise, support_of, wilson_interval
from lychee.eval.tasks import TaskCell
from lychee.gate import Gate, GateConfig
from lychee.memory_model import LycheeMemory
from lychee.trace import Answer, Step, Usage

SHARED = {"seed": 1}


@pytest.fixture(scope="module")
def books(tmp_path_factory, prose):
    """Words of several tokens in the tiny vocabulary do not count, so needles need their own."""
    path = tmp_path_factory.mktemp("books") / "book.txt"
    path.write_text(prose(3000))
    return path


@pytest.fixture
def needle_texts(tiny_model, books):
    texts = NeedleTexts.__new__(NeedleTexts)
    texts.tokenizer, texts.words = tiny_model.tokenizer, [f"w{index}" for index in range(20)]
    text = books.read_text()
    texts.books = [(text, tiny_model.tokenizer.encode_with_offsets(text)[1])]
    return texts


@pytest.fixture
def cells(needle_texts):
    def cell(length):
        return TaskCell(
            "needles", "", length, 6, lambda: needle_texts.texts(length, 6, 1), "exact", BREAKDOWN
        )

    return [cell(length) for length in (200, 300)]


def evaluate(cells, model, folder=None, metrics=()):
    return list(run(cells, [Setting()], lambda _: model, RecordFile(folder, SHARED), metrics))


@pytest.mark.parametrize("questions", [1, 3, 5, 7, 100])
def test_key_counts_add_up(questions):
    counts = key_counts(questions)
    assert sum(counts) == questions and set(counts) <= {1, 2, 3, 4}


def test_settings_of_one_bank_share_it(cells, tiny_model, monkeypatch):
    built, remember = [], LycheeMemory.remember

    def counted(model, context, **options):
        built.append((context, options["bank_dtype"]))
        return remember(model, context, **options)

    monkeypatch.setattr(LycheeMemory, "remember", counted)
    settings = [Setting(bank_dtype=dtype, notes=n) for dtype in ("auto", "int8") for n in (4, 8)]
    found = list(run(cells, settings, lambda _: tiny_model, RecordFile(None, SHARED)))
    # Two lengths, three texts each.
    assert len(built) == len(set(built)) == 2 * 2 * 3
    names = [(cell["length"], cell["bank_dtype"], cell["notes"]) for cell in found]
    assert names == [(n, s.bank_dtype, s.notes) for n in (200, 300) for s in settings]
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["build_seconds"] == second["build_seconds"] > 0
        assert second["peak_bytes"] is None


def test_wilson_interval_by_hand():
    low, high = wilson_interval(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_texts_have_the_length_asked_for(needle_texts):
    maker = NeedleMaker([f"w{index}" for index in range(20)])
    made, hidden = needle_texts.make_text(600, 3, maker, random.Random(0))
    assert abs(len(needle_texts.tokenizer.encode(made)) - 600) <= 6
    for needle, place in hidden:
        assert made[place:].startswith(needle.statement)
    with pytest.raises(InputError, match="length: expected more than [0-9]+ tokens, got 20"):
        needle_texts.make_text(20, 3, maker, random.Random(0))


def test_a_text_longer_than_the_books_repeats_them(needle_texts):
    maker = NeedleMaker([f"w{index}" for index in range(20)])
    (book,) = [text for text, _ in needle_texts.books]
    made, _ = needle_texts.make_text(100_000, 3, maker, random.Random(0))
    assert abs(len(needle_texts.tokenizer.encode(made)) - 100_000) <= 6
    assert len(made) > 2 * len(book) and made.count(book[:200]) > 1


def test_cells_count_what_was_asked(cells, tiny_model):
    found = evaluate(cells, tiny_model)
    assert [cell["length"] for cell in found] == [200, 300]
    table = Table([], list(BREAKDOWN), ["exact"])
    for cell in found:
        assert (cell["questions"], cell["texts"], cell["ratio"]) == (6, 3, 4)
        assert abs(cell["tokens"] - cell["length"]) <= 6
        # Without a gate everything is read, and of that few chunks hold what is asked for.
        assert cell["chunks_read"] == cell["chunks"] > 0 and cell["support_recall"] == 1
        assert 1 / cell["chunks"] <= cell["support_precision"] < 1
        assert cell["answer_seconds"] == cell["build_seconds"] + cell["ask_seconds"] > 0
        assert cell["breakdown"]["numbers"][1] + cell["breakdown"]["words"][1] == 6
        assert table.row(cell).count("|") == table.header.splitlines()[0].count("|")


def test_scores_are_of_the_answers_given(cells, tiny_model, tmp_path):
    evaluate(cells[:1], tiny_model, tmp_path, metrics=["string_match_all", "exact"])
    lines = (tmp_path / RECORDS).read_text().splitlines()
    stored = [json.loads(line) for line in lines]
    for text, samples in enumerate(cells[0].texts()):
        bank = tiny_model.remember(samples[0].context)
        answers = tiny_model.ask_many(bank, [sample.question for sample in samples])
        records = [record for record in stored if record["text"] == text]
        assert [record["prediction"] for record in records] == [a.text for a in answers]
        assert [record["answers"] for record in records] == [list(s.answers) for s in samples]
    # A prediction changed by hand to hold the answer would count: scores come from the records.
    record = stored[0] | {"scores": {"exact": 1.0}}
    assert summarise([record], {})["score"] == 1.0
    assert list(stored[0]["scores"]) == ["string_match_all", "exact"]


def test_an_interrupted_run_goes_on_where_it_stopped(cells, tiny_model, tmp_path, monkeypatch):
    whole = evaluate(cells, tiny_model, tmp_path / "whole")
    asked = []

    class Stopping(methods.Ours):
        def answer(self, context, questions):
            if len(asked) == 5:
                raise KeyboardInterrupt
            asked.append(context)
            return super().answer(context, questions)

    with monkeypatch.context() as patch:
        patch.setattr(methods, "Ours", Stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(cells, tiny_model, tmp_path / "part")
    path = tmp_path / "part" / RECORDS
    # The process died while it wrote the fifth text: three of four records, and half a line.
    lines = path.read_text().splitlines(keepends=True)
    assert len(asked) == 5 and json.loads(lines[-1])["questions"] == 4
    path.write_text("".join(lines[:-1]) + lines[-1][:50])
    with monkeypatch.context() as patch:
        asked.clear()
        patch.setattr(methods, "Ours", Stopping)
        evaluate(cells, tiny_model, tmp_path / "part")
        assert len(asked) == 2
        assert evaluate(cells, tiny_model, tmp_path / "part") and len(asked) == 2
    resumed = evaluate(cells, tiny_model, tmp_path / "part")
    times = {"build_seconds", "ask_seconds", "answer_seconds", "processor_seconds", "peak_bytes"}
    for first, second in zip(whole, resumed, strict=True):
        assert {k: first[k] for k in first.keys() - times} == {
            k: second[k] for k in second.keys() - times
        }
    assert path.read_text().endswith("\n")


def test_other_settings_and_broken_records_are_refused(cells, tiny_model, tmp_path):
    evaluate(cells[:1], tiny_model, tmp_path)
    with pytest.raises(InputError, match=r"run\.json: seed: expected 1 .* got 2; name another"):
        RecordFile(tmp_path, {"seed": 2})
    path = tmp_path / RECORDS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[1:], ""]))
    with pytest.raises(InputError, match=r"records\.jsonl: line 2: expected a record"):
        RecordFile(tmp_path, SHARED)
    path.write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="line 1: expected a record, got: one without bank_dtype"):
        RecordFile(tmp_path, SHARED)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match=r"records\.jsonl: line 1: expected a record"):
        RecordFile(tmp_path, SHARED)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(InputError, match=r"run\.json: expected the settings of a run, got a list"):
        RecordFile(tmp_path, SHARED)


def test_what_cannot_be_asked_is_named(tiny_model):
    def cell(*samples):
        return TaskCell("own", "f", None, len(samples), lambda: iter([[s] for s in samples]))

    good = TaskSample("own", "The sea ran high.", "Who?", ("a",), metric="f1")
    long = TaskSample("own", "The sea.", "why " * 200, ("a",), (), "f1", {"place": "f: line 2"})
    empty = TaskSample("own", " ", "Who?", ("a",), (), "f1", {"place": "f: line 3"})
    with pytest.raises(InputError, match="f: line 2: ours: question: expected at most 120 tokens"):
        evaluate([cell(good, long)], tiny_model)
    with pytest.raises(InputError, match="f: line 3: context: expected text, got nothing"):
        evaluate([cell(good, empty)], tiny_model)


def test_methods_and_settings():
    assert settings_of(["ours", "memagent"], [2, 4], ["auto", "int8"], ["off"], 2) == [
        Setting("ours", 2, "auto", "off", 2),
        Setting("ours", 2, "int8", "off", 2),
        Setting("ours", 4, "auto", "off", 2),
        Setting("ours", 4, "int8", "off", 2),
        Setting("memagent"),
    ]
    names = ["ours", "memagent", "full_context"]
    found = [(setting.method, setting.notes) for setting in settings_of(names, notes=[4, 8])]
    both = [(name, size) for name in ("ours", "memagent") for size in (4, 8)]
    assert found == [*both, ("full_context", None)]
    with pytest.raises(InputError, match="method: expected one of ours.*, got 'guess'"):
        check_methods(["ours", "guess"])


def test_settings_beyond_the_model_are_refused_before_anything_runs(tiny_model):
    check_settings(settings_of(["ours", "memagent"], [2, 8], notes=[100]), tiny_model)
    for setting, message in (
        (Setting(ratio=0), "ratio: expected a divisor of the window of .*, got 0"),
        (Setting(gate="0.5"), "gate: expected a model that has one, to set 0.5, got none"),
        (Setting(notes=10**6), r"notes: expected at most \d+ tokens, .* positions, got 1000000"),
        (Setting("memagent", notes=10**6), r"notes: expected at most \d+ tokens"),
    ):
        with pytest.raises(LycheeError, match=message):
            check_settings([Setting(), setting], tiny_model)
    # Old and new notes, beside a chunk and the longest question, fill the positions and no more.
    question = [0] * tiny_model.memory.question
    turn = tiny_model.memory.slots + len(tiny_model.reasoner.prompts.update.render(question, []))
    room = (tiny_model.decoder.config.max_position_embeddings - turn) // 2
    check_settings([Setting(notes=room)], tiny_model)
    with pytest.raises(InputError, match=f"notes: expected at most {room} tokens"):
        check_settings([Setting(notes=room + 1)], tiny_model)


def test_every_method_keeps_notes_of_the_size_asked_for(cells, tiny_model):
    settings = settings_of(["ours", "memagent"], notes=[1, 8])
    records = RecordFile(None, SHARED)
    found = list(run(cells[:1], settings, lambda _: tiny_model, records))
    assert [(cell["method"], cell["notes"]) for cell in found] == [
        (name, size) for name in ("ours", "memagent") for size in (1, 8)
    ]


def test_what_was_read_is_held_against_what_supports():
    sample = TaskSample("t", "x" * 40, "?", ("x",), ((5, 8), (18, 22)))
    steps = [Step(chunk, "d", 10 * chunk, 10 * chunk + 10, "", False) for chunk in (3, 0, 1)]
    # Statements lie in chunk 0, and over 1 and 2; the trace knows nothing of chunk 2.
    found = support_read(sample, Answer("?", "", [], steps, Usage(0, 0, 0, 4, 3, 0.0, 0.0)))
    assert found == {"support_chunks": 2, "support_read": 2}
    found = support_read(sample, Answer("?", "", [], [], Usage(0, 0, 0, 4, 3, 0.0, 0.0)))
    assert found == {"support_chunks": None, "support_read": None}
    records = [
        {"support_chunks": 2, "support_read": 1, "chunks_read": 4},
        {"support_chunks": 1, "support_read": 1, "chunks_read": 1},
        {"support_chunks": None, "support_read": None, "chunks_read": 50},
    ]
    assert support_of(records) == {"support_recall": 2 / 3, "support_precision": 2 / 5}
    assert set(support_of(records[2:]).values()) == {None}


def test_times_of_a_text_count_once():
    shared = dict.fromkeys(CELL) | {"details": {}, "text_tokens": 9, "memory_bytes": 1, "chunks": 1}
    shared |= {
        "support_chunks": None,
        "support_read": None,
        "chunks_read": 1,
        "processor_seconds": 1.0,
        "scores": {"f1": 0.5},
    }
    texts = [(0, 1.0, 3.0, 10), (0, 1.0, 3.0, 10), (1, 3.0, 6.0, None)]
    names = ("text", "build_seconds", "ask_seconds", "peak_bytes")
    cell = summarise([shared | dict(zip(names, text, strict=True)) for text in texts], {})
    # Two texts were built in 1 and 3 seconds; three questions were asked in 3 and 6.
    assert (cell["build_seconds"], cell["ask_seconds"], cell["answer_seconds"]) == (2, 3, 5)
    assert (cell["texts"], cell["questions"], cell["peak_bytes"]) == (2, 3, 10)


def test_gates_are_compared(cells, tiny_model):
    gate = Gate(tiny_model.decoder, GateConfig(layers=3, tail=3)).eval()
    parts = (tiny_model.decoder, tiny_model.tokenizer, tiny_model.raw_config, tiny_model.memory)
    model = LycheeMemory(*parts, gate)
    settings = settings_of(["ours"], gates=["off", "0.0", "1.0"])
    records = RecordFile(None, SHARED)
    off, all_pass, none_pass = run(cells[:1], settings, lambda _: model, records)
    assert [cell["gate"] for cell in (off, all_pass, none_pass)] == ["off", "0.0", "1.0"]
    assert off["chunks_read"] == all_pass["chunks_read"] == off["chunks"]
    assert off["support_recall"] == 1 and none_pass["chunks_read"] < off["chunks_read"]
    read = [record["support_read"] for record in records.of(cell_key(none_pass))]
    assert none_pass["support_recall"] == sum(read) / sum(
        record["support_chunks"] for record in records.of(cell_key(none_pass))
    )
    # What the gate lets through, the trace says; here nothing behind the opening chunks.
    assert none_pass["support_recall"] < 1
