# SPDX-License-Identifier: Apache-2.0
"""Trace files and the page made of them, without a browser: what is on it, and what is refused."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
from made_traces import HOSTILE, make_answer, make_trace

from lychee.errors import InputError
from lychee.trace_file import read_trace
from lychee.trace_map import MOST_CELLS, make_map
from lychee.trace_notes import diff_words
from lychee.trace_page import MOST_CHANGES, MOST_SOURCES, make_page


def write_trace(folder, *answers):
    path = folder / "t.json"
    path.write_text(json.dumps(make_trace(*answers)))
    return path


@pytest.fixture
def page_of(tmp_path):
    return lambda *answers: make_page(read_trace(write_trace(tmp_path, *answers)))


class Elements(HTMLParser):
    """Names of all elements, attributes by name, and the text outside of style and script."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.text, self.inside = [], [], "", None
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.attributes += attributes
        self.inside = name

    def handle_endtag(self, name):
        self.inside = None

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text += data


def test_page_says_what_was_read_and_what_came_of_it(page_of):
    text = Elements(page_of(make_answer(40, changes=(7, 30), reads=(20,)))).text
    assert "What word?" in text and "1412" in text
    assert "3 of 40 chunks read" in text
    assert "Chunk 8" in text and "gate 0.175" in text and "reading 1 of 3" in text
    assert "Chunk 31" in text and "reading 3 of 3" in text
    assert "word 7; word 30" in text
    assert "read, changed nothing" in text
    for cost in ("40,960", "15.0 MiB", "3.14 s", "surprises", "12.50 s"):
        assert cost in text


def test_page_without_gate_shows_reads_and_changes(page_of):
    page = page_of(make_answer(12, changes=(3,), gated=False))
    text = Elements(page).text
    assert "12 of 12 chunks read" in text
    assert "gate" not in text
    assert "Chunk 4" in text and "Chunk 5" not in text


def test_page_of_no_chunks(page_of):
    text = Elements(page_of(make_answer(0))).text
    assert "0 of 0 chunks read" in text and "No chunk changed the notes" in text


def test_page_of_several_questions_links_to_each(page_of):
    page = page_of(make_answer(5, word="tide"), make_answer(5, word="wind", text=""))
    assert 'href="#answer-1"' in page and 'id="answer-1"' in page
    text = Elements(page).text
    assert "What tide?" in text and "What wind?" in text and "no answer" in text


def test_hostile_text_stays_text(page_of):
    """Nothing of a document, question or answer becomes an element or an attribute."""
    hostile = make_answer(9, changes=(2, 5), word=HOSTILE, text="<i>" + HOSTILE)
    harmless = make_answer(9, changes=(2, 5), word="word", text="i")
    elements, expected = (Elements(page_of(answer)) for answer in (hostile, harmless))
    # Marked occurrences of the answer and of changed words are all that may differ in number.
    free = {"mark", "ins", "del"}
    assert [n for n in elements.names if n not in free] == [
        n for n in expected.names if n not in free
    ]
    assert {name for name, _ in elements.attributes} == {name for name, _ in expected.attributes}
    assert "<script>window.hacked" in elements.text
    assert "{{style}}" in elements.text


def test_page_names_no_address(page_of):
    page = page_of(make_answer(50, changes=(7,)))
    assert re.findall(r"https?:|\b(?:src|href)=\"[^#]|\burl\(|@import", page) == []
    assert "default-src 'none'" in page


@pytest.mark.parametrize("chunks", [5_000, 20_000])
def test_page_of_thousands_of_chunks_stays_light(page_of, chunks):
    changes = range(0, chunks, 10)
    page = page_of(make_answer(chunks, changes=changes, reads=range(0, chunks, 7)))
    elements = Elements(page)
    assert len(page) < 1_000_000
    assert len(elements.names) < 8_000
    left_out = len(changes) - MOST_CHANGES
    assert f"{left_out:,} more changes are in the trace file" in elements.text
    assert elements.text.count("reading ") == MOST_CHANGES
    assert page.count("<details>") == MOST_SOURCES


@pytest.mark.parametrize("chunks", [1, 2, 8, 63, 400, 401, MOST_CELLS, MOST_CELLS + 1, 20_000])
def test_map_has_a_place_for_every_chunk(chunks):
    answer = make_answer(chunks, changes=(chunks - 1,))
    for source in answer["trace"]:
        source.setdefault("memory", None)
    chunk_map = make_map(answer)
    assert chunk_map.count <= MOST_CELLS
    assert {chunk_map.cell_of(chunk) for chunk in range(chunks)} == set(range(chunk_map.count))
    shades = re.findall(r'class="(s\d)" d="([^"]+)"', chunk_map.drawing())
    assert sum(path.count("M") for _, path in shades) == chunk_map.count
    last = chunk_map.cells[chunk_map.count - 1]
    assert (last.changed, last.order) == (True, 1)
    assert last.score == pytest.approx((chunks - 1) / chunks)


def test_chunk_read_twice_keeps_its_first_place(tmp_path):
    answer = make_answer(4, changes=(1, 3))
    again = copy.deepcopy(answer["trace"][1]) | {"score": 0.9, "memory": "other"}
    answer["trace"].append(again)
    trace = read_trace(write_trace(tmp_path, answer))
    cell = make_map(trace["answers"][0]).cells[1]
    assert (cell.order, cell.score) == (1, 0.9)
    text = Elements(make_page(trace)).text
    assert text.count("Chunk 2") == 3 and "reading 3 of 3" in text


def test_diff_marks_words():
    assert diff_words("", "all of it") == "<ins>all of it</ins>"
    assert diff_words("a b; c", "a b, c") == "a b<del>;</del><ins>,</ins> c"
    assert diff_words("same text", "same text") == "same text"
    assert diff_words("gone", "") == "<del>gone</del>"
    assert diff_words("<b>", "<b> &") == "&lt;b&gt; <ins>&amp;</ins>"
    long = " ".join(f"w{i}" for i in range(200))
    short = diff_words(long, long + " end")
    assert short.endswith("w199 <ins>end</ins>") and " ... " in short and len(short) < 300
    words = " ".join(map(str, range(10_000)))
    assert len(diff_words(words, words[::-1])) < 2_000


def damaged(*path, value):
    """The sample trace with one value replaced."""
    trace = make_trace(make_answer(6, changes=(2,)))
    place = trace
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return trace


BROKEN = {
    "other JSON": ([], "expected a trace, got other JSON; make one with"),
    "other format": (damaged("format", value="x"), "expected a trace, got other JSON"),
    "other version": (damaged("version", value=2), "version: expected 1, got 2"),
    "answers": (damaged("answers", value={}), "answers: expected a list, got {}"),
    "answer": (damaged("answers", 0, value=3), "answers[0]: expected an object, got 3"),
    "question": (
        damaged("answers", 0, "question", value=None),
        "answers[0]: question: expected text, got None",
    ),
    "chunks": (
        damaged("answers", 0, "usage", "chunks", value=10**15),
        "answers[0]: usage: chunks: expected at most",
    ),
    "chunk": (
        damaged("answers", 0, "trace", 3, "chunk", value=6),
        "answers[0]: trace[3]: chunk: expected one of 6, got 6",
    ),
    "negative": (
        damaged("answers", 0, "trace", 3, "start", value=-1),
        "answers[0]: trace[3]: start: expected a whole number from 0 on, got -1",
    ),
    "score": (
        damaged("answers", 0, "trace", 3, "score", value=float("nan")),
        "answers[0]: trace[3]: score: expected a finite number, got nan",
    ),
    "flag": (
        damaged("answers", 0, "trace", 3, "changed", value=1),
        "answers[0]: trace[3]: changed: expected true or false, got 1",
    ),
    "source": (
        damaged("answers", 0, "sources", 0, value={"document": "a"}),
        "answers[0]: sources[0]: expected a field start, got none",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_trace(tmp_path, name):
    value, message = BROKEN[name]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_usage_may_hold_anything(page_of):
    answer = make_answer(3)
    answer["usage"] |= {"note": "<b>", "list": [1], "nothing": None, "yes": True, "huge": 10**30}
    text = Elements(page_of(answer)).text
    assert "<b>" in text and "[1]" in text and "yes" in text
