# SPDX-License-Identifier: Apache-2.0
"""What reading a text adds to a fresh process's memory at its peak, printed as JSON.

    python benchmarks/reading_peak.py ours 131072 1024

Eight questions are asked together. All turns of a method are alike but for the first, whose notes
are still short; so the text is read, or compressed, and then one turn with full notes is taken,
which is the peak of a whole run. Of that turn and the answer a few tokens are written; the places
of the others in the caches are filled at once. On a CPU it is resident memory less that of the
process when the model and the text are there, on a GPU allocated bytes.
"""

import gc
import json
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from reading import CUDA, make_model, make_questions, make_text, run_full_context

from lychee import generate
from lychee.allocator import return_freed_memory
from lychee.bank import BankBuilder, Document, MemoryBank
from lychee.baselines.memagent import MemAgent
from lychee.gate import Gate, GateConfig
from lychee.reading import ReadingLoop

BATCH = 8
WRITTEN = 4  # tokens
METHODS = ("ours", "ours_int8", "ours_disk", "memagent", "full_context")


def resident(field: str) -> float:
    """MiB of a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def reset_peak() -> float:
    """Start counting; MiB in use now."""
    gc.collect()
    return_freed_memory()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if CUDA else resident("VmHWM")


class FewTokens:
    """Stands for the tokens that end a turn: after WRITTEN steps each one does.

    `prefill` is generate's, behind which it fills the cache's places of the tokens to come.
    """

    def __init__(self):
        self.prefill, self.left = generate.prefill, 0

    def __call__(self, decoder, batch, cache, *options):
        hidden = self.prefill(decoder, batch, cache, *options)
        for kept in (cache.k, cache.v):
            kept[:, :, :, cache.length :] = 0
        self.left = WRITTEN * len(batch.ids)
        return hidden

    def __contains__(self, token: int) -> bool:
        self.left -= 1
        return self.left < 0


@contextmanager
def short_turns(model):
    """Turns of few tokens, in the memory of turns of as many as may be."""
    few, prompts = FewTokens(), model.reasoner.prompts
    generate.prefill, model.reasoner.prompts = few, replace(prompts, stop=few)
    try:
        yield
    finally:
        generate.prefill, model.reasoner.prompts = few.prefill, prompts


class LastChunkGate(Gate):
    """A gate that does all the work of scoring and then lets the last chunk through.

    It counts the chunks that each prompt was scored with, which come in order: a bank on disk
    numbers the pages of every table anew.
    """

    def __init__(self, decoder, chunks: int):
        super().__init__(decoder, GateConfig(layers=decoder.config.num_hidden_layers))
        self.last, self.scored = chunks - 1, Counter()
        self.eval()

    def score(self, prompts, rows, pages):
        logits, found = super().score(prompts, rows, pages), []
        for row in rows.tolist():
            found.append(8.0 if self.scored[row] == self.last else -8.0)
            self.scored[row] += 1
        return torch.tensor(found).to(logits)


def ask_once(model, bank, questions: list[str]) -> None:
    """Gate, read the last chunk and answer, with notes that are full from the start."""
    full = model.tokenizer.encode(make_text(model.memory.size))
    reasoner = model.reasoner
    reasoner.prompts = replace(reasoner.prompts, no_memory=full)
    ids = [model.encode_question(question) for question in questions]
    loop, read = ReadingLoop(reasoner, bank, gate=LastChunkGate(model.decoder, len(bank))), []
    notes = loop.run(ids, lambda event: read.append(event.chunk) if event.read else None)
    assert read == [len(bank) - 1] * len(ids), "another chunk than the last was read"
    reasoner.answer(ids, notes)


def run_ours(model, text: str, questions: list[str], variant: str) -> int:
    """Bytes of the bank's pages."""
    if variant == "ours_disk":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.bank"
            with BankBuilder(model, path) as builder:
                builder.add([Document("text", text)])
            bank = MemoryBank.open(path, model=model, tier="disk")
            ask_once(model, bank, questions)
            return bank.nbytes
    bank = model.remember(text, bank_dtype="int8" if variant == "ours_int8" else "auto")
    ask_once(model, bank, questions)
    return bank.nbytes


def run_memagent(model, text: str, questions: list[str]) -> None:
    agent = MemAgent(model)
    section = model.tokenizer.encode(text)[: agent.section]
    ids = [model.encode_question(question) for question in questions]
    notes = [model.tokenizer.encode(make_text(model.memory.size))] * len(ids)
    agent.answer_from(ids, agent.update(section, ids, notes))


def measure(method: str, length: int, memory_tokens: int) -> dict[str, float]:
    model, text, questions = make_model(memory_tokens), make_text(length), make_questions(BATCH)
    before, bank_bytes = reset_peak(), 0
    if method == "full_context":
        run_full_context(text, questions)
    else:
        with short_turns(model):
            if method == "memagent":
                run_memagent(model, text, questions)
            else:
                bank_bytes = run_ours(model, text, questions, method)
    return {"idle_mib": before, "peak_mib": peak() - before, "bank_mib": bank_bytes / 2**20}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]) if len(sys.argv) > 4 else torch.get_num_threads())
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
