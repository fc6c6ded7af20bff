# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, over the `tokenizers` library and a folder's tokenizer.json."""

from __future__ import annotations

import itertools
import json
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lychee.errors import CheckpointError

END = "<|end|>"
# Books hold few numbers; this many of each group make a token of it for certain.
NUMBER_REPEATS = 2000
# Characters encoded at once: the library's own records of a token take hundreds of bytes.
PIECE = 1 << 16
# Characters that neighbouring pieces share, and how many equal tokens in a row show that both were
# encoded as in the whole text: tokenizers decide word by word, from left to right.
OVERLAP, AGREEING = 1 << 11, 32
SPECIAL_TOKENS = (END, "<|pad|>", "<|question|>", "<|memory|>", "<|update|>", "<|answer|>")


class Spans(Sequence[tuple[int, int]]):
    """Characters (start, stop) that each token came from, in eight bytes a token."""

    def __init__(self, spans: Sequence[tuple[int, int]] = (), first: int = 0):
        """`first`: the character that `spans` count from."""
        self.starts = array("i", (start + first for start, _ in spans))
        self.stops = array("i", (stop + first for _, stop in spans))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.starts[index], self.stops[index]

    def replace(self, kept: int, new: Spans, skipped: int) -> None:
        """Put those of `new` but for `skipped` behind the first `kept` of these."""
        self.starts[kept:] = new.starts[skipped:]
        self.stops[kept:] = new.stops[skipped:]


def find_joint(
    ids: array[int], spans: Spans, new_ids: array[int], new: Spans
) -> tuple[int, int] | None:
    """How many tokens to keep of a piece, and to skip of the next one that overlaps it.

    Both agree about AGREEING tokens around that place; None where they nowhere do.
    """
    if not spans:
        return None
    for skipped in range(len(new_ids) - AGREEING + 1):
        start = new.starts[skipped]
        if start > spans.starts[-1]:
            break
        kept = bisect_left(spans.starts, start)
        here, there = slice(kept, kept + AGREEING), slice(skipped, skipped + AGREEING)
        if ids[here] == new_ids[there] and spans.starts[here] == new.starts[there]:
            return kept + AGREEING // 2, skipped + AGREEING // 2
    return None


class TextTokenizer:
    """Tokenizer of a model folder; never adds special tokens of its own."""

    def __init__(self, backend: Tokenizer, folder: Path | None = None):
        self.backend = backend
        self.folder = folder

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: expected a tokenizer.json, got none")
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError(f"{path}: expected a tokenizer, got: {error}") from error
        # A folder may carry the limits of what it was last used for.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, folder)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, number_repeats: int = NUMBER_REPEATS
    ) -> TextTokenizer:
        """Byte-level BPE with numbers in groups of three digits, each group one token.

        Few tokens per number, each almost unique in a text, make numbers as easy to find and to
        copy as words. The first group takes the space before it along, as words do.
        """
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r" ?\d{1,3}"), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        numbers = [f"{number:03d}" for number in range(1000)]
        numbers = "".join(f" {number}{number}" for number in [*numbers, *range(100)])
        counted = itertools.repeat(numbers, number_repeats)
        backend.train_from_iterator(itertools.chain(texts, counted), trainer)
        return cls(backend)

    def save(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            path.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: expected to write it, got: {error.strerror}") from error

    def encode(self, text: str) -> list[int]:
        if len(text) > PIECE:
            return self.encode_with_offsets(text)[0].tolist()
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded = self.backend.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_with_offsets(self, text: str) -> tuple[array[int], Spans]:
        """Ids and the characters each came from: those of the whole text, piece by piece."""
        ids, spans = array("i"), Spans()
        for first in range(0, max(1, len(text) - OVERLAP), PIECE - OVERLAP):
            encoding = self.backend.encode(text[first : first + PIECE], add_special_tokens=False)
            new_ids, new = array("i", encoding.ids), Spans(encoding.offsets, first)
            joint = find_joint(ids, spans, new_ids, new) if first else (0, 0)
            if joint is None:
                whole = self.backend.encode(text, add_special_tokens=False)
                return array("i", whole.ids), Spans(whole.offsets)
            kept, skipped = joint
            ids[kept:] = new_ids[skipped:]
            spans.replace(kept, new, skipped)
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    @cached_property
    def sentence_ends(self) -> frozenset[int]:
        """Tokens after which a text may be cut: a full stop and the like, or a blank line."""
        ends = set()
        for token_id in range(self.backend.get_vocab_size()):
            text = self.backend.decode([token_id])
            if text.rstrip(" \"')”’_").endswith((".", "!", "?")) or text.count("\n") > 1:
                ends.add(token_id)
        return frozenset(ends)

    @cached_property
    def has_chat_template(self) -> bool:
        if self.folder is None:
            return False
        path = self.folder / "tokenizer_config.json"
        if (self.folder / "chat_template.jinja").is_file():
            return True
        return path.is_file() and bool(json.loads(path.read_text()).get("chat_template"))

    def chat(self, prompt: str) -> str:
        """`prompt` as the only user message of a chat, if the folder has a chat template."""
        if not self.has_chat_template:
            return prompt
        # Imported here: transformers takes seconds to load and small models do not need it.
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
