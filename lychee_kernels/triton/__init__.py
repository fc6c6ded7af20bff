# SPDX-License-Identifier: Apache-2.0
"""The ops in Triton: for graphics processors without the compiled library, and to check it.

The functions take the arguments of the schemas in csrc/ops.cpp. They are registered with torch's
dispatcher, so that fake tensors, gradients and torch.compile work as for the compiled kernels.
"""

from importlib import import_module

import torch

# Schemas by the module that implements them.
MODULES = {
    "compress_pack": ("compress_pack", "compress_pack_bwd", "compress_pack_", "write_memory_"),
    "memory_attention": ("memory_attention", "memory_attention_bwd"),
    "select_chunks": ("select_chunks",),
    "gather_chunks": ("gather_chunks", "gather_chunks_", "gather_chunks_bwd"),
}


def register(key, *, replace):
    """Makes Triton the implementation of the ops on a device.

    Args:
        key: "CUDA" or "CPU", a dispatch key.
        replace: bool, also of ops that have compiled kernels for it.

    Returns:
        torch.library.Library; the registration ends with it.
    """
    library = torch.library.Library("lychee", "IMPL")
    for module, schemas in MODULES.items():
        for schema in schemas:
            compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"lychee::{schema}", key)
            if replace or not compiled:
                library.impl(schema, _Lazy(module, schema), key, allow_override=True)
    return library


class _Lazy:
    """A kernel whose module, and triton with it, is imported by the first call."""

    def __init__(self, module, schema):
        self.module, self.schema = module, schema

    def __call__(self, *args):
        try:
            module = import_module(f".{self.module}", __name__)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise RuntimeError(
                f"{self.schema}: triton: expected the package for tensors on a graphics processor "
                "without the compiled library, got none; install it with: pip install triton"
            ) from error
        return getattr(module, self.schema)(*args)
