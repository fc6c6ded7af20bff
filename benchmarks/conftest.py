# SPDX-License-Identifier: Apache-2.0
"""Options, the threads fixture and the closing table of the benchmarks."""

import os
from pathlib import Path

import machine
import pytest
import reading_table
import table
import torch


def pytest_addoption(parser):
    group = parser.getgroup("lychee")
    group.addoption("--table", type=Path, help="also write the table to this file, as markdown")
    group.addoption("--full", action="store_true", help="every length of the end-to-end runs")
    group.addoption(
        "--plain-malloc",
        action="store_true",
        help="let malloc return freed memory to the system, its default; see benchmarks/README.md",
    )


def pytest_configure(config):
    if os.environ.get("LYCHEE_POISON", "0") != "0":
        raise pytest.UsageError("LYCHEE_POISON: expected unset for benchmarks, got a value")
    if not config.getoption("--plain-malloc"):
        machine.keep_freed_memory()
    # The closing table says it in one line per case.
    config.option.benchmark_quiet = True


def pytest_report_header(config):
    about = machine.describe()
    kept = not config.getoption("--plain-malloc")
    threads = (f"{n} threads: {peaks}" for n, peaks in machine.measure_peaks().items())
    return [
        f"{about['processor']}, {about['cores']} cores, cache {about['last_level_cache_mib']} MiB, "
        f"torch {about['torch']}, kernels {about['isa']}, malloc "
        f"{'keeps' if kept else 'returns'} freed memory",
        *threads,
    ]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["lychee"] = machine.describe()
    machine_info["lychee"]["plain_malloc"] = config.getoption("--plain-malloc")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = session.benchmarks if session else []
    every = [benchmark.extra_info for benchmark in benchmarks]
    header, parts = pytest_report_header(config), []
    infos = [info for info in every if "op" in info]
    if infos:
        terminalreporter.section("ops against their peers")
        for line in [*header, "", *table.lines(infos), *table.notes(every)]:
            terminalreporter.write_line(line)
        parts += [*table.lines(infos, markdown=True), "", *table.notes(every)]
    for title, rows, remarks in reading_table.sections(every):
        terminalreporter.section(title)
        for line in [*table.aligned(rows), *remarks]:
            terminalreporter.write_line(line)
        parts += ["", title, "", *table.aligned(rows, markdown=True), "", *remarks]
    if notes := [info["note"] for info in every if "note" in info]:
        terminalreporter.section("banks on disk")
        for line in notes:
            terminalreporter.write_line(line)
        parts += ["", "banks on disk", "", *(f"- {line}" for line in notes)]
    if parts and (path := config.getoption("--table")):
        path.write_text("\n".join([*header, "", *parts]) + "\n")


@pytest.fixture
def threads(request):
    """Number of threads, as parametrised."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
