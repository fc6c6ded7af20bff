# SPDX-License-Identifier: Apache-2.0
"""Kernels of LycheeMemory: compression into a paged bank, and attention over it."""

__version__ = "0.1.0"

from ._loader import (
    backends,
    cpu_isa,
    load_library,
    refuse_cuda_tensors,
    register_triton,
)

load_library()

from .ops.compress_pack import compress_pack, compress_pack_, write_memory_  # noqa: E402
from .ops.gated_mlp import gated_mlp_  # noqa: E402
from .ops.gather_chunks import gather_chunks, gather_chunks_  # noqa: E402
from .ops.linear import linear_  # noqa: E402
from .ops.memory_attention import memory_attention  # noqa: E402
from .ops.select_chunks import ChunkSelection, select_chunks  # noqa: E402
from .rope import rope_tables  # noqa: E402

refuse_cuda_tensors()
register_triton()

__all__ = [
    "ChunkSelection",
    "backends",
    "compress_pack",
    "compress_pack_",
    "cpu_isa",
    "gated_mlp_",
    "gather_chunks",
    "gather_chunks_",
    "linear_",
    "memory_attention",
    "rope_tables",
    "select_chunks",
    "write_memory_",
]
