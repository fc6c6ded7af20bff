# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch, same signatures: the specification, and the backend "ref"."""

from .compress_pack import compress_pack, compress_pack_, write_memory_
from .gated_mlp import gated_mlp_
from .gather_chunks import gather_chunks, gather_chunks_
from .linear import linear_
from .memory_attention import memory_attention
from .select_chunks import ChunkSelection, select_chunks

__all__ = [
    "ChunkSelection",
    "compress_pack",
    "compress_pack_",
    "gated_mlp_",
    "gather_chunks",
    "gather_chunks_",
    "linear_",
    "memory_attention",
    "select_chunks",
    "write_memory_",
]
