# SPDX-License-Identifier: Apache-2.0
"""Compression speed against the released code's route: equal shape, threads and results."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import released_route
import torch

from lychee.bank import Chunk, MemoryBank
from lychee.compressor import Compressor
from lychee.config import MemoryConfig, ModelConfig
from lychee.decoder import Decoder

# 42.5M parameters, as in the measurements of the released code.
SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
CHUNK, WINDOW, RATIO = 4096, 2048, 4
ROUNDS = 5


def make_decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_dict(SHAPE), ("q", "k", "v")).eval()
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return decoder


@pytest.fixture(scope="module")
def decoder():
    return make_decoder()


@pytest.fixture(params=[1, 2], ids=lambda threads: f"{threads}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.inference_mode()
def compress(decoder, ids):
    memory = MemoryConfig(window=WINDOW, chunk=CHUNK, ratio=RATIO, param=("q", "k", "v"))
    bank = MemoryBank(decoder.config, memory, device=torch.device("cpu"), dtype=torch.float32)
    pages = bank.allocate(CHUNK)
    bank.chunks.append(Chunk(0, 0, 0, CHUNK, memory.slots, pages))
    Compressor(decoder).run(ids[None], bank.sink([pages]), ratio=RATIO, window=WINDOW)
    return bank


def measure_fma_peak() -> float:
    """GFLOP/s of a matrix product that stays in cache, as the machine's yardstick of the moment."""
    a, b = torch.randn(512, 512), torch.randn(512, 768)
    best = min(timed(lambda: a @ b) for _ in range(30))
    return 2 * 512 * 512 * 768 / best / 1e9


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_compression_against_released_route(benchmark, decoder, threads):
    ids = torch.randint(0, SHAPE["vocab_size"], (CHUNK,))
    bank = compress(decoder, ids)
    theirs = released_route.compress(decoder, ids, RATIO, WINDOW)
    for layer, recorded in enumerate(theirs):
        ours = bank.kv[:, layer].permute(2, 1, 0, 3, 4).flatten(2, 3)
        torch.testing.assert_close(ours, recorded, atol=5e-4, rtol=0)

    peer = []

    def both():
        peer.append(timed(lambda: released_route.compress(decoder, ids, RATIO, WINDOW)))

    benchmark.pedantic(
        compress, args=(decoder, ids), setup=both, rounds=ROUNDS, warmup_rounds=1, iterations=1
    )
    ours = benchmark.stats.stats.median
    theirs = statistics.median(peer[1:])
    benchmark.extra_info |= {
        "threads": threads,
        "tokens_per_second": CHUNK / ours,
        "released_route_tokens_per_second": CHUNK / theirs,
        "ratio": {"released_route": theirs / ours},
        "sgemm_gflops": measure_fma_peak(),
    }
    print(f"\n{threads} threads: {CHUNK / ours:.0f} tokens/s, released route {CHUNK / theirs:.0f}")
    assert theirs / ours > 1


def print_peak_memory() -> None:
    """MiB that this process holds with the model loaded, and that one chunk adds at its peak."""
    decoder, ids = make_decoder(), torch.randint(0, SHAPE["vocab_size"], (CHUNK,))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    compress(decoder, ids)
    print(json.dumps({"model_mib": before, "peak_extra_mib": resident("VmHWM") - before}))


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_a_chunk(benchmark, threads):
    """A fresh process, so that nothing was allocated before; float32, bank included."""
    here = Path(__file__)
    code = f"import torch; torch.set_num_threads({threads}); import {here.stem} as t; "
    path = os.pathsep.join([str(here.parent), str(here.parent.parent)])
    run = benchmark.pedantic(
        subprocess.run,
        args=([sys.executable, "-c", code + "t.print_peak_memory()"],),
        kwargs={
            "env": os.environ | {"PYTHONPATH": path},
            "capture_output": True,
            "check": True,
            "text": True,
        },
    )
    measured = json.loads(run.stdout)
    benchmark.extra_info |= {"threads": threads} | measured
    print(f"\n{threads} threads: one chunk adds {measured['peak_extra_mib']:.0f} MiB at its peak")
    assert measured["peak_extra_mib"] < 190
