# SPDX-License-Identifier: Apache-2.0
"""LoRA training of a Hugging Face folder: a frozen base, adapters that merge to the same model."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import RECIPE, assert_same_weights, steps, weights, write_recipe

from lychee.config import ModelConfig
from lychee.decoder import Decoder
from lychee.errors import CheckpointError, InputError, MemoryConfigError
from lychee.memory_model import LycheeMemory
from lychee.train.adapters import merge_adapter_folder
from lychee.train.pretrain import Pretraining, PretrainRecipe
from lychee.weights import save_decoder

BASE = {
    "model_type": "qwen2",
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
LORA = """
[lora]
rank = 4
alpha = 8.0
targets = ["q_proj", "v_proj", "down_proj"]
"""
BEGIN, END = RECIPE.index("[model]"), RECIPE.index("[memory]")
LORA_RECIPE = RECIPE[:BEGIN] + LORA + RECIPE[END:]


def write_base(folder, books, seed=0):
    """An ordinary model folder, as it comes from a hub: nothing of a memory in it."""
    torch.manual_seed(seed)
    save_decoder(folder, Decoder(ModelConfig.from_dict(BASE)), BASE)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.lychee_memory_embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(books / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def base(books, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), books)


@pytest.fixture(scope="module")
def trained(books, base, tmp_path_factory):
    """The folder of a finished run on `base`."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = write_recipe(folder, LORA_RECIPE.replace("log_every = 2", 'export = "float32"'))
    Pretraining.train(recipe, folder / "run", books=books, start=base)
    return folder / "run"


def test_only_adapters_and_memory_are_trained(tmp_path, books, base):
    run = Pretraining(
        PretrainRecipe.load(write_recipe(tmp_path, LORA_RECIPE)),
        tmp_path / "run",
        books=books,
        start=base,
    )
    before = {name: p.detach().clone() for name, p in run.decoder.named_parameters()}
    steps(run, 3)
    changed = {n for n, p in run.decoder.named_parameters() if not torch.equal(p, before[n])}
    assert all(".adapter." in name or "lychee_memory_" in name for name in changed)
    adapters = {name for name in before if ".adapter." in name}
    assert len(adapters) == 3 * 3 * 2 and adapters <= changed
    own = {f"model.layers.0.self_attn.lychee_memory_{x}_proj.weight" for x in "qkv"}
    assert own | {"model.lychee_memory_embed_tokens.weight"} <= changed


def test_a_checkpoint_holds_no_frozen_weights(trained):
    assert all(".adapter." in name or "lychee_memory_" in name for name in weights(trained))


def test_the_merged_folder_is_an_ordinary_model(trained, base):
    merged = load_file(trained / "model" / "model.safetensors")
    started = load_file(base / "model.safetensors")
    targets = ("q_proj", "v_proj", "down_proj")
    for name, tensor in started.items():
        adapted = any(f".{target}.weight" in name for target in targets)
        assert torch.equal(merged[name], tensor) == (not adapted), name
    assert LycheeMemory.from_pretrained(trained / "model").trained


def test_base_and_adapter_merge_to_the_trained_model(tmp_path, trained, base):
    merge_adapter_folder(base, trained / "adapter", tmp_path, torch.float32)
    expected = load_file(trained / "model" / "model.safetensors")
    merged = load_file(tmp_path / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name
    config = (tmp_path / "config.json").read_text()
    assert config == (trained / "model" / "config.json").read_text()


def test_merging_takes_the_folder_of_the_run(tmp_path, base, trained):
    merge_adapter_folder(base, trained, tmp_path / "out", torch.float32)
    assert (tmp_path / "out" / "config.json").is_file()
    with pytest.raises(CheckpointError, match="expected the folder of a LoRA run, got none; name"):
        merge_adapter_folder(base, tmp_path, tmp_path / "second", torch.float32)


def test_resuming_gives_the_same_weights(tmp_path, books, base, trained):
    recipe = PretrainRecipe.load(write_recipe(tmp_path, LORA_RECIPE))
    part = Pretraining(recipe, tmp_path / "part", books=books, start=base)
    steps(part, 4)
    part.save()
    Pretraining.train(
        tmp_path / "recipe.toml", tmp_path / "part", books=books, start=base, resume=True
    )
    assert_same_weights(tmp_path / "part", trained)


def test_another_base_is_refused(tmp_path, books, trained):
    other = write_base(tmp_path / "other", books, seed=1)
    recipe = write_recipe(tmp_path, LORA_RECIPE)
    with pytest.raises(CheckpointError, match="start: frozen_weights: expected .* got '"):
        Pretraining.train(recipe, trained, books=books, start=other, resume=True)


def test_an_adapter_of_another_shape_is_refused(tmp_path, books, trained):
    config = ModelConfig.from_dict(BASE | {"hidden_size": 48, "num_attention_heads": 6})
    other = tmp_path / "other"
    save_decoder(other, Decoder(config), BASE | {"hidden_size": 48, "num_attention_heads": 6})
    shutil.copy(books / "tokenizer.json", other)
    with pytest.raises(CheckpointError, match="expected"):
        merge_adapter_folder(other, trained / "adapter", tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("rank = 4", "rank = 0"), InputError, "lora.rank: expected at least 1, got 0"),
        (("rank = 4", "rank = 400"), MemoryConfigError, "rank: expected 1 to 32"),
        (('"q_proj"', '"w_proj"'), MemoryConfigError, "targets: expected projections .*w_proj"),
        (("rank = 4", "ranks = 4"), InputError, "lora.ranks: expected one of rank, alpha, targets"),
    ],
)
def test_bad_settings(tmp_path, books, base, change, error, message):
    recipe = write_recipe(tmp_path, LORA_RECIPE.replace(*change))
    with pytest.raises(error, match=message):
        Pretraining.train(recipe, tmp_path / "run", books=books, start=base)
