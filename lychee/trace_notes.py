# SPDX-License-Identifier: Apache-2.0
"""Two versions of the notes as one HTML text, with what came and what went marked."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from html import escape

# Words of unchanged text that are shown beside a change, and words up to which notes are compared:
# comparing takes time that grows with their product.
MARGIN, MOST_WORDS = 20, 3000


def diff_words(before: str, after: str) -> str:
    """`after`, escaped; added words in <ins>, removed ones in <del>, long equal parts shortened."""
    a, b = (re.findall(r"\s*(?:\w+|[^\w\s])", text) for text in (before, after))
    if max(len(a), len(b)) > MOST_WORDS:
        return shorten([escape(word) for word in b], 4 * MARGIN)
    parts = []
    for kind, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(shorten([escape(word) for word in b[b0:b1]], MARGIN))
            continue
        for tag, words in (("del", "".join(a[a0:a1])), ("ins", "".join(b[b0:b1]))):
            if words.strip():
                space = words[: len(words) - len(words.lstrip())]
                parts.append(f"{escape(space)}<{tag}>{escape(words.strip())}</{tag}>")
    return "".join(parts).strip()


def shorten(words: list[str], margin: int) -> str:
    """Words joined, all but `margin` at either end left out where there are more."""
    if len(words) <= 2 * margin + 2:
        return "".join(words)
    return "".join(words[:margin]) + " ... " + "".join(words[-margin:])
