# SPDX-License-Identifier: Apache-2.0
"""Builds the kernels with AddressSanitizer and UBSan, without Torch, and runs every case here."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
# Without optimisation the whole build takes a minute of one core, and every access stays visible.
FLAGS = [
    "-std=c++20", "-O0", "-g1", "-w", f"-I{CSRC}", f"-I{HERE}", "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip
# Leak checks need ptrace, which containers often forbid; nothing here can leak for long.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0"}


def compile_all(compiler, folder):
    """One object per test of an op, per build of its kernels, and for main."""
    tests = sorted(HERE.glob("*.cpp"))
    stems = {path.stem for path in tests} - {"main"}
    # of memory_attention also memory_attention_bwd; select_chunks has one build, in its test
    kernels = sorted({
        path for stem in stems for isa in ("generic", "avx2", "avx512", "amx")
        for path in CSRC.glob(f"cpu/{stem}*_{isa}.cpp")
    })  # fmt: skip
    objects = [folder / f"{path.parent.name}_{path.stem}.o" for path in (*tests, *kernels)]

    def build(source, target):
        return subprocess.run(
            [compiler, *FLAGS, "-c", source, "-o", target], capture_output=True, text=True
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(build, (*tests, *kernels), objects))
    return objects, "".join(result.stderr for result in results if result.returncode)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitizer")
    probe = folder / "probe.cpp"
    probe.write_text("#include <sanitizer/asan_interface.h>\nint main() {}\n")
    linked = subprocess.run([compiler, *FLAGS, probe, "-o", folder / "probe"], capture_output=True)
    if linked.returncode or subprocess.run([folder / "probe"], env=ENVIRONMENT).returncode:
        pytest.skip("this compiler has no sanitizer runtime")
    objects, errors = compile_all(compiler, folder)
    assert not errors, errors
    subprocess.run([compiler, *FLAGS, *objects, "-o", folder / "run"], check=True)
    return folder / "run"


def run(program, *arguments):
    result = subprocess.run(
        [program, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    return result.returncode, result.stdout, result.stderr


def test_kernels_stay_inside_their_buffers(program):
    code, output, errors = run(program)
    assert code == 0, errors
    passed = {line.removesuffix(" passed") for line in output.splitlines()}
    stems = {path.stem for path in HERE.glob("*.cpp")} - {"main"}
    assert stems and stems <= passed


def test_a_planted_read_past_a_row_is_caught(program):
    code, output, errors = run(program, "planted")
    assert code != 0 and "read" not in output
    assert "AddressSanitizer" in errors and "main.cpp" in errors
