# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the kernels: registers and spills from its logs, code from the library."""

import dataclasses
import re
import shutil
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from lychee_kernels._loader import CUDA_LIBRARY

ROOT = Path(__file__).resolve().parent.parent.parent
# setup.py keeps one log beside each object.
LOGS = ROOT / "build" / "cuda"


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel on one architecture, as ptxas reports it; bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def logs():
    """The log of every source of the library."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    return [LOGS / f"{path.stem}.o.log" for path in sources]


def readable(names):
    """Mangled name -> the kernel's name with its template arguments, without parameters."""
    names = sorted(names)
    filt = shutil.which("c++filt")
    assert filt, "c++filt comes with the compiler that built the library"
    output = subprocess.run(
        [filt, "--no-params"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    plain = [
        re.sub(r"^void |lychee::(cuda::)?|\(anonymous namespace\)::|\(bool\)|\(int\)", "", line)
        for line in output.splitlines()
    ]
    return dict(zip(names, plain, strict=True))


def resources(text):
    """{(mangled kernel, architecture): Resources} of a log of ptxas -v."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.S,
    )
    return {
        (name, architecture): Resources(int(registers), int(stack), int(stores), int(loads))
        for name, architecture, stack, stores, loads, registers in entry.findall(text)
    }


def cuobjdump():
    """From the CUDA toolkit, or from the triton wheel; None where there is neither."""
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=bundled)


def machine_code(library=CUDA_LIBRARY):
    """{(mangled kernel, architecture): [(address, instruction)]} of the whole library."""
    result = subprocess.run(
        [cuobjdump(), "-sass", library], capture_output=True, text=True, check=True
    )
    code, architecture, name = defaultdict(list), None, None
    instruction = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
    for line in result.stdout.splitlines():
        if found := instruction.match(line):
            code[name, architecture].append((int(found[1], 16), found[2]))
        elif found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            name = found[1]
    return dict(code)


def opcode(instruction):
    """Without its predicate and operands: "@!P0 LDG.E.128 R4, [R2]" -> "LDG.E.128"."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def hot_loop(code):
    """Instructions of the smallest loop that holds the most tensor-core products."""
    best, most = [], 0
    for address, instruction in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if target is None or int(target[1], 16) >= address:
            continue
        body = [text for at, text in code if int(target[1], 16) <= at <= address]
        products = sum(opcode(text).startswith("HMMA") for text in body)
        if products > most or (products == most and products and len(body) < len(best)):
            best, most = body, products
    return best


def ptx_files(library=CUDA_LIBRARY):
    """Names of the PTX texts that the library carries for GPUs newer than its machine code."""
    command = [cuobjdump(), "--list-ptx", library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
