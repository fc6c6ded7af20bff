# SPDX-License-Identifier: Apache-2.0
"""A run so small that a test can afford it: its recipe, its book, its tokenizer."""

import random
import shutil

import torch

from lychee.tokenizer import TextTokenizer
from lychee.train.pretrain import Pretraining, PretrainRecipe

MODEL = """
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
"""

RECIPE = f"""
seed = 0
threads = 1
warmup_steps = 2
weight_decay = 0.01
save_every = 2
log_every = 2
books = ["book.txt"]
{MODEL}
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

GATE_RECIPE = f"""
seed = 0
save_every = 2
log_every = 2
books = ["book.txt"]
held_out = 0.3
validation = 40
least_recall = 0.9
export = "float32"

{MODEL}

[gate]
layers = 3
tail = 4
opening = 1
rank = 4

[[stage]]
steps = 4
chunk = 64
batch = 3
questions = 8
facts = [0, 3]
learning_rate = [5e-3, 1e-4]
"""


def write_recipe(folder, text=RECIPE):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def write_books(folder):
    """One book of few words, each often enough to become a token, and its tokenizer."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choice(letters) for _ in range(5)) for _ in range(100)]
    text = " ".join(draw.choice(words) + draw.choice(["", "", "", "."]) for _ in range(6_000))
    (folder / "book.txt").write_text(text)
    TextTokenizer.train([text], 700, number_repeats=0).save(folder)


def run_folder(folder, books):
    """A folder in which a run finds its tokenizer and need not train one."""
    folder.mkdir()
    shutil.copy(books / "tokenizer.json", folder)
    return folder


def small_run(folder, books, recipe=RECIPE):
    """A run of the recipe in `folder`, not begun."""
    path = write_recipe(folder.parent, recipe)
    return Pretraining(PretrainRecipe.load(path), run_folder(folder, books), books=books)


def steps(run, count):
    """Losses of the next `count` steps."""
    losses = []
    for _ in range(count):
        losses.append(run.train_step()["loss"])
        run.step += 1
    return losses


def weights(folder):
    return torch.load(folder / "state.pt", weights_only=True)["weights"]


def assert_same_weights(folder, expected):
    got, expected = weights(folder), weights(expected)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
