# SPDX-License-Identifier: Apache-2.0
"""Pretraining: its losses on facts and on any texts, its recipes, and starting weights."""

import json

import pytest
import torch
from small_run import RECIPE, run_folder, small_run, steps, write_recipe

from lychee.bank.pieces import margin_of
from lychee.compressor import TensorSink
from lychee.config import ModelConfig
from lychee.data.recall import IGNORED, Mixture
from lychee.decoder import rotate
from lychee.errors import InputError
from lychee.train.initialise import new_decoder
from lychee.train.pretrain import PretrainBatch, Pretraining

TEXTS = """
[[stage]]
steps = 2
chunk = 64
batch = 2
recall = 0
language = 1.0
recite = 0.5
continuation = 0.5
span = 24
learning_rate = [3e-3, 1e-3]
ratios = [2, 4]
"""
TEXT_RECIPE = RECIPE[: RECIPE.index("[[stage]]")] + TEXTS


def test_losses_are_those_of_the_first_trainer(tmp_path, books):
    """Computed with the trainer that the shipped model came from, before it became this one."""
    expected = [9.2638378, 8.6511517, 8.1586313, 8.0906315, 8.1735983, 7.8915548]
    assert steps(small_run(tmp_path / "run", books), 6) == pytest.approx(expected, rel=1e-4)


def falls(run, batch, count):
    """First and last loss of a batch that is learned over and over."""
    (optimizer,) = run.optimizers
    optimizer.param_groups[0]["lr"] = 1e-2
    losses = []
    for _ in range(count):
        loss, _ = run.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_learns_one_batch(tmp_path, books):
    """Loss of a repeated batch falls by far: gradients reach what they must."""
    run = small_run(tmp_path / "run", books)
    batch = run.sampler.batch(4, 32, 2, (1, 1), Mixture(single=1.0))
    first, last = falls(run, PretrainBatch(4, batch.chunks, batch), 40)
    assert last < 0.3 * first


@pytest.mark.parametrize("alone", ["language", "recite", "continuation"])
def test_learns_one_batch_of_text(tmp_path, books, alone):
    recipe = TEXT_RECIPE
    for name in ("language = 1.0", "recite = 0.5", "continuation = 0.5"):
        if not name.startswith(alone):
            recipe = recipe.replace(name, name.split("=")[0] + "= 0.0")
    run = small_run(tmp_path / "run", books, recipe)
    first, last = falls(run, run.sample(), 25)
    assert last < 0.6 * first


def test_every_trained_parameter_gets_a_gradient(tmp_path, books):
    run = small_run(tmp_path / "run", books)
    batch = run.sampler.batch(2, 32, 2, (1, 1), Mixture(single=1.0))
    loss, _ = run.loss(PretrainBatch(4, batch.chunks, batch))
    loss.backward()
    # Nothing reads the last layer's memory queries: its memory rows only leave keys and values.
    unread = {
        f"model.layers.2.self_attn.lychee_memory_q_proj.{part}" for part in ("weight", "bias")
    }
    missing = {name for name, p in run.decoder.named_parameters() if p.grad is None}
    assert missing == unread


def gradients(run, loss):
    run.decoder.zero_grad()
    loss.backward()
    return {
        name: p.grad.clone() for name, p in run.decoder.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_turns_of_little_loss_move_no_weight(tmp_path, books, share):
    """As if they had been left out by hand; what is counted stays as it is."""
    run = small_run(tmp_path / "run", books)
    batch = run.sampler.batch(4, 32, 6, (1, 1), Mixture(single=1.0))
    sink = TensorSink(3)
    run.compressor.run(batch.chunks, sink, ratio=4, window=32)
    read = (batch.turns, batch.labels, 8, sink.memory())
    losses, exact, hits = run.reader.row_losses(*read, torch.arange(24) // 6)
    least = losses.sort().values[int(share * 23)].item()
    expected = gradients(run, losses[losses >= least].sum() / (batch.labels != IGNORED).sum())
    sink = TensorSink(3)
    run.compressor.run(batch.chunks, sink, ratio=4, window=32)
    limit = least if share < 1 else 2 * least
    found = run.reader.turn_loss(*read[:3], sink.memory(), limit)
    assert torch.equal(found[1], exact) and torch.equal(found[2], hits)
    got = gradients(run, found[0])
    assert got.keys() == expected.keys() and len(got) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7)


def test_mixed_precision(tmp_path, books):
    """bfloat16 products: other last digits, float32 weights, and a gradient for each of them."""
    run = small_run(tmp_path / "run", books)
    expected = steps(run, 6)
    recipe = RECIPE.replace("seed = 0", 'seed = 0\nprecision = "bfloat16"')
    for name, least in (("every", ""), ("hard", "\nleast_loss = 20")):
        mixed = small_run(tmp_path / name, books, recipe.replace("\nsteps =", least + "\nsteps = "))
        losses = steps(mixed, 6)
        assert losses != expected
        if not least:
            assert losses == pytest.approx(expected, rel=5e-3)
        for (name, p), reference in zip(
            mixed.decoder.named_parameters(), run.decoder.parameters(), strict=True
        ):
            assert p.dtype == torch.float32
            assert (p.grad is None) == (reference.grad is None), name
    assert losses[-1] < losses[0]


def test_raw_states_are_the_language_models(tmp_path, books):
    """Where no memory token stands before a token, the compressor is the plain decoder."""
    run = small_run(tmp_path / "run", books)
    ids = torch.randint(0, 700, (2, 16))
    sink = TensorSink(3)
    states = run.compressor.run(ids, sink, ratio=16, window=16, hidden=True)
    expected = run.decoder(ids, positions=torch.arange(16)[None], max_position=16)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_raw_states_leave_the_memory_as_it_is(tmp_path, books):
    run = small_run(tmp_path / "run", books)
    ids = torch.randint(0, 700, (2, 64))
    memories = []
    for hidden in (False, True):
        sink = TensorSink(3)
        run.compressor.run(ids, sink, ratio=4, window=32, hidden=hidden)
        memories.append(sink.memory())
    for expected, memory in zip(*memories, strict=True):
        torch.testing.assert_close(memory, expected, rtol=1e-4, atol=1e-5)


def targets(turns, row):
    return [token for token in turns.labels[row].tolist() if token != IGNORED]


def test_recited_spans_stand_behind_their_cue(tmp_path, books):
    run = small_run(tmp_path / "run", books, TEXT_RECIPE)
    for _ in range(20):
        batch = run.sample()
        for row, chunk in enumerate(batch.chunks.tolist()):
            span = targets(batch.recite, row)
            assert len(span) == 24
            first = int((batch.recite.labels[row] != IGNORED).nonzero()[0])
            joined = batch.recite.inputs[row, first - 7 : first + 1].tolist() + span
            assert any(chunk[i : i + 32] == joined for i in range(len(chunk) - 31))


@pytest.mark.parametrize("recall", ["recall = 0", "questions = 2\nfacts = [1, 2]"])
def test_continuations_follow_the_chunk_in_its_book(tmp_path, books, recall):
    run = small_run(tmp_path / "run", books, TEXT_RECIPE.replace("recall = 0", recall))
    batch = run.sample()
    (book,) = run.books
    for row, chunk in enumerate(batch.chunks.tolist()):
        following = targets(batch.continuation, row)
        places = [i for i in range(len(book) - 24) if book[i : i + 24] == following]
        last = chunk[-4:]
        assert any(book[place - 4 : place] == last for place in places)


def test_short_texts_are_joined(tmp_path, books):
    """A folder of one's own may hold texts shorter than a chunk."""
    text = (books / "book.txt").read_text()
    folder = tmp_path / "own"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.txt").write_text(text[index * 200 : index * 200 + 200])
    recipe = write_recipe(tmp_path, TEXT_RECIPE.replace('["book.txt"]', "[]"))
    out = run_folder(tmp_path / "run", books)
    Pretraining.train(recipe, out, books=folder)
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"language_loss", "recite_loss", "continuation_loss"} <= record.keys()
    weighted = record["language_loss"] + (record["recite_loss"] + record["continuation_loss"]) / 2
    assert record["loss"] == pytest.approx(weighted, abs=1e-3)


def test_too_little_text_is_refused(tmp_path, books):
    (tmp_path / "book.txt").write_text("A few words.")
    with pytest.raises(InputError, match="expected at least 89 tokens of text, got"):
        Pretraining.train(
            write_recipe(tmp_path, TEXT_RECIPE), run_folder(tmp_path / "run", books), books=tmp_path
        )


def test_a_ratio_that_does_not_divide_the_window_is_refused(tmp_path, books):
    recipe = RECIPE.replace("chunk = 64\nbatch", "chunk = 192\nbatch").replace("[2, 4]", "[2, 3]")
    with pytest.raises(InputError, match="divisors of the window of 64 tokens, got 3"):
        small_run(tmp_path / "run", books, recipe)


def test_chunks_end_with_the_models_margin(tmp_path, books):
    recipe = RECIPE.replace("window = 64", "window = 64\nmargin = 6")
    run = small_run(tmp_path / "run", books, recipe)
    blank = margin_of(run.model)
    assert len(blank) == 6 and run.sample().chunks[:, -6:].tolist() == [blank] * 4


def test_a_margin_as_long_as_a_chunk_is_refused(tmp_path, books):
    recipe = RECIPE.replace("window = 64", "window = 64\nmargin = 8")
    recipe = recipe.replace("facts = [0, 1]", "facts = [0, 1]\nshort = 0.5")
    with pytest.raises(InputError, match="margin of 8 tokens in the shortest chunks, got 8"):
        small_run(tmp_path / "run", books, recipe)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_that_does_not_begin_leaves_no_tokenizer_of_its_own(tmp_path, books, earlier):
    """The next run in the folder may have other texts."""
    (tmp_path / "book.txt").write_text("A few words.")
    folder = tmp_path / "run"
    if earlier:
        run_folder(folder, books)
    with pytest.raises(InputError, match="expected at least 89 tokens|vocab_size"):
        Pretraining.train(write_recipe(tmp_path, TEXT_RECIPE), folder, books=tmp_path)
    assert (folder / "tokenizer.json").exists() == earlier


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
