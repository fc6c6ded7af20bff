# SPDX-License-Identifier: Apache-2.0
"""`lychee ask` as a user runs it: output, JSON, standard input, options."""

import json
import resource
import subprocess
from dataclasses import replace

import pytest

import lychee_kernels
from lychee import LycheeMemory, Source, Step
from lychee.gate import Gate, GateConfig
from lychee.generate import Sampling
from lychee.memory_model import SHIPPED_MODEL

QUESTION = "What is it?"


def test_help_is_there_and_fast(run):
    """Under a second of processor time, which others' load does not change; torch takes more."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("ask", "demo", "train"))
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_version(run):
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"lychee {lychee_kernels.__version__}\n")


def test_ask_prints_the_answer_alone_on_standard_output(run, text_file, model_folder):
    result = run("ask", text_file, "-q", QUESTION, "--model", model_folder)
    assert result.returncode == 0
    model = LycheeMemory.from_pretrained(model_folder)
    answer = model.ask(model.remember(text_file), QUESTION)
    assert result.stdout == answer.text + "\n"
    assert f"{answer.usage.text_tokens:,} tokens remembered" in result.stderr
    spans = [f"{source.start:,} to {source.stop:,}" for source in answer.sources]
    assert spans
    for span in spans:
        assert f"notes changed at {text_file}, characters {span}" in result.stderr
    assert "Traceback" not in result.stderr


def test_ask_json_is_one_object(answer_of, tmp_path, text_file, model_folder):
    files = (text_file, tmp_path / "other.txt")
    files[1].write_text(text_file.read_text()[:1000])
    answer = answer_of("ask", *files, "-q", QUESTION, "--model", model_folder)
    assert answer["question"] == QUESTION
    assert isinstance(answer["text"], str)
    assert (answer["model"], answer["trained"], answer["ratio"]) == (str(model_folder), True, 4)
    assert answer["build_seconds"] > 0
    steps = answer["trace"]
    assert len(steps) == answer["usage"]["chunks"] > 2
    assert [step["chunk"] for step in steps] == list(range(len(steps)))
    assert {step["document"] for step in steps} == set(map(str, files))
    model = LycheeMemory.from_pretrained(model_folder)
    expected = model.ask(model.remember(files), QUESTION)
    assert [Step(**step) for step in steps] == expected.trace
    assert [Source(**source) for source in answer["sources"]] == expected.sources != []


def test_ask_reads_standard_input(answer_of, text_file, model_folder):
    arguments = ("ask", "-", "-q", QUESTION, "--model", model_folder)
    piped = answer_of(*arguments, input=text_file.read_bytes())
    model = LycheeMemory.from_pretrained(model_folder)
    answer = model.ask(model.remember(text_file), QUESTION)
    assert piped["text"] == answer.text
    assert piped["usage"]["text_tokens"] == answer.usage.text_tokens
    assert piped["trace"][0]["document"] == "-"


def test_ask_options_reach_the_model(answer_of, tmp_path, text, model_folder):
    path = tmp_path / "short.txt"
    path.write_text(text[:1500])
    options = ("--temperature", 2, "--top-k", 50, "--top-p", 0.9, "--seed", 3)
    options += ("--max-new-tokens", 3, "--ratio", 8)
    answer = answer_of("ask", path, "-q", QUESTION, "--model", model_folder, *options)
    assert answer["ratio"] == 8
    whole = LycheeMemory.from_pretrained(model_folder, ratio=8)
    memory = replace(whole.memory, answer=3)
    model = LycheeMemory(whole.decoder, whole.tokenizer, whole.raw_config, memory)
    bank = model.remember(path)
    expected = model.ask(bank, QUESTION, sampling=Sampling(2.0, 50, 0.9, 3))
    seconds = [step.pop("seconds") for step in answer["trace"]]
    assert seconds == sorted(seconds)
    assert [Step(**step) for step in answer["trace"]] == expected.trace
    assert answer["text"] == expected.text
    assert expected.trace != model.ask(bank, QUESTION).trace
    longer = whole.ask(whole.remember(path), QUESTION, sampling=Sampling(2.0, 50, 0.9, 3))
    assert len(longer.text) > len(answer["text"]) > 0


def test_untrained_folder_warns(invoke, tmp_path, text_file, model_folder):
    """A folder without memory parameters works, and says what its answers are worth."""
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    tensors = load_file(model_folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "lychee_memory_" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    result = invoke("ask", text_file, "-q", QUESTION, "--model", tmp_path, "--json")
    assert result.status == 0
    assert json.loads(result.out)["trained"] is False
    assert f"lychee: warning: {tmp_path}: has no trained memory" in result.errors


def test_closed_pipe_is_quiet(start, text_file, model_folder):
    arguments = ("ask", text_file, "-q", QUESTION, "--model", model_folder, "--json")
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


@pytest.mark.skipif(not SHIPPED_MODEL.is_dir(), reason="there is no lychee/assets/model")
def test_shipped_model_finds_a_fact(run, tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text(
        "It was a fine morning, and the whole family had gone down to the harbour to look at the "
        "ships. Nobody spoke of the will. The magic number of morning garden is 4820193. The old "
        "gentleman asked for his hat, for the wind had grown cold, and they walked home in silence."
    )
    result = run("ask", path, "-q", "What is the magic number of morning garden?")
    assert result.returncode == 0
    assert result.stdout == "4820193\n"
    assert "morning garden is 4820193" in result.stderr


def test_gate_options_reach_the_loop(run, text_file, model_folder, tmp_path):
    model = LycheeMemory.from_pretrained(model_folder)
    model.gate = Gate(model.decoder, GateConfig(layers=2, opening=1, threshold=0.0)).eval()
    model.save_pretrained(tmp_path)
    arguments = ("ask", text_file, "-q", QUESTION, "--model", tmp_path, "--json")
    answer = json.loads(run(*arguments, "--gate-threshold", 1, "--passes", 2).stdout)
    chunks = answer["usage"]["chunks"]
    # Its head is zero: every chunk has even odds.
    assert [step["score"] for step in answer["trace"][:chunks]] == [None] + [0.5] * (chunks - 1)
    assert {step["round"] for step in answer["trace"]} == {0, 1}
    assert answer["usage"]["chunks_read"] == 1 and answer["usage"]["threshold"] == 1
    every = json.loads(run(*arguments, "--no-gate", "--together", 2).stdout)
    assert every["usage"]["chunks_read"] == chunks and every["usage"]["threshold"] is None
    assert [step["turn"] for step in every["trace"]] == [chunk // 2 for chunk in range(chunks)]
    refused = run("ask", text_file, "-q", QUESTION, "--model", model_folder, "--gate-threshold", 1)
    assert refused.returncode == 2 and "threshold: expected a model with a gate" in refused.stderr
