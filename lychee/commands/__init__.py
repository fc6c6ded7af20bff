# SPDX-License-Identifier: Apache-2.0
"""What `lychee` can do: one module per group of commands, each registered by importing it.

Modules that import torch are imported inside the commands, so that help comes at once.
"""

from lychee.commands import ask, bank, demo, evaluate, machine, reproduce, trace, training  # noqa: F401
from lychee.commands.apps import Aborted, UsageProblem, app, bench, train

__all__ = ["Aborted", "UsageProblem", "app", "bench", "train"]
