# SPDX-License-Identifier: Apache-2.0
"""Numbers recorded from the authors' released code, reproduced case by case.

LYCHEE_ORACLE names the folder of recorded cases; without it the folder beside the project is used.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lychee.bank import PAGE_TOKENS, Chunk, MemoryBank
from lychee.compressor import Compressor
from lychee.config import MemoryConfig
from lychee.generate import Sampling, probabilities
from lychee.prompts import PromptTemplate, ReadingPrompts
from lychee.reading import ReadingLoop
from lychee.reasoner import Reasoner
from lychee.weights import load_decoder, read_config

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "oracle"
ORACLE = Path(os.environ.get("LYCHEE_ORACLE", BESIDE))
CASES = sorted(p.stem for p in ORACLE.glob("r*.json"))
KV_TOLERANCE = 5e-5
LOGIT_TOLERANCE = 2e-4

pytestmark = pytest.mark.skipif(not CASES, reason=f"no recorded cases in {ORACLE}")


@dataclass
class Case:
    """One recorded case and a decoder that loaded its weights as a released checkpoint."""

    record: dict
    tensors: dict[str, torch.Tensor]
    decoder: torch.nn.Module
    memory: MemoryConfig


@pytest.fixture(params=CASES)
def case(request, tmp_path) -> Case:
    record = json.loads((ORACLE / f"{request.param}.json").read_text())
    raw = record["config"] | {"model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(load_file(ORACLE / record["weights"]), tmp_path / "model.safetensors")
    memory = MemoryConfig.from_dict(raw, chunk=record["chunk"], size=record["loop"]["memory_size"])
    memory = MemoryConfig(**vars(memory) | {"answer": record["loop"]["max_new_tokens"]})
    raw = read_config(tmp_path)
    decoder, trained = load_decoder(tmp_path, raw, memory, device="cpu", dtype=torch.float32)
    assert trained
    return Case(record, load_file(ORACLE / f"{request.param}.safetensors"), decoder, memory)


@torch.inference_mode()
def compress(case: Case, ids: torch.Tensor, mask: torch.Tensor) -> MemoryBank:
    """A bank whose chunk b is row b of `ids`; a row of padding only has no memory tokens."""
    # A bank needs no more of its model, and a recorded case has no tokenizer to make one.
    bank = MemoryBank(SimpleNamespace(decoder=case.decoder, memory=case.memory))
    count = -(-case.memory.slots // PAGE_TOKENS)
    pages = [bank.pages.allocate(count) for _ in ids]
    for length, row in zip(mask.sum(1).tolist(), pages, strict=True):
        used = -(-length // case.memory.ratio)
        bank.chunks.append(Chunk(0, 0, 0, length, used, row[: -(-used // PAGE_TOKENS)]))
    Compressor(case.decoder).run(
        ids,
        bank.pages.sink(pages),
        ratio=case.memory.ratio,
        window=case.memory.window,
        mask=None if bool(mask.all()) else mask.bool(),
    )
    return bank


def test_compressed_keys_and_values(case):
    bank = compress(case, case.tensors["text_ids"], case.tensors["text_mask"])
    valid = case.tensors["kv_mask"].bool()
    for layer in range(case.decoder.config.num_hidden_layers):
        for index, name in enumerate("kv"):
            recorded = case.tensors[f"{name}.{layer}"].transpose(1, 2)
            for row, chunk in enumerate(bank.chunks):
                # [pages, Hkv, P, D] -> [tokens, Hkv, D]
                stored = (
                    bank.pages.kv[list(chunk.pages), layer, :, index].transpose(1, 2).flatten(0, 1)
                )
                stored = stored[: chunk.memory_tokens]
                expected = recorded[row][valid[row]]
                assert stored.shape == expected.shape
                torch.testing.assert_close(stored, expected, atol=KV_TOLERANCE, rtol=0)


@torch.inference_mode()
def test_prompt_and_step_logits(case):
    decoder, tensors = case.decoder, case.tensors
    bank = compress(case, tensors["text_ids"], tensors["text_mask"])
    pages = bank.page_table([[row] for row in range(len(bank))])
    prompt_mask = tensors["prompt_mask"].bool()
    width, steps = tensors["prompt_ids"].shape[1], tensors["step_ids"].shape[1]
    cache = decoder.new_cache(len(bank), width + steps)
    slots = tensors["kv_mask"].shape[1]
    valid = torch.cat((prompt_mask, torch.ones(len(bank), steps, dtype=torch.bool)), dim=1)

    def step(ids, length):
        # The released code counts padding in positions.
        positions = torch.arange(length, length + ids.shape[1])[None] + slots
        hidden = decoder(
            ids,
            positions=positions,
            max_position=slots + width + steps,
            cache=cache,
            pages=pages,
            valid=valid[:, : length + ids.shape[1]],
        )
        return decoder.logits(hidden)

    logits = step(tensors["prompt_ids"], 0)
    torch.testing.assert_close(
        logits[prompt_mask], tensors["prompt_logits"][prompt_mask], atol=LOGIT_TOLERANCE, rtol=0
    )
    for index in range(steps):
        logits = step(tensors["step_ids"][:, index : index + 1], width + index)
        recorded = tensors["step_logits"][:, index : index + 1]
        torch.testing.assert_close(logits, recorded, atol=LOGIT_TOLERANCE, rtol=0)


@torch.inference_mode()
def test_logits_without_memory(case):
    ids, mask = case.tensors["prompt_ids"], case.tensors["prompt_mask"].bool()
    positions = torch.arange(ids.shape[1])[None]
    hidden = case.decoder(ids, positions=positions, max_position=ids.shape[1], valid=mask)
    recorded = case.tensors["noctx_logits"]
    torch.testing.assert_close(
        case.decoder.logits(hidden)[mask], recorded[mask], atol=LOGIT_TOLERANCE, rtol=0
    )


def recorded_template(raw: dict) -> PromptTemplate:
    names = {"prompt": "question", "memory": "memory"}
    sections = [(names[k], ids) for k, ids in zip(raw["keywords"], raw["sections"], strict=True)]
    return PromptTemplate(sections, raw["last"])


def recorded_prompts(loop: dict) -> ReadingPrompts:
    stop = loop["eos_token_id"]
    stop = frozenset(stop if isinstance(stop, list) else [stop])
    update, answer = recorded_template(loop["update"]), recorded_template(loop["final"])
    return ReadingPrompts(update, answer, loop["no_memory_tokens"], stop)


def padded_pieces(case: Case):
    """The loop's text cut into chunks as the released code does, with masks."""
    ids, mask = case.tensors["loop_text_ids"], case.tensors["loop_text_mask"]
    missing = -ids.shape[1] % case.memory.chunk
    ids = torch.nn.functional.pad(ids, (0, missing))
    mask = torch.nn.functional.pad(mask, (0, missing))
    return zip(ids.split(case.memory.chunk, 1), mask.split(case.memory.chunk, 1), strict=True)


def test_recurrent_loop(case):
    """Working memory after every turn and the answers, token for token."""
    loop = case.record["loop"]
    reasoner = Reasoner(case.decoder, recorded_prompts(loop), case.memory, padded_positions=True)
    mask = case.tensors["loop_question_mask"].bool()
    rows = zip(case.tensors["loop_question_ids"], mask, strict=True)
    questions = [ids[keep].tolist() for ids, keep in rows]
    notes = [list(loop["no_memory_tokens"]) for _ in questions]
    turns = 0
    for ids, valid in padded_pieces(case):
        live = valid.any(1).nonzero()[:, 0].tolist()
        if not live:
            continue
        bank = compress(case, ids[live], valid[live])
        pages = bank.page_table([[row] for row in range(len(live))])
        new = reasoner.update([questions[row] for row in live], [notes[row] for row in live], pages)
        for row, written in zip(live, new, strict=True):
            notes[row] = written
        assert notes == loop["memory_after_turn"][turns]
        turns += 1
    assert turns == len(loop["memory_after_turn"])
    answers = reasoner.answer(questions, notes)
    pad = loop["pad_token_id"]
    for question, answer, recorded in zip(
        questions, answers, case.tensors["loop_output"].tolist(), strict=True
    ):
        expected = [token for token in recorded if token != pad]
        assert [t for t in question + answer if t != pad] == expected


def test_single_rows_through_the_bank(case):
    """A row alone, its whole text in one bank, read by the product's own loop."""
    loop = case.record["loop"]
    if len(case.tensors["loop_text_ids"]) > 1:
        pytest.skip("rows of a padded batch see other positions than rows alone")
    reasoner = Reasoner(case.decoder, recorded_prompts(loop), case.memory)
    pieces = [pair for pair in padded_pieces(case) if bool(pair[1].any())]
    bank = compress(case, torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces]))
    seen = []
    question = case.tensors["loop_question_ids"][0].tolist()
    notes = ReadingLoop(reasoner, bank).run([question], lambda event: seen.append(event.notes))
    assert [[memory] for memory in seen] == loop["memory_after_turn"]
    assert notes == [seen[-1]]


@pytest.mark.skipif(not (ORACLE / "sampling.safetensors").exists(), reason="no sampling record")
def test_sampling_distributions():
    recorded = load_file(ORACLE / "sampling.safetensors")
    settings = json.loads((ORACLE / "index.json").read_text())["sampling"]["settings"]
    for index, setting in enumerate(settings):
        if setting["temperature"] == 0:
            # Greedy here; the released code silently takes temperature 1.
            assert Sampling(**setting).greedy
            setting = setting | {"temperature": 1.0}
        ours = probabilities(recorded["logits"], Sampling(**setting))
        torch.testing.assert_close(ours, recorded[f"probs.{index}"], atol=1e-6, rtol=0)
