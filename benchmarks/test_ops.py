# SPDX-License-Identifier: Apache-2.0
"""Every op of registry.py against its peers, in turns; no time is taken of a wrong result."""

import functools

import machine
import pytest
import torch
from exact import check
from registry import REGISTRY
from timing import Method, interleave

# Seconds per case after the first calls; slow peers need more and get it.
SECONDS = 1.0
CASES = [(entry, case) for entry in REGISTRY for case in entry.cases]


@functools.lru_cache(maxsize=1)
def prepare(entry, case):
    """Inputs, peers and float64 result of one case, kept for the next number of threads."""
    torch.manual_seed(0)
    torch.compiler.reset()
    roles = entry.inputs(case)
    exact = entry.exact(case, **roles["ours"][0])
    functions = dict(entry.peers)
    if "compile" not in functions:
        function, role = functions["eager"]
        functions["compile"] = (torch.compile(function, dynamic=False), role)
    return roles, functions, exact


@pytest.fixture(autouse=True)
def compiler(entry, case):
    """Code from torch.compile that follows set_num_threads, and that can run backward twice.

    Such code runs every loop in parallel, so small cases are compiled for each number of threads.
    """
    follows = entry.bytes(case) > 1 << 20
    threads = torch._inductor.config.patch({"cpp.dynamic_threads": follows})
    buffers = torch._functorch.config.patch(donated_buffer=False)
    with threads, buffers:
        yield


@pytest.mark.parametrize("threads", machine.THREADS, indirect=True)
@pytest.mark.parametrize(("entry", "case"), CASES, ids=[f"{e.op}-{c}" for e, c in CASES])
def test_op(benchmark, entry, case, threads):
    roles, functions, exact = prepare(entry, case)
    with torch.set_grad_enabled(entry.op.endswith("_bwd")):
        ours = Method(entry.ours, roles["ours"])
        peers, skipped, result = {}, {}, ours.calibrate()
        for name, (function, role) in functions.items():
            method = Method(function, roles[role], compiles=name == "compile")
            try:
                theirs = method.calibrate()
            except torch._dynamo.exc.TorchDynamoException as error:
                skipped[name] = str(error).strip().partition("\n")[0]
                continue
            theirs = theirs if isinstance(theirs, tuple) else (theirs,)
            check(exact, entry.comparable(result), theirs, name)
            peers[name] = method
        del result, theirs
        timings = interleave(benchmark, ours, list(peers.values()), SECONDS)
    if timings:
        benchmark.extra_info |= summarise(entry, case, threads, timings, list(peers))
        benchmark.extra_info["skipped"] = skipped


def summarise(entry, case, threads, timings, names) -> dict:
    """What `--benchmark-json` carries of one case; times in seconds."""
    ours, *theirs = timings
    peaks = machine.measure_peaks()[threads]
    bandwidth = {"read": peaks.read, "copy": peaks.copy}[entry.traffic]
    moved, computed = entry.bytes(case) / 1e9, entry.flops(case) / 1e9
    # the least time that either peak allows; data in cache is not held to the speed of memory
    least = {"bandwidth": moved / bandwidth, "fma": computed / peaks.fma}
    bound = max(least, key=least.get) if case.shape.cold or not computed else "fma"
    return {
        "op": entry.op,
        "shape": str(case.shape),
        "dtype": name_of(case.dtype),
        "bank_dtype": case.bank_dtype and name_of(case.bank_dtype),
        "threads": threads,
        "ratio": {n: t.median / ours.median for n, t in zip(names, theirs, strict=True)},
        "bound": bound,
        "share": least[bound] / ours.median,
        "gb_per_second": moved / ours.median,
        "gflops": computed / ours.median,
        "seconds": {"ours": ours.median}
        | {n: t.median for n, t in zip(names, theirs, strict=True)},
        "spread": (ours.p20, ours.p80),
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
