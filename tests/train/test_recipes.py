# SPDX-License-Identifier: Apache-2.0
"""Recipes: what their stages give, and every field that is unknown, mistyped or contradictory."""

import pytest
from small_run import RECIPE, small_run, write_recipe

from lychee.config import TEMPLATES, MemoryConfig
from lychee.data import texts
from lychee.errors import InputError, LycheeError
from lychee.prompts import DEFAULTS
from lychee.train.pretrain import PretrainRecipe
from lychee.train.sft import SupervisedRecipe


def test_learning_rate_is_linear_within_stages(tmp_path):
    recipe = PretrainRecipe.load(write_recipe(tmp_path))
    rates = [recipe.learning_rate_at(step) for step in range(6)]
    assert rates[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert rates[4] == pytest.approx((3e-3 + 1e-5) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed = 0", "seed = "), "expected a training recipe"),
        (("seed = 0", "seeed = 0"), "recipe.toml: seeed: expected one of seed, .*stage, got this"),
        (("seed = 0", "seed = 0.5"), "seed: expected a whole number, got 0.5"),
        (("seed = 0", 'start = "shipped"'), "start: expected none beside"),
        (("threads = 1", "threads = 0"), "threads: expected at least 1, got 0"),
        (("[memory]", "[lora]\nrank = 2\n[memory]"), "lora: expected a model folder"),
        (("steps = 2\nchunk", "chunk"), r"stage\[1\].steps: expected a value, got none"),
        (("chunk = 32", "chonk = 32"), r"stage\[1\].chonk: expected one of steps, "),
        (("seed = 0", "seed = -1"), "seed: expected 0 or more and less than"),
        (("warmup_steps = 2", "warmup_steps = -2"), "warmup_steps: expected 0 or more, got -2"),
        (
            ("seed = 0", 'precision = "float16"'),
            "precision: expected one of float32, bfloat16, got",
        ),
        (("warmup_steps = 2", "clip = 0.0"), "clip: expected a norm above 0, got 0.0"),
        (("warmup_steps = 2", "betas = [0.9, 1.0]"), r"betas: expected .* got \[0.9, 1.0\]"),
        (
            ("weight_decay = 0.01", "weight_decay = nan"),
            "weight_decay: expected 0 or more, got nan",
        ),
        (("[3e-3, 3e-3]", "[3e-3, -1]"), r"stage\[1\].learning_rate: expected numbers of at least"),
        (
            ("vocab_size", "vocab"),
            "recipe.toml: model.vocab: expected one of model_type, .* got this",
        ),
        (
            ("hidden_size = 32", 'hidden_size = "a"'),
            "model.hidden_size: expected a whole number abo",
        ),
        (("eos_token_id = 0\n", ""), "model.eos_token_id: expected the token that ends a turn"),
        (("window = 64", "windows = 64"), "recipe.toml: memory.windows: expected one of window, "),
        (("ratio = 4", "ratio = [2, 4]"), r"memory.ratio: expected a whole number .* got \[2, 4\]"),
        (("update =", "updates ="), "memory.templates.updates: expected one of update, answer, "),
        (('no_memory = " none"', "no_memory = 1"), "memory.templates.no_memory: expected a text"),
        (("[3e-3, 3e-3]", "[3e-3]"), r"stage\[1\].learning_rate: expected 2 values"),
        (("[3e-3, 3e-3]", '[3e-3, "x"]'), r"learning_rate\[2\]: expected a number, got 'x'"),
    ],
)
def test_bad_recipes(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        PretrainRecipe.load(write_recipe(tmp_path, RECIPE.replace(*change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("questions = 2", "questions = 0"), r"stage\[1\].questions: expected at least 1 where"),
        (("questions = 2", "questions = 2\nrecall = 0"), r"stage\[1\].recall: expected one of"),
        (("questions = 2", "questions = 2\nrecall = 0\nrecite = 1"), r"questions: expected 0"),
        (("questions = 2", "questions = 2\nrecall = -1"), "recall: expected a weight of at least"),
        (("questions = 2", "questions = -2"), r"questions: expected at least 1 where"),
        (
            ("facts = [1, 1]", "facts = [2, 1]"),
            r"facts: expected two counts from 0 up, got \[2, 1\]",
        ),
        (("single = 1.0", "single = 1.1"), "single: expected a share of 0 to 1, got 1.1"),
        (("single = 1.0", "noted = 0.9"), "noted: expected a share of 0 to 0.8, got 0.9"),
        (("single = 1.0", "least_loss = -1"), "least_loss: expected at least 0, got -1"),
        (("chunk = 32", "chunk = 34"), r"ratios: expected divisors of the chunk of 34 tokens"),
    ],
)
def test_contradictions_of_a_stage(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        PretrainRecipe.load(write_recipe(tmp_path, RECIPE.replace(*change, 1)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("hops = []", r"stage\[1\].hops: expected a weight above 0 and none below, got \[\]"),
        ("hops = [1, -1]", "hops: expected a weight above 0 and none below"),
        ("bare = 2", "bare: expected a share of 0 to 1, got 2"),
        ("worlds = -0.5", "worlds: expected a share of 0 to 1, got -0.5"),
        ("progress = 1.0", "progress: expected a share below 1, got 1.0"),
    ],
)
def test_contradictions_of_traces(tmp_path, setting, message):
    with pytest.raises(InputError, match=message):
        SupervisedRecipe.load(write_recipe(tmp_path, RECIPE.replace("single = 1.0", setting)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("vocab_size = 700", "vocab_size = 300"),
            "model.vocab_size: expected at least .* got 300",
        ),
        (
            ("eos_token_id = 0", "eos_token_id = 700"),
            "model.eos_token_id: expected one of the token",
        ),
        (
            ('"book.txt"', '"/book.txt"'),
            "books: expected a name or pattern inside .*, got '/book.txt",
        ),
        (("window = 64", "window = 48"), "chunk: expected a multiple of the window of 48 tokens"),
    ],
)
def test_what_does_not_fit_the_books_or_the_model(tmp_path, books, change, message):
    with pytest.raises(LycheeError, match=message):
        small_run(tmp_path / "run", books, RECIPE.replace(*change))


def test_prompts_of_training_on_texts_belong_to_a_checkpoint():
    """TextTurns take them from there."""
    prompts = dict.fromkeys(texts.TEMPLATES, "<|memory|>") | dict.fromkeys(DEFAULTS, "text")
    assert MemoryConfig(templates=prompts).templates.keys() == set(TEMPLATES)
