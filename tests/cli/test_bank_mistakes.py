# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong with banks, traces and estimates: one line and exit code 2."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from lychee import LycheeMemory
from lychee.bank import BankBuilder, Document
from lychee.bank.folder import BankWriter

QUESTION = ("-q", "What is it?")


@pytest.fixture(scope="module")
def bank_made_once(text, model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("banks") / "X.bank"
    source = path.parent / "a.txt"
    source.write_text(text[:1200])
    model = LycheeMemory.from_pretrained(model_folder)
    model.remember(source).save(path)
    return path


@pytest.fixture
def bank(bank_made_once, tmp_path):
    return shutil.copytree(bank_made_once, tmp_path / "X.bank")


@pytest.fixture
def options(model_folder):
    return ("--model", model_folder)


COMMANDS = {
    "info": lambda path: ("info", path),
    "verify": lambda path: ("verify", path),
    "rm": lambda path: ("rm", path, "a"),
    "add": lambda path: ("add", path, path),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_path_that_is_no_bank(refuse, tmp_path, name):
    missing, text = tmp_path / "none.bank", tmp_path / "a.txt"
    text.write_text("some text")
    for path in (missing, text, tmp_path):
        line = refuse(*COMMANDS[name](path), "--json")
        assert line.startswith(f"{path}: expected a memory bank, got ")
    assert sorted(tmp_path.iterdir()) == [text]


def test_text_and_bank_mixed_up(refuse, bank, text_file, options):
    line = refuse("ask", bank, text_file, *QUESTION, *options)
    assert line.startswith(f"{bank}: expected texts or one bank alone, got a bank among 2 paths; ")
    line = refuse("build", bank, "-o", bank.with_name("Y.bank"), *options)
    assert line == f"{bank}: expected texts, got a memory bank"
    assert refuse("add", bank, bank, *options) == line
    assert not bank.with_name("Y.bank").exists()


def test_build_over_a_bank(refuse, bank, text_file, options):
    before = {path: path.stat().st_mtime_ns for path in bank.rglob("*")}
    line = refuse("build", text_file, "-o", bank, *options)
    expected = f"{bank}: expected a new folder, got a bank; go on with --resume, or "
    assert line.startswith(expected)
    assert {path: path.stat().st_mtime_ns for path in bank.rglob("*")} == before


def test_build_over_something_else(refuse, tmp_path, text_file, options):
    file = tmp_path / "file"
    file.write_text("mine")
    line = refuse("build", text_file, "-o", file, *options)
    assert line == f"{file}: expected a writable folder, got a file"
    assert file.read_text() == "mine"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    line = refuse("build", text_file, "-o", folder, *options)
    assert line.startswith(f"{folder}: expected ")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_bad_document_leaves_no_bank(refuse, tmp_path, options):
    out, lines = tmp_path / "X.bank", tmp_path / "a.jsonl"
    lines.write_text('{"id": "a", "text": "one"}\n{"id": "b"}\n')
    line = refuse("build", lines, "-o", out, *options)
    assert line == f"{lines}: line 2: text: expected text, got no such field"
    lines.write_text('{"id": "a", "text": "one"}\n{"id": "a", "text": "two"}\n')
    assert refuse("build", lines, "-o", out, *options).endswith("got a twice")
    assert not out.exists()


def test_dtype_that_does_not_exist(refuse, tmp_path, text_file, options):
    for command in (("ask", text_file, *QUESTION), ("build", text_file, "-o", tmp_path / "X")):
        line = refuse(*command, "--dtype", "int8", *options)
        assert line == "dtype: expected one of float32, bfloat16, float16, got 'int8'"


def test_bank_dtype_that_does_not_exist(refuse, tmp_path, text_file, options):
    line = refuse("build", text_file, "-o", tmp_path / "X", "--bank-dtype", "int3", *options)
    assert line.startswith("bank-dtype: expected one of float32, ") and line.endswith("'int3'")


def test_resume_with_another_dtype_or_ratio(refuse, bank, text_file, options):
    resume = ("build", text_file, "-o", bank, "--resume", *options)
    assert "dtype" in refuse(*resume, "--bank-dtype", "int8")
    assert str(bank) in refuse(*resume, "--ratio", 8)


def test_unknown_document(refuse, bank, answer_of):
    before = answer_of("info", bank)
    name = before["documents"][0]["name"]
    line = refuse("rm", bank, name, "none")
    assert line.startswith("none: expected a document of the bank, got none of that name; ")
    assert answer_of("info", bank) == before


def test_bank_without_documents(refuse, bank, options, answer_of):
    answer_of("rm", bank, *(document["name"] for document in answer_of("info", bank)["documents"]))
    line = refuse("ask", bank, *QUESTION, *options)
    assert line.startswith(f"{bank}: expected documents, got an empty bank; ")


def test_bank_of_an_interrupted_build(refuse, tmp_path, text, model_folder, monkeypatch):
    monkeypatch.setattr("lychee.bank.build.COMMIT_SECONDS", 0)

    def stop(progress):
        if progress.tokens > 0.5 * progress.tokens_total:
            raise KeyboardInterrupt

    path, model = tmp_path / "bank", LycheeMemory.from_pretrained(model_folder)
    with pytest.raises(KeyboardInterrupt), BankBuilder(model, path) as builder:
        builder.add([Document("long", 4 * text)], stop)
    line = refuse("ask", path, *QUESTION, "--model", model_folder)
    assert line.startswith(f"{path}: expected documents, got an unfinished bank; go on with ")


def test_ratio_that_is_not_the_banks(refuse, bank, options):
    line = refuse("ask", bank, *QUESTION, *options, "--ratio", 8)
    assert line == f"ratio: expected 4, which {bank} was built with, got 8"


def test_dtype_and_tier_that_a_bank_cannot_have(refuse, bank, text_file, options):
    line = refuse("ask", bank, *QUESTION, *options, "--bank-dtype", "int8")
    assert line == f"bank-dtype: expected float32, which {bank} has, got int8"
    line = refuse("ask", text_file, *QUESTION, *options, "--bank-dtype", "int3")
    assert line.startswith("bank-dtype: expected one of float32, ") and line.endswith("'int3'")
    for path in (bank, text_file):
        assert refuse("ask", path, *QUESTION, *options, "--tier", "moon").startswith("tier: exp")
    assert refuse("ask", text_file, *QUESTION, *options, "--tier", "disk").startswith("tier: exp")


def test_bank_of_another_model(refuse, bank, model_folder, tmp_path, text_file):
    """The shape is the same, one weight is not."""
    other = shutil.copytree(model_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {name: tensors[name] + 1}, other / "model.safetensors")
    for command in (("ask", bank, *QUESTION), ("add", bank, text_file)):
        line = refuse(*command, "--model", other)
        assert str(bank) in line and "other" in line


def test_damaged_manifest(refuse, bank, options):
    manifest = bank / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    for command in (("ask", bank, *QUESTION, *options), ("info", bank)):
        assert str(bank) in refuse(*command)


def test_bank_that_is_being_written(refuse, bank, text_file, options):
    with BankWriter(bank):
        line = refuse("add", bank, text_file, *options)
    assert str(bank) in line and str(os.getpid()) in line


@pytest.mark.parametrize("question", ["", " \n"])
def test_question_of_no_tokens(refuse, bank, options, question):
    asked = ("ask", bank, *QUESTION, "-q", question, *options)
    assert refuse(*asked) == "question: expected text, got nothing"


def test_question_that_the_tokenizer_drops(refuse, bank, model_folder, tmp_path):
    """A normalizer can leave nothing of a question that looks like one."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "?"}, "content": ""}
    path.write_text(json.dumps(tokenizer))
    line = refuse("ask", bank, "-q", "???", "--model", folder)
    assert line == "question: expected text, got nothing"


def test_trace_that_cannot_be_written(refuse, bank, tmp_path, options):
    asked = ("ask", bank, *QUESTION, *options, "--trace")
    assert refuse(*asked, tmp_path) == f"{tmp_path}: expected a file to write, got a folder"
    missing = tmp_path / "none/t.json"
    assert refuse(*asked, missing).startswith(f"{missing}: expected a file in a folder")


def test_trace_and_page_replace_nothing_else(refuse, bank, text_file, tmp_path, options, invoke):
    before = text_file.read_bytes()
    asked = ("ask", text_file, *QUESTION, *options, "--trace")
    line = refuse(*asked, text_file)
    assert line == f"{text_file}: expected a new file or a trace, got another; name a new file"
    os.mkfifo(tmp_path / "fifo")
    line = refuse(*asked, tmp_path / "fifo")
    assert line == f"{tmp_path / 'fifo'}: expected an ordinary file to write, got another"
    trace, link = tmp_path / "t.json", tmp_path / "link.json"
    link.symlink_to(trace)
    for _ in range(2):
        assert invoke(*asked, link).status == 0
    assert link.is_symlink()
    kept = trace.read_bytes()
    line = refuse("trace", trace, "--html", trace)
    assert line.startswith(f"{trace}: expected a new file or a page of lychee trace, got another")
    for _ in range(2):
        assert invoke("trace", trace, "--html", tmp_path / "t.html").status == 0
    assert (text_file.read_bytes(), trace.read_bytes()) == (before, kept)


def test_trace_that_is_none(refuse, tmp_path, text_file):
    missing = tmp_path / "t.json"
    line = refuse("trace", missing)
    assert line == f"{missing}: expected a trace, got: No such file or directory"
    page = tmp_path / "t.html"
    assert refuse("trace", text_file, "--html", page).startswith(f"{text_file}: expected a trace")
    assert not page.exists()


MODEL = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
ESTIMATES = {
    "no tokens": ((), {}, "Missing option '--tokens'"),
    "zero tokens": (("--tokens", 0), {}, "Invalid value for '--tokens'"),
    "ratio": (("--tokens", 9, "--ratio", 3), {}, "ratio: expected a divisor of the window of"),
    "bank dtype": (("--tokens", 9, "--bank-dtype", "int3"), {}, "bank-dtype: expected one of"),
    "dtype": (("--tokens", 9, "--dtype", "int8"), {}, "dtype: expected one of float32"),
    "family": (("--tokens", 9), {"model_type": "gpt2"}, "model_type: expected one of qwen2"),
    "experts": (("--tokens", 9), {"num_experts": 8}, "expected a dense model without experts"),
    "no layers": (("--tokens", 9), {"num_hidden_layers": 0}, "expected a whole number above 0"),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_bad_estimate(refuse, tmp_path, name):
    arguments, fields, message = ESTIMATES[name]
    (tmp_path / "config.json").write_text(json.dumps(MODEL | fields))
    assert message in refuse("estimate", "--model", tmp_path, *arguments)


def test_estimate_without_config(refuse, tmp_path):
    line = refuse("estimate", "--tokens", 9, "--model", tmp_path)
    assert line.startswith(f"{tmp_path}: expected a config.json, got none")
