# SPDX-License-Identifier: Apache-2.0
"""Texts encoded piece by piece: the ids and characters of the whole text at once."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import lychee.tokenizer as module
from lychee.errors import CheckpointError
from lychee.memory_model import SHIPPED_MODEL
from lychee.tokenizer import TextTokenizer

ODDITIES = (
    "plain words of a sentence. ", "1234567 and 12,345.67; ", "naïve façade – “quoted” ",
    "中文字符也要切分。", "👩‍👩‍👧 e\u0301 ", "\n\n", "    ", "\t\t\r\n", "don't WON'T ", "x" * 40,
    "<|end|>",
)  # fmt: skip


def mixed_text(pieces: int) -> str:
    return "".join(random.Random(3).choices(ODDITIES, k=pieces))


@pytest.fixture(scope="module")
def shipped():
    return TextTokenizer.from_folder(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def without_words():
    """A tokenizer that sees a text as one word, spaces included, as that of Llama 2 does."""
    backend = Tokenizer(models.BPE(unk_token="?"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?"], show_progress=False)
    backend.train_from_iterator([mixed_text(500)], trainer)
    backend.pre_tokenizer = None
    return TextTokenizer(backend)


@pytest.mark.parametrize("name", ["shipped", "without_words"])
@pytest.mark.parametrize("length", [module.PIECE, module.PIECE + 1, 3 * module.PIECE])
def test_pieces_give_what_the_whole_text_gives(name, length, request):
    tokenizer = request.getfixturevalue(name)
    text = mixed_text(length // 8)[:length]
    assert len(text) == length
    whole = tokenizer.backend.encode(text, add_special_tokens=False)
    ids, spans = tokenizer.encode_with_offsets(text)
    assert ids.tolist() == whole.ids == tokenizer.encode(text)
    assert list(spans) == whole.offsets


def test_no_more_than_a_piece_is_encoded_at_once(shipped):
    longest = []

    class Counting:
        def encode(self, text, **options):
            longest.append(len(text))
            return shipped.backend.encode(text, **options)

    TextTokenizer(Counting()).encode_with_offsets(mixed_text(20_000))
    assert len(longest) > 3
    assert max(longest) == module.PIECE


def test_a_text_without_joints_is_encoded_in_one_go(shipped, monkeypatch):
    """Pieces of one endless word can be cut in different ways."""
    monkeypatch.setattr(module, "PIECE", 1009)
    monkeypatch.setattr(module, "OVERLAP", 101)
    text = "abcdefg" * 2000
    whole = shipped.backend.encode(text, add_special_tokens=False)
    ids, spans = shipped.encode_with_offsets(text)
    assert ids.tolist() == whole.ids
    assert list(spans) == whole.offsets


def test_an_empty_text_has_no_tokens(shipped):
    ids, spans = shipped.encode_with_offsets("")
    assert len(ids) == len(spans) == 0


def test_limits_in_the_tokenizers_file_do_not_cut_texts(shipped, tmp_path):
    shipped.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    limits = {
        "truncation": {
            "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0
        }
    }  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | limits))
    text = "a sentence of more than eight tokens, as texts are"
    assert TextTokenizer.from_folder(tmp_path).encode(text) == shipped.encode(text)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_named(shipped, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected to write it, got: No sp"):
        shipped.save(tmp_path)
