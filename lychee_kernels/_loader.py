# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries and decides, once per process, which backend each op uses."""

import functools
import os
from pathlib import Path

import torch

BUILD_COMMAND = "pip install --no-build-isolation -e ."
LIBRARY = Path(__file__).with_name("_C_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")

# What each op has beside its reference; an op without C++ runs its reference in mode auto.
IMPLEMENTATIONS = {
    "compress_pack": ("cpp", "ref"),
    "compress_pack_": ("cpp", "ref"),
    "write_memory_": ("cpp", "ref"),
    "memory_attention": ("cpp", "ref"),
    "gated_mlp_": ("cpp", "ref"),
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
    for library in (LIBRARY, CUDA_LIBRARY):
        try:
            # the CUDA library is built where nvcc is found, and loads into any torch
            if library.exists():
                torch.ops.load_library(str(library))
        except OSError as error:
            raise ImportError(
                f"lychee_kernels: compiled library: expected one that loads into torch "
                f"{torch.__version__}, got: {error}; rebuild it with: {BUILD_COMMAND}"
            ) from error
    _refuse_cuda_tensors()


# Kernels that only say what is missing; their ops are in _WITHOUT_CUDA.
_REFUSALS = torch.library.Library("lychee", "IMPL", "CUDA")
_WITHOUT_CUDA: set[str] = set()


def _refuse_cuda_tensors() -> None:
    """Gives every op that has no CUDA kernel one that raises."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace != "lychee" or torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            continue
        _WITHOUT_CUDA.add(op)
        _REFUSALS.impl(op, functools.partial(_refuse, op))


def _refuse(op, *args, **kwargs):
    if not CUDA_LIBRARY.exists():
        raise RuntimeError(
            f"{op}: device: expected CPU tensors in a build without CUDA kernels, got CUDA "
            f"tensors; build them with: LYCHEE_CUDA=1 {BUILD_COMMAND}"
        )
    raise RuntimeError(
        f"{op}: device: expected CPU tensors as there is no CUDA kernel, got CUDA tensors"
    )


def has_cuda_kernel(op: str) -> bool:
    """Whether this build has a CUDA kernel for an op of torch.ops.lychee."""
    return op not in _WITHOUT_CUDA


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
