# SPDX-License-Identifier: Apache-2.0
"""LoRA training of a model folder: the base stays frozen, adapters and the memory are trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lychee.config import MemoryConfig
from lychee.decoder import Decoder
from lychee.errors import CheckpointError
from lychee.lora import attach, load_adapters, merge, save_adapters
from lychee.memory_model import LycheeMemory
from lychee.tokenizer import TextTokenizer
from lychee.train.recipe import LoraSettings
from lychee.weights import load_decoder, read_config, read_json

ADAPTERS, MEMORY, SETTINGS = "adapter.safetensors", "memory.safetensors", "adapter.json"


def attach_adapters(decoder: Decoder, lora: LoraSettings, seed: int) -> None:
    """Freeze all but new adapters and the memory tokens' own embedding and projections."""
    attach(decoder, lora.targets, lora.rank, lora.alpha, seed)
    for parameter in memory_parameters(decoder).values():
        parameter.requires_grad_(True)


def memory_parameters(decoder: Decoder) -> dict[str, torch.nn.Parameter]:
    """The memory tokens' own parameters, without adapters and what those stand on."""
    named = decoder.named_parameters()
    return {
        name: value
        for name, value in named
        if "lychee_memory_" in name and ".adapter." not in name and ".base." not in name
    }


def save_adapter_folder(
    folder: Path, decoder: Decoder, lora: LoraSettings, memory: MemoryConfig
) -> None:
    """Write what training changed: adapters and memory parameters, each as safetensors.

    `merge_adapter_folder` and the folder of the base give the whole model again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_adapters(folder / ADAPTERS, decoder)
    tensors = {n: p.detach().cpu().contiguous() for n, p in memory_parameters(decoder).items()}
    settings = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    try:
        save_file(tensors, folder / MEMORY, metadata={"format": "pt"})
        (folder / SETTINGS).write_text(json.dumps(settings | memory.to_dict(), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: expected a writable folder, got: {error}", "") from error


def merge_adapter_folder(base: Path, adapter: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model folder that a base folder and its trained adapter make together.

    `adapter` is the folder of the run, or the one inside that holds the adapter.

    Raises:
        CheckpointError: a file is missing or broken, or the adapter is another model's.
    """
    if not (adapter / SETTINGS).is_file():
        adapter = adapter / "adapter"
    if not (adapter / SETTINGS).is_file():
        raise CheckpointError(
            f"{adapter.parent}: expected the folder of a LoRA run, got none",
            "name the --out of a finished training with [lora]",
        )
    settings = read_json(adapter / SETTINGS)
    memory = MemoryConfig.from_dict(settings)
    raw = read_config(base)
    decoder, _ = load_decoder(base, raw, memory)
    try:
        lora = LoraSettings(settings["rank"], settings["alpha"], tuple(settings["targets"]))
        attach_adapters(decoder, lora, seed=0)
        load_adapters(adapter / ADAPTERS, decoder)
        tensors, parameters = load_file(adapter / MEMORY), memory_parameters(decoder)
        if tensors.keys() != parameters.keys():
            raise CheckpointError(f"{adapter / MEMORY}: expected this base's, got another model's")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{adapter}: expected {base}'s adapter, got: {error}", "") from error
    merge(decoder)
    tokenizer = TextTokenizer.from_folder(base)
    LycheeMemory(decoder, tokenizer, raw, memory).save_pretrained(out, dtype)
