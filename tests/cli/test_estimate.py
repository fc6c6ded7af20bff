# SPDX-License-Identifier: Apache-2.0
"""`lychee estimate`: bytes of real models' banks by hand, and a measured peak."""

import json
import subprocess
import sys

import pytest

from lychee.bank import DTYPES
from lychee.errors import LycheeError
from lychee.estimate import estimate_bank

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# Published parameters of Qwen2.5-7B and Llama-3.1-8B, and bytes of keys and values per token in
# 16 bits: layers x key heads x 128 x 2 x 2.
MODELS = {
    "qwen2.5-7b": (QWEN, 7_615_616_512, 57_344),
    "llama-3.1-8b": (LLAMA, 8_030_261_248, 131_072),
}


@pytest.fixture
def folder_of(tmp_path):
    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize("name", MODELS)
def test_bank_of_a_real_model(answer_of, folder_of, name):
    config, parameters, token_bytes = MODELS[name]
    options = ("--tokens", 2**20, "--model", folder_of(config), "--dtype", "bfloat16")
    report = answer_of("estimate", *options)
    # The memory tokens' one embedding is added.
    assert report["parameters"] == parameters + config["hidden_size"]
    assert report["weight_bytes"] == 2 * report["parameters"]
    rows = {(row["ratio"], row["bank_dtype"]): row for row in report["rows"]}
    assert set(rows) == {(ratio, dtype) for ratio in (2, 4, 8, 16) for dtype in DTYPES}
    scales = config["num_hidden_layers"] * config["num_key_value_heads"] * 2 * 4
    for (ratio, dtype), row in rows.items():
        assert row["memory_tokens"] == 2**20 // ratio
        per_token = {"float32": 2 * token_bytes, "float16": token_bytes, "bfloat16": token_bytes}
        expected = per_token.get(dtype, token_bytes // 2 + scales)
        assert row["bank_bytes"] == 2**20 // ratio * expected
        assert row["ask_peak_bytes"] > report["weight_bytes"] + row["bank_bytes"]
        assert report["weight_bytes"] < row["disk_peak_bytes"] < row["ask_peak_bytes"]
    build = {dtype: rows[4, dtype]["build_peak_bytes"] for dtype in DTYPES}
    # Building to a disk does not keep the bank.
    assert max(build.values()) - min(build.values()) < rows[4, "float32"]["bank_bytes"] / 10


def test_part_empty_pages_count(folder_of):
    """577 tokens at ratio 8 are 73 memory tokens, which take two pages of 64."""
    row = estimate_bank(folder_of(QWEN), 577, [8], ["float16"]).rows[0]
    assert (row.memory_tokens, row.pages, row.bank_bytes) == (73, 2, 128 * 57_344)


def test_table_names_its_parts(invoke, folder_of):
    config = folder_of(QWEN) / "config.json"
    options = ("--model", config, "--ratio", 4, "--bank-dtype", "int8", "--dtype", "float16")
    result = invoke("estimate", "--tokens", 1000, *options)
    assert result.status == 0, result.errors
    lines = result.out.splitlines()
    assert "7,615,620,096 parameters in float16" in lines[0] and "14.2 GiB" in lines[0]
    assert lines[2].split()[:2] == ["4", "int8"]
    for part in ("bank: ", "build: ", "ask: ", "from disk: "):
        assert any(line.startswith(part) for line in lines)


MEASURE = """
import gzip, json, sys
from pathlib import Path
import torch
from lychee.demo import SHIPPED_BOOK
from lychee.memory_model import LycheeMemory

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
text = gzip.decompress(SHIPPED_BOOK.read_bytes()).decode()[: int(sys.argv[1])]
warm = LycheeMemory.from_pretrained()
warm.ask(warm.remember(text[:3000]), "Who?")
del warm
before = status("VmRSS")
model = LycheeMemory.from_pretrained()
Path("/proc/self/clear_refs").write_text("5")
bank = model.remember(text)
model.ask(bank, "Who wrote the letter that came in the morning?")
print(json.dumps({"peak": status("VmHWM") - before, "tokens": bank.tokens}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_is_as_measured():
    """Resident memory of a process that remembers 36,000 tokens and is asked: within 15%."""
    command = [sys.executable, "-c", MEASURE, "120000"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    estimate = estimate_bank(None, measured["tokens"], [4], ["float32"])
    assert estimate.rows[0].ask_peak_bytes == pytest.approx(measured["peak"], rel=0.15)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lychee_memory_gate_layers", "two", "lychee_memory_gate_layers: expected a whole number"),
        ("lychee_memory_window", [64], "lychee_memory_window: expected a whole number above 0"),
        ("lychee_memory_templates", {"updates": "x"}, "expected texts named update, answer, no_me"),
        (
            "lychee_memory_templates",
            {"update": 3},
            "expected texts named update, answer, no_memory",
        ),
    ],
)
def test_what_loading_refuses_is_refused(folder_of, field, value, message):
    with pytest.raises(LycheeError, match=message):
        estimate_bank(folder_of(QWEN | {field: value}), 1000)
