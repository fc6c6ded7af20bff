# SPDX-License-Identifier: Apache-2.0
"""What a bank of so many tokens will take, from a model's config.json alone.

Bytes of pages are exact for texts cut into full chunks. Peaks are upper bounds, added up from the
parts that `PARTS` names; a test holds them against measured ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lychee.bank import DTYPES, page_bytes, pages_of
from lychee.bank.build import SEGMENT_BYTES
from lychee.bank.pieces import BATCH_TOKENS
from lychee.config import MemoryConfig, ModelConfig
from lychee.decoder import Decoder
from lychee.errors import InputError, MemoryConfigError
from lychee.memory_model import SHIPPED_MODEL, pick_device, pick_dtype
from lychee.reasoner import MAX_ROWS
from lychee.weights import CONFIG, read_config

RATIOS = (2, 4, 8, 16)
# Measured with byte-level BPE on English: bytes per token while a text is cut into tokens, with
# the characters each came from, and what stays of it while the tokens are compressed.
CUTTING_BYTES, CUT_BYTES = 500, 48

PARTS = {
    "bank": "all pages, whose last may be part empty; the texts are stored beside them",
    "build": "peak of 'lychee build': weights, all texts as one document, one batch of chunks, and "
    "two segments on their way to the disk",
    "ask": "peak of 'lychee ask' on texts or on a bank in memory: weights, texts, pages, and one "
    "batch of chunks or of reading turns with notes of full length",
    "from disk": "peak of 'lychee ask' on a bank on disk: weights, one batch of reading turns and "
    "its pages",
}


@dataclass(frozen=True)
class Row:
    """One ratio and bank dtype; sizes in bytes."""

    ratio: int
    bank_dtype: str
    memory_tokens: int
    pages: int
    bank_bytes: int
    build_peak_bytes: int
    ask_peak_bytes: int
    disk_peak_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Of `tokens` tokens of text; weights of `dtype` on `device`."""

    model: str
    tokens: int
    parameters: int
    device: str
    dtype: str
    window: int
    chunk: int
    weight_bytes: int
    text_bytes: int
    rows: list[Row]


def estimate_bank(
    folder: Path | None,
    tokens: int,
    ratios: Sequence[int] | None = None,
    bank_dtypes: Sequence[str] | None = None,
    dtype: str = "auto",
) -> Estimate:
    """Sizes for each ratio and bank dtype.

    Args:
        folder: of a config.json; None is the shipped model.
        tokens: length of all texts together.
        ratios: default to those of RATIOS that divide the model's window.
        bank_dtypes: default to all.
        dtype: of the weights; "auto" is what `from_pretrained` would take on this machine.

    Raises:
        CheckpointError, UnsupportedModelError, MemoryConfigError, InputError.
    """
    if folder is not None and folder.name == CONFIG:
        folder = folder.parent
    raw = read_config(SHIPPED_MODEL if folder is None else folder)
    unknown = [name for name in bank_dtypes or () if name not in DTYPES]
    if unknown:
        raise InputError(f"bank-dtype: expected one of {', '.join(DTYPES)}, got {unknown[0]!r}")
    config, device = ModelConfig.from_dict(raw), pick_device("auto")
    weights = pick_dtype(dtype, raw, device)
    memory = MemoryConfig.from_dict(raw)
    parameters = count_parameters(config, memory)
    if not ratios:
        ratios = [ratio for ratio in RATIOS if memory.window % ratio == 0]
    rows = [
        estimate_row(
            config,
            MemoryConfig.from_dict(raw, ratio=ratio),
            name,
            tokens,
            weights.itemsize,
            parameters * weights.itemsize,
            host=device.type == "cpu",
        )
        for ratio in ratios
        for name in bank_dtypes or DTYPES
    ]
    return Estimate(
        "shipped" if folder is None else str(folder),
        tokens,
        parameters,
        device.type,
        str(weights).removeprefix("torch."),
        memory.window,
        memory.chunk,
        parameters * weights.itemsize,
        tokens * CUTTING_BYTES,
        rows,
    )


def count_parameters(config: ModelConfig, memory: MemoryConfig) -> int:
    """Parameters of a decoder with its memory projections, each shared one counted once."""
    with torch.device("meta"):
        decoder = Decoder(config, memory.param)
    return sum(parameter.numel() for parameter in decoder.parameters())


def estimate_row(
    config: ModelConfig,
    memory: MemoryConfig,
    bank_dtype: str,
    tokens: int,
    itemsize: int,
    weight_bytes: int,
    host: bool,
) -> Row:
    """One line; `host`: the model runs in the memory that texts are in, too."""
    if bank_dtype not in DTYPES:
        raise MemoryConfigError(f"bank dtype: expected one of {DTYPES}, got {bank_dtype!r}")
    page, pages = page_bytes(config, bank_dtype), pages_of(tokens, memory)
    bank = page * pages
    work = itemsize * compress_floats(config, memory)
    reading = itemsize * read_floats(config, memory)
    cutting, cut = (CUTTING_BYTES * tokens, CUT_BYTES * tokens) if host else (0, 0)
    segments = 2 * min(bank, SEGMENT_BYTES)
    turn_pages = min(bank, MAX_ROWS * page * pages_of(memory.chunk, memory))
    return Row(
        memory.ratio,
        bank_dtype,
        -(-tokens // memory.ratio),
        pages,
        bank,
        weight_bytes + max(cutting, cut + work + segments),
        weight_bytes + max(cutting, bank + max(cut + work, reading)),
        weight_bytes + reading + turn_pages,
    )


def compress_floats(config: ModelConfig, memory: MemoryConfig) -> int:
    """Numbers alive at once while a window of a batch of chunks goes through a layer.

    Activations, q, k and v before and behind `compress_pack`, the attention's output of this and
    of the last layer, and a block of the MLP.
    """
    chunks = max(1, BATCH_TOKENS // memory.chunk)
    rows = chunks * (memory.window + memory.window // memory.ratio)
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    return rows * (config.hidden_size + 2 * (query + 2 * key) + 2 * query)


def read_floats(config: ModelConfig, memory: MemoryConfig) -> int:
    """Numbers alive at once in a batch of reading turns with questions and notes of full length.

    Activations of the widest part of a layer, the turns' keys and values, and the scores of the
    notes' tokens over the vocabulary.
    """
    prompt = memory.question + memory.size
    rows = MAX_ROWS
    tokens = rows * prompt
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    attention = 3 * (query + 2 * key) + query
    mlp = config.hidden_size + 2 * config.intermediate_size
    cache = 2 * config.num_hidden_layers * key * (tokens + rows * memory.size)
    scores = rows * memory.size * config.vocab_size
    return max(tokens * (config.hidden_size + max(attention, mlp)) + cache, scores)
