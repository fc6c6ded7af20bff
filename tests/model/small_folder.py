# SPDX-License-Identifier: Apache-2.0
"""A small random model folder, and ways to change its files."""

import json

import torch
from safetensors.torch import load_file, save_file

from lychee.config import MemoryConfig, ModelConfig
from lychee.decoder import Decoder
from lychee.weights import load_decoder, read_config

RAW = {
    "model_type": "qwen2",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 5,
    "eos_token_id": [7, 8],
    "tie_word_embeddings": False,
    "lychee_memory_window": 16,
    "lychee_memory_ratio": [4],
    "lychee_memory_param": ["q", "k", "v", "o"],
}
LAYER = "model.layers.1.self_attn"
EMBEDDING = "model.embed_tokens.weight"
MEMORY_EMBEDDING = "model.lychee_memory_embed_tokens.weight"


def new_decoder(raw):
    decoder = Decoder(ModelConfig.from_dict(raw), MemoryConfig.from_dict(raw).param)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder


def load(folder, dtype=torch.float32):
    raw = read_config(folder)
    return load_decoder(folder, raw, MemoryConfig.from_dict(raw), device="cpu", dtype=dtype)


def rewrite(folder, change):
    """Let `change` edit the stored tensors by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard(folder):
    """Split model.safetensors in two files and an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-0000{1 + index % 2}-of-00002.safetensors"
        for index, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    write_index(folder, {"metadata": {}, "weight_map": weight_map})
    return weight_map


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_memory(tensors):
    for name in [name for name in tensors if "lychee_memory_" in name]:
        del tensors[name]
