# SPDX-License-Identifier: Apache-2.0
"""End-to-end runs of this method, MemAgent and full context: model, texts, and what is timed.

Weights are random, so nothing a run does may depend on what it writes: no token ends a turn, every
turn writes as many tokens as it may, and the gate's real scores are replaced by a fixed choice of
chunks. The costs are those of any model of that shape.
"""

import bisect
import functools
import os
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lychee.bank import MemoryBank
from lychee.bank.pages import PagePool
from lychee.baselines.full_context import FullContext
from lychee.baselines.memagent import SECTION_TOKENS, MemAgent
from lychee.config import MemoryConfig, ModelConfig
from lychee.decoder import Decoder
from lychee.gate import Gate, GateConfig
from lychee.memory_model import SHIPPED_MODEL, LycheeMemory
from lychee.reading import ReadingLoop
from lychee.tokenizer import TextTokenizer

CUDA = torch.cuda.is_available()
# A variable, not an option of pytest: peaks are measured in processes of their own.
DTYPE_NAME = os.environ.get("LYCHEE_BENCH_DTYPE", "bfloat16" if CUDA else "float32")
if DTYPE_NAME not in ("float32", "bfloat16", "float16"):
    raise ValueError(
        f"LYCHEE_BENCH_DTYPE: expected float32, bfloat16 or float16, got {DTYPE_NAME!r}"
    )
DTYPE = getattr(torch, DTYPE_NAME)
POSITIONS = 1 << 21
# 42.5M parameters.
SMALL = {
    "model_type": "qwen2",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
QWEN_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": POSITIONS,
}
CHUNK, WINDOW, RATIO = 4096, 2048, 4
QUESTION, ANSWER = 30, 128
SELECTED = 0.1  # share of the chunks that the gate lets through, at least one
MOST_TOGETHER = 8  # chunks in a turn where chosen ones are read together
MEMORY_TOKENS = (256, 512, 1024)
LENGTHS = (
    tuple(1024 * k for k in (7, 14, 28, 56, 112, 224, 448, 896, 1750))
    if CUDA
    else tuple(1024 * k for k in (8, 16, 32, 64, 128))
)
# Texts that the crossovers with full context try: whole steps, from one on.
STEP, STEPS = 16384 if CUDA else 2048, 16
SHAPES = (
    f"{'Qwen2.5-7B shape' if CUDA else '42.5M parameters'}, {DTYPE_NAME}, random weights; "
    f"chunks of {CHUNK} tokens, windows of {WINDOW}, ratio {RATIO}; sections of MemAgent "
    f"{SECTION_TOKENS}; questions of {QUESTION} tokens"
)
ABOUT = (
    f"{SHAPES}; every turn writes all its notes' tokens, every answer {ANSWER}; the gate scores "
    f"every chunk and reads {SELECTED:.0%}, at least one"
)
ABOUT_PEAKS = (
    f"{SHAPES}; ours and MemAgent take one turn with full notes and one for the answer, with room "
    "for all tokens, of which they write a few; the gate scores every chunk and reads the last one"
)


@functools.cache
def make_model(memory_tokens: int, answer: int = ANSWER) -> LycheeMemory:
    """A model whose notes and answers have so many tokens; all share one set of weights."""
    memory = MemoryConfig(
        window=WINDOW, chunk=CHUNK, ratio=RATIO, param=("q", "k", "v"), size=memory_tokens,
        answer=answer,
    )  # fmt: skip
    model = LycheeMemory(make_decoder(), make_tokenizer(), {}, memory)
    assert not model.reasoner.prompts.stop, "some token would end a turn"
    return model


@functools.cache
def make_decoder() -> Decoder:
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        decoder = Decoder(ModelConfig.from_dict(QWEN_7B if CUDA else SMALL), ("q", "k", "v"))
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return decoder.to(DTYPE).eval()


@functools.cache
def make_tokenizer() -> TextTokenizer:
    return TextTokenizer.from_folder(SHIPPED_MODEL)


@functools.cache
def words() -> list[str]:
    """Words that are one token each, with the space before them."""
    backend = make_tokenizer().backend
    texts = (backend.decode([index]) for index in range(backend.get_vocab_size()))
    return [text for text in texts if len(text) > 3 and text[0] == " " and text[1:].islower()]


def make_text(tokens: int, seed: int = 0) -> str:
    """Random words, `tokens` tokens in all."""
    text = "".join(random.Random(seed).choices(words(), k=tokens))
    assert len(make_tokenizer().encode(text)) == tokens
    return text


def make_questions(count: int) -> list[str]:
    return [make_text(QUESTION, seed=1 + index).strip() for index in range(count)]


@dataclass
class Run:
    """Seconds by the clock, and of processors' time, of the parts of one run."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    results: dict = field(default_factory=dict)

    @contextmanager
    def part(self, name: str):
        if CUDA:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if CUDA:
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - wall
        self.cpu[name] = self.cpu.get(name, 0) + time.process_time() - cpu

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_cpu(self) -> float:
        return sum(self.cpu.values())


def count_chunks(tokens: int) -> int:
    return -(-tokens // CHUNK)


def chosen_chunks(tokens: int) -> list[int]:
    """Chunks of a text that the gate lets through, spread evenly."""
    chunks = count_chunks(tokens)
    count = max(1, round(SELECTED * chunks))
    return [int((place + 0.5) * chunks / count) for place in range(count)]


class ChosenGate(Gate):
    """A gate that does all the work of scoring and then lets given chunks of a bank through.

    It knows a chunk by its first page, so the bank's tables must have its own numbers of pages.

    Raises:
        ValueError: the bank is on disk, or in other memory than the model's.
    """

    def __init__(self, decoder: Decoder, bank: MemoryBank, chosen: list[int]):
        layers = decoder.config.num_hidden_layers
        super().__init__(decoder, GateConfig(layers=layers))
        store = bank.pages
        if not isinstance(store, PagePool) or store.device != store.reader:
            raise ValueError("bank: expected pages in the model's memory, got some from elsewhere")
        first_pages = [bank.chunks[chunk].pages[0] for chunk in chosen]
        self.first_pages = torch.tensor(first_pages, device=decoder.device)
        self.scored = 0
        self.eval()

    def score(self, prompts, rows, pages):
        logits = super().score(prompts, rows, pages)
        self.scored += len(logits)
        chosen = torch.isin(pages.table[:, 0], self.first_pages)
        return torch.where(chosen, 8.0, -8.0).to(logits)


def crossover(better: Callable[[int], bool]) -> int | None:
    """Tokens of the least text that ours is better for, by bisection; None if it never is."""
    steps = bisect.bisect_left(range(STEPS + 1), True, 1, key=lambda steps: better(STEP * steps))
    return STEP * steps if steps <= STEPS else None


def run_ours(memory_tokens: int, text: str, questions: list[str]) -> Run:
    """Turn by turn, as in the paper; the bank is kept in `results`."""
    run, model = Run(), make_model(memory_tokens)
    with run.part("build"):
        bank = model.remember(text)
    run.results["bank"] = bank
    ask(run, model, bank, questions)
    return run


def run_in_one_turn(memory_tokens: int, built: Run, questions: list[str]) -> Run:
    """The bank of another run, its chosen chunks read up to MOST_TOGETHER in a turn."""
    run = Run({"build": built.seconds["build"]}, {"build": built.cpu["build"]})
    ask(run, make_model(memory_tokens), built.results["bank"], questions, MOST_TOGETHER)
    return run


def ask(run: Run, model: LycheeMemory, bank, questions: list[str], together: int = 1) -> None:
    """Notes by the product's own loop, then the answers."""
    ids = [model.encode_question(question) for question in questions]
    chosen = chosen_chunks(bank.tokens)
    gate = ChosenGate(model.decoder, bank, chosen)
    loop, read = ReadingLoop(model.reasoner, bank, gate=gate, together=together), []
    with run.part("read"):
        notes = loop.run(ids, lambda event: read.append(event.chunk) if event.read else None)
    with run.part("answer"):
        answers = model.reasoner.answer(ids, notes)
    assert sorted(read) == sorted(chosen * len(ids))
    assert all(len(answer) == model.memory.answer for answer in answers)
    # Its seconds are within those of reading.
    run.results |= {"gate_seconds": loop.gate_seconds, "scored": gate.scored}


def run_memagent(memory_tokens: int, text: str, questions: list[str]) -> Run:
    run, method = Run(), MemAgent(make_model(memory_tokens))
    with run.part("ask"):
        run.results["answers"] = method.answer(text, questions)
    return run


def run_full_context(text: str, questions: list[str]) -> Run:
    run, method = Run(), FullContext(make_model(MEMORY_TOKENS[0]))
    with run.part("build"):
        cache = method.read(method.model.tokenizer.encode(text))
    with run.part("ask"):
        ids = [method.model.encode_question(question) for question in questions]
        answers = method.answer_from(cache, ids)
    assert all(len(answer) == ANSWER for answer in answers)
    return run
