# SPDX-License-Identifier: Apache-2.0
"""Traces as `lychee ask --trace` would write them, of any length, with known reads and changes."""

from lychee.trace_file import FORMAT, VERSION

CHUNK = 4000
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<style>body{display:none}</style>{{style}} \u202ereversed\u202c & <b>\"quoted\" 'too'"
    "<!-- --><a href='javascript:alert(1)'>link</a>"
)


def make_answer(chunks, *, changes=(), reads=(), gated=True, text="1412", word="word"):
    """One answer: chunk i scores i / chunks; `reads` and `changes` (or all) are read."""
    steps, sources, notes = [], [], []
    for chunk in range(chunks):
        changed = chunk in changes
        read = changed or chunk in reads or not gated
        span = {"document": f"{word}-{chunk * 3 // chunks}.txt", "start": chunk * CHUNK}
        span["stop"] = span["start"] + CHUNK
        score = chunk / chunks if gated else None
        step = span | {"chunk": chunk, "score": score, "read": read, "changed": changed}
        if changed:
            notes.append(f"{word} {chunk}")
            step["memory"] = "; ".join(notes[-10:])
        steps.append(step)
        if changed or (gated and read):
            quote = f"{word} {chunk} stands here, and {text} does. " * 20
            sources.append(span | {"quote": quote, "score": score, "changed": changed})
    usage = {
        "text_tokens": chunks * 1024,
        "memory_tokens": chunks * 256,
        "memory_bytes": chunks * 393_216,
        "chunks": chunks,
        "chunks_read": sum(step["read"] for step in steps),
        "read_seconds": 3.14159,
        "answer_seconds": 0.5,
        "surprises": 7,
    }
    question = f"What {word}?"
    return {
        "question": question,
        "text": text,
        "sources": sources,
        "trace": steps,
        "usage": usage,
    }


def make_trace(*answers):
    made_with = {"model": "shipped", "trained": True, "ratio": 4, "build_seconds": 12.5}
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_with": made_with,
        "answers": list(answers),
    }
