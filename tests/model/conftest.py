# SPDX-License-Identifier: Apache-2.0
"""A tiny random model, complete with tokenizer, that every model test can afford; a bank of it."""

import random

import pytest
import torch
from bank_contents import build_bank, documents_of, many_commits

from lychee.config import MemoryConfig, ModelConfig
from lychee.memory_model import LycheeMemory
from lychee.tokenizer import TextTokenizer
from lychee.train.initialise import new_decoder

WORDS = (
    "the sea ran high and every sailor kept below until grey morning came again while "
    "three gulls cried over their broken mast under heavy cloud"
).split()


def make_prose(words: int, seed: int = 0) -> str:
    """Sentences of random words."""
    draw = random.Random(seed)
    parts = []
    while len(parts) < words:
        sentence = [draw.choice(WORDS) for _ in range(draw.randint(4, 9))]
        parts += [*sentence[:-1], sentence[-1] + "."]
    return " ".join(parts)


@pytest.fixture(scope="session")
def prose():
    return make_prose


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    return {
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


@pytest.fixture(scope="session")
def tiny_memory() -> MemoryConfig:
    return MemoryConfig(
        window=16,
        chunk=32,
        ratio=4,
        param=("q", "k", "v"),
        size=6,
        answer=5,
        question=120,
        cut="sentence",
        templates={
            "update": "<|memory|>{memory}<|question|>{question}<|update|>",
            "answer": "<|memory|>{memory}<|question|>{question}<|answer|>",
            "no_memory": " none",
        },
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config, tiny_memory) -> LycheeMemory:
    tokenizer = TextTokenizer.train([make_prose(4000)], tiny_config["vocab_size"], number_repeats=0)
    decoder = new_decoder(ModelConfig.from_dict(tiny_config), tiny_memory.param, seed=1).eval()
    # Larger output scores than at initialisation, so that argmax differs from chunk to chunk.
    with torch.no_grad():
        decoder.model.embed_tokens.weight.mul_(3)
    raw = tiny_config | tiny_memory.to_dict()
    return LycheeMemory(decoder, tokenizer, raw, tiny_memory)


@pytest.fixture(scope="module")
def sound_bank(tiny_model, prose, tmp_path_factory):
    """An int8 bank of three documents in several segments; copy it before changing it."""
    path = tmp_path_factory.mktemp("sound") / "bank"
    with many_commits():
        build_bank(tiny_model, path, documents_of(prose, 0, 1, 2), bank_dtype="int8")
    return path
