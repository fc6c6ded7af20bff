# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is made of: tasks by name, methods, model fingerprints, peak memory."""

from pathlib import Path

import pytest

from lychee.errors import InputError
from lychee.eval import methods
from lychee.eval.harness import fingerprint
from lychee.eval.methods import PeakMemory, make_method
from lychee.eval.records import RecordFile
from lychee.eval.tasks import Request, task_cells, task_names


def test_banks_of_another_dtype_are_made(tiny_model, prose):
    method = make_method("ours", tiny_model, bank_dtype="int8")
    (answer,) = method.answer(prose(200), ["where is the sea"])
    (whole,) = make_method("ours", tiny_model).answer(prose(200), ["where is the sea"])
    assert answer.usage.memory_bytes < 0.5 * whole.usage.memory_bytes


def test_every_installed_method_answers(tiny_model, prose):
    for name in methods.known_methods():
        method = make_method(name, tiny_model)
        questions = ["where is the sea", "who cried over the mast"]
        answers = method.answer(prose(60), questions)
        assert [answer.question for answer in answers] == questions
        assert method.build_seconds >= 0 and all(a.usage.text_tokens > 60 for a in answers)


def test_task_names_and_lengths(tiny_model):
    assert task_names("vt,needles,vt") == ["vt", "needles"]
    assert len(task_names("ruler")) == 11
    with pytest.raises(
        InputError, match="task: expected one of ruler, multihop, needles, .*, got 'qa'"
    ):
        task_names("vt,qa")
    with pytest.raises(InputError, match="expected tasks that are generated or tasks of files"):
        task_cells(["vt", "own"], [100], Request(), tiny_model.tokenizer)
    with pytest.raises(InputError, match="own: length: expected none, as texts stay as they are"):
        task_cells(["own"], [100], Request((Path("own.jsonl"),)), tiny_model.tokenizer)
    with pytest.raises(InputError, match="own: expected a data file, got none"):
        task_cells(["own"], [100], Request(), tiny_model.tokenizer)


def test_a_text_is_asked_all_its_questions(tiny_model):
    """RULER's tasks over the shipped novel: as many questions as asked for, texts shared."""
    request = Request((), 6, split=None)
    (cell,) = task_cells(["fwe"], [700], request, ShippedWords(tiny_model.tokenizer))
    assert len(list(cell.texts())) == 6
    (cell,) = task_cells(["niah_multikey_1"], [700], request, ShippedWords(tiny_model.tokenizer))
    assert [len(samples) for samples in cell.texts()] == [4, 2]


class ShippedWords:
    """Counts words as tokens, so that the novel's words are one token each."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text):
        return text.split()


def test_fingerprint_changes_with_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(200_000))
    first = fingerprint(tmp_path)
    weights.write_bytes(bytes(199_999) + b"1")
    assert fingerprint(tmp_path) != first == fingerprint_again(tmp_path, weights)


def fingerprint_again(folder, weights):
    weights.write_bytes(bytes(200_000))
    return fingerprint(folder)


def test_peak_memory_sees_what_was_used_and_freed(tiny_model):
    device = tiny_model.decoder.device
    with PeakMemory(device) as small:
        pass
    with PeakMemory(device) as large:
        block = bytearray(96 << 20)
        del block
    if small.bytes is None:
        pytest.skip("this system does not measure a process's peak")
    assert small.bytes < 16 << 20 and 90 << 20 < large.bytes < 130 << 20


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder.* got one with table.md"):
        RecordFile(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
