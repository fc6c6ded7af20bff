# SPDX-License-Identifier: Apache-2.0
"""Adapters: they start as nothing, train alone, merge into the same function, and load again."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from lychee.compressor import Compressor, TensorSink
from lychee.errors import CheckpointError, MemoryConfigError
from lychee.lora import LowRank, adapters, attach, load_adapters, merge, save_adapters

TARGETS = ("q_proj", "v_proj", "lychee_memory_k_proj", "down_proj", "gate_proj")


def read(decoder, ids):
    return decoder(ids, positions=torch.arange(ids.shape[1])[None], max_position=ids.shape[1])


def compress(decoder, ids):
    sink = TensorSink(decoder.config.num_hidden_layers)
    Compressor(decoder).run(ids, sink, ratio=4, window=16)
    return torch.stack(sink.memory())


@pytest.fixture
def ids(tiny_model):
    return torch.randint(tiny_model.decoder.config.vocab_size, (2, 32))


@pytest.fixture
def adapted(tiny_model):
    """A decoder whose adapters are far from their start."""
    decoder = copy.deepcopy(tiny_model.decoder)
    parameters = attach(decoder, TARGETS, rank=4, alpha=8.0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.2)
    return decoder


def test_adapters_start_as_nothing_and_train_alone(tiny_model, ids):
    decoder = copy.deepcopy(tiny_model.decoder)
    parameters = attach(decoder, TARGETS, rank=4, alpha=8.0)
    assert torch.equal(read(decoder, ids), read(tiny_model.decoder, ids))
    assert {id(p) for p in decoder.parameters() if p.requires_grad} == {id(p) for p in parameters}
    layers = decoder.config.num_hidden_layers
    assert len(parameters) == 2 * len(TARGETS) * layers
    (read(decoder, ids).square().sum() + compress(decoder, ids).square().sum()).backward()
    assert all(adapter.b.grad.abs().sum() > 0 for _, adapter in adapters(decoder))


def test_merging_keeps_the_function(adapted, tiny_model, ids):
    before = read(adapted, ids), compress(adapted, ids)
    assert not torch.allclose(before[0], read(tiny_model.decoder, ids), atol=1e-2)
    with torch.no_grad():
        # Without gradients the compressor multiplies by the weights directly.
        torch.testing.assert_close(compress(adapted, ids), before[1], rtol=1e-4, atol=1e-4)
    merge(adapted)
    assert not list(adapters(adapted))
    assert set(adapted.state_dict()) == set(tiny_model.decoder.state_dict())
    torch.testing.assert_close(read(adapted, ids), before[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compress(adapted, ids), before[1], rtol=1e-4, atol=1e-4)


def test_adapters_of_a_half_precision_weight_keep_their_own_precision():
    weight = torch.randn(6, 5).bfloat16()
    adapter = LowRank(5, 6, 2, 4.0)
    with torch.no_grad():
        adapter.b.normal_()
    x = torch.randn(3, 5).bfloat16()
    assert adapter(x).dtype == torch.bfloat16 and adapter.a.dtype == torch.float32
    exact = weight.double() + 2 * (adapter.b.double() @ adapter.a.double())
    assert torch.equal(adapter.merged(weight), exact.float().bfloat16())


def test_save_and_load(adapted, tiny_model, tmp_path, ids):
    save_adapters(tmp_path / "a.safetensors", adapted)
    other = copy.deepcopy(tiny_model.decoder)
    attach(other, TARGETS, rank=4, alpha=8.0, seed=5)
    load_adapters(tmp_path / "a.safetensors", other)
    assert torch.equal(read(other, ids), read(adapted, ids))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_mistakes_are_named(adapted, tiny_model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapters(path, adapted)

    def fresh(targets=TARGETS, rank=4, alpha=8.0):
        decoder = copy.deepcopy(tiny_model.decoder)
        attach(decoder, targets, rank, alpha)
        return decoder

    with pytest.raises(CheckpointError, match=r"lora_A: expected \[2, 32\], got \[4, 32\]"):
        load_adapters(path, fresh(rank=2, alpha=4.0))
    with pytest.raises(CheckpointError, match="scale: expected 1.0, got 2.0"):
        load_adapters(path, fresh(alpha=4.0))
    with pytest.raises(CheckpointError, match="down_proj.lora_A: expected none, got one"):
        load_adapters(path, fresh(("q_proj",)))
    save_file({"x": next(iter(load_file(path).values()))}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="lora_A: expected one, got none"):
        load_adapters(tmp_path / "b.safetensors", fresh())
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="expected a file of adapters"):
        load_adapters(path, fresh())
    with pytest.raises(MemoryConfigError, match="targets: .* got x_proj"):
        fresh(("q_proj", "x_proj"))
    with pytest.raises(MemoryConfigError, match="rank: expected 1 to 16 for this model, got 33"):
        fresh(("v_proj",), rank=33)
