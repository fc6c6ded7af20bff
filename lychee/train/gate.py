# SPDX-License-Identifier: Apache-2.0
"""Training of the gate: adapters and a head over a frozen decoder and its compressed chunks.

Every turn of a trace is one example: a chunk, a question and notes, and whether the chunk tells
what the notes still miss. The threshold is then chosen on texts held out of the training, so that a
stated share of the chunks that matter is read.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee.compressor import Compressor, MemoryTensors, TensorSink
from lychee.data.needles import Needle
from lychee.data.recall import IGNORED, Mixture, RecallBatch, Turn
from lychee.data.texts import long_enough
from lychee.data.traces import TraceSampler
from lychee.gate import Gate, GateConfig
from lychee.memory_model import LycheeMemory
from lychee.train.metrics import Value
from lychee.train.pretrain import PretrainBatch
from lychee.train.sft import SupervisedRecipe, SupervisedTraining

# Turns after which the notes are as before, because the chunk tells nothing that they miss.
NOTHING_NEW = frozenset({"absent", "kept", "known", "hops0"})
# Share of turns about needles in which the notes hold already what the chunk tells.
KNOWN_SHARE = 0.1
# Different draws than those of the training, at the same seed.
VALIDATION_SEED = 1_000_003


@dataclass(frozen=True)
class GateRecipe(SupervisedRecipe):
    """The recipe of a gate.

    Attributes:
        gate: its shape; the threshold is found in the end.
        positive_weight: of examples whose chunk is to be read, against the others.
        held_out: share of every book, its end, that only validation sees.
        validation: examples on which the threshold is chosen; their worlds' names are those of the
            validation split, which the training never draws.
        least_recall: share of the chunks to be read that must pass the gate there.
    """

    gate: GateConfig = GateConfig(layers=2)
    positive_weight: float = 1.0
    held_out: float = 0.1
    validation: int = 4000
    least_recall: float = 0.98

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.positive_weight < math.inf:
            raise ValueError(f"positive_weight: expected above 0, got {self.positive_weight}")
        for name in ("held_out", "least_recall"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share, got {getattr(self, name)}")
        if self.validation < 1:
            raise ValueError(f"validation: expected at least 1, got {self.validation}")
        if self.lora is not None:
            raise ValueError("lora: expected none, as the gate has adapters of its own")
        if not all(stage.recall for stage in self.stages):
            raise ValueError("recall: expected above 0 in every stage, got 0")
        for index, stage in enumerate(self.stages, start=1):
            for name in ("language", "recite", "continuation"):
                if weight := getattr(stage, name):
                    raise ValueError(
                        f"stage[{index}].{name}: expected 0, as a gate learns from recall alone, "
                        f"got {weight}"
                    )


class GateSampler(TraceSampler):
    """Traces with one more hard case: notes that hold what the chunk tells again."""

    def update_turn(self, needles: list[Needle], mixture: Mixture) -> Turn:
        if not needles or self.random.random() >= KNOWN_SHARE:
            return super().update_turn(needles, mixture)
        asked = self.random.choice(needles)
        told = [n.value for n in needles if (n.key, n.attribute) == (asked.key, asked.attribute)]
        notes = self.encode_notes(asked.key, told[-1])
        question = self.tokenizer.encode(self.maker.reword(asked))
        return Turn(self.prompts.update.render(question, notes), [*notes, self.end], "known")


class GateTraining(SupervisedTraining):
    """The decoder stays as it is; `modules` has the gate beside it."""

    kind = "gate"
    recipe_type = GateRecipe
    sampler_type = GateSampler

    def prepare(self) -> None:
        cuts = [round(len(text) * (1 - self.recipe.held_out)) for text in self.texts]
        held_out = [text[cut:] for text, cut in zip(self.texts, cuts, strict=True)]
        self.texts = [text[:cut] for text, cut in zip(self.texts, cuts, strict=True)]
        super().prepare()
        encode, longest = self.tokenizer.encode, max(s.chunk for s in self.recipe.stages) + 1
        books = long_enough([encode(text) for text in held_out], longest, encode("\n\n"))
        draw = random.Random(self.recipe.seed + VALIDATION_SEED)
        self.validation = self.new_sampler(books, draw)
        self.validation.split = "validation"
        self.gate = Gate(self.decoder, self.recipe.gate, self.recipe.seed)
        self.modules["gate"] = self.gate

    def trains(self, name: str) -> bool:
        return name.startswith("gate.")

    def loss(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Value]]:
        """Binary cross-entropy; metrics are the shares that pass at even odds."""
        logits, wanted, cases = score_turns(
            self.gate, self.compressor, self.model, batch.recall, batch.ratio
        )
        weight = torch.tensor(self.recipe.positive_weight, device=logits.device)
        losses = F.binary_cross_entropy_with_logits(
            logits, wanted, pos_weight=weight, reduction="none"
        )
        metrics: dict[str, Value] = {}
        for case, passed in zip(cases, (logits > 0).tolist(), strict=True):
            for name in (case, "false_positives" if case in NOTHING_NEW else "true_positives"):
                hits, count = metrics.get(name, (0, 0))
                metrics[name] = (hits + passed, count + 1)
        return self.processes.mean(losses.sum(), len(losses)), metrics

    def export(self) -> None:
        """Choose the threshold, and write the model folder and what was measured."""
        whole = self.processes.whole
        state = {name: whole(value) for name, value in self.gate.state_dict().items()}
        model = self.plain_model()
        if model is not None:
            gate = Gate(model.decoder, self.recipe.gate)
            gate.load_state_dict(state)
            measured = self.measure(gate.eval(), model)
            gate.config = replace(gate.config, threshold=measured["threshold"])
            model.gate = gate
            model.save_pretrained(self.folder / "model", getattr(torch, self.recipe.export))
            text = json.dumps(measured)
            (self.folder / "validation.json").write_text(text + "\n", encoding="utf-8")
            print(text, flush=True)
        self.processes.wait()

    @torch.no_grad()
    def measure(self, gate: Gate, model: LycheeMemory) -> dict[str, Any]:
        """Threshold, and what passes it, on held-out texts with the last stage's mixture."""
        stage, compressor = self.recipe.stages[-1], Compressor(model.decoder)
        logits, cases = [], []
        while len(cases) < self.recipe.validation:
            batch = self.validation.batch(
                stage.batch, stage.chunk, stage.questions, stage.facts, stage.mixture
            )
            ratio = self.validation.random.choice(stage.ratios)
            new, _, about = score_turns(gate, compressor, model, batch, ratio)
            logits += new.tolist()
            cases += about
        return calibrate(logits, cases, self.recipe.least_recall)


def score_turns(
    gate: Gate, compressor: Compressor, model: LycheeMemory, batch: RecallBatch, ratio: int
) -> tuple[Tensor, Tensor, list[str]]:
    """Logits [N], wanted verdicts [N] (1 is to be read) and cases of a batch's update turns.

    Turns that the gate will not be asked for, as the notes are still the initial ones, are left out
    where the gate leaves a text's opening to the reader.
    """
    device = batch.chunks.device
    with torch.no_grad():
        sink = TensorSink(model.decoder.config.num_hidden_layers)
        window = min(model.memory.window, batch.chunks.shape[1])
        compressor.run(batch.chunks, sink, ratio=ratio, window=window)
    template = model.reasoner.prompts.update
    lengths = ((batch.labels != IGNORED).int().argmax(dim=1) + 1).tolist()
    rows, prompts, notes = [], [], []
    for row, (turn, length) in enumerate(zip(batch.turns.tolist(), lengths, strict=True)):
        _, noted = template.split(turn[:length])
        if gate.config.opening and noted == model.reasoner.prompts.no_memory:
            continue
        rows.append(row)
        prompts.append(turn[:length])
        notes.append(noted)
    cases = [batch.cases[row] for row in rows]
    chunks = torch.tensor(rows, device=device) * len(batch.chunks) // len(batch.turns)
    prepared = gate.prepare(prompts, notes, batch.chunks.shape[1] // ratio)
    logits = gate.score(prepared, None, MemoryTensors(sink.memory(), chunks))
    wanted = torch.tensor([float(case not in NOTHING_NEW) for case in cases], device=device)
    return logits, wanted, cases


def calibrate(logits: list[float], cases: list[str], least_recall: float) -> dict[str, Any]:
    """The highest threshold that `least_recall` of the chunks to be read pass, and what passes it.

    Returns:
        Plain values: threshold (a probability), recall, false_positives (shares), auc (area under
        the curve of the two), and per case the share that passes and the count.
    """
    scores = torch.tensor(logits, dtype=torch.float64).sigmoid()
    wanted = torch.tensor([case not in NOTHING_NEW for case in cases])
    positive, negative = scores[wanted].sort().values, scores[~wanted].sort().values
    if not len(positive) or not len(negative):
        return {"threshold": 0.5, "examples": len(cases)}
    threshold = positive[int((1 - least_recall) * len(positive))].item()
    # A little lower, as scores differ in their last digits from batch to batch.
    threshold = max(0.0, threshold - 1e-6)
    below = torch.searchsorted(negative, positive, right=False)
    ties = torch.searchsorted(negative, positive, right=True) - below
    passed = scores >= threshold
    by_case = {}
    for case in sorted(set(cases)):
        of_case = torch.tensor([other == case for other in cases])
        by_case[case] = [round(passed[of_case].double().mean().item(), 5), int(of_case.sum())]
    return {
        "threshold": threshold,
        "recall": passed[wanted].double().mean().item(),
        "false_positives": passed[~wanted].double().mean().item(),
        "auc": ((below + ties / 2).sum() / (len(positive) * len(negative))).item(),
        "examples": len(cases),
        "cases": by_case,
    }
