# SPDX-License-Identifier: Apache-2.0
"""The machine under test: its description, and its peaks as measured at the start of a run."""

import ctypes
import os
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from timing import timed

import lychee_kernels

# One thread, and every core this process may use.
THREADS = tuple(sorted({1, len(os.sched_getaffinity(0))}))
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
REPEATS = 5
# mallopt parameters of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Peaks:
    """What plain loops reach on some number of threads."""

    read: float  # GB/s
    copy: float  # GB/s, bytes read and bytes written
    fma: float  # GFLOP/s, float32

    def __str__(self):
        return f"read {self.read:.1f} GB/s, copy {self.copy:.1f} GB/s, FMA {self.fma:.0f} GFLOP/s"


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache that a core sees; 32 MiB where the system does not say."""
    sizes = [int(path.read_text().rstrip("K\n")) << 10 for path in CACHE.glob("index*/size")]
    return max(sizes, default=32 << 20)


def cold_bytes() -> int:
    """Bytes to rotate through, so that each call finds its data evicted: twice the cache, or more.

    The cache may be shared with neighbours, so "out of cache" is soft in either direction.
    """
    return max(512 << 20, 2 * last_level_cache())


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed, for every method alike; False where glibc is not used.

    By default glibc returns large blocks at once, and the kernel clears every page of the next
    call's output again. In an op of a few milliseconds that takes longer than the op.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@cache
def yardsticks() -> ctypes.CDLL:
    """The loops of peaks.cpp, compiled for this very machine."""
    source = Path(__file__).with_name("peaks.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/peaks.so"
        command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", library]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(library)
    loaded.flops_per_iteration.restype = ctypes.c_long
    loaded.multiply_add.argtypes = (ctypes.c_long, ctypes.c_float, ctypes.c_float)
    loaded.read.argtypes = (ctypes.c_void_p, ctypes.c_long)
    loaded.copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)
    for function in (loaded.multiply_add, loaded.read):
        function.restype = ctypes.c_float
    return loaded


@cache
def measure_peaks() -> dict[int, Peaks]:
    """Threads -> the best of a few repeats, over buffers larger than the cache."""
    source, target = torch.ones(2, cold_bytes() // 4).unbind(0)
    loops, iterations = yardsticks(), 1 << 23
    flops = loops.flops_per_iteration() * iterations

    def best(pool, threads, work):
        return min(timed(lambda: list(pool.map(work, range(threads)))) for _ in range(REPEATS))

    peaks = {}
    for threads in THREADS:
        count = source.numel() // threads

        def read(thread, count=count):
            for buffer in (source, target):
                loops.read(buffer.data_ptr() + 4 * count * thread, count)

        def copy(thread, count=count):
            offset = 4 * count * thread
            loops.copy(target.data_ptr() + offset, source.data_ptr() + offset, count)

        def multiply_add(_):
            loops.multiply_add(iterations, 0.5, 1.0)

        with ThreadPoolExecutor(threads) as pool:
            seconds = [best(pool, threads, work) for work in (read, copy, multiply_add)]
        moved = 2 * source.nbytes
        peaks[threads] = Peaks(
            moved / seconds[0] / 1e9, moved / seconds[1] / 1e9, threads * flops / seconds[2] / 1e9
        )
    return peaks


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def describe() -> dict:
    """What a reader of results must know about the machine."""
    return {
        "processor": processor(),
        "cores": THREADS[-1],
        "last_level_cache_mib": last_level_cache() >> 20,
        "torch": torch.__version__,
        "isa": lychee_kernels.cpu_isa(),
        "backends": lychee_kernels.backends(),
        "peaks": {threads: asdict(peak) for threads, peak in measure_peaks().items()},
    }
