# SPDX-License-Identifier: Apache-2.0
"""The fixture `backend`: every op on the reference, the CPU and CUDA kernels, in the host emulator
and under Triton's interpreter."""

import contextlib
import importlib.metadata
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import lychee_kernels
from lychee_kernels import ref, triton
from lychee_kernels._loader import has_cuda_kernel

if not torch.cuda.is_available():
    # read by triton at its first import
    os.environ["TRITON_INTERPRET"] = "1"

# Schedules under which every emulated kernel is run.
NUM_SEEDS = 20


class Backend:
    """One way to run the ops: `backend.gather_chunks(...)` takes the public arguments, on the CPU,
    and returns CPU tensors; what an op writes in place is written into the caller's tensors."""

    device = "cpu"
    seeds = (0,)

    def __init__(self, name):
        self.name = name

    def __getattr__(self, op):
        return getattr(ref if self.name == "reference" else lychee_kernels, op)

    def use_seed(self, seed):
        """Chooses the emulator's schedule of the calls that follow; nothing elsewhere."""

    def leave_out(self, repeated):
        """Skips a test that repeats on Triton's interpreter, hundreds of times slower than any
        kernel, what another shows: one type of a case, or one case of a type, is as good."""

    def active(self):
        """A context in which torch.ops.lychee, and so a backward pass, uses this backend too."""
        return contextlib.nullcontext()


class Emulated(Backend):
    """The public functions, over the CUDA kernels in the emulator."""

    seeds = tuple(range(1, NUM_SEEDS + 1))

    def __init__(self):
        super().__init__("emulated")
        import emulated

        self.emulated = emulated
        self.use_seed(1)

    def __getattr__(self, op):
        if not self.emulated.has(op):
            pytest.skip(f"{op} has no CUDA kernel")

        def call(*args, **kwargs):
            with self.active():
                return getattr(lychee_kernels, op)(*args, **kwargs)

        return call

    def use_seed(self, seed):
        self.emulated.module().set_options(seed)

    def active(self):
        return self.emulated.Emulated()

    def take_statistics(self):
        """Counts of the emulator since the last call: bank_conflicts, mma, barriers, ..."""
        return self.emulated.module().take_statistics()


class Cuda(Backend):
    """The public functions on the GPU; storages move as a whole, so that strides stay."""

    device = "cuda"
    seeds = (1, 2, 3)  # of nothing: as many launches, in which blocks come in another order

    def __init__(self):
        super().__init__("cuda")

    def __getattr__(self, op):
        if not has_cuda_kernel(op):
            pytest.skip(f"{op} has no CUDA kernel in this build")

        def call(*args, **kwargs):
            with moved_to_gpu() as (move, back):
                args, kwargs = tree_map(move, (args, kwargs))
                return tree_map(back, getattr(lychee_kernels, op)(*args, **kwargs))

        return call


@contextlib.contextmanager
def moved_to_gpu():
    """Functions that move one value to the GPU and back; at the end, storages are copied back."""
    storages = {}

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.requires_grad:
            return value.cuda()  # in the graph
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = (storage, storage.cuda())
        moved = torch.empty(0, dtype=value.dtype, device="cuda")
        return moved.set_(
            storages[storage.data_ptr()][1], value.storage_offset(), value.shape, value.stride()
        )

    def back(value):
        return value.cpu() if isinstance(value, torch.Tensor) else value

    yield move, back
    for storage, moved in storages.values():
        storage.copy_(moved)


class InTriton(TorchDispatchMode):
    """Inside it, lychee's ops run their Triton kernels."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "lychee" or name not in triton.SCHEMAS:
            return func(*args, **(kwargs or {}))
        return triton.call(name, *args)


class Triton(Backend):
    """The public functions, over the Triton kernels: compiled where there is a GPU, else
    interpreted on the CPU."""

    def __init__(self):
        super().__init__("triton")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def __getattr__(self, op):
        if op not in triton.SCHEMAS:
            pytest.skip(f"{op} has no Triton kernel")

        def call(*args, **kwargs):
            if self.device == "cpu":
                with self.active():
                    return getattr(lychee_kernels, op)(*args, **kwargs)
            with self.active(), moved_to_gpu() as (move, back):
                args, kwargs = tree_map(move, (args, kwargs))
                return tree_map(back, getattr(lychee_kernels, op)(*args, **kwargs))

        return call

    def leave_out(self, repeated):
        if repeated and self.device == "cpu":
            pytest.skip("repeats under a slow interpreter what other tests show")

    def active(self):
        return InTriton()


def without_triton():
    """Why the Triton backend cannot run here, or None."""
    if not triton.is_installed():
        return "triton is not installed"
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    if version < (3, 7) and not torch.cuda.is_available():
        return "the interpreter of triton before 3.7 does not run with numpy 2.4"
    return None


def make_backend(name):
    if name == "emulated":
        import host_compiler

        if reason := host_compiler.reason_without():
            pytest.skip(reason)
        return Emulated()
    if name == "triton":
        if reason := without_triton():
            pytest.skip(reason)
        return Triton()
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return Cuda()
    return Backend(name)


@pytest.fixture(params=["reference", "cpu", "emulated", "triton", "cuda"])
def backend(request):
    return make_backend(request.param)
