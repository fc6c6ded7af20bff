# SPDX-License-Identifier: Apache-2.0
"""The gate's passes over prompts: bounded, with the result of one pass over all of them."""

import pytest
import torch

from lychee.gate import Gate, GateConfig
from lychee.reading import ReadingLoop


@pytest.mark.parametrize("lengths", [(4, 9, 6), (5, 5, 5)], ids=["padded", "equal"])
def test_prompts_in_several_passes_give_what_one_gives(tiny_model, monkeypatch, lengths):
    gate = Gate(tiny_model.decoder, GateConfig(layers=3, tail=3)).eval()
    prompts = [list(range(10, 10 + length)) for length in lengths]
    notes = [[7, 8], [9, 11], [12, 13]]
    once = gate.prepare(prompts, notes, 8)
    monkeypatch.setattr("lychee.gate.PASS_TOKENS", 2 * (max(lengths) + 2))
    passes = []
    run = gate._pass
    monkeypatch.setattr(gate, "_pass", lambda *given: passes.append(given) or run(*given))
    parts = gate.prepare(prompts, notes, 8)
    assert [len(given[0]) for given in passes] == [2, 1]
    for name, expected in vars(once).items():
        got = getattr(parts, name)
        if name in ("keys", "values"):  # without the tail's places, which nothing has filled yet
            got, expected = ([t[:, :, :-3] for t in layers] for layers in (got, expected))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_no_prompts_are_kept_while_notes_are_written(tiny_model, prose, monkeypatch):
    """The gate's keys and values would stand beside the turn's own."""
    bank = tiny_model.remember(prose(60))
    gate = Gate(tiny_model.decoder, GateConfig(layers=2, threshold=0.0)).eval()
    loop = ReadingLoop(tiny_model.reasoner, bank, gate=gate)
    kept = []
    update = tiny_model.reasoner.update

    def watched(*given):
        kept.append(loop.prepared[1])
        return update(*given)

    monkeypatch.setattr(tiny_model.reasoner, "update", watched)
    loop.run([tiny_model.tokenizer.encode(prose(3))])
    assert kept and not any(kept)
