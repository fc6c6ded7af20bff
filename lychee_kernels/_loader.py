# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries and decides, once per process, which backend each op uses."""

import functools
import os
from pathlib import Path

import torch

from . import triton

BUILD_COMMAND = "pip install --no-build-isolation -e ."
LIBRARY = Path(__file__).with_name("_C_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")

# What each op has beside its reference; an op without C++ runs its reference in mode auto.
IMPLEMENTATIONS = {
    "compress_pack": ("cpp", "triton", "ref"),
    "compress_pack_": ("cpp", "triton", "ref"),
    "write_memory_": ("cpp", "triton", "ref"),
    "memory_attention": ("cpp", "triton", "ref"),
    "gated_mlp_": ("cpp", "ref"),
    "linear_": ("cpp", "ref"),
    "select_chunks": ("cpp", "triton", "ref"),
    "gather_chunks": ("cpp", "triton", "ref"),
    "gather_chunks_": ("cpp", "triton", "ref"),
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


# Kernels that only say what is missing; their ops are in _WITHOUT_CUDA.
_REFUSALS = torch.library.Library("lychee", "IMPL", "CUDA")
_WITHOUT_CUDA: set[str] = set()


def refuse_cuda_tensors() -> None:
    """Gives every op that has no CUDA kernel one that raises; called once all ops are imported, as
    some bring a CUDA kernel in Python."""
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
    if name not in ("auto", "cpp", "triton", "ref"):
        raise ImportError(
            f"lychee_kernels: LYCHEE_BACKEND: expected auto, cpp, triton or ref, got {name}"
        )
    if name == "triton" and not triton.is_installed():
        raise ImportError(
            "lychee_kernels: triton: expected the package, which LYCHEE_BACKEND=triton asks for, "
            "got none; install it with: pip install triton"
        )
    return name


_REQUESTED = _requested_backend()


def register_triton() -> None:
    """Registers the Triton kernels where LYCHEE_BACKEND asks for them, and in mode auto for CUDA
    tensors where there are no compiled kernels."""
    if _REQUESTED == "triton":
        triton.register("CUDA")
        triton.register("CPU")
    elif _REQUESTED == "auto" and triton.is_installed():
        triton.register("CUDA", _WITHOUT_CUDA)


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


def backends(device: str = "cpu") -> dict[str, str]:
    """Which backend each op uses in this process.

    Args:
        device: "cpu" or "cuda".

    Returns:
        dict from op to "cpp", "triton", "ref", or "none" where the op has no such backend (calling
        it then raises).
    """
    return {op: _backend_on(device, op) for op in IMPLEMENTATIONS}


def _backend_on(device, op):
    available = IMPLEMENTATIONS[op]
    if _REQUESTED != "auto":
        return _REQUESTED if _REQUESTED in available else "none"
    if device == "cpu" or has_cuda_kernel(op):
        return available[0]
    return "triton" if "triton" in available and triton.is_installed() else "none"


def cpu_isa() -> str:
    """The instruction set of the CPU kernels: "generic", "avx2", "avx512" or "amx".

    Chosen from what the processor supports; the environment variable LYCHEE_CPU_ISA forces one and
    raises RuntimeError if the processor lacks it."""
    return torch.ops.lychee.cpu_isa()
