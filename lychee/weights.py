# SPDX-License-Identifier: Apache-2.0
"""Model folders on disk: config.json and safetensors to a Decoder and back."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lychee.config import MemoryConfig, ModelConfig, as_tuple
from lychee.decoder import Decoder
from lychee.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
MEMORY_EMBEDDING = "model.lychee_memory_embed_tokens.weight"
HEAD = "lm_head.weight"
FLOATS = {"F64", "F32", "F16", "BF16"}
# Never read: the released training's leftover head, and rotary tables of old transformers versions.
IGNORED = re.compile(r"similarity_head\.(weight|bias)|.*rotary_emb\.inv_freq")

COUNT, COUNTS, SIZE = "a whole number above 0", "whole numbers above 0", "a whole number from 0"
NUMBER, IDS, TEXTS, OBJECT = "a number above 0", "token ids", "a list of texts", "an object"
# What config.json may say; fields that are absent or null are the config classes' matter.
FIELDS = {
    COUNT: (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *(f"lychee_memory_{name}" for name in ("window", "stride", "chunk", "size", "answer")),
        *(f"lychee_memory_{name}" for name in ("question", "passes", "together")),
    ),
    SIZE: ("lychee_memory_margin",),
    NUMBER: ("rms_norm_eps", "rope_theta"),
    COUNTS: ("lychee_memory_ratio",),
    IDS: ("bos_token_id", "eos_token_id", "pad_token_id"),
    TEXTS: ("lychee_memory_param",),
    OBJECT: ("rope_parameters", "rope_scaling", "lychee_memory_templates"),
}
FITS = {
    COUNT: lambda value: type(value) is int and value > 0,
    SIZE: lambda value: type(value) is int and value >= 0,
    NUMBER: lambda value: type(value) in (int, float) and 0 < value < float("inf"),
    COUNTS: lambda value: value != [] and all(map(FITS[COUNT], as_tuple(value))),
    IDS: lambda value: all(type(item) is int for item in as_tuple(value)),
    TEXTS: lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    OBJECT: lambda value: isinstance(value, dict),
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if it is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a JSON object, got: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder, its fields checked for their types."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: expected a model folder, got {got}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: expected a {CONFIG}, got none")
    raw = read_json(folder / CONFIG)
    for expected, names in FIELDS.items():
        for name in names:
            if raw.get(name) is not None and not FITS[expected](raw[name]):
                raise CheckpointError(
                    f"{folder / CONFIG}: {name}: expected {expected}, got {raw[name]!r}"
                )
    return raw


def load_decoder(
    folder: Path,
    raw: dict[str, Any],
    memory: MemoryConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Decoder, bool]:
    """Build a decoder from a model folder's safetensors, single or sharded.

    Args:
        folder: Hugging Face model folder; tensors have `transformers`' names, and the memory
            tokens' those of released checkpoints.
        raw: the folder's config.json.
        memory: says which projections memory tokens have of their own.
        device, dtype: where and as what parameters end up, whatever their stored float dtype.

    Returns:
        The decoder, and whether the folder holds trained memory parameters. Where it does not,
        memory tokens start with the ordinary projections and the EOS (or BOS) token's embedding.

    Raises:
        CheckpointError: a file or tensor is missing, broken, or does not fit the config.
        UnsupportedModelError: the config asks for what the decoder does not compute.
    """
    config = ModelConfig.from_dict(raw)
    with torch.device("meta"):
        decoder = Decoder(config, memory.param)
    shapes = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    files = tensor_files(folder)
    trained = any("lychee_memory_" in name for name in files)
    needed = {name for name in shapes if trained or "lychee_memory_" not in name}
    compare_names(folder, config, needed, files)
    tensors = {}
    for path in sorted({files[name] for name in needed}):
        names = sorted(name for name in needed if files[name] == path)
        tensors.update(read_tensors(path, {n: shapes[n] for n in names}, device, dtype))
    if not trained:
        start_memory(tensors, shapes, start_token(folder, config, memory))
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    decoder.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    decoder.cos = decoder.sin = torch.empty(0, device=device)
    decoder.folder = folder
    return decoder.eval(), trained


def save_decoder(
    folder: Path, decoder: Decoder, raw: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write model.safetensors and config.json, each to a temporary name that is then renamed.

    Args:
        folder: created if it does not exist.
        decoder: its parameters are stored as `dtype`.
        raw: config.json's fields, the `lychee_memory_*` ones included.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in decoder.state_dict().items()
        if not (name == HEAD and decoder.config.tie_word_embeddings)
    }
    # The spelling of transformers 4, which version 5 still reads.
    fields = {name: value for name, value in raw.items() if name != "dtype"}
    fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = (folder / f"{name}.part" for name in (SINGLE, CONFIG))
        save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        # safetensors makes files that only their owner may read.
        shutil.copymode(config, weights)
        os.replace(weights, folder / SINGLE)
        os.replace(config, folder / CONFIG)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: expected a writable folder, got: {error}", "") from error


def tensor_files(folder: Path) -> dict[str, Path]:
    """Every stored tensor's name and the file it is in."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return dict.fromkeys(stored_names(single), single)
    if not index.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file())) or "no files"
        raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, got {found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map: expected file names by tensor, got none")
    stored = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: expected its file {shard} next to it, got none")
        stored[shard] = stored_names(folder / shard)
    for name, shard in weight_map.items():
        if name not in stored[shard]:
            raise CheckpointError(f"{folder / shard}: expected the tensor {name}, got none")
    return {name: folder / shard for name, shard in weight_map.items()}


def stored_names(path: Path) -> set[str]:
    with open_safetensors(path) as file:
        return set(file.keys())


def open_safetensors(path: Path) -> safe_open:
    """Open a file after checking its header against its length."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, got {size} bytes that are not: {error}"
        ) from error


def compare_names(
    folder: Path, config: ModelConfig, needed: set[str], files: dict[str, Path]
) -> None:
    """Raise CheckpointError if the stored tensors are not those of the config."""
    layers = {int(m[1]) for name in files if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers and max(layers) + 1 != config.num_hidden_layers:
        raise CheckpointError(
            f"{folder / CONFIG}: num_hidden_layers: expected {max(layers) + 1} as in the weights, "
            f"got {config.num_hidden_layers}"
        )
    missing = sorted(needed - set(files))
    if missing:
        raise CheckpointError(
            f"{folder}: {missing[0]}: expected this tensor for the config's "
            f"{config.model_type} model, got none{others(missing)}"
        )
    surplus = sorted(name for name in set(files) - needed if not IGNORED.fullmatch(name))
    if config.tie_word_embeddings and HEAD in surplus:
        surplus.remove(HEAD)
    if surplus:
        raise CheckpointError(
            f"{files[surplus[0]]}: {surplus[0]}: expected no such tensor for the config's "
            f"{config.model_type} model, got one{others(surplus)}"
        )


def others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_tensors(
    path: Path, shapes: dict[str, list[int]], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read tensors of one file, one by one, each checked against its expected shape first."""
    tensors = {}
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in shapes}
        # The embedding first: its two sizes tell a wrong config best.
        for name in sorted(shapes, key=lambda name: name != EMBEDDING):
            got, stored_as = slices[name].get_shape(), slices[name].get_dtype()
            if got != shapes[name]:
                raise CheckpointError(
                    f"{path}: {name}: expected shape {shapes[name]} by {CONFIG}, got {got}"
                )
            if stored_as not in FLOATS:
                raise CheckpointError(
                    f"{path}: {name}: expected one of {', '.join(sorted(FLOATS))}, got {stored_as}"
                )
        for name in shapes:
            tensors[name] = file.get_tensor(name).to(device, dtype)
            check_finite(f"{path}: {name}", tensors[name])
    return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for numbers that every answer would be lost in."""
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name}: expected finite numbers, got others as {dtype}",
            "choose another dtype or model",
        )


def start_token(folder: Path, config: ModelConfig, memory: MemoryConfig) -> int:
    """The token whose embedding an untrained memory embedding starts from."""
    field = f"{memory.embed_init}_token_id"
    ids = config.eos_token_ids if memory.embed_init == "eos" else (config.bos_token_id,)
    if not ids or ids[0] is None or not 0 <= ids[0] < config.vocab_size:
        raise CheckpointError(
            f"{folder / CONFIG}: {field}: expected a token id below {config.vocab_size} to start "
            f"the memory embedding from, got {ids[0] if ids else None}"
        )
    return ids[0]


def start_memory(tensors: dict[str, Tensor], shapes: dict[str, list[int]], token: int) -> None:
    """Add memory parameters copied from the ordinary ones."""
    for name in shapes:
        if name == MEMORY_EMBEDDING:
            tensors[name] = tensors[EMBEDDING][token][None].clone()
        elif "lychee_memory_" in name:
            tensors[name] = tensors[name.replace("lychee_memory_", "")].clone()
