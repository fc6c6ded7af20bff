# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the command's tests: a small random model folder, a text, and a way to run it."""

import io
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lychee import cli
from lychee.config import MemoryConfig, ModelConfig
from lychee.decoder import Decoder
from lychee.tokenizer import END, TextTokenizer
from lychee.weights import save_decoder

ROOT = Path(__file__).resolve().parents[2]


def make_text(sentences):
    """Sentences over 120 invented words, most of which become tokens of their own."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(4, 6))) for _ in range(120)]
    return " ".join(
        " ".join(draw.choices(words, k=10)).capitalize() + "." for _ in range(sentences)
    )


@pytest.fixture(scope="session")
def text():
    return make_text(300)


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory):
    """A dozen chunks."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(text[:2500])
    return path


@pytest.fixture(scope="session")
def book_file(text, tmp_path_factory):
    """Long enough to hold words for facts."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(text)
    return path


def word_tokenizer(text):
    """Byte-level BPE of 800 tokens, in which most of the text's words are one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return TextTokenizer(backend)


@pytest.fixture(scope="session")
def model_folder(text, tmp_path_factory):
    """A random Qwen2 of two layers with window 64 and ratio 4, notes and answers of 6 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer(text)
    tokenizer.save(folder)
    memory = MemoryConfig(
        window=64, chunk=128, ratio=4, param=("q", "k", "v"), size=6, answer=6, question=128
    )
    raw = {
        "model_type": "qwen2",
        "vocab_size": tokenizer.backend.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.id_of(END),
    } | memory.to_dict()
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_dict(raw), memory.param)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3)
    save_decoder(folder, decoder, raw)
    return folder


@pytest.fixture
def run():
    """Run `lychee` with arguments; the completed process with its output as text."""

    def run_command(*arguments, **options):
        command = [sys.executable, "-m", "lychee", *map(str, arguments)]
        options = {"cwd": ROOT, "capture_output": True, "timeout": 120, "text": True} | options
        return subprocess.run(command, **options)

    return run_command


@pytest.fixture
def invoke(monkeypatch, capfd):
    """Run `lychee` in this process, for speed; its exit code, output and errors.

    What the command does not catch reaches the test as the exception it is.
    """

    def run_here(*arguments, input=None):
        monkeypatch.setattr(sys, "argv", ["lychee", *map(str, arguments)])
        if input is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input)))
        status = cli.run()
        captured = capfd.readouterr()
        return SimpleNamespace(status=status, out=captured.out, errors=captured.err)

    return run_here


@pytest.fixture
def answer_of(invoke):
    """Run a command that must succeed; the JSON object it prints."""

    def run_for_json(*arguments, **options):
        result = invoke(*arguments, "--json", **options)
        assert result.status == 0, result.errors
        return json.loads(result.out)

    return run_for_json


@pytest.fixture
def refuse(invoke):
    """Run a command that must fail with one line; the line without its prefix."""

    def run_refused(*arguments, **options):
        result = invoke(*arguments, **options)
        assert (result.status, result.out) == (2, ""), result.errors
        lines = result.errors.splitlines()
        assert len(lines) == 1, result.errors
        assert lines[0].startswith("lychee: error: ")
        return lines[0].removeprefix("lychee: error: ")

    return run_refused


@pytest.fixture
def start():
    """Start `lychee` with arguments; processes still running at the end of the test are ended."""
    started = []
    # A test run in the background ignores Ctrl-C, and so would what it starts.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start_command(*arguments, **options):
        command = [sys.executable, "-m", "lychee", *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=ROOT, **options))
        return started[-1]

    yield start_command
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
    signal.signal(signal.SIGINT, previous)
