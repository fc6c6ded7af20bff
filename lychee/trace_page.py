# SPDX-License-Identifier: Apache-2.0
"""A trace as one self-contained web page: chunk map, notes as they changed, sources and costs.

All text is escaped, and a content policy allows the page's own style and script and nothing else,
so that no document can add to it. What grows with the text is bounded: thousands of chunks share
MOST_CELLS cells, and of long lists the middle is left out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from lychee.quantities import as_size
from lychee.trace_map import ChunkMap, make_map
from lychee.trace_notes import diff_words

ASSETS = Path(__file__).parent / "assets"
MOST_CHANGES = 200
MOST_SOURCES = 100
# Characters of a quote that are shown; and around the answer where a quote is longer.
QUOTE, AROUND = 6_000, 2_000
EXCERPT = 160

LABELS = {
    "text_tokens": "Tokens of text",
    "memory_tokens": "Memory tokens",
    "memory_bytes": "Memory bank",
    "bytes_read": "Brought from disk",
    "peak_bytes": "Peak memory",
    "chunks": "Chunks",
    "chunks_gated": "Chunks gated",
    "chunks_read": "Chunks read",
    "reads": "Readings",
    "prompt_tokens": "Prompt tokens",
    "new_tokens": "New tokens",
    "build_seconds": "Building the memory",
    "open_seconds": "Opening the bank",
    "gate_seconds": "Gating",
    "read_seconds": "Reading",
    "answer_seconds": "Answering",
    "threshold": "Gate threshold",
}


def make_page(trace: dict[str, Any]) -> str:
    """The page of a trace as `read_trace` returns it."""
    answers, about = trace["answers"], describe(trace["made_with"])
    style, script = (read_asset(f"trace.{suffix}") for suffix in ("css", "js"))
    body = [f'<p class="about">{escape(about)}</p>']
    if len(answers) > 1:
        entries = (
            f'<li><a href="#answer-{index}">{escape(answer["question"])}</a></li>'
            for index, answer in enumerate(answers)
        )
        body.append(f"<nav><ol>{''.join(entries)}</ol></nav>")
    body += (make_article(index, answer, trace) for index, answer in enumerate(answers))
    parts = {
        "title": escape(answers[0]["question"] if answers else "Trace"),
        "policy": f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'",
        "style": style,
        "script": script,
        "body": "\n".join(body),
    }
    # In one pass: what a document says between braces stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read_asset("trace.html"))


def read_asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """What a content policy calls an inline style or script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def describe(made_with: dict[str, Any]) -> str:
    """One line on how the trace was made."""
    parts = ["LycheeMemory trace"]
    if made_with.get("trained") is False:
        parts.append("never trained to remember")
    listed = {n: v for n, v in made_with.items() if n != "trained" and not is_time(n)}
    parts += (f"{name.replace('_', ' ')} {as_text(name, v)}" for name, v in listed.items())
    return " · ".join(parts)


def is_time(name: str) -> bool:
    return name.endswith("_seconds")


def make_article(index: int, answer: dict[str, Any], trace: dict[str, Any]) -> str:
    """Everything on one question."""
    chunk_map = make_map(answer)
    notes = next((s["memory"] for s in reversed(answer["trace"]) if s["memory"] is not None), "")
    times = {name: value for name, value in trace["made_with"].items() if is_time(name)}
    parts = [
        f'<article id="answer-{index}">',
        f'<h1 class="text">{escape(answer["question"])}</h1>',
        f'<p class="answer text">{text_or(answer["text"], "no answer")}</p>',
        *section("What was read", make_figure(chunk_map)),
        *section("How the notes changed", make_changes(answer, chunk_map)),
        *section("Notes the answer was written from", f'<p class="text">{text_or(notes)}</p>'),
        *section("Sources", make_sources(answer, chunk_map)),
        *section("Costs", make_costs(answer["usage"] | times)),
        "</article>",
    ]
    return "\n".join(parts)


def section(title: str, content: str) -> tuple[str, str]:
    return f"<h2>{title}</h2>", content


def text_or(text: str, otherwise: str = "nothing yet") -> str:
    """Escaped text, or in its absence a word that is visibly not text."""
    return escape(text) if text.strip() else f'<span class="empty">{otherwise}</span>'


def make_figure(chunk_map: ChunkMap) -> str:
    """The chunk map with its legend, and the data its script needs."""
    data = json.dumps(chunk_map.data(), separators=(",", ":")).replace("<", "\\u003c")
    return f"""<figure>
<div class="map">{chunk_map.drawing()}</div>
<div class="muted legend">{chunk_map.legend()}</div>
<p class="detail" aria-live="polite">{escape(chunk_map.summary())}</p>
<script type="application/json">{data}</script>
</figure>"""


def make_changes(answer: dict[str, Any], chunk_map: ChunkMap) -> str:
    """Every step that changed the notes, in order, with the change marked."""
    changes = []
    before = ""
    readings = [step for step in answer["trace"] if step["read"]]
    for order, step in enumerate(readings, 1):
        if step["changed"]:
            changes.append((order, len(readings), step, before))
            before = step["memory"] or ""
    if not changes:
        return '<p class="muted">No chunk changed the notes.</p>'
    items = [make_change(*change, chunk_map) for change in keep_ends(changes, MOST_CHANGES)]
    return with_gap("steps", items, len(changes), "changes")


def make_change(
    order: int, total: int, step: dict[str, Any], before: str, chunk_map: ChunkMap
) -> str:
    where = make_where(step, step["chunk"], f"reading {order:,} of {total:,}")
    notes = diff_words(before, step["memory"] or "") or '<span class="empty">emptied</span>'
    cell = chunk_map.cell_of(step["chunk"])
    return f'<li data-cell="{cell}" tabindex="0">{where}<p class="notes text">{notes}</p></li>'


def make_where(span: dict[str, Any], chunk: int | None, order: str = "") -> str:
    """The line that says where in the text something stands."""
    parts = [f"<b>Chunk {chunk + 1:,}</b>"] if chunk is not None else []
    parts.append(f"<span>{escape(span['document'])}</span>")
    parts.append(f"<span>characters {span['start']:,} to {span['stop']:,}</span>")
    if span["score"] is not None:
        parts.append(f'<span class="tag">gate {span["score"]:.3f}</span>')
    if order:
        parts.append(f"<span>{order}</span>")
    return f'<div class="where">{"".join(parts)}</div>'


def make_sources(answer: dict[str, Any], chunk_map: ChunkMap) -> str:
    """Passages with their text, the answer marked in them."""
    sources = answer["sources"]
    if not sources:
        return '<p class="muted">None.</p>'
    chunks = {(s["document"], s["start"], s["stop"]): s["chunk"] for s in answer["trace"]}
    items = []
    for source in keep_ends(sources, MOST_SOURCES):
        chunk = source["chunk"]
        if chunk is None:
            chunk = chunks.get((source["document"], source["start"], source["stop"]))
        note = "" if source["changed"] else "read, changed nothing"
        quote = source["quote"]
        place = quote.find(answer["text"]) if answer["text"] else -1
        start = max(0, place - AROUND) if len(quote) > QUOTE else 0
        shown = quote[start : start + QUOTE]
        first = max(0, place - start - EXCERPT // 2) if place >= 0 else 0
        opening = " ".join(shown[first : first + EXCERPT].split()[1 if first else 0 : -1])
        cut = [" ..." if start else "", " ..." if start + QUOTE < len(quote) else ""]
        data = "" if chunk is None else f' data-cell="{chunk_map.cell_of(chunk)}" tabindex="0"'
        items.append(
            f"<li{data}>{make_where(source, chunk, note)}<details><summary>"
            f"{mark(opening, answer['text'])} ...</summary>"
            f'<p class="quote text">{cut[0]}{mark(shown, answer["text"])}{cut[1]}</p>'
            f"</details></li>"
        )
    return with_gap("sources", items, len(sources), "sources")


def mark(text: str, answer: str) -> str:
    """Escaped text with each occurrence of the answer marked."""
    if not answer.strip():
        return escape(text)
    return f"<mark>{escape(answer)}</mark>".join(escape(part) for part in text.split(answer))


def keep_ends(items: list, most: int) -> list:
    """At most `most` items: the first and the last ones."""
    return items if len(items) <= most else items[: most // 2] + items[-(most // 2) :]


def with_gap(kind: str, items: list[str], total: int, unit: str) -> str:
    """A list, with a line in its middle that says how many were left out there."""
    if total > len(items):
        middle = len(items) // 2
        gap = f'<li class="gap muted">{total - len(items):,} more {unit} are in the trace file</li>'
        items = [*items[:middle], gap, *items[middle:]]
    return f'<ol class="{kind}">{"".join(items)}</ol>'


def make_costs(usage: dict[str, Any]) -> str:
    """Every number of the usage; those that are known have a name of their own, and come first."""
    names = [name for name in LABELS if name in usage]
    names += (name for name in usage if name not in LABELS)
    rows = (
        f"<div><dt>{escape(LABELS.get(name, name.replace('_', ' ')))}</dt>"
        f"<dd>{escape(as_text(name, usage[name]))}</dd></div>"
        for name in names
        if usage[name] is not None
    )
    return f"<dl>{''.join(rows)}</dl>"


def as_text(name: str, value: Any) -> str:
    """A value as people read it, with its unit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    if name.endswith("bytes") or name == "bytes_read":
        return as_size(value)
    if name.endswith("seconds"):
        return f"{value:,.2f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
