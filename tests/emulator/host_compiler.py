# SPDX-License-Identifier: Apache-2.0
"""Compiles device code for the host emulator with the C++ compiler, and keeps what it compiled."""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi",
         f"-I{ROOT / 'csrc'}", f"-I{HERE}"]  # fmt: skip


def compiler():
    return shutil.which(os.environ.get("CXX", "g++"))


def reason_without():
    """Why the emulator cannot be built here, or None."""
    if platform.machine() != "x86_64":
        return f"the emulator needs an x86-64 processor, got {platform.machine()}"
    return None if compiler() else "no C++ compiler"


def _digest(*parts):
    state = hashlib.sha256()
    for part in parts:
        state.update(part if isinstance(part, bytes) else str(part).encode())
        state.update(b"\0")
    return state.hexdigest()[:20]


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr}"


def _dependencies(depfile):
    text = depfile.read_text().replace("\\\n", " ").partition(": ")[2]
    return [Path(name.replace("\\ ", " ")) for name in re.split(r"(?<!\\)\s+", text.strip())]


def compile_object(source, *flags):
    """The object of one C++ or CUDA source; compiled again only where its text, one of the files it
    includes, or the flags changed."""
    command = [compiler(), *FLAGS, *flags]
    key = _digest(*command, source.resolve())
    target, depfile = CACHE / f"{source.stem}-{key}.o", CACHE / f"{source.stem}-{key}.d"
    stamp = target.with_suffix(".sha256")

    def contents():
        return _digest(*(path.read_bytes() for path in _dependencies(depfile)))

    try:
        if target.exists() and stamp.read_text() == contents():
            return target
    except FileNotFoundError:
        pass
    # under another name first: a second process may be doing the same
    partial = target.with_suffix(f".{os.getpid()}.o")
    _run([*command, "-MMD", "-MF", depfile, "-x", "c++", "-c", source, "-o", partial])
    stamp.write_text(contents())
    partial.replace(target)
    return target


def link(name, sources, compile_flags=(), link_flags=()):
    """A program, or a library with "-shared", from these sources; they are compiled in parallel."""
    CACHE.mkdir(parents=True, exist_ok=True)
    # of several test processes one compiles, the others wait for what it makes
    with (CACHE / f"{_digest(name, *sources, *compile_flags)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _link(name, sources, compile_flags, link_flags)


def _link(name, sources, compile_flags, link_flags):
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda source: compile_object(source, *compile_flags), sources))
    key = _digest(*compile_flags, *link_flags, *(path.read_bytes() for path in objects))
    folder = CACHE / key
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.{os.getpid()}"
        _run([compiler(), *compile_flags, *objects, *link_flags, "-o", partial])
        partial.replace(target)
    return target


def python_flags():
    """What a Python extension needs beside its sources."""
    import sysconfig

    import torch.utils.cpp_extension as extension

    includes = [sysconfig.get_path("include"), *extension.include_paths()]
    return [f"-I{path}" for path in includes], [
        *(f"-L{path}" for path in extension.library_paths()),
        *(f"-Wl,-rpath,{path}" for path in extension.library_paths()),
    ]


def load_module(name, path):
    """Imports a compiled extension module from where it lies."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
