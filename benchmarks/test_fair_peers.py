# SPDX-License-Identifier: Apache-2.0
"""The baselines are fair peers: on equal shapes they prefill and decode as fast as ours does."""

import itertools
import statistics
import time

import torch
from reading import CHUNK, CUDA, make_model, make_questions, make_text, make_tokenizer

from lychee.baselines.full_context import FullContext
from lychee.baselines.memagent import MemAgent

PREFILL, DECODE, KEYS = 4096, 64, 4096  # tokens
ROUNDS = 3
ALLOWED = 0.10


def now() -> float:
    """Seconds: on a CPU of processors' time, which other processes disturb less than the clock."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ids_of(text: str) -> list[int]:
    return make_tokenizer().encode(text)


def check(benchmark, what: str, shape: str, rates: dict[str, float]) -> None:
    """Record tokens per second, and fail where a peer is not as fast as ours."""
    benchmark.extra_info |= {"equal_shapes": {"what": what, "shape": shape, "rates": rates}}
    for name, rate in rates.items():
        assert abs(rate / rates["ours"] - 1) <= ALLOWED, (name, rates)


def test_prefill_rate_is_equal(benchmark):
    """One prompt of 4,096 tokens, without any memory, up to its first token."""
    model, [question] = make_model(1, answer=1), [ids_of(make_questions(1)[0])]
    agent, full = MemAgent(model), FullContext(model)
    answer = model.reasoner.prompts.answer

    def filler(tokens):
        return ids_of(make_text(tokens))

    notes = filler(PREFILL - len(answer.render(question)))
    section = filler(PREFILL - len(agent.prompt.render(question)))
    text = filler(PREFILL - len(full.before_text))
    methods = {
        "ours": lambda: model.reasoner.answer([question], [notes]),
        "memagent": lambda: agent.update(section, [question], [[]]),
        "full_context": lambda: full.read(text),
    }
    seconds = {name: [] for name in methods}

    def one_round():
        for name, work in methods.items():
            started = now()
            work()
            seconds[name].append(now() - started)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    # Of the best round: another process on the machine slows down whoever runs beside it.
    rates = {name: PREFILL / min(costs[1:]) for name, costs in seconds.items()}
    check(benchmark, "prefill", f"{PREFILL} tokens", rates)


def test_decode_speed_is_equal(benchmark):
    """64 tokens behind as many keys: half of ours in memory pages, all of full context's."""
    model = make_model(DECODE, answer=DECODE)
    question = ids_of(make_questions(1)[0])
    chunks = KEYS // 2 // model.memory.slots
    pages = model.remember(make_text(chunks * CHUNK)).page_table([list(range(chunks))])
    agent, full = MemAgent(model), FullContext(model)
    update = model.reasoner.prompts.update
    notes = ids_of(make_text(KEYS // 2 - len(update.render(question))))
    section = ids_of(make_text(KEYS - len(agent.prompt.render(question))))
    around = len(full.before_text) + len(full.after_text.render(question))
    cache = full.read(ids_of(make_text(KEYS - around)))
    methods = {
        "ours": lambda: model.reasoner.update([question], [notes], pages),
        "memagent": lambda: agent.update(section, [question], [[]]),
        "full_context": lambda: full.answer_from(cache, [question]),
    }
    steps = {name: [] for name in methods}

    def one_round():
        for name, work in methods.items():
            steps[name].append(statistics.median(costs_of_steps(model.decoder, work)))

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    rates = {name: 1 / min(costs[1:]) for name, costs in steps.items()}
    check(benchmark, "decode", f"behind {KEYS} keys", rates)


def costs_of_steps(decoder, work) -> list[float]:
    """Seconds from each token to the next, by when the decoder is called for it."""
    stamps = []

    def note(_, arguments):
        if arguments[0].shape[1] == 1:
            stamps.append(now())

    hook = decoder.register_forward_pre_hook(note)
    try:
        work()
    finally:
        hook.remove()
    return [after - before for before, after in itertools.pairwise(stamps)]
