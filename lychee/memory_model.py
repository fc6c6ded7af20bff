# SPDX-License-Identifier: Apache-2.0
"""LycheeMemory: one object that remembers texts and answers questions about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import torch

from lychee.asking import Asking, OnStep
from lychee.bank import Document, MemoryBank, ModelIdentity
from lychee.bank.identity import identify
from lychee.compressor import Compressor
from lychee.config import MemoryConfig, ModelConfig
from lychee.documents import read_documents
from lychee.errors import CheckpointError, InputError
from lychee.gate import Gate
from lychee.gate_file import gate_fields, load_gate, save_gate, without_gate
from lychee.generate import GREEDY, Sampling
from lychee.prompts import ReadingPrompts
from lychee.reading import AS_CONFIGURED, ReadingOptions
from lychee.reasoner import Reasoner
from lychee.tokenizer import TextTokenizer
from lychee.trace import Answer, Step
from lychee.weights import load_decoder, read_config, save_decoder

SHIPPED_MODEL = Path(__file__).parent / "assets" / "model"

Progress = Callable[[int, int], None]


class LycheeMemory:
    """A decoder with its compressor and reasoner, and a gate where it has one."""

    def __init__(
        self,
        decoder,
        tokenizer: TextTokenizer,
        raw_config: dict,
        memory: MemoryConfig,
        gate: Gate | None = None,
    ):
        self.decoder, self.tokenizer = decoder, tokenizer
        self.raw_config, self.memory, self.gate = without_gate(raw_config), memory, gate
        self.trained, self.compressor = True, Compressor(decoder)
        ends = decoder.config.eos_token_ids
        prompts = ReadingPrompts.of_checkpoint(tokenizer, memory.templates, ends)
        self.reasoner = Reasoner(decoder, prompts, memory)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        ratio: int | None = None,
        window: int | None = None,
        chunk: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> LycheeMemory:
        """Load a Hugging Face model folder: Qwen2, Qwen2.5, Qwen3 or Llama 3.

        Args:
            folder: config.json, *.safetensors and tokenizer.json; None is the shipped small model.
            ratio, window, chunk: raw tokens per memory token, per compressor window and per
                chunk; default to the checkpoint's own.
            device: "auto" takes a GPU where there is one.
            dtype: "auto" is float32 on a CPU and the stored dtype on a GPU.

        Raises:
            LycheeError: CheckpointError, UnsupportedModelError, MemoryConfigError, or InputError of
                the device or dtype; each is one line that says why.

        A folder without trained memory parameters loads as well: its compressor then starts as a
        copy of the ordinary projections, `trained` is False and answers are not to be relied on.
        """
        folder = SHIPPED_MODEL if folder is None else Path(folder)
        raw = read_config(folder)
        config = ModelConfig.from_dict(raw)
        if chunk is None and window is not None:
            chunk = window
        memory = MemoryConfig.from_dict(raw, ratio=ratio, window=window, chunk=chunk)
        device = pick_device(device)
        tokenizer = TextTokenizer.from_folder(folder)
        if (size := tokenizer.backend.get_vocab_size()) > config.vocab_size:
            raise CheckpointError(
                f"{folder}/tokenizer.json: expected at most {config.vocab_size} tokens, got {size}"
            )
        decoder, trained = load_decoder(
            folder, raw, memory, device=device, dtype=pick_dtype(dtype, raw, device)
        )
        model = cls(decoder, tokenizer, raw, memory, load_gate(folder, raw, decoder))
        model.trained = trained
        return model

    def limited(self, **limits: int) -> LycheeMemory:
        """The same weights with other limits: `size` of the notes, `answer`, in tokens."""
        memory = replace(self.memory, **limits)
        model = LycheeMemory(self.decoder, self.tokenizer, self.raw_config, memory, self.gate)
        model.trained = self.trained
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `from_pretrained` reads; `dtype` None keeps the current one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        raw = self.raw_config | self.memory.to_dict()
        if self.gate is not None:
            raw |= gate_fields(self.gate.config)
        save_decoder(folder, self.decoder, raw, dtype or self.decoder.dtype)
        save_gate(folder, self.gate)
        self.tokenizer.save(folder)

    @cached_property
    def identity(self) -> ModelIdentity:
        """Name and fingerprint of what compresses, for banks on disk."""
        identity = identify(self.decoder)
        shipped = self.decoder.folder == SHIPPED_MODEL
        return replace(identity, name="the shipped model") if shipped else identity

    def remember(
        self,
        source: str | Path | Sequence[Path | Document],
        *,
        bank_dtype: str = "auto",
        tier: str = "auto",
        progress: Progress | None = None,
    ) -> MemoryBank:
        """Read texts once and compress them into a new bank in memory.

        Args:
            source: a text (a str), the Path or paths of UTF-8 text files, or documents.
            bank_dtype: float32, float16, bfloat16, int8 or e4m3; "auto" is the model's.
            tier: "auto" keeps the bank where the model is, "cpu" in the CPU's memory.
            progress: called with (tokens done, tokens in all).

        Raises:
            InputError: a missing, empty or binary file, an empty text, or a text that is only the
                name of a file.
        """
        bank = MemoryBank(self, bank_dtype, tier)
        report = progress and (lambda p: progress(p.tokens, p.tokens_total))
        bank.add(read_documents(source), report)
        return bank

    def ask(
        self,
        bank: MemoryBank,
        question: str,
        *,
        sampling: Sampling = GREEDY,
        reading: ReadingOptions = AS_CONFIGURED,
        on_step: OnStep | None = None,
    ) -> Answer:
        """Answer one question from a bank; see `ask_many`."""
        options = {"sampling": sampling, "reading": reading, "on_step": on_step}
        return self.ask_many(bank, [question], **options)[0]

    def ask_many(
        self,
        bank: MemoryBank,
        questions: Sequence[str],
        *,
        sampling: Sampling = GREEDY,
        reading: ReadingOptions = AS_CONFIGURED,
        on_step: OnStep | None = None,
        on_token: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """Answer questions from a bank, all of them in one go.

        Args:
            bank: what `remember` returned, made with this model at this ratio.
            questions: non-empty texts.
            sampling: greedy by default.
            reading: which chunks are read, and how often; by default as the model says.
            on_step: called with (question index, step) for every chunk gated or read.
            on_token: called with (question index, text) as the answers are written.

        Raises:
            InputError: an empty question, or one longer than the checkpoint's limit.
            BankMismatchError: a bank of another model or geometry.
        """
        if not isinstance(bank, MemoryBank):
            raise InputError(f"bank: expected what `remember` returns, got {type(bank).__name__}")
        if isinstance(questions, str):
            raise InputError("questions: expected several texts, got one", "ask it with `ask`")
        if not questions:
            return []
        bank.check_model(self)
        return Asking(self, bank, reading, sampling, on_step).run(questions, on_token)

    def stream(
        self,
        bank: MemoryBank,
        question: str,
        *,
        sampling: Sampling = GREEDY,
        reading: ReadingOptions = AS_CONFIGURED,
    ) -> Iterator[Step | str | Answer]:
        """Yield a Step per chunk gated or read, pieces of the answer, and the Answer at the end."""
        events: SimpleQueue = SimpleQueue()

        def work() -> None:
            try:
                answers = self.ask_many(
                    bank,
                    [question],
                    sampling=sampling,
                    reading=reading,
                    on_step=lambda _, step: events.put(step),
                    on_token=lambda _, text: events.put(text),
                )
                events.put(answers[0])
            except BaseException as error:  # handed to the reader, who raises it
                events.put(error)

        worker = Thread(target=work, daemon=True)
        worker.start()
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Answer):
                worker.join()
                return

    def encode_question(self, question: str) -> list[int]:
        """Token ids of a question; InputError if it is empty or longer than the limit."""
        if not isinstance(question, str):
            raise InputError(f"question: expected text, got {type(question).__name__}")
        ids = self.tokenizer.encode(question.strip())
        if not ids:
            raise InputError("question: expected text, got nothing")
        if len(ids) > self.memory.question:
            raise InputError(
                f"question: expected at most {self.memory.question} tokens, got {len(ids)}"
            )
        return ids


def pick_device(device: str | torch.device) -> torch.device:
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(best if device == "auto" else device)
    except RuntimeError as error:
        raise InputError(f"device: expected auto, cpu or cuda, got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {device}")
    if found.type == "cuda" and best == "cpu":
        raise InputError(f"device: expected cpu, as torch sees no GPU here, got {device}")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"device: expected cuda:0 to cuda:{count - 1}, got {device}")
    return found


def pick_dtype(dtype: str | torch.dtype, raw: dict, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = (stored if device.type != "cpu" else "float32") if dtype == "auto" else dtype
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in found:
        raise InputError(f"dtype: expected one of {', '.join(found)}, got {name!r}")
    return found[name]
