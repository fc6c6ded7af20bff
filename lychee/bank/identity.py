# SPDX-License-Identifier: Apache-2.0
"""Tells which model a bank was made by: a bank means nothing to any other model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lychee.config import MemoryConfig
from lychee.decoder import Decoder
from lychee.errors import BankMismatchError
from lychee.weights import HEAD, IGNORED, open_safetensors, tensor_files

if TYPE_CHECKING:
    from lychee.memory_model import LycheeMemory

# Values of each tensor that are hashed, spread evenly: training changes all of them, and whole
# tensors of a large model would take a minute.
SAMPLED = 1024
# Fields of ModelConfig that do not change what is computed.
IRRELEVANT = ("max_position_embeddings", "eos_token_ids", "bos_token_id", "pad_token_id")
# What of MemoryConfig a bank's pages depend on.
GEOMETRY = ("window", "chunk", "ratio", "param", "cut", "margin")


@dataclass(frozen=True)
class ModelIdentity:
    """A model's name, for people, and the fingerprint that decides."""

    name: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[:12]})"


def identify(decoder: Decoder) -> ModelIdentity:
    """Name and fingerprint of a decoder with its memory parameters.

    Where the parameters are those of the folder they came from, the folder's stored values count,
    so that the fingerprint is the same whatever dtype they were loaded as.
    """
    config = decoder.config
    settings = {k: v for k, v in asdict(config).items() if k not in IRRELEVANT}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    loaded = decoder.folder is not None and not any(p._version for p in decoder.parameters())
    tensors = stored_tensors(decoder) if loaded else sorted(decoder.state_dict().items())
    for name, tensor in tensors:
        if name != HEAD and not IGNORED.fullmatch(name):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(sample(tensor))
    name = f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}"
    return ModelIdentity(decoder.folder.resolve().name if loaded else name, digest.hexdigest())


def stored_tensors(decoder: Decoder) -> Iterable[tuple[str, Tensor]]:
    """The tensors of the decoder's folder in the order of their names, mapped, not read."""
    files = tensor_files(decoder.folder)
    opened = {path: open_safetensors(path) for path in set(files.values())}
    for name in sorted(files):
        yield name, opened[files[name]].get_tensor(name)


def sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    count = min(len(flat), SAMPLED)
    places = torch.linspace(0, len(flat) - 1, count, dtype=torch.float64).long()
    values = flat[places.to(flat.device)].cpu().contiguous()
    return values.view(torch.uint8).numpy().tobytes()


def check_match(
    where: object, memory: MemoryConfig, identity: ModelIdentity, model: LycheeMemory
) -> None:
    """Raise BankMismatchError unless a bank, made so and by that model, is one of `model`'s."""
    differing = [n for n in GEOMETRY if getattr(memory, n) != getattr(model.memory, n)]
    if differing:
        expected, got = (
            ", ".join(f"{name} {getattr(side, name)}" for name in differing)
            for side in (model.memory, memory)
        )
        raise BankMismatchError(
            f"{where}: expected a bank of {expected} as the model's, got {got}",
            "load the model with the bank's settings, or build the bank anew",
        )
    if identity.fingerprint != model.identity.fingerprint:
        raise BankMismatchError(
            f"{where}: expected a bank of the model {model.identity}, got one of {identity}"
        )
