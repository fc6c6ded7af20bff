# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: a fixed seed, and poisoned kernel outputs."""

import os

# Several test processes share the cores. Tests of threads set their number themselves.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Every fresh output of a compiled op is filled with NaN before the kernel runs.
os.environ["LYCHEE_POISON"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
