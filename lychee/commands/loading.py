# SPDX-License-Identifier: Apache-2.0
"""What commands do before their work: import torch, load the model, say what was loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lychee.cli import leaving_at_once
from lychee.errors import InputError


def load_libraries() -> None:
    """Import what takes seconds: torch, above all."""
    with leaving_at_once():
        import lychee.memory_model  # noqa: F401


def check_question(question: str) -> None:
    """Refuse, before any work, what no tokenizer takes."""
    if not question.strip():
        raise InputError("question: expected text, got nothing")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"question: expected UTF-8 text, got {question!r}") from error


def check_bank_dtype(name: str) -> None:
    """Refuse, before the model is loaded, a dtype that no bank has."""
    from lychee.bank import DTYPES

    if name not in ("auto", *DTYPES):
        raise InputError(f"bank-dtype: expected one of {', '.join(DTYPES)}, got {name!r}")


def load_model_of(
    bank,
    folder: Path | None,
    ratio: int | None = None,
    max_new_tokens: int | None = None,
    dtype: str = "auto",
):
    """The model to ask or extend an opened bank with, set to the bank's own geometry."""
    memory = bank.memory
    if ratio not in (None, memory.ratio):
        raise InputError(
            f"ratio: expected {memory.ratio}, which {bank.path} was built with, got {ratio}"
        )
    geometry = {"window": memory.window, "chunk": memory.chunk}
    return load_model(folder, memory.ratio, max_new_tokens, dtype, **geometry)


def load_model(
    folder: Path | None,
    ratio: int | None,
    max_new_tokens: int | None = None,
    dtype: str = "auto",
    **geometry: int,
):
    """The model of a command, with a warning where it was never trained to remember."""
    from lychee.memory_model import LycheeMemory

    with leaving_at_once():
        model = LycheeMemory.from_pretrained(folder, dtype=dtype, ratio=ratio, **geometry)
    if not model.trained:
        warning = f"lychee: warning: {folder}: has no trained memory; its answers mean little"
        print(warning, file=sys.stderr, flush=True)
    if max_new_tokens is None:
        return model
    positions, memory = model.decoder.config.max_position_embeddings, model.memory
    room = positions - len(model.reasoner.prompts.answer) - memory.question - memory.size
    if max_new_tokens > room:
        raise InputError(
            f"max-new-tokens: expected at most {room}, which leave room for prompt, question and "
            f"notes in the model's {positions} positions, got {max_new_tokens}"
        )
    return model.limited(answer=max_new_tokens)


def dtype_name(model) -> str:
    """Of the weights, as `--dtype` takes it."""
    return str(model.decoder.dtype).removeprefix("torch.")


def describe(model, folder: Path | None) -> dict[str, Any]:
    """What a result was made with."""
    memory = model.memory
    return {
        "model": "shipped" if folder is None else str(folder),
        "trained": model.trained,
        "dtype": dtype_name(model),
        "ratio": memory.ratio,
        "window": memory.window,
        "chunk": memory.chunk,
    }
