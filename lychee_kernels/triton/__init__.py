# SPDX-License-Identifier: Apache-2.0
"""The ops in Triton: for graphics processors without the compiled library, and to check it.

The functions take the arguments of the schemas in csrc/ops.cpp. They are registered with torch's
dispatcher, so that fake tensors, gradients and torch.compile work as for the compiled kernels.
"""

import warnings
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

# Schemas, and the modules that implement them.
SCHEMAS = {
    "compress_pack": "compress_pack",
    "compress_pack_bwd": "compress_pack",
    "compress_pack_": "compress_pack",
    "write_memory_": "compress_pack",
    "memory_attention": "memory_attention",
    "memory_attention_bwd": "memory_attention",
    "select_chunks": "select_chunks",
    "gather_chunks": "gather_chunks",
    "gather_chunks_": "gather_chunks",
    "gather_chunks_bwd": "gather_chunks",
}


def is_installed():
    return find_spec("triton") is not None


def call(schema, *args):
    """Runs one op in Triton, which the first call imports."""
    if not is_installed():
        raise RuntimeError(
            f"{schema}: triton: expected the package, for a graphics processor without compiled "
            "kernels, got none; install it with: pip install triton"
        )
    module = import_module(f".{SCHEMAS[schema]}", __name__)
    first = next(argument for argument in args if isinstance(argument, torch.Tensor))
    # kernels are launched on the current device
    with torch.cuda.device_of(first):
        return getattr(module, schema)(*args)


def register(key, schemas=tuple(SCHEMAS)):
    """Makes Triton the implementation of ops on a device, for the rest of the process.

    Args:
        key: "CUDA" or "CPU", a dispatch key; on the CPU there is only Triton's interpreter.
        schemas: of which ops; those without a Triton kernel are left as they are.
    """
    library = torch.library.Library("lychee", "IMPL")
    _LIBRARIES.append(library)
    with warnings.catch_warnings():
        # PyTorch warns of kernels that are replaced
        warnings.simplefilter("ignore", UserWarning)
        for schema in SCHEMAS:
            if schema in schemas:
                library.impl(schema, partial(call, schema), key, allow_override=True)


# A registration ends with its library.
_LIBRARIES = []
