# SPDX-License-Identifier: Apache-2.0
"""Time of one call on a device: launched eagerly, and replayed from a CUDA graph; on the CPU, where
the harness itself is tested, by the clock."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import Timing, clamp

SAMPLES = 15
# Seconds of one sample, at least, if its calls fit into the limits.
SAMPLE_SECONDS = 0.002
CALLS = range(1, 257)


@dataclass(frozen=True)
class Measured:
    """Seconds per call; `graph` is None, and `reason` says why, where nothing can be captured."""

    eager: Timing
    graph: Timing | None
    reason: str = ""

    @property
    def best(self) -> float:
        return min(x.median for x in (self.eager, self.graph) if x is not None)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable, device) -> float:
    """Seconds of the work on the device, host time in which it waits included."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def waits_for_device(work: Callable) -> str:
    """The error of a call that copies sizes or values to the host, or nothing: to be found before a
    capture, as one that fails leaves the stream, the random numbers and the allocator in it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def measure(function: Callable, arguments: list[dict], device, *, captures=True) -> Measured:
    """Times a function that has been called before over argument sets that rotate: together they
    are larger than the L2 cache, so that each call finds its data evicted."""
    count = len(arguments)

    def calls(number):
        for i in range(number):
            function(**arguments[i % count])

    calls(min(count, 3))
    synchronize(device)
    one = timed(lambda: calls(1), device)
    # every set once, if that is affordable, so that the next round finds them evicted
    number = clamp(max(SAMPLE_SECONDS / one, min(count, 0.05 / one)), CALLS)
    eager = Timing.of([timed(lambda: calls(number), device) / number for _ in range(SAMPLES)])
    if device.type != "cuda":
        return Measured(eager, None, "no CUDA graphs on a CPU")
    if not captures:
        return Measured(eager, None, "sizes depend on the data")
    if reason := waits_for_device(lambda: calls(1)):
        return Measured(eager, None, reason)
    number = clamp(max(min(count, 0.05 / one), 10), CALLS)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls(number)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return Measured(eager, None, str(error).partition("\n")[0])
    graph.replay()
    samples = [timed(graph.replay, device) / number for _ in range(SAMPLES)]
    return Measured(eager, Timing.of(samples))


@dataclass(frozen=True)
class Peaks:
    """What the device reaches in plain PyTorch."""

    copy: float  # GB/s, bytes read and bytes written
    matrix: float  # GFLOP/s, bfloat16

    def __str__(self):
        return f"copy {self.copy:.0f} GB/s, bfloat16 matrix {self.matrix / 1e3:.0f} TFLOP/s"


def measure_peaks(device, *, tiny=False) -> Peaks:
    """A copy far larger than any cache, and a square product of random matrices."""
    source = torch.ones(1 << (22 if tiny else 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 256 if tiny else 8192
    a, b = torch.randn(2, size, size, device=device).bfloat16()

    def best(work):
        work()
        synchronize(device)
        return min(timed(work, device) for _ in range(10))

    copy = 2 * source.numel() / best(lambda: target.copy_(source)) / 1e9
    matrix = 2 * size**3 / best(lambda: a @ b) / 1e9
    return Peaks(copy, matrix)
