# SPDX-License-Identifier: Apache-2.0
"""What the passes of a reading cost, each measured by itself at its full shape.

    LYCHEE_BACKEND=ref python benchmarks/reading_parts.py 8 1024

prints them as JSON for 8 questions together and notes of 1,024 tokens. Sums of them are the whole
run because nothing depends on what is written; `test_time_to_answer.py` times whole runs.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from reading import CHUNK, CUDA, RATIO, ChosenGate, make_model, make_questions, make_text

from lychee.baselines.memagent import MemAgent
from lychee.generate import generate

STEPS = 8
# Chunks that the gate lets through of 128K tokens.
TOGETHER = 3


@dataclass(frozen=True)
class Parts:
    """Seconds of each pass, for all questions of a batch together."""

    build: float  # one chunk, whatever the batch
    gate_start: float  # the gate's pass over question and empty notes
    gate_prompt: float  # ... and full notes
    gate_pair: float  # one question and one chunk
    compressed_prompt: float  # reading turn up to its first token
    compressed_step: float  # one token, in the middle of the notes
    together_prompt: float  # reading turn that reads TOGETHER chunks at once
    together_step: float
    raw_prompt: float  # MemAgent's turn up to its first token
    raw_step: float
    answer: float  # the final turn

    @classmethod
    def measure(cls, batch: int, memory_tokens: int) -> "Parts":
        model = make_model(memory_tokens)
        reasoner, prompts = model.reasoner, model.reasoner.prompts
        warm_up(model)
        started = now()
        bank = model.remember(make_text(TOGETHER * CHUNK))
        build = (now() - started) / TOGETHER
        questions = [model.encode_question(text) for text in make_questions(batch)]
        notes = model.tokenizer.encode(make_text(memory_tokens))
        section = model.tokenizer.encode(make_text(MemAgent(model).section))
        turns = [prompts.update.render(question, notes) for question in questions]
        first = [prompts.update.render(question, prompts.no_memory) for question in questions]
        raw = [MemAgent(model).prompt.render(question, notes, section) for question in questions]
        pages = bank.page_table([[0]] * batch)
        together = bank.page_table([list(range(TOGETHER))] * batch, in_place=True)
        middle = memory_tokens // 2
        gate, pairs = ChosenGate(model.decoder, bank, [0]), 4 * batch

        def score():
            rows = torch.arange(pairs, device=model.decoder.device) % batch
            gate.score(prepared, rows, bank.page_table([[0]] * pairs))

        with torch.inference_mode():
            empty, full = ([ids] * batch for ids in (prompts.no_memory, notes))
            gate_start = seconds(lambda: gate.prepare(first, empty, CHUNK // RATIO))
            gate_prompt = seconds(lambda: gate.prepare(turns, full, CHUNK // RATIO))
            prepared = gate.prepare(turns, full, CHUNK // RATIO)
            return cls(
                build=build,
                gate_start=gate_start,
                gate_prompt=gate_prompt,
                gate_pair=seconds(score) / pairs,
                compressed_prompt=prompt_seconds(model, turns, pages, CHUNK // RATIO),
                compressed_step=step_seconds(model, batch, len(turns[0]) + middle, pages),
                together_prompt=prompt_seconds(model, turns, together, CHUNK // RATIO),
                together_step=step_seconds(model, batch, len(turns[0]) + middle, together),
                raw_prompt=prompt_seconds(model, raw),
                raw_step=step_seconds(model, batch, len(raw[0]) + middle),
                answer=seconds(lambda: reasoner.answer(questions, [notes] * batch)),
            )


def now() -> float:
    """On a CPU seconds of processors' time, which other processes disturb less than the clock."""
    if not CUDA:
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable) -> float:
    started = now()
    work()
    return now() - started


def warm_up(model) -> None:
    model.decoder.rope_tables(16384)
    bank = model.remember(make_text(CHUNK // 2))
    generate(model.decoder, [[0] * 64], pages=bank.page_table([[0]]), max_new_tokens=3, stop=())


def prompt_seconds(model, prompts, pages=None, first_position: int = 0) -> float:
    return seconds(
        lambda: generate(
            model.decoder, prompts, pages=pages, first_position=first_position, max_new_tokens=1,
            stop=(),
        )
    )  # fmt: skip


def step_seconds(model, batch: int, keys: int, pages=None) -> float:
    """Median seconds of one token of every row, behind so many keys."""
    decoder = model.decoder
    cache = decoder.new_cache(batch, keys + STEPS)
    for rows in (cache.k, cache.v):
        rows.normal_()
    cache.length = keys
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=decoder.device)

    def step():
        positions = torch.full_like(ids, cache.length)
        hidden = decoder(
            ids, positions=positions, max_position=keys + STEPS, cache=cache, pages=pages
        )
        decoder.logits(hidden[:, 0]).argmax(dim=-1).tolist()

    return statistics.median([seconds(step) for _ in range(STEPS)][1:])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]) if len(sys.argv) > 3 else torch.get_num_threads())
    print(json.dumps(asdict(Parts.measure(int(sys.argv[1]), int(sys.argv[2])))))
