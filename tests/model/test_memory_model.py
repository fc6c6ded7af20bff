# SPDX-License-Identifier: Apache-2.0
"""LycheeMemory from text to answer: chunks, banks, sources, streaming and bad input."""

import pytest
import torch

from lychee import Answer, LycheeMemory, Step
from lychee.bank import PAGE_TOKENS
from lychee.chunking import cut_chunks
from lychee.errors import BankMismatchError, CheckpointError, InputError, LycheeError
from lychee.generate import Sampling
from lychee.trace import tells, words


def test_cut_chunks_covers_everything_in_order():
    ids = list(range(103))
    for ends in (None, {7, 23, 30, 58, 59}):
        spans = cut_chunks(ids, 16, ends)
        assert [token for start, stop in spans for token in ids[start:stop]] == ids
        assert all(0 < stop - start <= 16 for start, stop in spans)


def test_cut_chunks_ends_at_sentences():
    ids = [1, 1, 1, 1, 1, 1, 9, 1, 1, 1]
    assert cut_chunks(ids, 8, {9}) == [(0, 7), (7, 10)]
    # A sentence that ends before the last quarter of a chunk does not shorten it.
    assert cut_chunks([1, 9] + [1] * 8, 8, {9}) == [(0, 8), (8, 10)]


def test_chunks_hold_their_text(tiny_model, prose):
    text = prose(300)
    bank = tiny_model.remember(text)
    assert "".join(bank.text(index) for index in range(len(bank))) == text
    assert bank.tokens == len(tiny_model.tokenizer.encode(text))
    assert all(chunk.memory_tokens == -(-chunk.tokens // 4) for chunk in bank.chunks)


def test_a_chunk_does_not_depend_on_its_neighbours(tiny_model, prose):
    """Batching and padding change nothing: the same chunk alone has the same memory."""
    bank = tiny_model.remember(prose(500))
    assert len({chunk.tokens for chunk in bank.chunks}) > 1
    for index in (0, 3, len(bank) - 1):
        alone = tiny_model.remember(bank.text(index))
        assert len(alone) == 1
        used = alone.chunks[0].memory_tokens
        assert used == bank.chunks[index].memory_tokens <= PAGE_TOKENS
        both = bank.pages.kv[bank.chunks[index].pages[0]], alone.pages.kv[0]
        mine, other = (page[:, :, :, :used] for page in both)
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=0)
        assert not alone.pages.kv[0][:, :, :, used:].any()


@pytest.mark.parametrize("ratio", [2, 8, 16])
def test_other_ratios(tiny_model, tiny_memory, prose, ratio, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    model = LycheeMemory.from_pretrained(tmp_path, ratio=ratio)
    bank = model.remember(prose(100))
    assert bank.memory_tokens == sum(-(-chunk.tokens // ratio) for chunk in bank.chunks)
    assert isinstance(model.ask(bank, "what ran high").text, str)


def test_save_and_load_gives_the_same_answer(tiny_model, prose, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    again = LycheeMemory.from_pretrained(tmp_path / "model")
    assert again.trained and again.memory == tiny_model.memory
    text = prose(200)
    first = tiny_model.ask(tiny_model.remember(text), "who came again")
    second = again.ask(again.remember(text), "who came again")
    assert [step.memory for step in first.trace] == [step.memory for step in second.trace]
    assert first.text == second.text


def test_answer_names_its_sources(tiny_model, prose):
    """Those whose reading brought a word into the notes that was still there at the end."""
    text = prose(300)
    for question in ("who came again", "what ran high", "which mast broke"):
        answer = tiny_model.ask(tiny_model.remember(text), question)
        final, told = words(answer.trace[-1].memory), []
        before = known = words(question) | {"none"}
        for step in answer.trace:
            if (words(step.memory) - before - known) & final:
                told.append(step.chunk)
            before = words(step.memory)
        assert [source.chunk for source in answer.sources] == told
        assert all(source.changed for source in answer.sources)
        assert all(source.quote == text[source.start : source.stop] for source in answer.sources)
    assert answer.usage.chunks_read == answer.usage.reads == len(answer.trace)
    assert answer.to_dict()["usage"]["text_tokens"] == answer.usage.text_tokens
    assert answer.usage.chunks_gated == 0 and answer.usage.threshold is None


def test_words_of_the_question_in_the_notes_are_no_source():
    """The first turn often only writes down what is looked for."""
    known = "What is the code of morning garden? none"
    assert not tells("none", "morning garden none", known, "morning garden 7312345")
    assert tells("morning garden none", "morning garden 7312345", known, "morning garden 7312345")
    assert not tells("morning garden none", "morning garden 999", known, "morning garden 7312345")
    assert tells(
        "Mara none", "Mara Tobin Harth none", "Who is Mara's aunt? none", "Mara Tobin Ilse"
    )


def test_stream_ends_with_what_ask_returns(tiny_model, prose):
    bank = tiny_model.remember(prose(200))
    events = list(tiny_model.stream(bank, "who came again"))
    answer = tiny_model.ask(bank, "who came again")
    assert isinstance(events[-1], Answer) and events[-1].text == answer.text
    assert [event for event in events if isinstance(event, Step)] == answer.trace
    assert "".join(event for event in events if isinstance(event, str)).strip() == answer.text


def test_stream_raises_in_the_reader(tiny_model, prose):
    with pytest.raises(InputError, match="question: expected text"):
        next(tiny_model.stream(tiny_model.remember(prose(20)), " "))


def test_several_files(tiny_model, prose, tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for seed, path in enumerate(paths):
        path.write_text(prose(80, seed=seed))
    bank = tiny_model.remember(paths)
    assert [document.name for document in bank.documents] == [str(path) for path in paths]
    assert {chunk.document for chunk in bank.chunks} == {0, 1}


def test_progress_reaches_the_total(tiny_model, prose):
    seen = []
    bank = tiny_model.remember(prose(300), progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, bank.tokens) and seen[-1] == (bank.tokens, bank.tokens)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a text file, got: No such file"),
        (b"", "expected text, got an empty document"),
        (b" \n\t", "expected text, got an empty document"),
        (b"abc\0def", "got binary data"),
        (b"caf\xe9", "expected UTF-8 text, got byte 0xe9 at 3"),
    ],
)
def test_bad_files(tiny_model, tmp_path, content, message):
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="book.txt") as error:
        tiny_model.remember(path)
    assert message in str(error.value)


def test_bad_questions(tiny_model, prose):
    bank = tiny_model.remember(prose(50))
    with pytest.raises(InputError, match="question: expected text, got nothing"):
        tiny_model.ask(bank, "  ")
    with pytest.raises(InputError, match="question: expected at most 120 tokens, got"):
        tiny_model.ask(bank, prose(200))


def test_what_is_no_bank_question_or_document_is_refused_by_name(tiny_model, prose, tmp_path):
    bank = tiny_model.remember(prose(50))
    with pytest.raises(InputError, match="bank: expected what `remember` returns, got str"):
        tiny_model.ask(prose(50), "who came")
    with pytest.raises(InputError, match="question: expected text, got NoneType"):
        tiny_model.ask(bank, None)
    with pytest.raises(InputError, match="questions: expected several texts, got one"):
        tiny_model.ask_many(bank, "who came")
    assert tiny_model.ask_many(bank, []) == []
    with pytest.raises(InputError, match="documents: expected Document, got PosixPath; read paths"):
        bank.add([tmp_path / "book.txt"])


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="device: expected cpu, as torch sees no GPU here, got"):
        LycheeMemory.from_pretrained(device="cuda")
    with pytest.raises(InputError, match="device: expected auto, cpu or cuda, got 'gpu'"):
        LycheeMemory.from_pretrained(device="gpu")


def test_a_bank_of_other_geometry_is_refused(tiny_model, prose, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    bank = LycheeMemory.from_pretrained(tmp_path, ratio=2).remember(prose(50))
    with pytest.raises(BankMismatchError, match="bank: expected a bank of ratio 4"):
        tiny_model.ask(bank, "who")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 3}, "ratio: expected a divisor of the window of 16 tokens, got 3"),
        ({"chunk": 24}, "chunk: expected a multiple of the window of 16 tokens, got 24"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"device": "meta"}, "device: expected auto, cpu or cuda, got meta"),
    ],
)
def test_bad_options(tiny_model, tmp_path, options, message):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(LycheeError, match=message):
        LycheeMemory.from_pretrained(tmp_path, **options)


def test_logits_that_are_not_finite_stop_the_answer(tiny_model, prose):
    """As of half-precision weights that overflow; an empty answer would hide it."""
    bank = tiny_model.remember(prose(60))
    norm = tiny_model.decoder.model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
        try:
            for sampling in (Sampling(), Sampling(1.0)):
                with pytest.raises(CheckpointError, match="logits: expected finite numbers"):
                    tiny_model.ask(bank, "who", sampling=sampling)
        finally:
            norm.copy_(kept)
