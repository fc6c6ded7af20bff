# SPDX-License-Identifier: Apache-2.0
"""Pretraining of compressor and reader together: dense recall of facts through compressed memory.

The stage list of the TOML file is a curriculum over chunk length, density of facts and ratio.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee.compressor import Compressor, MemoryTensors, TensorSink
from lychee.config import MemoryConfig, ModelConfig
from lychee.data.needles import word_list
from lychee.data.recall import IGNORED, Mixture, RecallBatch, RecallSampler
from lychee.errors import InputError
from lychee.memory_model import LycheeMemory
from lychee.prompts import ReadingPrompts
from lychee.tokenizer import TextTokenizer
from lychee.train.checkpoint import load_state, save_state
from lychee.train.initialise import new_decoder

FINAL_TURN_WEIGHT = 0.3
LENGTH_GROUPS = 3
TUPLES = ("facts", "ratios", "learning_rate")


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum; the learning rate goes linearly from the first to the second.

    `ratios` are drawn from evenly. `short` is the share of batches whose chunks are cut to a random
    length from an eighth of `chunk` on. The fields behind it are those of `data.recall.Mixture`.
    """

    steps: int
    chunk: int
    batch: int
    questions: int
    facts: tuple[int, int]
    learning_rate: tuple[float, float]
    ratios: tuple[int, ...] = (4,)
    short: float = 0.0
    single: float = Mixture.single
    numbers: float = Mixture.numbers
    noted: float = Mixture.noted
    confusable: float = Mixture.confusable

    def draw_chunk(self, draw: random.Random) -> int:
        """Tokens of one batch's chunks, a multiple of every ratio."""
        if not self.short or draw.random() >= self.short:
            return self.chunk
        step = math.lcm(*self.ratios)
        return step * draw.randint(max(1, self.chunk // 8 // step), self.chunk // step)

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.single, self.numbers, self.noted, self.confusable)


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs but the books: read from TOML by `load`."""

    seed: int
    threads: int
    warmup_steps: int
    weight_decay: float
    save_every: int
    log_every: int
    books: tuple[str, ...]
    model: dict[str, Any]
    memory: dict[str, Any]
    stages: tuple[Stage, ...] = field(default_factory=tuple)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe; unknown or missing fields are errors that name them."""
        try:
            raw = tomllib.loads(path.read_text())
            stages = tuple(
                Stage(**stage | {n: tuple(stage[n]) for n in TUPLES if n in stage})
                for stage in raw.pop("stage")
            )
            return cls(**raw | {"books": tuple(raw["books"])}, stages=stages)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: expected a training recipe, got: {error}") from error

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and the step within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return self.stages[-1], self.stages[-1].steps

    def learning_rate_at(self, step: int) -> float:
        """Linear within each stage, after a linear warm-up."""
        stage, inside = self.stage_at(step)
        first, last = stage.learning_rate
        rate = first + (last - first) * inside / stage.steps
        return rate * min(1.0, (step + 1) / self.warmup_steps)


def load_books(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Texts of the books a recipe names."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: expected the recipe's books, got no {', '.join(missing)}")
    return [(folder / name).read_text(encoding="utf-8", errors="replace") for name in names]


class Pretraining:
    """State of one run; `run` goes from wherever it stands to the last step."""

    def __init__(self, recipe: Recipe, books: Path, folder: Path):
        torch.set_num_threads(recipe.threads)
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe, self.folder, self.step = recipe, folder, 0
        texts = load_books(books, recipe.books)
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = TextTokenizer.from_folder(folder)
        else:
            self.tokenizer = TextTokenizer.train(texts, recipe.model["vocab_size"])
            self.tokenizer.save(folder)
        self.raw_config = recipe.model | MemoryConfig(**recipe.memory).to_dict()
        config = ModelConfig.from_dict(self.raw_config)
        self.memory = MemoryConfig.from_dict(self.raw_config)
        self.decoder = new_decoder(config, self.memory.param, recipe.seed)
        self.compressor = Compressor(self.decoder)
        self.sampler = RecallSampler(
            self.tokenizer,
            ReadingPrompts.of_checkpoint(
                self.tokenizer, self.memory.templates, config.eos_token_ids
            ),
            [self.tokenizer.encode(text) for text in texts],
            word_list(texts, self.tokenizer.encode),
            recipe.seed,
        )
        self.optimizer = torch.optim.AdamW(
            self.decoder.parameters(), betas=(0.9, 0.98), weight_decay=recipe.weight_decay
        )
        self.seconds = 0.0

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        version, internal, gauss = self.sampler.random.getstate()
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": [version, list(internal), gauss],
        }
        save_state(self.state_path, state)

    def resume(self) -> None:
        state = load_state(self.state_path)
        self.decoder.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        version, internal, gauss = state["random"]
        self.sampler.random.setstate((version, tuple(internal), gauss))
        self.step, self.seconds = state["step"], state["seconds"]

    def run(self) -> None:
        """Train to the recipe's last step, logging one JSON line every `log_every` steps."""
        totals: dict[str, list[float]] = {}
        with (self.folder / "metrics.jsonl").open("a") as log:
            while self.step < self.recipe.total_steps:
                started = time.monotonic()
                for name, value in self.train_step().items():
                    totals.setdefault(name, []).append(value)
                self.step += 1
                self.seconds += time.monotonic() - started
                if self.step % self.recipe.log_every == 0:
                    self.report(log, totals)
                    totals.clear()
                if self.step % self.recipe.save_every == 0:
                    self.save()
        self.save()
        self.export()

    def export(self) -> None:
        """Write the model folder, in half precision to keep it small."""
        model = LycheeMemory(self.decoder.eval(), self.tokenizer, self.raw_config, self.memory)
        model.save_pretrained(self.folder / "model", torch.float16)

    def report(self, log, totals: dict[str, list[float]]) -> None:
        left = (self.recipe.total_steps - self.step) * self.seconds / self.step
        line = {"step": self.step, "seconds": round(self.seconds), "eta_s": round(left)}
        line["lr"] = self.recipe.learning_rate_at(self.step)
        line |= {name: round(sum(v) / len(v), 5) for name, v in sorted(totals.items())}
        text = json.dumps(line)
        log.write(text + "\n")
        log.flush()
        print(text, flush=True)

    def train_step(self) -> dict[str, float]:
        stage, _ = self.recipe.stage_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step)
        ratio = self.sampler.random.choice(stage.ratios)
        chunk = stage.draw_chunk(self.sampler.random)
        batch = self.sampler.batch(stage.batch, chunk, stage.questions, stage.facts, stage.mixture)
        loss, metrics = self.loss(batch, ratio)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        return metrics | {"loss": loss.item(), "grad_norm": norm.item()}

    def loss(self, batch: RecallBatch, ratio: int) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of update turns over the chunks' memory, and of final turns without it."""
        sink = TensorSink(self.decoder.config.num_hidden_layers)
        window = min(self.memory.window, batch.chunks.shape[1])
        self.compressor.run(batch.chunks, sink, ratio=ratio, window=window)
        offset = batch.chunks.shape[1] // ratio
        update, exact = self.turn_loss(batch.turns, batch.labels, offset, sink.memory())
        final, final_exact = self.turn_loss(batch.final_turns, batch.final_labels, 0, None)
        metrics = {"update_loss": update.item(), "final": final_exact.float().mean().item()}
        for case, results in itertools.groupby(
            sorted(zip(batch.cases, exact.tolist(), strict=True)), key=lambda pair: pair[0]
        ):
            values = [result for _, result in results]
            metrics[f"{case}_r{ratio}"] = sum(values) / len(values)
        return update + FINAL_TURN_WEIGHT * final, metrics

    def turn_loss(
        self, inputs: Tensor, labels: Tensor, offset: int, memory: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over target tokens, and per row whether every target token was the argmax.

        Rows are read in groups of similar length, so that little of a group is padding.
        """
        last = torch.where(labels != IGNORED, torch.arange(labels.shape[1]), 0).amax(1)
        order = last.argsort(stable=True)
        total, exact = torch.zeros(()), torch.empty(len(inputs), dtype=torch.bool)
        for rows in order.tensor_split(min(LENGTH_GROUPS, len(order))):
            width = int(last[rows[-1]]) + 1
            pages = None
            if memory is not None:
                pages = MemoryTensors(memory, rows * memory[0].shape[0] // len(inputs))
            loss, exact[rows] = self.group_loss(
                inputs[rows, :width], labels[rows, :width], offset, pages
            )
            total = total + loss
        return total / (labels != IGNORED).sum(), exact

    def group_loss(
        self, inputs: Tensor, labels: Tensor, offset: int, pages: MemoryTensors | None
    ) -> tuple[Tensor, Tensor]:
        """Summed loss over target tokens, and per row whether every one was the argmax."""
        positions = torch.arange(offset, offset + inputs.shape[1])[None]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        hidden = self.decoder(
            inputs,
            positions=positions,
            max_position=offset + inputs.shape[1],
            pages=pages,
            select=(rows, columns),
        )
        logits = self.decoder.logits(hidden)
        targets = labels[rows, columns]
        wrong = torch.zeros(len(inputs)).index_add_(0, rows, (logits.argmax(-1) != targets).float())
        return F.cross_entropy(logits, targets, reduction="sum"), wrong == 0


def pretrain(recipe_path: Path, books: Path, folder: Path, *, resume: bool = False) -> None:
    """Train from a recipe into `folder`; `resume` continues from its last saved step."""
    recipe = Recipe.load(recipe_path)
    run = Pretraining(recipe, books, folder)
    if run.state_path.exists():
        if not resume:
            raise InputError(f"{folder}: expected a new folder, got a run at a later step")
        run.resume()
    run.run()
