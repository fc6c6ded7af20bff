# SPDX-License-Identifier: Apache-2.0
"""The emulator itself, and the kernels in it: correct ones pass, every planted bug is reported, by
the emulator or by the sanitizers that watch it."""

import re
import shutil
import subprocess
from pathlib import Path

import host_compiler
import pytest

HERE = Path(__file__).resolve().parent
PLANTED = HERE / "planted_bugs.cpp"
SAMPLES = [HERE / "main.cpp", HERE / "correct_kernels.cpp"]
CONVERSIONS = HERE / "conversions.cpp"
KERNELS = [HERE / "main.cpp", *sorted(HERE.glob("*_cases.cpp"))]
WATCHED = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# Leak checks need ptrace, which containers often forbid; fibers have stacks of their own.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
# What reports each planted bug: the emulator's own words, or a sanitizer's.
REPORTS = {
    "no_barrier_before_reuse": ("plain", r"expected .*, got -?nan"),
    "no_wait": ("plain", r"expected .*, got -?nan"),
    "no_barrier_after_wait": ("plain", r"expected .*, got -?nan"),
    "no_swizzle": ("plain", "expected no bank conflicts"),
    "half_of_a_warp": ("plain", "deadlock: 16 at a warp collective, {0}"),
    "barrier_against_collective": (
        "plain", "deadlock: 32 at a barrier, {0}; 32 at a warp collective, {1}"),
    "barriers_on_different_lines": ("plain", "divergent barrier: ({0} and {1}|{1} and {0})"),
    "shuffle_against_ballot": ("plain", "divergent warp collective: ({0} and {1}|{1} and {0})"),
    "exit_with_open_copies": ("plain", r"thread \d+ exits with copies not waited for"),
    "copy_outside_of_shared_memory": ("plain", "copy_async: target outside of shared memory, {0}"),
    "misaligned_copy": ("plain", "copy_async: misaligned address, {0}"),
    "misaligned_matrix_row": ("plain", "load_matrix: misaligned row, {0}"),
    "lane_outside_of_its_mask": ("plain", "caller not in its own mask, {0}"),
    "overlapping_masks": ("plain", "overlapping masks of warp collectives: {0} and {0}"),
    "offset_in_32_bits": ("address", r"{0}:\d+: runtime error: signed integer overflow"),
    "shared_memory_overrun": ("address", r"heap-buffer-overflow[\s\S]*{0}"),
    "misaligned_vector": (
        "address", r"{0}:\d+: runtime error: member access within misaligned address"),
    "no_order_in_a_warp": ("thread", r"data race[\s\S]*{0}"),
}  # fmt: skip
# These are races too.
RACES = ["no_barrier_before_reuse", "no_barrier_after_wait"]


@pytest.fixture(scope="module")
def program():
    """Compiles one of the test programs, watched by one of the sanitizers, when it is asked for."""
    if reason := host_compiler.reason_without():
        pytest.skip(reason)

    def build(watched, sources):
        flags = WATCHED[watched]
        return host_compiler.link("run", sources, flags)

    return build


def run(path, *arguments):
    """Exit code and output; where the layout of memory is too random for TSan, without that."""

    def attempt(*prefix):
        result = subprocess.run(
            [*prefix, path, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        return result.returncode, result.stdout + result.stderr

    code, output = attempt()
    if "unexpected memory mapping" in output and shutil.which("setarch"):
        code, output = attempt("setarch", "-R")
    if "unexpected memory mapping" in output or "failed to set personality" in output:
        pytest.skip("ThreadSanitizer cannot run in this address space")
    return code, output


def planted_lines(name):
    """The marked lines of a case, as the reports name them."""
    lines = PLANTED.read_text().splitlines()
    marked = [i for i, line in enumerate(lines, 1) if line.endswith(f"// planted: {name}")]
    return [re.escape(f"{PLANTED.name}:{i}") for i in marked]


def test_every_planted_bug_has_its_report():
    names = re.findall(r"EMULATOR_CASE\((\w+)\)", PLANTED.read_text())
    assert sorted(names) == sorted(REPORTS)


@pytest.mark.parametrize("name", REPORTS)
def test_a_planted_bug_is_reported(program, name):
    watched, report = REPORTS[name]
    code, output = run(program(watched, [HERE / "main.cpp", PLANTED]), 20, name)
    assert code != 0 and f"{name} passed" not in output
    assert re.search(report.format(*planted_lines(name)), output), output


@pytest.mark.parametrize("name", RACES)
def test_a_planted_race_is_reported_by_the_thread_sanitizer(program, name):
    code, output = run(program("thread", [HERE / "main.cpp", PLANTED]), 1, name)
    assert code == 66 and "data race" in output and "pipeline.cuh" in output, output


@pytest.mark.parametrize("watched, seeds", [("plain", 20), ("address", 3), ("thread", 3)])
def test_correct_kernels_pass(program, watched, seeds):
    # conversions share nothing between threads
    chosen = SAMPLES if watched == "thread" else [*SAMPLES, CONVERSIONS]
    code, output = run(program(watched, chosen), seeds)
    assert code == 0, output
    sources = "".join(path.read_text() for path in chosen)
    names = re.findall(r"EMULATOR_CASE\((\w+)\)", sources)
    assert names
    assert sorted(output.splitlines()) == sorted(f"{name} passed" for name in names)


@pytest.mark.parametrize("watched, seeds", [("address", 2), ("thread", 1)])
def test_the_ops_pass_under_sanitizers(program, watched, seeds):
    if len(KERNELS) == 1:
        pytest.skip("no op has cases without Torch")
    code, output = run(program(watched, KERNELS), seeds)
    assert code == 0 and " passed" in output, output
