# SPDX-License-Identifier: Apache-2.0
"""The CUDA ops in the host emulator: csrc/cuda/*.cu built by the C++ compiler, for CPU tensors."""

import functools

import host_compiler
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lychee_kernels  # noqa: F401  (defines the schemas)

NAMESPACE = "lychee_emulated"


def schemas():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lychee::")]
    return {
        name.removeprefix("lychee::"): str(torch._C._get_schema(name, ""))
        for name in names
        if name != "lychee::cpu_isa"
    }


@functools.cache
def module():
    """Builds and loads every CUDA op; returns the Python module that steers the emulator."""
    sources = sorted((host_compiler.ROOT / "csrc/cuda").glob("*.cu"))
    includes, libraries = host_compiler.python_flags()
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-fPIC", "-fvisibility=hidden"]
    library = host_compiler.link(
        "_emulated.so",
        [host_compiler.HERE / "binding.cpp", *sources],
        [*defines, *includes],
        ["-shared", *libraries, "-ltorch", "-ltorch_cpu", "-lc10"],
    )
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for schema in schemas().values():
        definitions.define(schema.removeprefix("lychee::"))
    loaded = host_compiler.load_module("_emulated", library)
    loaded.definitions = definitions  # lives as long as the module
    return loaded


def has(op):
    module()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU")


class Emulated(TorchDispatchMode):
    """Inside it, lychee's ops run their CUDA kernels in the emulator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "lychee":
            return func(*args, **(kwargs or {}))
        if not has(name):
            raise NotImplementedError(f"{name}: expected a CUDA kernel, got none")
        return getattr(getattr(torch.ops, NAMESPACE), name)(*args, **(kwargs or {}))
