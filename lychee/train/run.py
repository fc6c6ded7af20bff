# SPDX-License-Identifier: Apache-2.0
"""The loop of every kind of training: steps, checkpoints, metrics, and an end that can be resumed.

A kind of training is a subclass of `TrainingRun` with its own recipe, `sample` and `loss`.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from lychee.decoder import Decoder
from lychee.errors import InputError, TrainingError
from lychee.lora import merge
from lychee.memory_model import LycheeMemory
from lychee.train.adapters import attach_adapters, save_adapter_folder
from lychee.train.checkpoint import (
    capture,
    check_state,
    load_state,
    reason,
    restore,
    save_state,
    write_whole,
)
from lychee.train.metrics import Averages, MetricsLog, Value, significant
from lychee.train.optimizers import make_optimizers
from lychee.train.processes import Processes, to_device
from lychee.train.recipe import Recipe
from lychee.train.start import (
    check_folder,
    fingerprint,
    frozen_fingerprint,
    identity,
    load_books,
    load_samples,
    no_tokenizer_left,
    starting_model,
)


class Batch(Protocol):
    """What `sample` returns; a dataclass whose tensors move to the run's device."""

    def part(self, index: int, count: int) -> Self | None:
        """The rows of process `index` of `count`, or None where it has none."""


class TrainingRun:
    """State of one run; `run` goes from wherever it stands to the recipe's last step.

    Subclasses set `kind` and `recipe_type`, build what they need in `prepare`, and override
    `sample` and `loss`. All that they draw comes from `random`, whose state is saved, or from
    torch's generator, whose state is saved as well.

    Attributes:
        model: LycheeMemory in training, with `decoder`, `tokenizer`, `compressor`, `reasoner`.
        texts: contents of the recipe's books.
        samples: questions from the recipe's files of data.
        modules: what is trained and saved; `prepare` may add to it.
        processes: the processes that share this run.
    """

    kind: ClassVar[str] = ""
    recipe_type: ClassVar[type[Recipe]] = Recipe

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        books: Path | None = None,
        start: Path | None = None,
        device: str = "auto",
        shard: bool = False,
    ):
        if shard and recipe.optimizer == "muon":
            raise InputError("optimizer: expected adamw for spread weights, got muon")
        torch.set_num_threads(recipe.threads)
        self.recipe, self.folder, self.step, self.seconds = recipe, folder, 0, 0.0
        self.processes = Processes(device, shard)
        self.device = self.processes.device
        folder.mkdir(parents=True, exist_ok=True)
        self.random = random.Random(recipe.seed)
        self.samples = load_samples(books, recipe.data)
        if self.samples and not recipe.books:
            self.texts = [sample.context for sample in self.samples]
        else:
            self.texts = load_books(books, recipe.books)
        self.fingerprint = fingerprint(self.texts, self.samples)
        if not self.processes.first:
            self.processes.wait()
        self.model: LycheeMemory = starting_model(recipe, self.texts, folder, start)
        if self.processes.first:
            self.processes.wait()
        self.decoder, self.tokenizer = self.model.decoder, self.model.tokenizer
        if recipe.lora is not None:
            attach_adapters(self.decoder, recipe.lora, recipe.seed)
        self.modules = nn.ModuleDict({"decoder": self.decoder})
        self.averages = Averages()
        self.prepare()
        for name, parameter in self.modules.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and self.trains(name))
        self.identity, self.frozen = identity(self.model), frozen_fingerprint(self.modules)
        self.modules.to(self.device)
        self.wrapped = self.processes.wrap(self.modules, self.loss)
        self.optimizers = make_optimizers(recipe, self.trained_parameters())

    def prepare(self) -> None:
        """Build samplers and further modules."""

    def trains(self, name: str) -> bool:
        """Whether the parameter `name` ("decoder.model.norm.weight") is trained."""
        return True

    def sample(self) -> Batch:
        """The next batch, the same in every process."""
        raise NotImplementedError

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Value]]:
        """Loss of this process's part of a batch, and metrics of it.

        Means over rows or tokens go through `processes.mean`, which counts every process's.
        """
        raise NotImplementedError

    def resumed(self) -> None:
        """Called when the run has been brought to where its checkpoint stands."""

    def export(self) -> None:
        """Write the model folder of a finished run."""
        model = self.plain_model()
        if model is not None:
            model.save_pretrained(self.folder / "model", getattr(torch, self.recipe.export))
        self.processes.wait()

    def plain_model(self) -> LycheeMemory | None:
        """A copy of the model as one process would hold it, on the CPU; None where not `first`.

        Adapters are saved in the run's folder on the way, and merged.
        """
        state = {n: self.processes.whole(t) for n, t in self.decoder.state_dict().items()}
        if not self.processes.first:
            return None
        lora, memory = self.recipe.lora, self.model.memory
        decoder = Decoder(self.decoder.config, memory.param)
        if lora is not None:
            attach_adapters(decoder, lora, self.recipe.seed)
        decoder.load_state_dict(state)
        if lora is not None:
            save_adapter_folder(self.folder / "adapter", decoder, lora, memory)
            merge(decoder)
        return LycheeMemory(decoder.eval(), self.tokenizer, self.model.raw_config, memory)

    def train_step(self) -> dict[str, Value]:
        """One step; returns its metrics."""
        return self.update(self.sample())

    def update(self, batch: Any) -> dict[str, Value]:
        """One step of the optimiser on a batch that every process holds; returns its metrics.

        Raises:
            TrainingError: loss or gradient is not finite; the batch is saved, no weight moved.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(self.step)
            optimizer.zero_grad(set_to_none=True)
        part = to_device(self.processes.part(batch), self.device)
        # No cache: it would offer weights cast without gradients where gradients are wanted.
        mixed = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, mixed, cache_enabled=False):
            loss, metrics = self.wrapped(part)
        loss.backward()
        parameters = list(self.trained_parameters().values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        found = {
            "loss": self.processes.sum(loss).item() / self.processes.count,
            "grad_norm": float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm),
        }
        if not all(math.isfinite(value) for value in found.values()):
            self.stop_on(batch, found)
        for optimizer in self.optimizers:
            optimizer.step()
        return metrics | found

    def stop_on(self, batch: Any, found: dict[str, float]) -> None:
        """Save a batch whose loss or gradient is not finite, and raise TrainingError."""
        path = self.folder / "failed_batch.pt"
        saved = f"study the batch in {path}"
        if self.processes.first:
            content = {"step": self.step, "batch": dataclasses.asdict(batch)} | found
            try:
                write_whole(path, content)
            except (OSError, RuntimeError) as error:
                saved = f"the batch could not be saved in {path}: {reason(error)}"
        self.processes.wait()
        values = ", ".join(f"{name} {value}" for name, value in found.items())
        raise TrainingError(
            f"step {self.step + 1}: expected a finite loss and gradient, got {values}",
            f"{saved}; a resumed run meets it again: begin anew at a lower learning rate",
        )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        named = self.modules.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    def description(self, step: int) -> dict[str, Any]:
        """What a checkpoint of this run at `step` says about itself."""
        recipe = self.recipe.begun(step) | {"texts": self.fingerprint}
        start = {"frozen_weights": self.frozen}
        return {"kind": self.kind, "model": self.identity, "recipe": recipe, "start": start}

    def save(self) -> None:
        """Write the checkpoint from which a resumed run goes on to the same weights."""
        state = self.description(self.step) | capture(self)
        if self.processes.first:
            save_state(self.state_path, state)
        self.processes.wait()

    def resume(self) -> None:
        """Go to where the last checkpoint stands; CheckpointError if it is another run's."""
        state = load_state(self.state_path)
        check_state(self.state_path, state, self.description(state["step"]))
        restore(self, state)

    def run(self) -> None:
        """Train to the recipe's last step, save, and write the model folder."""
        log = MetricsLog(self.folder, self.step) if self.processes.first else None
        while self.step < self.recipe.total_steps:
            started = time.monotonic()
            self.averages.add(self.train_step())
            self.step += 1
            self.seconds += time.monotonic() - started
            if self.step % self.recipe.log_every == 0:
                self.report(log)
            if self.step % self.recipe.save_every == 0:
                self.save()
        self.save()
        self.export()
        if log is not None:
            log.close()

    def report(self, log: MetricsLog | None) -> None:
        """One line of the averages since the last one, over all processes."""
        sums = self.processes.gather(self.averages.sums)
        self.averages = Averages()
        if log is None:
            return
        everywhere = Averages()
        everywhere.merge(sums)
        left = (self.recipe.total_steps - self.step) * self.seconds / self.step
        line = {"step": self.step, "seconds": round(self.seconds), "eta_s": round(left)}
        means = {"lr": self.recipe.learning_rate_at(self.step - 1)} | everywhere.take()
        log.write(line | {name: significant(mean) for name, mean in means.items()})

    @classmethod
    def train(
        cls,
        config: Path,
        folder: Path,
        *,
        books: Path | None = None,
        start: Path | None = None,
        resume: bool = False,
        device: str = "auto",
        shard: bool = False,
        **changes: Any,
    ) -> None:
        """Train by a recipe's file into `folder`; what each `lychee train` command runs.

        `resume` goes on from the last checkpoint, if there is one; `changes` replace fields of the
        recipe.
        """
        recipe = dataclasses.replace(cls.recipe_type.load(config), **changes)
        check_folder(folder, resume)
        with no_tokenizer_left(folder):
            run = cls(recipe, folder, books=books, start=start, device=device, shard=shard)
        try:
            if run.state_path.exists():
                run.resume()
            run.run()
        finally:
            processes = run.processes
            del run
            processes.leave()
