# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own check of results: small cases of every op pass it, and wrong ones do not."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import exact  # noqa: E402
import inputs  # noqa: E402
from registry import REGISTRY  # noqa: E402

# Sizes that replace those of each op's first case.
SMALL = {
    "compress_pack": {"rows": 320, "batch": 2},
    "gated_mlp": {"rows": 9, "hidden": 16, "intermediate": 24},
    "linear": {"rows": 9, "hidden": 16, "outputs": 24},
    "select_chunks": {"chunks": 30, "budget": 4},
    "gather_chunks": {"tokens": 128, "layers": 3},
    "memory_attention": {"memory": 192, "queries": 131},
    "memory_attention_bwd": {"memory": 64, "queries": 5, "batch": 2},
}
HEADS = {"query_heads": 4, "kv_heads": 2, "head_dim": 32}


def run(op, monkeypatch, **change):
    """The float64 result, ours, and that of each peer that is not compiled."""
    monkeypatch.setattr(inputs, "cold_bytes", lambda: 1 << 16)
    entry = next(entry for entry in REGISTRY if entry.op == op)
    heads = HEADS if hasattr(entry.cases[0].shape, "query_heads") else {}
    case = replace(
        entry.cases[-1], shape=replace(entry.cases[-1].shape, **SMALL[op] | heads | change)
    )
    roles = entry.inputs(case)
    wanted = entry.exact(case, **roles["ours"][0])
    ours = entry.comparable(entry.ours(**roles["ours"][0]))
    theirs = {}
    for name, (function, role) in entry.peers.items():
        if name != "compile":
            result = function(**roles[role][0])
            theirs[name] = result if isinstance(result, tuple) else (result,)
    return wanted, ours, theirs


def accepted(*arguments):
    try:
        exact.check(*arguments)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("op", [entry.op for entry in REGISTRY])
def test_small_cases_pass_and_one_wrong_element_does_not(op, cold, monkeypatch):
    wanted, ours, theirs = run(op, monkeypatch, cold=cold)
    for name, results in theirs.items():
        assert accepted(wanted, ours, results, name)
        for i in range(len(results)):
            for mine in (True, False):
                changed = [x.detach().clone() for x in (ours if mine else results)]
                # the last layer, head and query are computed in every case
                last = changed[i][(-1,) * changed[i].dim()]
                last += changed[i].abs().max() * 0.1 if last.is_floating_point() else 3
                pair = (changed, results) if mine else (ours, changed)
                assert not accepted(wanted, *pair, name), (name, i, mine)


def test_ours_may_not_hide_behind_a_poor_peer():
    wanted = exact.Exact((torch.ones(4, dtype=torch.float64),))
    poor = torch.full((4,), 1 + 2.0**-6, dtype=torch.bfloat16)
    good = torch.ones(4, dtype=torch.bfloat16)
    assert accepted(wanted, (good,), (poor,), "peer")
    assert not accepted(wanted, (good + 2.0**-5,), (poor,), "peer")
    assert not accepted(wanted, (poor,), (good,), "peer")
    assert not accepted(wanted, (good,), (good + 2.0**-4,), "peer")
