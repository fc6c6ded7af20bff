# SPDX-License-Identifier: Apache-2.0
"""`lychee build`, `add`, `rm`, `info`, `verify`, and `ask` on the bank, as a user runs them."""

import json
import signal
import subprocess
import time

import pytest

from lychee import LycheeMemory
from lychee.bank import MemoryBank

QUESTIONS = ("What is it?", "Who was it?")
ASK = [part for question in QUESTIONS for part in ("-q", question)]


@pytest.fixture
def docs(text, tmp_path):
    """A folder of two texts and two documents as JSON lines."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text(text[:1500])
    (folder / "b.md").write_text(text[1500:2500])
    lines = ({"id": name, "text": text[3000:3500] + name} for name in ("one", "two"))
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def bank(docs, tmp_path, model_folder, invoke):
    path = tmp_path / "X.bank"
    result = invoke("build", docs, "-o", path, "--model", model_folder)
    assert result.status == 0, result.errors
    return path


def untimed(step):
    return {name: value for name, value in step.items() if name != "seconds"}


def names(report):
    return [document["name"] for document in report["documents"]]


def test_build_says_what_the_bank_holds(docs, tmp_path, model_folder, answer_of):
    path = tmp_path / "X.bank"
    report = answer_of("build", docs, "-o", path, "--model", model_folder, "--bank-dtype", "int8")
    expected = [str(docs / "a.txt"), str(docs / "b.md"), "one", "two"]
    assert report["added"] == expected
    assert (report["documents"], report["dtype"], report["ratio"]) == (4, "int8", 4)
    assert report["compressed_tokens"] == report["tokens"] > 0
    details = answer_of("info", path)
    assert names(details) == expected
    assert details["tokens"] == report["tokens"] == sum(d["tokens"] for d in details["documents"])


def test_build_resumes_and_adds_replace(bank, docs, model_folder, answer_of):
    options = ("-o", bank, "--model", model_folder)
    again = answer_of("build", docs, *options, "--resume")
    assert (len(again["skipped"]), again["compressed_tokens"]) == (4, 0)
    (docs / "b.md").write_text("Something else. " * 10)
    (docs / "d.txt").write_text("Something new. " * 10)
    report = answer_of("add", bank, docs, "--model", model_folder)
    assert (report["added"], report["replaced"]) == ([str(docs / "d.txt")], [str(docs / "b.md")])
    assert report["documents"] == 5


def test_documents_are_removed_by_name(bank, docs, answer_of, invoke):
    report = answer_of("rm", bank, "two", docs / "a.txt", "two")
    assert (report["removed"], report["documents"]) == (["two", str(docs / "a.txt")], 2)
    listed = invoke("info", bank).out
    assert str(docs / "b.md") in listed and "one" in listed and "a.txt" not in listed
    result = invoke("rm", bank, "one")
    assert result.out.splitlines()[0] == "removed one"
    assert ": 1 document, " in result.out


def test_ask_on_a_bank_answers_as_on_its_texts(bank, docs, model_folder, answer_of):
    options = (*ASK, "--model", model_folder)
    stored, fresh = answer_of("ask", bank, *options), answer_of("ask", docs, *options)
    assert len(stored["answers"]) == len(QUESTIONS)
    for ours, theirs in zip(stored["answers"], fresh["answers"], strict=True):
        for field in ("question", "text", "sources"):
            assert ours[field] == theirs[field]
        assert [untimed(step) for step in ours["trace"]] == [untimed(s) for s in theirs["trace"]]
        assert ours["usage"]["bytes_read"] > 0 == theirs["usage"]["bytes_read"]
    assert stored["open_seconds"] >= 0 and "build_seconds" not in stored


def test_ask_prints_each_answer_under_its_question(bank, model_folder, invoke):
    result = invoke("ask", bank, *ASK, "--model", model_folder)
    assert result.status == 0
    model = LycheeMemory.from_pretrained(model_folder)
    opened = MemoryBank.open(bank, model=model)
    answers = model.ask_many(opened, QUESTIONS)
    assert result.out == "".join(f"{answer.text}\n" for answer in answers)
    assert [line for line in result.errors.splitlines() if line in QUESTIONS] == list(QUESTIONS)
    assert "tokens in the bank, opened in" in result.errors


def test_ratio_is_the_banks_own(docs, tmp_path, model_folder, answer_of):
    path = tmp_path / "X.bank"
    answer_of("build", docs, "-o", path, "--model", model_folder, "--ratio", 8)
    assert answer_of("ask", path, "-q", "What?", "--model", model_folder)["ratio"] == 8
    answer_of("add", path, docs, "--model", model_folder)


def test_dtype_and_tier_reach_the_bank(docs, bank, model_folder, answer_of):
    options = ("-q", "What?", "--model", model_folder)
    whole, small = (answer_of("ask", docs, *options, "--bank-dtype", d) for d in ("auto", "int8"))
    # Heads of 8 numbers, each with a scale of 4 bytes.
    assert small["usage"]["memory_bytes"] == whole["usage"]["memory_bytes"] * (8 + 4) // (8 * 4)
    read = {tier: answer_of("ask", bank, *options, "--tier", tier) for tier in ("disk", "cpu")}
    assert read["disk"]["text"] == read["cpu"]["text"] == whole["text"]


def test_dtype_of_the_weights(docs, tmp_path, model_folder, answer_of):
    """Text in memory takes it; a bank on disk the stored one, and weights of either ask it."""
    options, path = ("--model", model_folder, "--dtype", "bfloat16"), tmp_path / "X.bank"
    whole = answer_of("ask", docs, "-q", "What?", "--model", model_folder)
    half = answer_of("ask", docs, "-q", "What?", *options)
    assert 2 * half["usage"]["memory_bytes"] == whole["usage"]["memory_bytes"]
    answer_of("build", docs, "-o", path, *options)
    assert answer_of("info", path)["dtype"] == "float32"
    answer_of("add", path, docs, *options)
    for weights in (options, options[:2]):
        usage = answer_of("ask", path, "-q", "What?", *weights)["usage"]
        assert usage["memory_bytes"] == whole["usage"]["memory_bytes"] and usage["chunks_read"] > 0


def test_stream_prints_every_event_as_a_line(bank, model_folder, invoke, answer_of):
    options = (bank, *ASK, "--model", model_folder)
    result = invoke("ask", *options, "--stream")
    assert result.status == 0
    events = [json.loads(line) for line in result.out.splitlines()]
    expected = answer_of("ask", *options)
    for index, answer in enumerate(expected["answers"]):
        own = [event for event in events if event["question_index"] == index]
        read = [(e["chunk"], e["document"], e["start"]) for e in own if e["event"] == "read"]
        steps = [step for step in answer["trace"] if step.get("read", True)]
        assert read == [(s["chunk"], s["document"], s["start"]) for s in steps]
        updated = [(e["chunk"], e["memory"]) for e in own if e["event"] == "updated"]
        assert updated == [(s["chunk"], s["memory"]) for s in steps if s["changed"]]
        tokens = "".join(event["text"] for event in own if event["event"] == "token")
        assert tokens.strip() == answer["text"]
        assert own[-1]["event"] == "answer"
        assert (own[-1]["text"], own[-1]["sources"]) == (answer["text"], answer["sources"])


def test_trace_of_an_answer_becomes_a_page(bank, model_folder, tmp_path, invoke, answer_of):
    trace, page = tmp_path / "t.json", tmp_path / "t.html"
    options = ("--model", model_folder, "--trace", trace)
    expected = answer_of("ask", bank, *ASK, *options)
    report = answer_of("trace", trace, "--html", page)
    assert report["page"] == str(page)
    assert QUESTIONS[1] in page.read_text()
    for found, answer in zip(report["answers"], expected["answers"], strict=True):
        changes = [step for step in answer["trace"] if step["changed"]]
        assert [change["memory"] for change in found["changes"]] == [s["memory"] for s in changes]
    listed = invoke("trace", trace).out
    assert QUESTIONS[0] in listed and "characters" in listed


def test_verify_names_damage(bank, invoke, answer_of):
    assert answer_of("verify", bank) == {"path": str(bank), "sound": True, "damage": []}
    segment = max(bank.glob("segments/*"), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    data[-100] ^= 1
    segment.chmod(0o644)
    segment.write_bytes(data)
    result = invoke("verify", bank)
    assert result.status == 1
    assert segment.name in result.out
    result = invoke("verify", bank, "--json")
    assert result.status == 1
    assert json.loads(result.out)["sound"] is False


def test_interrupted_build_is_resumed(start, docs, text, tmp_path, model_folder, answer_of):
    """Ctrl-C leaves a bank that says how to go on; what was finished is not done again."""
    for index in range(12):
        (docs / f"long-{index}.txt").write_text(text + str(index))
    path = tmp_path / "X.bank"
    options = (docs, "-o", path, "--model", model_folder)
    process = start("build", *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stop = time.monotonic() + 120
    while not any(path.glob("segments/*.safetensors")):
        assert process.poll() is None and time.monotonic() < stop
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), errors
    lines = errors.splitlines()
    assert lines[-1] == "interrupted"
    assert f"lychee: {path}: go on with the same command and --resume" in lines
    answer_of("verify", path)
    report = answer_of("build", *options, "--resume")
    assert report["documents"] == 16
    assert report["compressed_tokens"] < report["tokens"]
