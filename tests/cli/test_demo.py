# SPDX-License-Identifier: Apache-2.0
"""`lychee demo`: facts are where it says, judged as it says, and reported whole."""

import json

import pytest

from lychee import LycheeMemory
from lychee.demo import hide_facts, make_facts, place_of, says
from lychee.memory_model import SHIPPED_MODEL


@pytest.fixture(scope="module")
def model(model_folder):
    return LycheeMemory.from_pretrained(model_folder)


def test_facts_are_different_and_of_the_text(model, text):
    facts = make_facts(model, "text", text, 40, seed=1)
    assert len({(fact.attribute, fact.key) for fact in facts}) == 40
    assert [fact.kind for fact in facts] == ["number", "word"] * 20
    assert all(word in text for fact in facts for word in fact.key.split())
    assert facts == make_facts(model, "text", text, 40, seed=1)
    assert facts != make_facts(model, "text", text, 40, seed=2)


@pytest.mark.parametrize("tokens", [1000, 60_000])
def test_hidden_facts_stand_where_they_are_said_to(model, text, tokens):
    """60,000 tokens are more than the text has."""
    facts = make_facts(model, "text", text, 6, seed=1)
    long_text, hidden = hide_facts(model, text, facts, tokens, seed=1)
    assert sorted(fact.key for fact, _ in hidden) == sorted(fact.key for fact in facts)
    total = len(model.tokenizer.encode(long_text))
    assert abs(total - tokens) <= 2 * len(facts)
    for fact, character in hidden:
        assert long_text[character:].startswith(fact.statement)
        assert long_text[character - 2 : character] == ". "
    assert [place for _, place in hidden] == sorted(place for _, place in hidden)


def test_place_is_token_and_chunk(model, text):
    facts = make_facts(model, "text", text, 6, seed=1)
    long_text, hidden = hide_facts(model, text, facts, 3000, seed=1)
    bank = model.remember(long_text)
    offsets = model.tokenizer.encode_with_offsets(long_text)[1]
    for _, character in hidden:
        token, chunk = place_of(model, bank, character)
        true_token = next(i for i, (_, stop) in enumerate(offsets) if stop > character)
        assert abs(token - true_token) <= 1
        assert bank.chunks[chunk].start <= character < bank.chunks[chunk].stop


def test_answers_are_judged_by_whole_words():
    assert says("1234567", "1234567")
    assert says("It is Amber-Lantern.", "amber-lantern")
    assert not says("11234567", "1234567")
    assert not says("amber-lantern", "amber")
    assert not says("", "amber")


def test_demo_reports_every_fact(run, book_file, model_folder):
    options = ("--text", book_file, "--model", model_folder, "--tokens", 2000, "--facts", 3)
    result = run("demo", *options, "--seed", 7, "--json")
    assert result.returncode == 0
    report = json.loads(result.stdout)
    assert (report["asked"], len(report["facts"]), report["seed"]) == (3, 3, 7)
    assert abs(report["tokens"] - 2000) < 20
    assert (report["ratio"], report["window"], report["chunk"]) == (4, 64, 128)
    for fact in report["facts"]:
        assert fact["expected"] in fact["statement"]
        assert fact["right"] == says(fact["answer"], fact["expected"])
        assert fact["chunks_read"] == report["chunks"]
        assert 0 <= fact["chunk"] < report["chunks"]
        assert 0 <= fact["token"] < report["tokens"]
        assert set(fact["changed_chunks"]) <= set(range(report["chunks"]))
    assert report["right"] == sum(fact["right"] for fact in report["facts"])
    assert report["dtype"] == "float32"
    half = json.loads(run("demo", *options, "--seed", 7, "--dtype", "bfloat16", "--json").stdout)
    assert half["dtype"] == "bfloat16"
    assert [fact["expected"] for fact in half["facts"]] == [
        fact["expected"] for fact in report["facts"]
    ]
    table = run("demo", *options, "--seed", 7)
    assert table.returncode == 0
    lines = table.stdout.splitlines()
    assert lines[-1] == f"{report['right']} of 3 right"
    words = " ".join(table.stdout.split())
    assert f"Model {model_folder}: ratio 4, window 64, chunk 128 tokens." in words
    for fact in report["facts"]:
        assert f"token {fact['token']:,}" in table.stdout


@pytest.mark.skipif(not SHIPPED_MODEL.is_dir(), reason="there is no lychee/assets/model")
def test_shipped_demo_finds_facts(run):
    """Chance is nil; the model's true rate at this length is far higher (MODEL_CARD.md)."""
    result = run("demo", "--tokens", 8192, "--facts", 6, "--seed", 1, "--json")
    assert result.returncode == 0
    report = json.loads(result.stdout)
    assert report["model"] == "shipped" and report["trained"]
    assert report["right"] >= 4, report["facts"]
