# SPDX-License-Identifier: Apache-2.0
"""Full context: the whole text stands in the prompt, and every new token attends to all of it.

The text comes first and the question behind it, so the text's keys and values are computed once,
in pages that all questions on it share; a second question does not read the text again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lychee.bank import PAGE_TOKENS
from lychee.decoder import KVCache
from lychee.errors import InputError
from lychee.generate import GREEDY, Sampling, generate, prefill_step
from lychee.memory_model import LycheeMemory
from lychee.prompts import PromptTemplate
from lychee.trace import Answer, Usage

# Questions that are answered together over one text.
MAX_ROWS = 32

FULL_TEXT = (
    "Read the text and answer the question about it, in as few words as possible.\n"
    "<text>{text}</text>\n<question>{question}</question>\nAnswer:"
)


class TextCache(KVCache):
    """Rotated keys and values of one text in pages [pages, L, Hkv, 2, P, D].

    While it is filled, new tokens see the earlier ones as pages, and themselves as the segment.
    """

    def __init__(self, decoder, tokens: int):
        config = decoder.config
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (-(-tokens // PAGE_TOKENS), layers, heads, 2, PAGE_TOKENS, config.head_dim)
        # zeros, so that the last page's unused tail stays finite
        self.kv = torch.zeros(shape, device=decoder.device, dtype=decoder.dtype)
        self.tokens, self.length = tokens, 0

    @property
    def capacity(self) -> int:
        return self.tokens

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [1, Hkv, T, D] from a page's first token on; return them alone."""
        count = k.shape[2]
        if self.length % PAGE_TOKENS or self.length + count > self.tokens:
            raise ValueError(
                f"cache: expected whole pages, {self.tokens} tokens in all, "
                f"got {count} tokens behind {self.length}"
            )
        for kind, rows in enumerate((k, v)):
            first, whole = self.length // PAGE_TOKENS, count // PAGE_TOKENS
            pages = self.kv[first:, layer, :, kind]
            full, rest = rows[0].split([whole * PAGE_TOKENS, count % PAGE_TOKENS], dim=1)
            pages[:whole] = full.unflatten(1, (whole, PAGE_TOKENS)).transpose(0, 1)
            if rest.shape[1]:
                pages[whole, :, : rest.shape[1]] = rest
        return k, v

    def readers(self, rows: int) -> TextPages:
        """What `rows` prompts behind the text read."""
        return TextPages(self, rows)


class TextPages:
    """The pages filled so far, as the decoder's attention takes them for a batch of rows."""

    def __init__(self, cache: TextCache, rows: int):
        options = {"dtype": torch.int32, "device": cache.kv.device}
        count = -(-cache.length // PAGE_TOKENS)
        place = torch.arange(max(1, count), **options)
        table = place.expand(rows, -1).contiguous()
        base = table * PAGE_TOKENS
        self.arguments = {
            "kv": cache.kv,
            "page_table": table,
            "page_len": (cache.length - base).clamp_(0, PAGE_TOKENS),
            "page_base": base,
            "num_pages": torch.full((rows,), count, **options),
        }

    def attention_arguments(self, layer: int) -> dict:
        return self.arguments | {"layer": layer}


class FullContext:
    """Questions answered with the whole text in the prompt, over a LycheeMemory's decoder.

    Attributes:
        build_seconds: what `answer` took to read its last text.
        at_hand: whether it had been read before; every call of `answer` reads it.
    """

    build_seconds, at_hand = 0.0, False

    def __init__(self, model: LycheeMemory, *, sampling: Sampling = GREEDY):
        """
        Args:
            model: whose decoder, tokenizer and limit of answers are used; its checkpoint may carry
                a template "full_text" of its own, with {text} before {question}.
        """
        self.model, self.sampling = model, sampling
        encode, templates = model.tokenizer.encode, model.memory.templates
        text = templates.get("full_text")
        if text is None:
            text = FULL_TEXT if templates else model.tokenizer.chat(FULL_TEXT)
        prompt = PromptTemplate.from_text(text, encode, ("text", "question"))
        (_, self.before_text), question = prompt.sections
        self.after_text = PromptTemplate([question], prompt.tail)

    def check_length(self, tokens: int) -> None:
        """InputError if a text of so many tokens is longer than the model's positions allow."""
        memory = self.model.memory
        positions = self.model.decoder.config.max_position_embeddings
        room = positions - len(self.before_text) - len(self.after_text)
        room -= memory.question + memory.answer
        if tokens > room:
            raise InputError(
                f"text: expected at most {room} tokens, which leave room for prompt, question and "
                f"answer in the model's {positions} positions, got {tokens}"
            )

    @torch.inference_mode()
    def read(self, text: Sequence[int]) -> TextCache:
        """Keys and values of a text's ids and of what the prompt has before it.

        Raises:
            InputError: text, question and answer would be longer than the model's positions.
        """
        decoder = self.model.decoder
        self.check_length(len(text))
        ids = torch.tensor([*self.before_text, *text], device=decoder.device)[None]
        cache = TextCache(decoder, ids.shape[1])
        step = prefill_step(decoder.device, 1)
        for piece in ids.split(step, dim=1):
            places = torch.arange(cache.length, cache.length + piece.shape[1])
            decoder(
                piece,
                positions=places[None].to(decoder.device),
                max_position=ids.shape[1],
                cache=cache,
                pages=cache.readers(1) if cache.length else None,
                select=(),
            )
        return cache

    def answer_from(self, cache: TextCache, questions: Sequence[Sequence[int]]) -> list[list[int]]:
        """Answer ids per question."""
        answers = []
        for first in range(0, len(questions), MAX_ROWS):
            rows = questions[first : first + MAX_ROWS]
            answers += generate(
                self.model.decoder,
                [self.after_text.render(question) for question in rows],
                pages=cache.readers(len(rows)),
                first_position=cache.length,
                max_new_tokens=self.model.memory.answer,
                stop=self.model.reasoner.prompts.stop,
                sampling=self.sampling,
            )
        return answers

    def answer(self, context: str, questions: Sequence[str]) -> list[Answer]:
        """Answer questions on one text.

        Raises:
            InputError: an empty text, one longer than the model's positions, or a bad question.
        """
        tokenizer = self.model.tokenizer
        text = tokenizer.encode(context)
        if not text:
            raise InputError("context: expected text, got nothing to read")
        ids = [self.model.encode_question(question) for question in questions]
        started = time.perf_counter()
        cache = self.read(text)
        if cache.kv.is_cuda:
            torch.cuda.synchronize()  # or its last kernels would count as asking
        read = time.perf_counter()
        answers = self.answer_from(cache, ids)
        self.build_seconds = read - started
        usage = Usage(
            len(text), cache.length, cache.kv.nbytes, 1, 1, self.build_seconds,
            time.perf_counter() - read,
        )  # fmt: skip
        return [
            Answer(question, tokenizer.decode(answer).strip(), [], [], usage)
            for question, answer in zip(questions, answers, strict=True)
        ]
