# SPDX-License-Identifier: Apache-2.0
"""Episodes from files of questions: what supports an answer is always among the chunks."""

import json
import random

import pytest
from small_run import small_run, write_recipe

from lychee.data.file_episodes import EncodedSample, FileEpisodes, encode_samples
from lychee.data.task import TaskSample, split_of
from lychee.errors import InputError
from lychee.train.rl import Reinforcement


def sample(number, length, support, split="train"):
    """A text of numbers that occur in no other one."""
    text = list(range(number * 1000, number * 1000 + length))
    return EncodedSample(text, [number], f"answer {number}", support, split)


def test_long_texts_keep_the_chunks_that_support_the_answer():
    samples = [sample(1, 95, [(12, 15), (58, 62)]), sample(2, 93, [(90, 93)])]
    drawn = FileEpisodes(samples, 4, 10, "train", random.Random(0))
    for _ in range(30):
        batch = drawn.draw(1)
        (question,) = batch.questions
        (own,) = [s for s in samples if s.question == question.ids]
        assert question.answer == own.answer
        chunks = batch.chunks[0]
        assert chunks.shape == (4, 10)
        held = set(chunks.flatten().tolist())
        assert all(set(own.text[start:stop]) <= held for start, stop in own.support)
        assert chunks[:, 0].tolist() == sorted(chunks[:, 0].tolist())


def test_a_margin_ends_each_chunk():
    own = sample(1, 95, [(12, 15), (58, 62)])
    drawn = FileEpisodes([own], 4, 10, "train", random.Random(0), [-1, -2])
    for _ in range(20):
        (chunks,) = drawn.draw(1).chunks
        assert chunks.shape == (4, 10) and chunks[:, -2:].tolist() == [[-1, -2]] * 4
        held = set(chunks[:, :-2].flatten().tolist())
        assert all(set(own.text[start:stop]) <= held for start, stop in own.support)


def test_short_texts_go_on_with_others():
    samples = [sample(1, 13, []), sample(2, 9, [(2, 4)])]
    batch = FileEpisodes(samples, 3, 8, "train", random.Random(0)).draw(5)
    for question, chunks in zip(batch.questions, batch.chunks, strict=True):
        (own,) = [s for s in samples if s.question == question.ids]
        assert chunks.flatten()[: len(own.text)].tolist() == own.text
    assert [question.text for question in batch.questions] == list(range(5))


@pytest.mark.parametrize(
    ("text", "split"),
    [
        (sample(1, 95, []), "train"),
        (sample(1, 95, [(5, 9), (25, 26), (45, 46)]), "train"),
        (sample(1, 15, []), "test"),
    ],
    ids=["unknown support", "too much support", "other split"],
)
def test_texts_that_cannot_be_cut_are_refused(text, split):
    with pytest.raises(InputError, match=f"expected {split} records whose supporting sentences"):
        FileEpisodes([text], 2, 10, split, random.Random(0))


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def encode_with_offsets(self, text):
        return self.encode(text), [(i, i + 1) for i in range(len(text))]


def test_samples_become_tokens_with_their_support():
    record = TaskSample("own", "One. Two. Three.", " Which? ", ("Two",), ((5, 9),))
    (encoded,) = encode_samples([record], Letters(), 10)
    assert encoded.text[slice(*encoded.support[0])] == [ord(letter) for letter in "Two."]
    assert encoded.question == [ord(letter) for letter in "Which?"]
    assert encoded.split == split_of(" Which? ")
    with pytest.raises(InputError, match="own: question: expected at most 5 tokens, got 6"):
        encode_samples([record], Letters(), 5)


RECIPE = """
evaluate_every = 1
evaluated_texts = 2
dump_every = 1

[data]
files = ["questions.jsonl"]
format = "own"

[memory]
size = 4
answer = 3

[[stage]]
steps = 1
texts = 2
questions = 1
group = 2
chunks = 2
facts = [1, 1]
learning_rate = [1e-4, 1e-4]
"""


def test_a_file_trains_by_reinforcement(tmp_path, books):
    small_run(tmp_path / "first", books).export()
    words = (books / "book.txt").read_text().split()[:400]
    with (tmp_path / "questions.jsonl").open("w") as file:
        for place in range(40):
            fields = {"context": " ".join(words[place:][:60]), "question": words[place] + "?"}
            file.write(json.dumps(fields | {"answers": [words[place + 3]]}) + "\n")
    recipe = write_recipe(tmp_path, RECIPE)
    run, start = tmp_path / "run", tmp_path / "first" / "model"
    Reinforcement.train(recipe, run, books=tmp_path, start=start)
    asked = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(asked) == 2
    for line in asked:
        assert split_of(line["question"]) == "train"
        assert line["expected"] in words
    assert (run / "evaluations.jsonl").is_file()
