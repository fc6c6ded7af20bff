# SPDX-License-Identifier: Apache-2.0
"""Pretraining: recipes, starting weights, learning, and resuming to the same bits."""

import json
import random
import shutil

import pytest
import torch

from lychee.config import ModelConfig
from lychee.data.recall import Mixture
from lychee.decoder import rotate
from lychee.errors import InputError
from lychee.tokenizer import TextTokenizer
from lychee.train.initialise import new_decoder
from lychee.train.pretrain import PretrainBatch, Pretraining, PretrainRecipe

RECIPE = """
seed = 0
threads = 1
warmup_steps = 2
weight_decay = 0.01
save_every = 2
log_every = 2
books = ["book.txt"]

[model]
model_type = "qwen2"
vocab_size = 700
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 4
tie_word_embeddings = true
eos_token_id = 0

[memory]
window = 64
chunk = 64
ratio = 4
param = ["q", "k", "v"]

[memory.templates]
update = "<|memory|>{memory}<|question|>{question}<|update|>"
answer = "<|memory|>{memory}<|question|>{question}<|answer|>"
no_memory = " none"

[[stage]]
steps = 2
chunk = 32
batch = 4
questions = 2
facts = [1, 1]
learning_rate = [3e-3, 3e-3]
single = 1.0

[[stage]]
steps = 4
chunk = 64
batch = 2
questions = 3
facts = [0, 1]
learning_rate = [3e-3, 1e-5]
ratios = [2, 4]
"""


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """A folder with one book of few words, each often enough to become a token."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choice(letters) for _ in range(5)) for _ in range(100)]
    text = " ".join(draw.choice(words) + draw.choice(["", "", "", "."]) for _ in range(60_000))
    folder = tmp_path_factory.mktemp("books")
    (folder / "book.txt").write_text(text)
    TextTokenizer.train([text], 700, number_repeats=0).save(folder)
    return folder


@pytest.fixture(autouse=True)
def ready_tokenizer(tmp_path, books):
    """Runs find a tokenizer and need not train one."""
    for name in ("run", "whole", "part"):
        (tmp_path / name).mkdir()
        shutil.copy(books / "tokenizer.json", tmp_path / name)


def write_recipe(folder, text=RECIPE):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def weights(folder):
    return torch.load(folder / "state.pt", weights_only=True)["weights"]


def test_resuming_gives_the_same_weights(tmp_path, books):
    recipe = PretrainRecipe.load(write_recipe(tmp_path))
    whole = Pretraining(recipe, tmp_path / "whole", books=books)
    whole.run()
    part = Pretraining(recipe, tmp_path / "part", books=books)
    for _ in range(4):
        part.train_step()
        part.step += 1
    part.save()
    del part
    Pretraining.train(tmp_path / "recipe.toml", tmp_path / "part", books=books, resume=True)
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "part")
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name


def test_losses_are_those_of_the_first_trainer(tmp_path, books):
    """Computed with the trainer that the shipped model came from, before it became this one."""
    run = Pretraining(PretrainRecipe.load(write_recipe(tmp_path)), tmp_path / "run", books=books)
    losses = []
    for _ in range(6):
        losses.append(run.train_step()["loss"])
        run.step += 1
    expected = [8.7155085, 8.2162847, 8.1011486, 8.4204702, 8.5037222, 8.2095604]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_metrics_are_logged(tmp_path, books):
    Pretraining.train(write_recipe(tmp_path), tmp_path / "run", books=books)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(record["loss"] > 0 and record["eta_s"] >= 0 for record in records)


def test_a_finished_folder_is_not_overwritten(tmp_path, books):
    Pretraining.train(write_recipe(tmp_path), tmp_path / "run", books=books)
    with pytest.raises(InputError, match="expected a folder without a run"):
        Pretraining.train(tmp_path / "recipe.toml", tmp_path / "run", books=books)


def test_learns_one_batch(tmp_path, books):
    """Loss of a repeated batch falls by far: gradients reach what they must."""
    run = Pretraining(PretrainRecipe.load(write_recipe(tmp_path)), tmp_path / "run", books=books)
    batch = run.sampler.batch(4, 32, 2, (1, 1), Mixture(single=1.0))
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-2
    losses = []
    for _ in range(40):
        loss, _ = run.loss(PretrainBatch(4, batch.chunks, batch))
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_every_trained_parameter_gets_a_gradient(tmp_path, books):
    run = Pretraining(PretrainRecipe.load(write_recipe(tmp_path)), tmp_path / "run", books=books)
    batch = run.sampler.batch(2, 32, 2, (1, 1), Mixture(single=1.0))
    loss, _ = run.loss(PretrainBatch(4, batch.chunks, batch))
    loss.backward()
    # Nothing reads the last layer's memory queries: its memory rows only leave keys and values.
    unread = {
        f"model.layers.2.self_attn.lychee_memory_q_proj.{part}" for part in ("weight", "bias")
    }
    missing = {name for name, p in run.decoder.named_parameters() if p.grad is None}
    assert missing == unread


def test_learning_rate_is_linear_within_stages(tmp_path):
    recipe = PretrainRecipe.load(write_recipe(tmp_path))
    rates = [recipe.learning_rate_at(step) for step in range(6)]
    assert rates[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert rates[4] == pytest.approx((3e-3 + 1e-5) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed = 0", "seed = "), "expected a training recipe"),
        (("steps = 2\nchunk", "chunk"), r"stage\[1\].steps: expected a value, got none"),
        (("chunk = 32", "chonk = 32"), r"stage\[1\].chonk: expected one of steps, "),
    ],
)
def test_bad_recipes(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        PretrainRecipe.load(write_recipe(tmp_path, RECIPE.replace(*change)))


def test_missing_books_are_named(tmp_path):
    with pytest.raises(InputError, match="expected the recipe's books, got no book.txt"):
        Pretraining.train(write_recipe(tmp_path), tmp_path / "run", books=tmp_path)


def test_offset_heads_look_back():
    """Head h of a fresh first layer attends most to the token h + 1 places back."""
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen2",
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "eos_token_id": 0,
        }
    )
    decoder = new_decoder(config, ("q", "k", "v"), seed=0)
    attention = decoder.model.layers[0].self_attn
    q = attention.linear("q", memory=True).bias.view(1, 4, 1, 16).expand(-1, -1, 9, -1)
    k = attention.linear("k").bias.view(1, 4, 1, 16).expand(-1, -1, 9, -1)
    cos, sin = (table[:9] for table in decoder.rope_tables(9))
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, :, 8, :8]
    assert scores.argmax(-1).tolist() == [7 - head for head in range(4)]


def test_memory_starts_as_a_copy():
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen2",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "eos_token_id": 5,
        }
    )
    decoder = new_decoder(config, ("k", "v"), seed=0)
    attention = decoder.model.layers[2].self_attn
    assert torch.equal(attention.lychee_memory_v_proj.weight, attention.v_proj.weight)
    row = decoder.model.lychee_memory_embed_tokens.weight[0]
    assert torch.equal(row, decoder.model.embed_tokens.weight[5])
