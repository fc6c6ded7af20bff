# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels, read without running them: spills, registers, instructions."""

import re

import cuda_build
import pytest
from cuda_build import Resources
from cuda_limits import LIMITS

ARCHITECTURES = {"sm_80", "sm_90a"}
by_limit = pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.kernel)


@pytest.fixture(scope="module")
def log():
    missing = [path for path in cuda_build.logs() if not path.exists()]
    if missing or not cuda_build.CUDA_LIBRARY.exists():
        pytest.skip("the CUDA library was not built here: no nvcc, or LYCHEE_CUDA=0")
    return "".join(path.read_text() for path in cuda_build.logs())


@pytest.fixture(scope="module")
def kernels(log):
    """{(kernel, architecture): Resources} of the whole library."""
    found = cuda_build.resources(log)
    names = cuda_build.readable({name for name, _ in found})
    return {(names[name], architecture): value for (name, architecture), value in found.items()}


@pytest.fixture(scope="module")
def code(log):
    """{(kernel, architecture): [(address, instruction)]} of the whole library."""
    if cuda_build.cuobjdump() is None:
        pytest.skip("no cuobjdump: neither on PATH nor in an installed triton")
    found = cuda_build.machine_code()
    names = cuda_build.readable({name for name, _ in found})
    return {(names[name], architecture): value for (name, architecture), value in found.items()}


def chosen(table, limit):
    found = {key: value for key, value in table.items() if re.fullmatch(limit.kernel, key[0])}
    assert found, f"no kernel matches {limit.kernel}"
    return found


def test_every_kernel_has_one_limit_and_both_architectures(kernels):
    for name, _ in kernels:
        assert sum(bool(re.fullmatch(limit.kernel, name)) for limit in LIMITS) == 1, name
        assert {arch for other, arch in kernels if other == name} == ARCHITECTURES, name


def test_nothing_spills_and_nothing_is_warned_of(kernels, log):
    nothing = (0, 0, 0)
    assert {
        key: value
        for key, value in kernels.items()
        if (value.stack, value.spill_stores, value.spill_loads) != nothing
    } == {}
    assert [line for line in log.splitlines() if "warning" in line] == []


@by_limit
def test_registers_stay_below_their_ceiling(kernels, limit):
    registers = {key: value.registers for key, value in chosen(kernels, limit).items()}
    assert {key: value for key, value in registers.items() if value > limit.registers} == {}


def test_no_kernel_touches_local_memory(code):
    local = re.compile(r"(LDL|STL)\b")
    assert [
        key
        for key, instructions in code.items()
        if any(local.match(cuda_build.opcode(text)) for _, text in instructions)
    ] == []


@by_limit
def test_promised_instructions_are_there(code, limit):
    for key, instructions in chosen(code, limit).items():
        opcodes = {cuda_build.opcode(text) for _, text in instructions}
        for wanted in limit.has:
            assert any(re.match(wanted, found) for found in opcodes), (key, wanted)


@pytest.mark.parametrize(
    "limit", [limit for limit in LIMITS if limit.loop], ids=lambda limit: limit.kernel
)
def test_the_loop_over_pages_stays_short(code, limit):
    lengths = {
        key: len(cuda_build.hot_loop(instructions))
        for key, instructions in chosen(code, limit).items()
    }
    assert {key: length for key, length in lengths.items() if not 0 < length <= limit.loop} == {}


def test_newer_gpus_get_ptx(log):
    if cuda_build.cuobjdump() is None:
        pytest.skip("no cuobjdump: neither on PATH nor in an installed triton")
    assert any("sm_90.ptx" in name for name in cuda_build.ptx_files())


def test_spills_and_registers_are_read_from_a_log():
    report = (
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1fv\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function '_Z1gv' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1gv\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 10 registers\n"
    )
    assert cuda_build.resources(report) == {
        ("_Z1fv", "sm_80"): Resources(255, 16, 8, 12),
        ("_Z1gv", "sm_90a"): Resources(10, 0, 0, 0),
    }


def test_the_hot_loop_is_the_smallest_with_most_products():
    code = [
        (0x00, "MOV R1, c[0x0][0x28]"), (0x10, "HMMA.16816.F32 R4, R8, R12, R4"),
        (0x20, "HMMA.16816.F32 R4, R8, R12, R4"), (0x30, "@P0 BRA 0x10"), (0x40, "IADD3 R1, R1, 1"),
        (0x50, "@!P1 BRA 0x0"), (0x60, "HMMA.16816.F32 R4, R8, R12, R4"), (0x70, "@P0 BRA 0x60"),
        (0x80, "BRA 0x80"),
    ]  # fmt: skip
    assert cuda_build.hot_loop(code) == [text for _, text in code[1:4]]
    assert cuda_build.opcode("@!UP0 LDG.E.128 R4, [R2]") == "LDG.E.128"
