# SPDX-License-Identifier: Apache-2.0
"""The model that a training run starts with: from nothing, or from a model folder."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lychee.config import MemoryConfig, ModelConfig
from lychee.data.readers import read_samples
from lychee.data.task import TaskSample
from lychee.documents import read_file
from lychee.errors import InputError
from lychee.memory_model import SHIPPED_MODEL, LycheeMemory
from lychee.tokenizer import TextTokenizer
from lychee.train.initialise import new_decoder
from lychee.train.recipe import DataSettings, Recipe
from lychee.weights import load_decoder, read_config

# Values of each frozen tensor that tell its model from others.
FINGERPRINTED = 256


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse, before any work, a folder that a run would spoil."""
    if (folder / "state.pt").exists() and not resume:
        raise InputError(
            f"{folder}: expected a folder without a run, got one with a checkpoint",
            "add --resume, or choose another folder",
        )
    if (folder / "config.json").exists():
        raise InputError(
            f"{folder}: expected a folder without a model, got one with config.json",
            "choose another folder",
        )


def find_files(folder: Path | None, patterns: tuple[str, ...]) -> list[Path]:
    """Files that a recipe names in the folder of books: in its order, each once."""
    if folder is None:
        if patterns:
            raise InputError(f"books: expected a folder that holds {patterns[0]}, got none")
        return []
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: expected a folder of texts, got {found}")
    paths: dict[Path, None] = {}
    for pattern in patterns:
        try:
            found = sorted(path for path in folder.glob(pattern) if path.is_file())
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"books: expected a name or pattern inside {folder}, got {pattern!r}"
            ) from error
        if not found:
            raise InputError(f"{folder}: expected the recipe's books, got no {pattern}")
        paths |= dict.fromkeys(found)
    return list(paths)


def load_samples(folder: Path | None, data: DataSettings | None) -> list[TaskSample]:
    """Questions from the files of [data]; InputError names the line of a broken record."""
    if data is None:
        return []
    paths = find_files(folder, data.files)
    return [sample for path in paths for sample in read_samples(path, data.format)]


def load_books(folder: Path | None, patterns: tuple[str, ...]) -> list[str]:
    """Texts that a recipe names in the folder of books; every *.txt there if it names none."""
    paths = find_files(folder, patterns or ("*.txt",) * (folder is not None))
    # With every line's end as one character, as Python reads texts.
    return [io.StringIO(read_file(path).text, newline=None).read() for path in paths]


def fingerprint(texts: list[str], samples: list[TaskSample]) -> str:
    """Tells the texts and questions of a run from others: a resumed run must have the same."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
    for sample in samples:
        digest.update(repr((sample.question, sample.answers, sample.support)).encode())
    return digest.hexdigest()


def new_model(recipe: Recipe, texts: list[str], folder: Path) -> LycheeMemory:
    """A model from nothing; its tokenizer is trained on the texts and kept in the run's folder."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = TextTokenizer.from_folder(folder)
    elif texts:
        tokenizer = TextTokenizer.train(texts, recipe.model["vocab_size"])
        tokenizer.save(folder)
    else:
        raise InputError("books: expected texts to train the new model's tokenizer on, got none")
    memory = memory_config(recipe.memory)
    raw = recipe.model | memory.to_dict()
    config = ModelConfig.from_dict(raw)
    if (size := tokenizer.backend.get_vocab_size()) > config.vocab_size:
        raise InputError(
            f"model.vocab_size: expected at least {size}, the tokens of {folder}/tokenizer.json, "
            f"got {config.vocab_size}"
        )
    if max(config.eos_token_ids) >= size:
        raise InputError(
            f"model.eos_token_id: expected one of the tokenizer's {size} tokens, "
            f"got {max(config.eos_token_ids)}"
        )
    return LycheeMemory(new_decoder(config, memory.param, recipe.seed), tokenizer, raw, memory)


@contextmanager
def no_tokenizer_left(folder: Path) -> Iterator[None]:
    """Take a new tokenizer away where the run does not begin: the next may have other texts."""
    path = folder / "tokenizer.json"
    found = path.exists()
    try:
        yield
    except BaseException:
        if not found:
            with suppress(OSError):
                path.unlink()
        raise


def folder_model(recipe: Recipe, folder: Path) -> LycheeMemory:
    """The model of a folder in float32, with the recipe's own memory settings.

    A folder that never had a memory gets projections of its own for the recipe's `param`, q, k and
    v if it names none, as copies of the ordinary ones.
    """
    raw = read_config(folder)
    own = MemoryConfig.from_dict(raw)
    settings = recipe.memory
    if "lychee_memory_window" not in raw:
        settings = {"param": ["q", "k", "v"]} | settings
    memory = memory_config(settings, own)
    decoder, trained = load_decoder(folder, raw, memory)
    model = LycheeMemory(decoder.train(), TextTokenizer.from_folder(folder), raw, memory)
    model.trained = trained
    return model


def memory_config(settings: dict[str, Any], own: MemoryConfig | None = None) -> MemoryConfig:
    """[memory] of a recipe, over what a model folder says."""
    values = dict(settings)
    if "param" in values:
        values["param"] = tuple(values["param"])
    if own is not None and "window" in values and "chunk" not in values:
        values["chunk"] = max(own.chunk, values["window"])
    try:
        return MemoryConfig(**values) if own is None else replace(own, **values)
    except TypeError as error:
        raise InputError(f"memory: expected fields of the memory, got: {error}") from error


def starting_model(
    recipe: Recipe, texts: list[str], folder: Path, start: Path | None
) -> LycheeMemory:
    """The model that `start` or the recipe asks for, in float32 and ready for training.

    Args:
        recipe: says where to start unless `start` does.
        texts: to train a new model's tokenizer on.
        folder: of the run.
        start: model folder; refused beside a recipe with [model].
    """
    torch.manual_seed(recipe.seed)
    if start is not None and recipe.model is not None:
        raise InputError(f"start: expected none for a recipe with [model], got {start}")
    if recipe.model is not None:
        return new_model(recipe, texts, folder)
    if start is None and recipe.start is None:
        raise InputError("recipe: expected [model], start or --start DIR to start from, got none")
    chosen = start if start is not None else Path(recipe.start)
    shipped = start is None and recipe.start == "shipped"
    return folder_model(recipe, SHIPPED_MODEL if shipped else chosen)


def identity(model: LycheeMemory) -> dict[str, Any]:
    """The decoder's shape and the memory's own projections, which a checkpoint must agree with."""
    return dict(vars(model.decoder.config)) | {"memory_param": model.memory.param}


def frozen_fingerprint(modules: nn.Module) -> str:
    """Tells frozen weights, which no checkpoint holds, from those of another start."""
    digest = hashlib.sha256()
    for name, parameter in modules.named_parameters():
        if not parameter.requires_grad:
            start = parameter.detach().flatten()[:FINGERPRINTED].float().cpu()
            digest.update(name.encode() + start.numpy().tobytes())
    return digest.hexdigest()
