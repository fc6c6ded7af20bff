# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause, each with one line: what is wrong, what was expected, what to do."""

from __future__ import annotations


class LycheeError(Exception):
    """Base of every error caused by what the user gave, not by a fault of this project.

    Args:
        message: "<thing>: expected <what>, got <value>".
        advice: what to do about it; the class's own advice if not given.

    The text is always one line, so the command line can print it as it is.
    """

    advice = ""

    def __init__(self, message: str, advice: str | None = None):
        super().__init__(message)
        if advice is not None:
            self.advice = advice

    def __str__(self) -> str:
        text = f"{self.args[0]}; {self.advice}" if self.advice else self.args[0]
        return " ".join(text.split())


class InputError(LycheeError):
    """A document or question that cannot be read, is empty, or is too long."""


class CheckpointError(LycheeError):
    """A model folder that is missing, incomplete, or whose files do not fit each other."""

    advice = "name a complete Hugging Face model folder: config.json, *.safetensors, tokenizer.json"


class UnsupportedModelError(LycheeError):
    """A model this project would compute wrongly, refused by name with the reason."""

    advice = "choose a dense Qwen2, Qwen2.5, Qwen3 or Llama 3 model with full attention"


class MemoryConfigError(LycheeError):
    """Memory settings that contradict each other, the model, or a saved memory."""

    advice = "change the option, or the lychee_memory_* fields in the model's config.json"


class BankError(LycheeError):
    """A bank on disk that is missing, damaged, of another format, or cannot be written."""


class BankMismatchError(BankError):
    """A bank of another model, or of another ratio, window or chunk than the model's."""

    advice = "name the model that it was built with, or build it anew"


class BankLockedError(BankError):
    """A bank that another process is writing at this moment."""

    advice = "wait until it is done; reading the bank needs no lock"


class TrainingError(LycheeError):
    """A training run that cannot go on: its loss is not a number, or its state cannot be saved."""
