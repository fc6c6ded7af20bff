# SPDX-License-Identifier: Apache-2.0
"""The one line that each broken model folder gives."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_folder import (
    EMBEDDING,
    LAYER,
    MEMORY_EMBEDDING,
    RAW,
    drop_memory,
    load,
    new_decoder,
    reconfigure,
    rewrite,
    shard,
    write_index,
)

from lychee.errors import CheckpointError
from lychee.weights import read_config, save_decoder


@pytest.fixture
def folder(tmp_path):
    """A saved model with memory parameters."""
    save_decoder(tmp_path, new_decoder(RAW), RAW)
    return tmp_path


def truncate(folder, name="model.safetensors", size=1000):
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])


def remove_from_shard(folder):
    weight_map = shard(folder)
    tensors = load_file(folder / weight_map[EMBEDDING])
    del tensors[EMBEDDING]
    save_file(tensors, folder / weight_map[EMBEDDING])


def remove_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def tensor_change(name, tensor):
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def removal(name):
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def config_text(text):
    return lambda folder: (folder / "config.json").write_text(text)


def config_change(**fields):
    return lambda folder: reconfigure(folder, **fields)


def delete(name):
    return lambda folder: (folder / name).unlink()


def index_change(index):
    def change(folder):
        shard(folder)
        write_index(folder, index)

    return change


def spoil(value):
    def change(tensors):
        name = min(name for name in tensors if name.endswith("q_proj.weight"))
        tensors[name][0, 0] = value

    return lambda folder: rewrite(folder, change)


BROKEN = {
    "not a number": (spoil(float("nan")), r"q_proj\.weight: expected finite numbers, got others"),
    "infinity": (spoil(float("inf")), r"q_proj\.weight: expected finite numbers, got others"),
    "no config": (delete("config.json"), r"expected a config\.json, got none"),
    "config is not JSON": (
        config_text('{"hidden'),
        r"config\.json: expected a JSON object, got: Unterminated string",
    ),
    "config is empty": (config_text(""), r"config\.json: expected a JSON object, got: Expecting"),
    "config is a list": (config_text("[]"), r"config\.json: expected a JSON object, got a list"),
    "config of text": (
        config_change(hidden_size="32"),
        r"config\.json: hidden_size: expected a whole number above 0, got '32'",
    ),
    "config of half a chunk": (
        config_change(lychee_memory_together=1.5),
        "lychee_memory_together: expected a whole number above 0, got 1.5",
    ),
    "config of a margin below nothing": (
        config_change(lychee_memory_margin=-1),
        "lychee_memory_margin: expected a whole number from 0, got -1",
    ),
    "config of zero": (
        config_change(num_attention_heads=0),
        "num_attention_heads: expected a whole number above 0, got 0",
    ),
    "config of true": (
        config_change(rope_theta=True),
        "rope_theta: expected a number above 0, got",
    ),
    "config without ratios": (
        config_change(lychee_memory_ratio=[]),
        r"lychee_memory_ratio: expected whole numbers above 0, got \[\]",
    ),
    "config of other letters": (
        config_change(lychee_memory_param="qkv"),
        "lychee_memory_param: expected a list of texts, got 'qkv'",
    ),
    "config of other ids": (
        config_change(eos_token_id="</s>"),
        "eos_token_id: expected token ids, got '</s>'",
    ),
    "config of other rope": (
        config_change(rope_scaling="llama3"),
        "rope_scaling: expected an object, got 'llama3'",
    ),
    "no weights": (
        delete("model.safetensors"),
        r"expected model\.safetensors or model\.safetensors\.index\.json, got config\.json",
    ),
    "empty weights": (
        lambda folder: truncate(folder, size=0),
        r"model\.safetensors: expected a whole safetensors file, got 0 bytes that are not",
    ),
    "truncated in the header": (
        truncate,
        r"model\.safetensors: expected a whole safetensors file, got 1000 bytes that are not",
    ),
    "truncated in the data": (
        lambda folder: truncate(folder, size=20000),
        r"model\.safetensors: expected a whole safetensors file, got 20000 bytes that are not",
    ),
    "weights are something else": (
        lambda folder: (folder / "model.safetensors").write_text("<html>not found</html>"),
        r"model\.safetensors: expected a whole safetensors file, got 22 bytes that are not",
    ),
    "missing tensor": (
        removal("model.norm.weight"),
        r"model\.norm\.weight: expected this tensor for the config's qwen2 model, got none;",
    ),
    "missing head": (
        removal("lm_head.weight"),
        r"lm_head\.weight: expected this tensor for the config's qwen2 model, got none;",
    ),
    "several missing tensors": (
        lambda folder: rewrite(
            folder, lambda t: [t.pop(f"{LAYER}.{letter}_proj.bias") for letter in "qkv"]
        ),
        r"self_attn\.k_proj\.bias: expected this tensor .*, got none \(and 2 more\);",
    ),
    "some memory tensors only": (
        removal(f"{LAYER}.lychee_memory_k_proj.weight"),
        r"layers\.1\.self_attn\.lychee_memory_k_proj\.weight: expected this tensor",
    ),
    "unexpected tensor": (
        tensor_change("model.layers.0.mlp.router.weight", torch.zeros(2)),
        r"model\.safetensors: model\.layers\.0\.mlp\.router\.weight: expected no such tensor",
    ),
    "wrong shape": (
        tensor_change(f"{LAYER}.q_proj.weight", torch.zeros(32, 24)),
        r"model\.safetensors: model\.layers\.1\.self_attn\.q_proj\.weight: expected shape "
        r"\[32, 32\] by config\.json, got \[32, 24\]",
    ),
    "wrong memory shape": (
        tensor_change(MEMORY_EMBEDDING, torch.zeros(2, 32)),
        r"lychee_memory_embed_tokens\.weight: expected shape \[1, 32\] by config\.json, got",
    ),
    "integers": (
        tensor_change("model.norm.weight", torch.zeros(32, dtype=torch.int8)),
        r"model\.norm\.weight: expected one of BF16, F16, F32, F64, got I8",
    ),
    "config of another hidden size": (
        config_change(hidden_size=64),
        r"embed_tokens\.weight: expected shape \[48, 64\] by config\.json, got \[48, 32\]",
    ),
    "config of another vocabulary": (
        config_change(vocab_size=50),
        r"embed_tokens\.weight: expected shape \[50, 32\] by config\.json, got \[48, 32\]",
    ),
    "config of another MLP": (
        config_change(intermediate_size=48),
        r"mlp\.down_proj\.weight: expected shape \[32, 48\] by config\.json, got \[32, 40\]",
    ),
    "config of more layers": (
        config_change(num_hidden_layers=3),
        r"config\.json: num_hidden_layers: expected 2 as in the weights, got 3",
    ),
    "config of fewer layers": (
        config_change(num_hidden_layers=1),
        r"config\.json: num_hidden_layers: expected 2 as in the weights, got 1",
    ),
    "config of another family": (
        config_change(model_type="qwen3", head_dim=8),
        r"k_norm\.weight: expected this tensor for the config's qwen3 model, got none \(and 3 more",
    ),
    "config of fewer memory projections": (
        config_change(lychee_memory_param=["q"]),
        r"lychee_memory_k_proj\.bias: expected no such tensor for the config's qwen2 model",
    ),
    "index is not JSON": (
        lambda folder: (shard(folder), (folder / "model.safetensors.index.json").write_text("{")),
        r"index\.json: expected a JSON object, got: Expecting",
    ),
    "index without a map": (
        index_change({"metadata": {}}),
        "weight_map: expected file names by tensor, got none",
    ),
    "index names an absent shard": (
        remove_shard,
        r"index\.json: expected its file model-00002-of-00002\.safetensors next to it, got none",
    ),
    "index names an absent tensor": (
        remove_from_shard,
        r"model-0000\d-of-00002\.safetensors: expected the tensor model\.embed_tokens\.weight",
    ),
    "truncated shard": (
        lambda folder: (shard(folder), truncate(folder, "model-00002-of-00002.safetensors")),
        r"model-00002-of-00002\.safetensors: expected a whole safetensors file, got 1000 bytes",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_gives_one_line(folder, name):
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_untrained_memory_needs_its_token(folder):
    rewrite(folder, drop_memory)
    for token, got in ((None, "None"), (48, "48"), ([], "None")):
        reconfigure(folder, eos_token_id=token)
        with pytest.raises(CheckpointError, match=f"eos_token_id: expected .* got {got}"):
            load(folder)


def test_path_that_is_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="absent: expected a model folder, got no such folde"):
        read_config(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: expected a model folder, got a file"):
        read_config(tmp_path / "file")
