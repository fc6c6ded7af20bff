# SPDX-License-Identifier: Apache-2.0
"""What a bank of so many tokens will take, from a model's config.json alone.

Bytes of pages are exact for texts cut into full chunks. Peaks are added up from the parts that
`PARTS` names; a test holds the sum against a measured one. On a GPU they are those of its memory,
without the texts.
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
from lychee.decoder import BLOCK_ROWS, Decoder
from lychee.errors import InputError, MemoryConfigError
from lychee.gate_file import read_gate_config
from lychee.memory_model import SHIPPED_MODEL, pick_device, pick_dtype
from lychee.reading import MAX_TOKENS
from lychee.reasoner import MAX_ROWS
from lychee.weights import CONFIG, read_config

RATIOS = (2, 4, 8, 16)
# Of a text: its characters in byte-level BPE on English, a token's id twice and where it stands.
TEXT_BYTES = 6 + 2 * 4 + 2 * 4
# Measured: what encoding one piece of a text takes besides.
ENCODING_BYTES = 10 << 20

PARTS = {
    "bank": "all pages, of chunks of full length; chunks that end with a sentence take some more, "
    "and on disk the texts are added",
    "build": "peak of 'lychee build': weights, all texts as one document and its tokens, one batch "
    "of chunks, and two segments on their way to the disk",
    "ask": "peak of 'lychee ask' on texts: weights, texts and tokens, the bank, and one batch of "
    "chunks or of one question's reading turns, with question and notes of full length",
    "from disk": "peak of 'lychee ask' on a bank on disk: weights, one such batch of reading turns "
    "and the pages of its chunks",
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
    model = SHIPPED_MODEL if folder is None else folder
    raw = read_config(model)
    read_gate_config(raw, model / CONFIG)
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
        tokens * TEXT_BYTES,
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
    text = TEXT_BYTES * tokens + ENCODING_BYTES if host else 0
    segments = 2 * min(bank, SEGMENT_BYTES)
    turn_pages = min(bank, MAX_ROWS * page * pages_of(memory.text, memory))
    return Row(
        memory.ratio,
        bank_dtype,
        -(-tokens // memory.ratio),
        pages,
        bank,
        weight_bytes + text + work + segments,
        weight_bytes + text + bank + max(work, reading),
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
    """Numbers alive at once where one question, and notes, of full length are read with.

    Many chunks' turns are checked in one pass, as long as `MAX_ROWS` and `MAX_TOKENS` allow:
    activations of the widest part of a layer, or a block's scores over the vocabulary.
    """
    width = memory.question + 2 * memory.size
    rows = max(1, min(MAX_ROWS, MAX_TOKENS // width))
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    attention = 3 * (query + 2 * key) + query
    mlp = config.hidden_size + 2 * config.intermediate_size
    activations = rows * width * (config.hidden_size + max(attention, mlp))
    return max(activations, min(rows * memory.size, BLOCK_ROWS) * config.vocab_size)
