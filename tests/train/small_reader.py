# SPDX-License-Identifier: Apache-2.0
"""A tiny model with a tokenizer that knows twenty words, and episodes it can read."""

import random
from functools import cache

import torch

from lychee.config import MemoryConfig, ModelConfig
from lychee.data.episodes import EpisodeSampler, EpisodeShape
from lychee.data.needles import word_list
from lychee.data.recall import RecallSampler
from lychee.memory_model import LycheeMemory
from lychee.tokenizer import TextTokenizer
from lychee.train.initialise import new_decoder

WORDS = (
    "anchor basket candle desert engine forest garden hammer island jungle kettle lantern meadow "
    "needle orange pepper quarry ribbon saddle timber"
).split()
STATEMENT = "The secret word of {} is {}. What is the hiding place of {}? My home town was {}."
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
MEMORY = MemoryConfig(
    window=32,
    chunk=64,
    ratio=4,
    param=("q", "k", "v"),
    size=5,
    answer=3,
    question=40,
    templates={
        "update": "<|memory|>{memory}<|question|>{question}<|update|>",
        "answer": "<|memory|>{memory}<|question|>{question}<|answer|>",
        "no_memory": " none",
    },
)


@cache
def book() -> str:
    draw = random.Random(0)
    sentences = [STATEMENT.format(*draw.sample(WORDS, 4)) for _ in range(1500)]
    return " none ".join(sentences)


@cache
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train([book()], CONFIG["vocab_size"], number_repeats=0)


def small_reader(seed: int = 1) -> LycheeMemory:
    """A random model whose next tokens are far from certain and far from uniform."""
    decoder = new_decoder(ModelConfig.from_dict(CONFIG), MEMORY.param, seed)
    with torch.no_grad():
        decoder.model.embed_tokens.weight.mul_(3)
    return LycheeMemory(decoder, tokenizer(), CONFIG | MEMORY.to_dict(), MEMORY)


def episode_sampler(model: LycheeMemory, seed: int = 0, **shape) -> EpisodeSampler:
    settings = {"chunks": 3, "facts": (2, 3), "questions": 2, "single": True, "numbers": 0.0}
    encoded = model.tokenizer.encode(book())
    words = word_list([book()], model.tokenizer.encode)
    prompts = model.reasoner.prompts
    sampler = RecallSampler(model.tokenizer, prompts, [encoded], words, seed)
    return EpisodeSampler(sampler, EpisodeShape(**settings | shape), MEMORY.chunk, "train")
