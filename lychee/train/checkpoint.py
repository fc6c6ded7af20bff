# SPDX-License-Identifier: Apache-2.0
"""Training state on disk; a kill at any moment leaves a whole file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lychee.errors import CheckpointError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at every moment the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: expected a training state, got: {error}") from error
