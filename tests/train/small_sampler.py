# SPDX-License-Identifier: Apache-2.0
"""A book of few words and its tokenizer: what samplers of training batches are made of."""

from lychee.prompts import ReadingPrompts
from lychee.tokenizer import END, TextTokenizer

WORDS = [f"{first}{second}ing" for first in "bdfglmprst" for second in ("ar", "el", "on", "uck")]
TEXT = "It was a long day. Nobody came! Who would have thought so? The end came late. " * 40
TEMPLATES = {
    "update": "<|memory|>{memory}<|question|>{question}<|update|>",
    "answer": "<|memory|>{memory}<|question|>{question}<|answer|>",
    "no_memory": " none",
}


def small_sampler(sampler_type, **options):
    """A sampler of this type with seed 0."""
    text = TEXT + " ".join(WORDS * 20)
    tokenizer = TextTokenizer.train([text], 600, number_repeats=0)
    prompts = ReadingPrompts.of_checkpoint(tokenizer, TEMPLATES, [tokenizer.id_of(END)])
    return sampler_type(tokenizer, prompts, [tokenizer.encode(text)], WORDS * 10, 0, **options)
