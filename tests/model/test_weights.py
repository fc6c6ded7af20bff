# SPDX-License-Identifier: Apache-2.0
"""Model folders: what is read and what is written back."""

import pytest
import torch
from safetensors.torch import load_file
from small_folder import (
    EMBEDDING,
    MEMORY_EMBEDDING,
    RAW,
    drop_memory,
    load,
    new_decoder,
    reconfigure,
    rewrite,
    shard,
)

from lychee.errors import LycheeError
from lychee.weights import read_config, save_decoder


@pytest.fixture
def folder(tmp_path):
    """A saved model with memory parameters."""
    save_decoder(tmp_path, new_decoder(RAW), RAW)
    return tmp_path


def assert_same(decoder, other):
    expected = other.state_dict()
    assert decoder.state_dict().keys() == expected.keys()
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_keeps_every_bit(tmp_path, tied):
    raw = RAW | {"tie_word_embeddings": tied}
    decoder = new_decoder(raw)
    save_decoder(tmp_path, decoder, raw)
    loaded, trained = load(tmp_path)
    assert trained and not loaded.training
    assert_same(loaded, decoder)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert read_config(tmp_path) == raw | {"torch_dtype": "float32"}


def test_loaded_decoder_computes_and_trains(folder):
    decoder, _ = load(folder)
    ids = torch.arange(6)[None]
    decoder(ids, positions=ids, max_position=5).sum().backward()
    assert decoder.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_save_over_a_loaded_folder(folder):
    """Loaded parameters may lie in the mapped file; replacing it must not change them."""
    decoder, _ = load(folder)
    with torch.no_grad():
        decoder.model.norm.weight.fill_(3)
    expected = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    save_decoder(folder, decoder, RAW)
    again, _ = load(folder)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert_same(decoder, again)


def test_saved_files_have_ordinary_permissions(folder):
    (folder / "other").write_text("")
    expected = (folder / "other").stat().st_mode
    assert (folder / "model.safetensors").stat().st_mode == expected


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_storage_converts_to_the_requested_dtype(tmp_path, stored):
    decoder = new_decoder(RAW)
    save_decoder(tmp_path, decoder, RAW, stored)
    for dtype in (torch.float32, stored):
        loaded, _ = load(tmp_path, dtype)
        assert loaded.dtype == dtype
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, decoder.state_dict()[name].to(stored).to(dtype)), name
    assert read_config(tmp_path)["torch_dtype"] == str(stored).removeprefix("torch.")


def test_sharded_folder(folder):
    expected, _ = load(folder)
    assert set(shard(folder).values()) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    loaded, trained = load(folder)
    assert trained
    assert_same(loaded, expected)


def test_names_that_are_ignored(folder):
    """Leftovers of the released training and of old transformers versions are not read."""
    expected, _ = load(folder)

    def add(tensors):
        tensors["similarity_head.weight"] = torch.zeros(1, 32)
        tensors["similarity_head.bias"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewrite(folder, add)
    loaded, trained = load(folder)
    assert trained
    assert_same(loaded, expected)


def test_tied_folder_may_store_its_head(tmp_path):
    raw = RAW | {"tie_word_embeddings": True}
    save_decoder(tmp_path, new_decoder(raw), raw)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(48, 32)}))
    loaded, _ = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.abs().sum() > 0


@pytest.mark.parametrize("embed_init, token", [("eos", 7), ("bos", 5)])
def test_ordinary_folder_gets_untrained_memory_parameters(folder, embed_init, token):
    rewrite(folder, drop_memory)
    reconfigure(folder, lychee_memory_embed_init=embed_init)
    decoder, trained = load(folder)
    assert not trained
    state = decoder.state_dict()
    assert torch.equal(state[MEMORY_EMBEDDING], state[EMBEDDING][token : token + 1])
    copies = [name for name in state if "lychee_memory_" in name and name != MEMORY_EMBEDDING]
    assert len(copies) == 2 * (4 + 3)
    for name in copies:
        assert torch.equal(state[name], state[name.replace("lychee_memory_", "")]), name
        assert state[name].data_ptr() != state[name.replace("lychee_memory_", "")].data_ptr()


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LycheeError, match="file: expected a writable folder, got"):
        save_decoder(tmp_path / "file", new_decoder(RAW), RAW)
