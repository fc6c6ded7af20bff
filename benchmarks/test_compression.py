# SPDX-License-Identifier: Apache-2.0
"""Compression speed against the released code's route: equal shape, threads and results."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import machine
import pytest
import released_route
import torch
from timing import Method, interleave

from lychee.bank.pages import PAGE_TOKENS, PageLayout, PagePool
from lychee.compressor import Compressor
from lychee.config import ModelConfig
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
SECONDS = 12


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


@torch.inference_mode()
def compress(decoder, ids):
    pool = PagePool(PageLayout.of(decoder.config, torch.float32), torch.device("cpu"))
    pages = pool.allocate(CHUNK // RATIO // PAGE_TOKENS)
    Compressor(decoder).run(ids[None], pool.sink([pages]), ratio=RATIO, window=WINDOW)
    return pool


@pytest.mark.parametrize("threads", machine.THREADS, indirect=True)
def test_compression_against_released_route(benchmark, decoder, threads):
    ids = torch.randint(0, SHAPE["vocab_size"], (CHUNK,))
    ours = Method(compress, [{"decoder": decoder, "ids": ids}])
    arguments = {"decoder": decoder, "ids": ids, "ratio": RATIO, "window": WINDOW}
    theirs = Method(released_route.compress, [arguments])
    pool = ours.calibrate()
    for layer, recorded in enumerate(theirs.calibrate()):
        kept = pool.kv[:, layer].permute(2, 1, 0, 3, 4).flatten(2, 3)
        torch.testing.assert_close(kept, recorded, atol=5e-4, rtol=0)

    timings = interleave(benchmark, ours, [theirs], SECONDS)
    if not timings:
        return
    seconds = {"ours": timings[0].median, "released_route": timings[1].median}
    ratio = seconds["released_route"] / seconds["ours"]
    benchmark.extra_info |= {
        "op": "lychee.compressor",
        "shape": f"{CHUNK} tokens, 42.5M parameters",
        "dtype": "float32",
        "bank_dtype": "float32",
        "threads": threads,
        "ratio": {"released_route": ratio},
        "seconds": seconds,
        "spread": (timings[0].p20, timings[0].p80),
        "tokens_per_second": {name: CHUNK / median for name, median in seconds.items()},
    }
    assert ratio > 1


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


@pytest.mark.parametrize("threads", machine.THREADS, indirect=True)
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
    assert measured["peak_extra_mib"] < 190
