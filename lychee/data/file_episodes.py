# SPDX-License-Identifier: Apache-2.0
"""Episodes for reinforcement learning from files of questions with their texts.

A text that is longer than an episode is cut to the chunks that hold its supporting sentences and
some others; one that is shorter goes on with other records' texts, as published test sets do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lychee.data.episodes import EpisodeBatch, Question
from lychee.data.task import TaskSample, split_of, tokens_of
from lychee.errors import InputError
from lychee.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EncodedSample:
    """A record as token ids; `support` are the tokens of its supporting sentences in `text`."""

    text: list[int]
    question: list[int]
    answer: str
    support: list[tuple[int, int]]
    split: str


def encode_samples(
    samples: Sequence[TaskSample], tokenizer: TextTokenizer, longest: int
) -> list[EncodedSample]:
    """Records as token ids; InputError names one whose question exceeds `longest` tokens."""
    encoded = []
    for sample in samples:
        text, offsets = tokenizer.encode_with_offsets(sample.context)
        touched = (tokens_of(span, offsets) for span in sample.support)
        support = [tokens for tokens in touched if tokens is not None]
        question = tokenizer.encode(sample.question.strip())
        if len(question) > longest:
            raise InputError(
                f"{sample.details.get('place', sample.task)}: question: expected at most "
                f"{longest} tokens, got {len(question)}"
            )
        answer, split = sample.answers[0], split_of(sample.question)
        encoded.append(EncodedSample(list(text), question, answer, support, split))
    return encoded


class FileEpisodes:
    """Draws batches in the form of `EpisodeSampler`, one question per text."""

    def __init__(
        self,
        samples: Sequence[EncodedSample],
        chunks: int,
        chunk: int,
        split: str,
        draw: random.Random,
        margin: Sequence[int] = (),
    ):
        """Episodes of `chunks` chunks of `chunk` tokens, `margin` the last ones of each; texts are
        those of one split.

        Raises:
            InputError: no record of the split fits: where a text is longer than the episode, its
                supporting sentences must be known and touch no more chunks than there are.
        """
        self.chunks, self.random, self.margin = chunks, draw, list(margin)
        self.chunk = chunk - len(self.margin)  # tokens of text
        own = [sample for sample in samples if sample.split == split]
        self.samples = [sample for sample in own if self.fits(sample)]
        if not self.samples:
            raise InputError(
                f"data: expected {split} records whose supporting sentences fit {chunks} chunks "
                f"of {chunk} tokens, got none among {len(own)}"
            )

    def fits(self, sample: EncodedSample) -> bool:
        whole = len(sample.text) <= self.chunks * self.chunk
        return whole or 0 < len(self.needed(sample)) <= self.chunks

    def needed(self, sample: EncodedSample) -> set[int]:
        """Chunks of a text that its supporting sentences touch."""
        spans = ((a // self.chunk, (b - 1) // self.chunk) for a, b in sample.support)
        return {place for first, last in spans for place in range(first, last + 1)}

    def draw(self, texts: int) -> EpisodeBatch:
        """`texts` texts with a question each."""
        batch, questions = [], []
        for index in range(texts):
            sample = self.random.choice(self.samples)
            batch.append(self.pieces(sample))
            questions.append(Question(index, sample.question, sample.answer))
        return EpisodeBatch(torch.tensor(batch), questions)

    def pieces(self, sample: EncodedSample) -> list[list[int]]:
        """The chunks of one episode in the order of the text."""
        text, needed = sample.text, self.needed(sample)
        while len(text) < self.chunks * self.chunk:
            text = text + self.random.choice(self.samples).text
        # A last chunk that is not full holds support, or is left away.
        count = max([len(text) // self.chunk, *(place + 1 for place in needed)])
        others = [place for place in range(count) if place not in needed]
        room = self.chunks - len(needed)
        kept = sorted([*needed, *self.random.sample(others, room)])
        return [self.piece(text, place) for place in kept]

    def piece(self, text: list[int], place: int) -> list[int]:
        """A chunk; one at the text's end starts earlier, so that it is full."""
        start = min(place * self.chunk, len(text) - self.chunk)
        return text[start : start + self.chunk] + self.margin
