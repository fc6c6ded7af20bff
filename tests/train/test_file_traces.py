# SPDX-License-Identifier: Apache-2.0
"""Training on files of questions: traces of their supporting sentences, and broken records."""

import json
import random

import pytest
from small_run import RECIPE, run_folder, write_recipe

from lychee.bank.pieces import margin_of
from lychee.data.recall import IGNORED
from lychee.errors import InputError
from lychee.train.sft import SupervisedRecipe, SupervisedTraining

DATA = """
[data]
files = ["*.jsonl"]
format = "hotpotqa"
"""
HEAD = RECIPE[: RECIPE.index("[[stage]]")].replace('["book.txt"]', "[]")
STAGE = """
[[stage]]
steps = 2
chunk = 64
batch = 4
questions = 6
learning_rate = [3e-3, 1e-3]
"""
HEAD = HEAD.replace("window = 64", "size = 60\nwindow = 64")


def records(books, count):
    """HotpotQA's form: two documents with a supporting sentence each, and one without."""
    draw = random.Random(0)
    words = sorted(set((books / "book.txt").read_text().replace(".", "").split()))
    for _ in range(count):
        documents = [
            [
                f"title{place}",
                [" ".join(draw.sample(words, draw.randint(4, 8))) + ". " for _ in range(3)],
            ]
            for place in range(3)
        ]
        facts = [[f"title{place}", draw.randrange(3)] for place in (0, 2)]
        answer = documents[2][1][facts[1][1]].split()[0]
        yield {
            "question": " ".join(draw.sample(words, 5)) + "?",
            "answer": answer,
            "context": documents,
            "supporting_facts": facts,
        }


@pytest.fixture
def folder(tmp_path, books):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps(record) for record in records(books, 12)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def new_run(tmp_path, books, folder, recipe=HEAD + DATA + STAGE):
    recipe = SupervisedRecipe.load(write_recipe(tmp_path, recipe))
    return SupervisedTraining(recipe, run_folder(tmp_path / "run", books), books=folder)


@pytest.mark.parametrize("margin", [0, 6])
def test_notes_gain_the_sentences_of_the_chunk(tmp_path, books, folder, margin):
    """Whatever the turn, new notes are the old ones and the question's sentences in the chunk."""
    recipe = (HEAD + DATA + STAGE).replace("window = 64", f"window = 64\nmargin = {margin}")
    run = new_run(tmp_path, books, folder, recipe)
    blank = margin_of(run.model)
    traces, seen = run.file_traces, set()
    prompts = {tuple(trace.question): trace for trace in traces.traces}
    for _ in range(20):
        batch = traces.batch(2, 64, 6)
        assert batch.chunks.shape == (2, 64)
        assert batch.chunks[:, 64 - margin :].tolist() == [blank] * 2
        for row, case in enumerate(batch.cases):
            chunk = batch.chunks[row // 6].tolist()
            fed = batch.turns[row].tolist()
            (trace,) = [t for q, t in prompts.items() if contains(fed, list(q))]
            target = [token for token in batch.labels[row].tolist() if token != IGNORED]
            prompt = fed[: int((batch.labels[row] != IGNORED).nonzero()[0]) + 1]
            own = contains(trace.text, chunk[:32])
            expected = []
            for ids, (start, stop) in zip(trace.sentences, trace.spans, strict=True):
                inside = own and contains(chunk, trace.text[start:stop])
                if contains(prompt, ids) or inside:
                    expected += ids
            assert target == [*(expected or run.model.reasoner.prompts.no_memory), traces.end]
            seen.add((case, own))
    assert {("found", True), ("extended", True), ("kept", True), ("kept", False)} <= seen


def contains(ids, part):
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


def test_a_file_trains_with_the_same_command(tmp_path, books, folder):
    recipe = write_recipe(tmp_path, HEAD + DATA + STAGE)
    out = run_folder(tmp_path / "run", books)
    SupervisedTraining.train(recipe, out, books=folder)
    record = json.loads((out / "metrics.jsonl").read_text())
    assert record["step"] == 2 and record["update_loss"] > 0
    assert (out / "model" / "model.safetensors").is_file()


def test_files_mix_with_generated_facts(tmp_path, books, folder):
    (folder / "book.txt").write_bytes((books / "book.txt").read_bytes())
    recipe = (HEAD + DATA + "share = 0.5\n" + STAGE).replace("books = []", 'books = ["*.txt"]')
    run = new_run(
        tmp_path, books, folder, recipe.replace("questions = 6", "questions = 6\nfacts = [1, 2]")
    )
    cases = [set(run.sample().recall.cases) for _ in range(12)]
    generated = {"absent", "replaced"}
    assert any(found & generated for found in cases)
    assert any(found <= {"found", "extended", "kept"} for found in cases)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"train.jsonl: line 13: expected JSON"),
        ('{"question": "?", "answer": "a"}', r"train.jsonl: line 13: context: expected a list"),
        (
            '{"question": "?", "answer": "a", "context": [["t", ["s."]]], "supporting_facts": []}',
            r"train.jsonl: line 13: expected supporting sentences to train on, got none",
        ),
    ],
)
def test_broken_records_are_named_by_line(tmp_path, books, folder, line, message):
    with (folder / "train.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(InputError, match=message):
        new_run(tmp_path, books, folder)


def test_records_beyond_the_limits_are_counted(tmp_path, books, folder, capsys):
    run = new_run(tmp_path, books, folder)
    lengths = sorted(sum(map(len, trace.sentences)) for trace in run.file_traces.traces)
    limit = next(length for length in lengths if length < lengths[-1])
    over = sum(length > limit for length in lengths)
    capsys.readouterr()
    recipe = HEAD + DATA + STAGE
    (tmp_path / "again").mkdir()
    new_run(tmp_path / "again", books, folder, recipe.replace("size = 60", f"size = {limit}"))
    assert f"data: {over} of 12 records exceed the limits" in capsys.readouterr().out
    (tmp_path / "never").mkdir()
    with pytest.raises(InputError, match="expected notes of at most 2 tokens"):
        new_run(tmp_path / "never", books, folder, recipe.replace("size = 60", "size = 2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('format = "hotpotqa"', 'format = "paper"'), "format: expected one of ruler_hqa"),
        (('["*.jsonl"]', "[]"), "data.files: expected names of files"),
        (("questions = 6", "questions = 6\ncontinuation = 1"), "no continuation beside"),
        (('["*.jsonl"]', '["none.json"]'), "got no none.json"),
    ],
)
def test_bad_settings(tmp_path, books, folder, change, message):
    with pytest.raises(InputError, match=message):
        new_run(tmp_path, books, folder, (HEAD + DATA + STAGE).replace(*change))
