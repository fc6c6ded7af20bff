# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that need not be there; prints one JSON line per build.

Run as a program, without TRITON_INTERPRET: calls of the ops are recorded instead of launched.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lychee_kernels.triton import _arguments

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(module, function, *args):
    """The launches of one call."""
    module = importlib.import_module(f"lychee_kernels.triton.{module}")
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    launches = []
    # nothing is written, so there is nothing to check
    module.readable = lambda tensor: False
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel, launches))
    try:
        getattr(module, function)(*args)
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def type_of(value):
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i64" if abs(value) >= 2**31 else "i32"


def build(kernel, args, kwargs, capability):
    """Compiles one launch; ones are constants, as Triton makes them, but no sizes are promised to
    be multiples of 16, as for odd shapes."""
    options = {name: kwargs.pop(name) for name in ("num_warps",) if name in kwargs}
    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    ones = {
        p.name
        for p in kernel.params
        if not p.do_not_specialize and type(named[p.name]) is int and named[p.name] == 1
    }
    constants = {n: v for n, v in named.items() if n in kwargs or n in ones or v is None}
    types = {n: "constexpr" if n in constants else type_of(named[n]) for n in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(built):
    """Bytes of a thread's registers that ptxas keeps in memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def bank(dtype, pages=3, heads=4, dim=128):
    kv = torch.zeros(pages, 2, heads, 2, 64, dim).to(dtype)
    return kv, torch.zeros(kv.shape[:5]) if dtype in (INT8, E4M3) else None


def table(batch=2, pages=200):
    zeros = torch.zeros(batch, pages, dtype=torch.int32)
    return zeros, zeros, zeros, torch.zeros(batch, dtype=torch.int32)


def attention(dtype, bank_dtype, queries, dim=128):
    q = torch.zeros(2, 28, queries, dim, dtype=dtype)
    k = torch.zeros(2, 4, 300, dim, dtype=dtype)
    tables = torch.zeros(2, 500, dim // 2)
    return (q, k, k, *bank(bank_dtype, dim=dim), 1, *table(), None, *tables, 1, 1, 0.1)


def attention_of_ones():
    """Every size and most strides are 1."""
    q = torch.zeros(1, 1, 1, 8)
    one = torch.ones(1, 1, dtype=torch.int32)
    kv = torch.zeros(1, 1, 1, 2, 1, 8)
    return q, q, q, kv, None, 0, one, one, one, one[0], None, *torch.zeros(2, 1, 4), 1, 1, 0.1


def packed_ones():
    rows, tables = torch.zeros(2, 1, 8), torch.zeros(2, 2, 4)
    where = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    bank = torch.zeros(1, 1, 1, 2, 1, 8), None
    return (rows, rows, rows, *tables, *bank, *where, 1, 1, 0, None, None, 0)


def segment_alone():
    q, k = torch.zeros(2, 6, 5, 64).half(), torch.zeros(2, 2, 9, 64).half()
    valid = torch.ones(2, 9, dtype=torch.bool)
    return (q, k, k, None, None, 0, *[None] * 4, valid, None, None, 0, 1, 0.1)


def gradients():
    positions = torch.zeros(2, 10, dtype=torch.int64)
    grad, mem_grad = torch.zeros(2, 3, 10, 40), torch.zeros(2, 3, 2, 40)
    return grad, mem_grad, *torch.zeros(2, 50, 20), 2, 4, positions, 0, False


def packed(dtype, bank_dtype):
    q, k = torch.zeros(20, 28, 128, dtype=dtype), torch.zeros(20, 4, 128, dtype=dtype)
    tables = torch.zeros(2, 500, 64)
    where = table()[0], torch.zeros(2, dtype=torch.int32)
    valid = torch.ones(2, 2, dtype=torch.bool)
    return (q, k, k, *tables, *bank(bank_dtype), *where, 2, 4, 0, valid, None, 0)


def written(dtype, bank_dtype):
    k = torch.zeros(4, 4, 128, dtype=dtype)
    where = table()[0], torch.zeros(2, dtype=torch.int32)
    return k, k, *bank(bank_dtype), *where, 2, 0, None


def selection():
    scores, tokens = torch.zeros(2, 427), torch.zeros(427, dtype=torch.int32)
    return scores, 0.5, 64, torch.zeros(427, 16, dtype=torch.int32), tokens, 64


CALLS = {
    "decode": lambda: ("memory_attention", "memory_attention", *attention(BF16, INT8, 1)),
    "prefill": lambda: ("memory_attention", "memory_attention", *attention(BF16, E4M3, 99)),
    "ones": lambda: ("memory_attention", "memory_attention", *attention_of_ones()),
    "segment alone": lambda: ("memory_attention", "memory_attention", *segment_alone()),
    "pack backward": lambda: ("compress_pack", "compress_pack_bwd", *gradients()),
    "pack of ones": lambda: ("compress_pack", "compress_pack_", *packed_ones()),
    "pack": lambda: ("compress_pack", "compress_pack_", *packed(BF16, INT8)),
    "write in float8": lambda: ("compress_pack", "write_memory_", *written(torch.float16, E4M3)),
    "gather": lambda: (
        "gather_chunks", "gather_chunks", *bank(E4M3), *table(), *torch.zeros(2, 500, 64), 0, 2, 1,
        BF16,
    ),
    "select": lambda: ("select_chunks", "select_chunks", *selection()),
}  # fmt: skip


def main(capabilities):
    _arguments._check_device = lambda *_: None
    for name, call in CALLS.items():
        for kernel, args, kwargs in record(*call()):
            for capability in capabilities:
                built = build(kernel, args, kwargs, capability)
                line = {"call": name, "kernel": kernel.__name__, "capability": capability}
                line |= {"shared": built.metadata.shared, "spilled": spilled(built)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
