# SPDX-License-Identifier: Apache-2.0
"""Readers of published formats: what they take, and the place that a broken record is given."""

import json
import re
from pathlib import Path

import pytest

from lychee.data.hotpotqa import lengthened
from lychee.data.readers import FORMATS, LONGBENCH_METRICS, SUMMARISE, read_samples
from lychee.errors import InputError
from lychee.eval.metrics import METRICS

OWN_FILE = Path(__file__).with_name("ruler_hqa.json")
BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "ruler_hqa_sample.json"

HOTPOT = {
    "_id": "1",
    "question": "Which of the two mills is older?",
    "answer": "yes",
    "context": [["North Mill", ["It is old.", " It has a wheel."]], ["South Mill", ["New."]]],
    "supporting_facts": [["North Mill", 1], ["South Mill", 0], ["South Mill", 7]],
}
GOOD = {
    "ruler_hqa": {"context": "A text.", "question": "Who?", "answers": ["Ann"]},
    "hotpotqa": HOTPOT,
    "ruler_file": {"input": "A text.\nWhat is it?", "outputs": ["12"]},
    "longbench": {"context": "A text.", "input": "Who?", "answers": ["Ann"], "dataset": "qasper"},
    "own": {"context": "A text.", "question": "Who?", "answer": "Ann"},
}


def read(tmp_path, form, *records, lines=True):
    path = tmp_path / "data.jsonl"
    texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(texts) if lines else f"[{','.join(texts)}]")
    return list(read_samples(path, form))


def test_ruler_hqa_reads_both_of_its_forms():
    first, second = read_samples(OWN_FILE, "ruler_hqa")
    assert first.question == "Where was the author of The Blue Lantern born?"
    assert first.answers == ("Osterwick",) and second.answers == ("1887", "in 1887")
    assert first.context.startswith("Document 1:\nThe Blue Lantern\n")
    assert first.details["num_docs"] == 2 and first.details["place"].endswith("record 1")
    assert {first.metric, second.metric} == {"sub_em"}


@pytest.mark.skipif(not BESIDE.exists(), reason="the published sample is not beside the project")
def test_published_sample_loads():
    samples = list(read_samples(BESIDE, "ruler_hqa"))
    assert [sample.answers[0] for sample in samples[:2]] == ["Chief of Protocol", "Animorphs"]
    assert {sample.details["num_docs"] for sample in samples} == {50}
    assert all(sample.context.count("Document ") >= 50 for sample in samples)


def test_hotpotqa_marks_the_supporting_sentences(tmp_path):
    (sample,) = read(tmp_path, "hotpotqa", HOTPOT)
    assert sample.context == (
        "Document 1:\nNorth Mill\nIt is old. It has a wheel.\n\nDocument 2:\nSouth Mill\nNew."
    )
    assert [sample.context[a:b] for a, b in sample.support] == [" It has a wheel.", "New."]
    assert sample.details["missing_facts"] == 1 and sample.metric == "f1"


def test_hotpotqa_reads_columns_as_lists(tmp_path):
    columns = HOTPOT | {
        "context": {
            "title": ["North Mill", "South Mill"],
            "sentences": [["It is old.", " It has a wheel."], ["New."]],
        },
        "supporting_facts": {"title": ["North Mill", "South Mill"], "sent_id": [1, 0]},
    }
    (from_lists,), (from_columns,) = (
        read(tmp_path, "hotpotqa", record) for record in (HOTPOT, columns)
    )
    assert (from_lists.context, from_lists.support) == (from_columns.context, from_columns.support)


def hotpot_file(tmp_path):
    path = tmp_path / "hotpot.json"
    records = [
        {
            "question": f"Which mill is number {index}?",
            "answer": f"Mill {index}",
            "context": [
                [f"Mill {index}", [f"It has number {index}.", " It is old."]],
                [f"River {index}", ["It is cold. "] * 6],
            ],
            "supporting_facts": [[f"Mill {index}", 0]],
        }
        for index in range(40)
    ]
    path.write_text(json.dumps(records))
    return path


def test_hotpotqa_grows_by_documents_of_other_questions(tmp_path):
    path, count = hotpot_file(tmp_path), lambda text: len(text.split())
    made = {n: list(lengthened(path, n, count, 10, seed=0)) for n in (20, 300)}
    assert made[300] == list(lengthened(path, 300, count, 10, seed=0))
    assert made[300] != list(lengthened(path, 300, count, 10, seed=1))
    places = set()
    for length, samples in made.items():
        assert len(samples) == 10
        for index, sample in enumerate(samples):
            assert length - 18 < count(sample.context) <= length
            assert sample.context.count("Document ") == sample.details["num_docs"]
            ((start, stop),) = sample.support
            assert sample.context[start:stop] == f"It has number {index}."
            assert sample.context.count(f"\nMill {index}\n") == 1
            places.add(start // 100)
    assert len(places) > 3
    with pytest.raises(InputError, match="record 1: context: expected at least 11 tokens.* got 9"):
        list(lengthened(path, 9, count, 10, seed=0))


@pytest.mark.parametrize(
    ("prompt", "prefix", "context", "question"),
    [
        ("Read.\nOne text.\nWhat is it?", "", "Read.\nOne text.", "What is it?"),
        ("One.\nQuestion: What\nis it? It is:", " It is:", "One.", "What\nis it?"),
    ],
)
def test_ruler_prompts_are_cut_at_the_question(tmp_path, prompt, prefix, context, question):
    record = {"input": prompt, "outputs": ["a", "b"], "answer_prefix": prefix}
    (sample,) = read(tmp_path, "ruler_file", record)
    assert (sample.context, sample.question) == (context, question)
    assert sample.answers == ("a", "b") and sample.metric == "string_match_all"


def test_ruler_questions_on_documents_want_any_answer(tmp_path):
    (sample,) = read(tmp_path, "ruler_file", GOOD["ruler_file"] | {"task": "qa_1"})
    assert (sample.task, sample.metric) == ("qa_1", "string_match_part")
    # RULER's own files do not name the task; their folders do.
    for folder, metric in (("qa_2", "string_match_part"), ("niah_multivalue", "string_match_all")):
        (tmp_path / folder).mkdir()
        (sample,) = read(tmp_path / folder, "ruler_file", GOOD["ruler_file"])
        assert (sample.task, sample.metric) == (folder, metric)


def test_longbench_metrics_are_those_of_the_data_set(tmp_path):
    record = GOOD["longbench"] | {"dataset": "gov_report_e", "input": ""}
    (sample,) = read(tmp_path, "longbench", record)
    assert (sample.task, sample.metric) == ("longbench_gov_report", "rouge_l")
    assert sample.question == SUMMARISE
    assert set(LONGBENCH_METRICS.values()) <= METRICS.keys()


def test_own_records_may_name_support_and_metric(tmp_path):
    record = GOOD["own"] | {"support": [[2, 6]], "metric": "f1", "task": "mine", "answer": 7}
    (sample,) = read(tmp_path, "own", record)
    assert sample.support == ((2, 6),) and sample.context[2:6] == "text"
    assert (sample.metric, sample.task, sample.answers) == ("f1", "mine", ("7",))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("lines", [True, False])
def test_every_format_names_line_and_field_of_a_broken_record(tmp_path, form, lines):
    good = GOOD[form]
    assert len(read(tmp_path, form, good, good, lines=lines)) == 2
    place = "line 2" if lines else "record 2"
    for field in good.keys() - {"_id", "supporting_facts", "dataset"}:
        broken = {name: value for name, value in good.items() if name != field}
        with pytest.raises(InputError, match=rf"data\.jsonl: {place}: ") as caught:
            read(tmp_path, form, good, broken, lines=lines)
        assert re.search(rf"{field}.*: expected|expected the field .*{field}", str(caught.value))
    with pytest.raises(InputError, match=f"{place}: expected a JSON object, got list"):
        read(tmp_path, form, good, "[]", lines=lines)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("ruler_hqa", {"context": " "}, "context: expected non-empty text, got ' '"),
        ("ruler_hqa", {"answers": []}, "expected an answer or a list of answers, got \\[\\]"),
        ("ruler_hqa", {"question": None, "prompt": []}, "prompt: expected a chat whose last"),
        ("hotpotqa", {"supporting_facts": [["West Mill", 0]]}, "supporting_facts: expected .title"),
        ("hotpotqa", {"context": [["A", "text"]]}, r"context\[0\]: expected \[title, sentences\]"),
        ("ruler_file", {"input": "What is it?"}, "input: expected a text and, on its last line"),
        ("longbench", {"dataset": "lcc"}, "dataset: expected one of narrativeqa, .*, got 'lcc'"),
        ("own", {"metric": "bleu"}, "metric: expected one of exact_match, .*, got 'bleu'"),
        ("own", {"support": [[0, 99]]}, r"support: expected \[start, stop\] within 0 to 7"),
        ("own", {"question": 3}, "question: expected non-empty text, got 3"),
        ("own", {"question": "\ud800"}, "question: expected non-empty text, got "),
        ("own", {"answer": "\ud800"}, "answers: expected an answer or a list of answers, got "),
        ("hotpotqa", {"context": [["A", ["\ud800"]]]}, r"context\[0\]: expected \[title, sent"),
        ("own", {"metric": ["f1"]}, r"metric: expected one of exact_match, .*, got \['f1'\]"),
        ("own", {"support": 5}, "support: expected a list, got 5"),
        ("ruler_hqa", {"question": "\ud800"}, "question: expected non-empty text, got "),
        ("ruler_file", {"answer_prefix": 3}, "answer_prefix: expected text, got 3"),
        ("hotpotqa", {"supporting_facts": 3}, "supporting_facts: expected a list, got 3"),
        ("hotpotqa", {"supporting_facts": [[["A"], 0]]}, "supporting_facts: expected .title"),
    ],
)
def test_what_a_field_must_hold_is_said(tmp_path, form, change, message):
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        read(tmp_path, form, GOOD[form] | change)


def test_broken_json_and_empty_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"data\.jsonl: line 2: expected JSON, got: "):
        read(tmp_path, "own", GOOD["own"], "{'context'")
    for text in ("[" * 100_000, '{"context": ' + "1" * 5000 + "}"):
        with pytest.raises(InputError, match=r"data\.jsonl: (line 1: )?expected JSON, got: "):
            read(tmp_path, "own", text)
    with pytest.raises(InputError, match=r"data\.jsonl: expected at least one record, got none"):
        read(tmp_path, "own", "")
    with pytest.raises(InputError, match="format: expected one of ruler_hqa, .*, got 'csv'"):
        read(tmp_path, "csv", "")
