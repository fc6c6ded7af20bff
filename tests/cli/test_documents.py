# SPDX-License-Identifier: Apache-2.0
"""Documents by path, folder, pattern, JSON lines and standard input, and what is refused."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from lychee.documents import Document, read_documents
from lychee.errors import InputError


def names_of(*paths):
    return [document.name for document in read_documents([Path(path) for path in paths])]


@pytest.fixture
def folder(tmp_path):
    """Texts at several depths, beside files that are not."""
    files = ("b.txt", "a.md", "deep/er/c.TXT", ".hidden.txt", ".git/d.txt", "picture.png", "e.py")
    for name in files:
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    lines = [{"id": "one", "text": "first"}, {"id": "two", "text": "second", "year": 1850}]
    (tmp_path / "docs/f.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path / "docs"


def test_folder_holds_its_texts_at_any_depth(folder):
    assert names_of(folder) == [
        str(folder / "a.md"),
        str(folder / "b.txt"),
        str(folder / "deep/er/c.TXT"),
        "one",
        "two",
    ]


def test_pattern_finds_files_of_any_kind(folder):
    assert names_of(folder / "*.p*") == [str(folder / "e.py"), str(folder / "picture.png")]
    assert names_of(folder / "**/*.TXT") == [str(folder / "deep/er/c.TXT")]


def test_file_named_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("none")
    assert read_documents([tmp_path / "a[1].txt"])[0].text == "brackets"


def test_json_lines_give_names_and_texts(folder):
    documents = read_documents([folder / "f.jsonl"])
    assert documents == [Document("one", "first"), Document("two", "second")]


def test_json_lines_may_hold_what_other_line_ends_are(tmp_path):
    """Only a line feed ends a line: JSON may hold U+2028 as it is."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a", "text": "b\u2028c"}\r\n', encoding="utf-8")
    assert read_documents([path]) == [Document("a", "b\u2028c")]


def test_standard_input_is_a_document(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffCafé".encode())))
    assert read_documents([Path("-")]) == [Document("-", "Café")]


def test_closed_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("-") == "-: expected standard input, got none"


@pytest.mark.parametrize("text", ["book.txt", "my/Notes.MD", "LICENSE"])
def test_the_name_of_a_file_is_no_text(text, tmp_path, monkeypatch):
    (tmp_path / "LICENSE").write_text("Free.")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{text}: expected a text, got the name .*Path"):
        read_documents(text)
    assert read_documents(f"See {text}")[0].text == f"See {text}"


def test_text_and_documents_pass_as_they_are():
    assert read_documents("some text") == [Document("text", "some text")]
    documents = [Document("a", "one"), Document("b", "two")]
    assert read_documents(documents) == documents


LINES = {
    "not JSON": ("{", "expected a JSON object, got: Expecting property name"),
    "a list": ("[1]", "expected a JSON object, got a list"),
    "no id": ('{"text": "a"}', "id: expected text, got no such field"),
    "no text": ('{"id": "a"}', "text: expected text, got no such field"),
    "number": ('{"id": 7, "text": "a"}', "id: expected text, got int"),
    "null": ('{"id": "a", "text": null}', "text: expected text, got NoneType"),
    "blank": ('{"id": "a", "text": " "}', "text: expected text, got ' '"),
    "half a character": (
        '{"id": "a", "text": "\\ud800"}',
        "text: expected text, got '\\ud800'",
    ),
    "deep": ("[" * 100_000, "expected a JSON object, got: "),
}


@pytest.mark.parametrize("name", LINES)
def test_bad_line_is_named(tmp_path, name):
    line, message = LINES[name]
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "fine", "text": "fine"}\n\n' + line)
    with pytest.raises(InputError) as caught:
        read_documents([path])
    assert str(caught.value).startswith(f"{path}: line 3: {message}")


def refused(*paths):
    with pytest.raises(InputError) as caught:
        read_documents([Path(path) for path in paths])
    return str(caught.value)


def test_nothing_to_read(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "picture.png").write_bytes(b"\0")
    assert refused(empty) == f"{empty}: expected files of .txt, .md, .jsonl, got none"
    assert refused(empty / "*.txt") == f"{empty}/*.txt: expected files that match, got none"
    lines = tmp_path / "none.jsonl"
    lines.write_text("\n\n")
    assert refused(lines) == f"{lines}: expected text, got an empty document"
    with pytest.raises(InputError, match="documents: expected at least one, got none"):
        read_documents([])


def test_two_documents_of_one_name(folder):
    assert refused(folder, folder / "b.txt").endswith(f"got {folder / 'b.txt'} twice")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text already")
def test_file_name_that_is_no_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    Path(os.fsdecode(path)).write_text("text")
    assert "expected" in refused(tmp_path)


def test_bad_file_in_a_folder_is_named(folder):
    (folder / "deep/latin.txt").write_bytes(b"Caf\xe9")
    message = f"{folder / 'deep/latin.txt'}: expected UTF-8 text, got byte 0xe9 at 3"
    assert refused(folder) == message
