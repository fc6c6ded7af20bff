# SPDX-License-Identifier: Apache-2.0
"""The page of a trace in a real browser: readable at any width, in both schemes, and harmless."""

import pytest
from headless import Browser, find_browser
from made_traces import HOSTILE, make_answer, make_trace

from lychee.trace_file import check
from lychee.trace_page import make_page

pytestmark = pytest.mark.skipif(find_browser() is None, reason="needs chromium")

# Smallest contrast of text to its background that WCAG's level AA allows.
CONTRAST = 4.5
CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = color.map((part) => {
      const value = part / 255;
      return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = rgb(getComputedStyle(element).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = {};
  for (const element of document.querySelectorAll("main *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.closest("svg") || element.localName === "script") continue;
    const [a, b] = [rgb(getComputedStyle(element).color), behind(element)].map(light);
    const name = `${element.localName}.${element.className}`;
    found[name] = Math.min(found[name] ?? 99, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(find_browser(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def write_page(tmp_path):
    """Write the page of some answers; its path."""

    def write(*answers):
        for answer in answers:
            for step in answer["trace"]:
                check("step", step, {}, {"memory": ("text", None)})
            for source in answer["sources"]:
                source.setdefault("chunk", None)
        path = tmp_path / "page.html"
        path.write_text(make_page(make_trace(*answers)), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
def test_page_is_readable(browser, write_page, tmp_path, width, scheme):
    page = write_page(make_answer(300, changes=(20, 200), reads=(31,), word="longword" * 12))
    browser.open(page, width=width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    # What is marked as an answer is in the details, which are closed.
    browser.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 12
    assert {name: c for name, c in contrasts.items() if c < CONTRAST} == {}
    sizes = browser.evaluate(
        "[...document.querySelectorAll('main *:not(svg *)')]"
        ".map((e) => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 13
    browser.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = false))")
    shot = tmp_path / "page.png"
    browser.screenshot(shot)
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 20_000


def test_map_shows_scores_reads_and_changes(browser, write_page):
    browser.open(write_page(make_answer(100, changes=(95,), reads=(40,))))
    look = """(cell) => {
      const map = document.querySelector("svg.chunks"), box = map.getBoundingClientRect();
      const columns = map.viewBox.baseVal.width / 10, side = box.width / columns;
      const x = box.left + (cell % columns + 0.5) * side;
      const y = box.top + (Math.floor(cell / columns) + 0.5) * side;
      return [x, y, document.elementFromPoint(x, y).className.baseVal];
    }"""
    shades = {}
    for cell in (5, 25, 45, 65, 95):
        x, y, shades[cell] = browser.evaluate(f"({look})({cell})")
    assert shades == {5: "s0", 25: "s1", 45: "s2", 65: "s3", 95: "s4"}
    detail = "document.querySelector('.detail').textContent"
    assert browser.evaluate(detail).startswith("2 of 100 chunks read")
    browser.point_at(x, y)
    assert browser.evaluate(detail) == (
        "Chunk 96 of 100 · word-2.txt, characters 380,000 to 384,000 · gate 0.950 · "
        "reading 2 of 2 · changed the notes"
    )
    assert browser.evaluate("document.querySelector('.picked').getAttribute('visibility')") == (
        "visible"
    )
    x, y, _ = browser.evaluate(f"({look})(12)")
    browser.point_at(x, y)
    assert browser.evaluate(detail).endswith("gate 0.120 · not read")


def test_listed_chunk_is_shown_on_the_map(browser, write_page):
    browser.open(write_page(make_answer(100, changes=(33, 95))))
    browser.evaluate("document.querySelectorAll('.steps li')[1].focus()")
    assert browser.evaluate("document.querySelector('.detail').textContent").startswith("Chunk 96")


def test_hostile_text_does_nothing(browser, write_page):
    answers = [
        make_answer(30, changes=(3, 9), word=HOSTILE, text=HOSTILE),
        make_answer(30, gated=False, word=HOSTILE),
    ]
    browser.open(write_page(*answers))
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("getComputedStyle(document.body).display") == "block"
    browser.evaluate("document.querySelectorAll('.steps li')[1].focus()")
    assert HOSTILE.replace("\n", " ") in browser.evaluate("document.body.textContent")
    assert browser.evaluate("document.images.length") == 0
    requests = [request["request"]["url"] for request in browser.seen("Network.requestWillBeSent")]
    assert len(requests) == 1 and requests[0].startswith("file://")
    # A blocked script, style or request would be logged.
    assert browser.seen("Log.entryAdded") == []
    assert browser.seen("Runtime.exceptionThrown") == []


def test_thousands_of_chunks_stay_light(browser, write_page):
    answer = make_answer(20_000, changes=range(0, 20_000, 100), reads=range(0, 20_000, 7))
    browser.open(write_page(answer), width=360)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate("document.querySelectorAll('*').length") < 8_000
    assert browser.evaluate("document.querySelector('svg.chunks').children.length") < 20
    browser.evaluate("document.querySelector('.steps li:last-child').focus()")
    assert browser.evaluate("document.querySelector('.detail').textContent").startswith(
        "Chunks 19,901 to 19,905 of 20,000"
    )
