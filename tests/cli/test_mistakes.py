# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong: one line on standard error, exit code 2, nothing else."""

import json
import os
import re
import shutil
import subprocess

import pytest
from tokenizers import Tokenizer

QUESTION = ("-q", "What is it?")


def the_line(status, out, errors):
    assert (status, out) == (2, ""), errors
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("lychee: error: ")
    return lines[0].removeprefix("lychee: error: ")


def write(path, data):
    path.write_bytes(data)
    return path


FILES = {
    "missing": (None, "expected texts or a bank, got nothing of that name"),
    "empty": (b"", "expected text, got an empty document"),
    "blank": (b" \n\t\n", "expected text, got an empty document"),
    "null-bytes": (b"abc\0def", "expected a text file, got binary data"),
    "latin-1": ("Caf\u00e9 noir".encode("latin-1"), "expected UTF-8 text, got byte 0xe9 at 3"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_text_file(refuse, tmp_path, model_folder, name):
    data, message = FILES[name]
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    line = refuse("ask", path, *QUESTION, "--model", model_folder, "--json")
    assert line == f"{path}: {message}"


def test_mistakes_of_the_real_command(run, tmp_path, text_file, model_folder):
    """The same end in a process of its own, with --json too; the other tests stay in this one."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    truncated(folder)
    ask = ("ask", text_file, *QUESTION, "--json", "--model")
    cases = [
        ((*ask, model_folder, "--ratio", 5), "ratio: expected a divisor of the window of 64 tok"),
        ((*ask, folder), f"{folder}/model.safetensors: expected a whole safetensors file, got"),
        (("ask", tmp_path / "none", *QUESTION, "--model", model_folder), f"{tmp_path}/none: exp"),
        (("ask", text_file, "-q", ""), "question: expected text, got nothing"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert the_line(result.returncode, result.stdout, result.stderr).startswith(message)


def test_folder_without_texts(refuse, tmp_path, model_folder):
    line = refuse("ask", tmp_path, *QUESTION, "--model", model_folder)
    assert line == f"{tmp_path}: expected files of .txt, .md, .jsonl, got none"


def test_second_file_missing(refuse, tmp_path, text_file, model_folder):
    line = refuse("ask", text_file, tmp_path / "none", *QUESTION, "--model", model_folder)
    assert line == f"{tmp_path / 'none'}: expected a text file, got: No such file or directory"


def test_empty_standard_input(refuse, model_folder):
    line = refuse("ask", "-", *QUESTION, "--model", model_folder, input=b"")
    assert line == "-: expected text, got an empty document"


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(refuse, text_file, model_folder, question):
    line = refuse("ask", text_file, "-q", question, "--model", model_folder)
    assert line == "question: expected text, got nothing"


def test_question_that_is_no_text(refuse, text_file, model_folder):
    line = refuse("ask", text_file, "-q", b"\xff?".decode(errors="surrogateescape"))
    assert line == r"question: expected UTF-8 text, got '\udcff?'"


def test_question_too_long(refuse, text_file, model_folder):
    line = refuse("ask", text_file, "-q", "Which? " * 100, "--model", model_folder)
    assert re.fullmatch(r"question: expected at most 128 tokens, got \d+", line)


def test_unknown_model_folder(refuse, tmp_path, text_file):
    line = refuse("ask", text_file, *QUESTION, "--model", tmp_path / "none")
    assert line.startswith(f"{tmp_path / 'none'}: expected a model folder, got no such folder; ")


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def configured(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def added_tokens(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    tokenizer.save(str(folder / "tokenizer.json"))


FOLDERS = {
    "truncated": (truncated, "model.safetensors: expected a whole safetensors file, got"),
    "other hidden size": (
        configured(hidden_size=64),
        "model.embed_tokens.weight: expected shape [800, 64] by config.json, got [800, 32]",
    ),
    "other layers": (
        configured(num_hidden_layers=5),
        "num_hidden_layers: expected 2 as in the weights, got 5",
    ),
    "broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: expected a JSON object, got: ",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "expected a tokenizer.json, got none",
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json: expected a tokenizer, got: ",
    ),
    "larger tokenizer": (
        added_tokens,
        "tokenizer.json: expected at most 800 tokens, got 803",
    ),
    "other family": (
        configured(model_type="gemma3"),
        "model_type: expected one of qwen2, qwen3, llama, got 'gemma3'",
    ),
    "sliding window": (
        configured(use_sliding_window=True),
        "use_sliding_window: expected false, got true",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_bad_model_folder(refuse, tmp_path, text_file, model_folder, name):
    change, message = FOLDERS[name]
    folder = shutil.copytree(model_folder, tmp_path / "model")
    change(folder)
    assert message in refuse("ask", text_file, *QUESTION, "--model", folder)


@pytest.mark.parametrize("ratio", [5, 0, 128])
def test_ratio_that_does_not_divide_the_window(refuse, text_file, model_folder, ratio):
    line = refuse("ask", text_file, *QUESTION, "--model", model_folder, "--ratio", ratio)
    expected = f"ratio: expected a divisor of the window of 64 tokens, got {ratio}; "
    assert line.startswith(expected)


OPTIONS = {
    "no question": (("ask", "x.txt"), "Missing option '--question'"),
    "no file": (("ask", "-q", "Why?"), "Missing argument 'DOCS'; see 'lychee ask --help'"),
    "no command": ((), "Missing command; see 'lychee --help'"),
    "unknown command": (("tell",), "No such command 'tell'"),
    "unknown option": (("ask", "x.txt", *QUESTION, "--fast"), "No such option: --fast"),
    "ratio of text": (
        ("ask", "x.txt", *QUESTION, "--ratio", "four"),
        "Invalid value for '--ratio': ",
    ),
    "a seed too small": (
        ("ask", "x.txt", *QUESTION, "--seed", "-1"),
        "or equal to 0, got '-1'; see",
    ),
    "no path": (("ask", "", *QUESTION), "argument 2: expected a value, got nothing"),
    "no folder": (
        ("ask", "x.txt", *QUESTION, "--model="),
        "--model: expected a value, got nothing",
    ),
    "input twice": (
        ("ask", "-", "-", *QUESTION),
        "-: expected standard input once, got it 2 times",
    ),
    "too many tokens": (
        ("ask", __file__, *QUESTION, "--max-new-tokens", "6000"),
        "max-new-tokens: expected at most 3901, which leave room for prompt, question and notes in",
    ),
    "no new tokens": (
        ("ask", "x.txt", *QUESTION, "--max-new-tokens", "0"),
        "Invalid value for '--max-new-tokens': ",
    ),
    "no facts": (("demo", "--facts", "0"), "Invalid value for '--facts': "),
    "cold": (("ask", "x.txt", *QUESTION, "--temperature", "-1"), "temperature: expected"),
    "no number": (("ask", "x.txt", *QUESTION, "--temperature", "nan"), "temperature: expected"),
    "no share": (("ask", "x.txt", *QUESTION, "--top-p", "0"), "top_p: expected a share above 0"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(refuse, name):
    arguments, message = OPTIONS[name]
    assert message in refuse(*arguments)


def test_demo_text_without_enough_words(refuse, tmp_path, model_folder):
    path = write(tmp_path / "short.txt", b"Once upon a time there was a king. " * 20)
    line = refuse("demo", "--text", path, "--model", model_folder)
    assert re.match(rf"{path}: expected English prose with at least 16 .*, got \d; ", line)


def test_demo_of_too_few_tokens(refuse, book_file, model_folder):
    line = refuse("demo", "--text", book_file, "--model", model_folder, "--tokens", 50)
    assert re.fullmatch(r"tokens: expected at least \d+ for 5 facts, got 50", line)


def test_training_recipe_missing(refuse, tmp_path):
    paths = (tmp_path / "none.toml", "--books", tmp_path, "--out", tmp_path / "run")
    line = refuse("train", "pretrain", *paths)
    assert line.startswith(f"{tmp_path / 'none.toml'}: expected a training recipe, got: ")
    assert not (tmp_path / "run").exists()


RECIPE = b"""[[stage]]
steps = 1
chunk = 64
batch = 1
questions = 1
facts = [0, 1]
learning_rate = [0, 0]
"""


def test_training_into_a_file(refuse, tmp_path):
    recipe = write(tmp_path / "run.toml", RECIPE)
    line = refuse("train", "sft", recipe, "--out", recipe)
    assert line == f"{recipe}: expected a folder, got a file"


@pytest.mark.parametrize(("name", "got"), [("none", "no such folder"), ("book.txt", "a file")])
def test_training_on_no_folder_of_books(refuse, tmp_path, name, got):
    recipe = write(tmp_path / "run.toml", RECIPE)
    write(tmp_path / "book.txt", b"Words.")
    line = refuse("train", "sft", recipe, "--books", tmp_path / name, "--out", tmp_path / "run")
    assert line == f"{tmp_path / name}: expected a folder of texts, got {got}"


def test_training_on_text_that_is_not_utf_8(refuse, tmp_path):
    recipe = write(tmp_path / "run.toml", RECIPE)
    book = write(tmp_path / "book.txt", "Caf\u00e9 noir".encode("latin-1"))
    line = refuse("train", "sft", recipe, "--books", tmp_path, "--out", tmp_path / "run")
    assert line == f"{book}: expected UTF-8 text, got byte 0xe9 at 3"


def test_closed_output(run, tmp_path):
    """Whoever starts the command may have closed its standard output."""
    close = {"stdout": None, "preexec_fn": lambda: os.close(1), "capture_output": False}
    done = run("info", tmp_path, stderr=subprocess.PIPE, **close)
    assert done.returncode == 2
    assert the_line(2, "", done.stderr).startswith(f"{tmp_path}: expected a memory bank")


def test_help_keeps_its_words(invoke):
    """No word of the help is taken for markup."""
    words = " ".join(invoke("train", "sft", "--help").out.replace("│", " ").split())
    assert "Folder of texts, and of the recipe's data files." in words
