# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled library and decides, once per process, which backend each op uses."""

import os
from pathlib import Path

import torch

BUILD_COMMAND = "pip install --no-build-isolation -e ."
LIBRARY = Path(__file__).with_name("_C_cpu.so")

# What each op has beside its reference; an op without C++ runs its reference in mode auto.
IMPLEMENTATIONS = {
    "compress_pack": ("cpp", "ref"),
    "compress_pack_": ("cpp", "ref"),
    "write_memory_": ("cpp", "ref"),
    "memory_attention": ("cpp", "ref"),
    "gated_mlp_": ("cpp", "ref"),
    "linear_": ("cpp", "ref"),
    "select_chunks": ("cpp", "ref"),
    "gather_chunks": ("cpp", "ref"),
    "gather_chunks_": ("cpp", "ref"),
}


def load_library() -> None:
    """Makes torch.ops.lychee available; one error names the build command."""
    if not LIBRARY.exists():
        raise ImportError(
            f"lychee_kernels: compiled library: expected {LIBRARY}, got no such file; "
            f"build it with: {BUILD_COMMAND}"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"lychee_kernels: compiled library: expected one that loads into torch "
            f"{torch.__version__}, got: {error}; rebuild it with: {BUILD_COMMAND}"
        ) from error


def _requested_backend() -> str:
    name = os.environ.get("LYCHEE_BACKEND") or "auto"
    if name not in ("auto", "cpp", "ref"):
        hint = " (there are no Triton kernels in this version)" if name == "triton" else ""
        raise ImportError(
            f"lychee_kernels: LYCHEE_BACKEND: expected auto, cpp or ref, got {name}{hint}"
        )
    return name


_REQUESTED = _requested_backend()


def backend(op: str) -> str:
    """The backend of one op; raises where LYCHEE_BACKEND asks for one that does not exist."""
    available = IMPLEMENTATIONS[op]
    if _REQUESTED == "auto":
        return available[0]
    if _REQUESTED not in available:
        raise RuntimeError(
            f"{op}: LYCHEE_BACKEND: expected auto or {' or '.join(available)}, got {_REQUESTED}"
        )
    return _REQUESTED


def backends() -> dict[str, str]:
    """Which backend each op uses in this process: "cpp", "ref", or "none" where LYCHEE_BACKEND
    names one that the op does not have (calling the op then raises)."""
    return {
        op: _REQUESTED
        if _REQUESTED in available
        else available[0]
        if _REQUESTED == "auto"
        else "none"
        for op, available in IMPLEMENTATIONS.items()
    }


def cpu_isa() -> str:
    """The instruction set of the CPU kernels: "generic", "avx2" or "avx512".

    Chosen from what the processor supports; the environment variable LYCHEE_CPU_ISA forces one and
    raises RuntimeError if the processor lacks it."""
    return torch.ops.lychee.cpu_isa()
