# SPDX-License-Identifier: Apache-2.0
"""The shapes that the ops are timed at: those of Qwen2.5-7B, and a small model's for training."""

from dataclasses import dataclass, fields

import torch

# Tokens of a bank's page, as in lychee.bank.
PAGE = 64
RATIO = 4


@dataclass(frozen=True)
class Shape:
    """What the shapes of all ops have; a cold case rotates through more data than caches hold."""

    cold: bool = False

    def __str__(self):
        names = (field.name for field in fields(self) if field.name != "cold")
        parts = (f"{getattr(self, name)} {name.replace('_', ' ')}" for name in names)
        return f"{', '.join(parts)}, {'cold' if self.cold else 'warm'}"


@dataclass(frozen=True)
class Heads(Shape):
    """Shape of the attention heads."""

    query_heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128

    def __str__(self):
        heads = (
            f"{self.query_heads} query heads, {self.kv_heads} kv heads, {self.head_dim} head dim, "
        )
        return (
            super()
            .__str__()
            .replace(heads, f"{self.query_heads}/{self.kv_heads}x{self.head_dim}, ")
        )


@dataclass(frozen=True)
class Window(Heads):
    """compress_pack: rows of one compressor window, memory rows included, and windows at once."""

    rows: int = 2560
    batch: int = 1

    @property
    def memory(self) -> int:
        return self.rows // (RATIO + 1)


@dataclass(frozen=True)
class FeedForward(Shape):
    """gated_mlp_: rows of a window, in the model of test_compression.py."""

    rows: int = 2560
    hidden: int = 512
    intermediate: int = 1408


@dataclass(frozen=True)
class Projection(Shape):
    """linear_: rows of a window's raw tokens, in the same model; or of a decoding step."""

    rows: int = 2048
    hidden: int = 512
    outputs: int = 512


@dataclass(frozen=True)
class Selection(Shape):
    """select_chunks: chunks of 1024 memory tokens, of which at most `budget` are selected."""

    chunks: int = 427
    budget: int = 64


@dataclass(frozen=True)
class Gather(Heads):
    """gather_chunks: memory tokens of the selected pages, in so many layers."""

    tokens: int = 1024
    layers: int = 28


@dataclass(frozen=True)
class Attention(Heads):
    """memory_attention: queries over pages and a causal segment as long as the queries.

    Decoding is one query over pages alone.
    """

    queries: int = 1
    memory: int = 1024
    batch: int = 1

    @property
    def segment(self) -> int:
        return self.queries if self.queries > 1 else 0

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head that are seen."""
        return self.batch * (self.queries * self.memory + self.segment * (self.segment + 1) // 2)


@dataclass(frozen=True)
class Case:
    """A shape in one dtype, over a bank in another (None: the op has no bank)."""

    shape: Shape
    dtype: torch.dtype
    bank_dtype: torch.dtype | None = None

    def __str__(self):
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.bank_dtype)]
        return f"{self.shape}, {names[0]}, bank {names[1]}"


def cases(shapes, *dtypes) -> tuple[Case, ...]:
    return tuple(Case(shape, *pair) for shape in shapes for pair in dtypes)


FLOAT, HALF, BYTE = torch.float32, torch.bfloat16, torch.int8

COMPRESS_PACK = cases([Window(), Window(batch=8, cold=True)], (FLOAT, BYTE), (HALF, BYTE))
GATED_MLP = cases([FeedForward()], (FLOAT, None))
LINEAR = cases([Projection(), Projection(outputs=128)], (FLOAT, None)) + cases(
    [Projection(rows=1, hidden=3584, outputs=18944, cold=True), Projection(rows=1, cold=True)],
    (HALF, None),
)
SELECT_CHUNKS = cases([Selection(), Selection(chunks=4096)], (FLOAT, None))
GATHER_CHUNKS = cases([Gather(), Gather(tokens=8192, cold=True)], (HALF, BYTE))
DECODE = cases(
    [Attention(), Attention(memory=16384, cold=True), Attention(memory=262144, cold=True)],
    (FLOAT, FLOAT),
    (HALF, HALF),
    (HALF, BYTE),
)
PREFILL = cases([Attention(queries=512), Attention(queries=1536)], (FLOAT, FLOAT), (HALF, BYTE))
TRAINING = cases(
    [
        Attention(queries=512, memory=256, batch=4, query_heads=8, kv_heads=2, head_dim=64),
        Attention(queries=512, memory=1024),
    ],
    (FLOAT, FLOAT),
    (HALF, HALF),
)
