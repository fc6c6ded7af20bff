# SPDX-License-Identifier: Apache-2.0
"""Decoding: a batch of prompts, optionally in front of compressed memory, greedy or sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee.allocator import return_freed_memory
from lychee.decoder import Decoder, KVCache, Pages
from lychee.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        # Far colder would overflow; not-a-number fails every comparison.
        if self.temperature != 0 and not 1e-4 <= self.temperature <= 1e4:
            raise InputError(f"temperature: expected 0, or 0.0001 to 10000, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k: expected 0 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected a share above 0 and up to 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Distribution [B, V] to draw from: temperature, then top-k (ties kept), then top-p.

    Top-p keeps the tokens before which less than `top_p` of the probability is already spent.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(dim=-1)
        spent = share.cumsum(dim=-1) - share
        ordered = ordered.masked_fill(spent >= sampling.top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return logits.softmax(dim=-1)


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts with their positions; a row's positions do not depend on its padding."""

    ids: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    valid: Tensor | None  # [B, T + extra], None where nothing is padded

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        first_position: int,
        extra: int,
        device,
        padded_positions: bool = False,
    ) -> PromptBatch:
        """`padded_positions` counts padding too, as the released code does in batches."""
        width = max(map(len, prompts))
        padding = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
        rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        places = torch.arange(width)[None]
        positions = places.expand(len(prompts), width) + first_position
        if not padded_positions:
            positions = (positions - padding).clamp_(min=0)
        valid = None
        if bool(padding.any()):
            valid = (torch.arange(width + extra)[None] >= padding).to(device)
        return cls(torch.tensor(rows).to(device), positions.to(device), valid)

    def widened(self, width: int) -> PromptBatch:
        """Padded on the left to at least `width`."""
        missing = width - self.ids.shape[1]
        if missing <= 0:
            return self
        valid = torch.ones_like(self.ids, dtype=torch.bool) if self.valid is None else self.valid
        return PromptBatch(*(F.pad(t, (missing, 0)) for t in (self.ids, self.positions, valid)))


def prefill_step(device: torch.device, rows: int) -> int:
    """Tokens per row of one pass over prompts: enough, over all rows, for matrix products at full
    rate, and few enough that their activations stay small beside the cache."""
    return max(1, (2048 if device.type == "cpu" else 8192) // rows)


def prefill(
    decoder: Decoder, batch: PromptBatch, cache: KVCache, pages: Pages | None, max_position: int
) -> Tensor:
    """Fill the cache with prompts, piece by piece; the last token's hidden states [B, E]."""
    count, width = batch.ids.shape
    rows = torch.arange(count, device=decoder.device)
    step = prefill_step(decoder.device, count)
    for start in range(0, width, step):
        stop = min(start + step, width)
        select = (rows, torch.full_like(rows, stop - start - 1)) if stop == width else ()
        hidden = decoder(
            batch.ids[:, start:stop],
            positions=batch.positions[:, start:stop],
            max_position=max_position,
            cache=cache,
            pages=pages,
            valid=None if batch.valid is None else batch.valid[:, :stop],
            select=select,
        )
    return hidden


def check_scores(scores: Iterable[float], message: str) -> None:
    """Raise a CheckpointError of this message for scores that nothing can be told from."""
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(message, "choose the dtype float32, or another model")


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    pages: Pages | None = None,
    first_position: int = 0,
    max_new_tokens: int,
    stop: Container[int],
    sampling: Sampling = GREEDY,
    padded_positions: bool = False,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop token, which is not returned, or `max_new_tokens`.

    Args:
        prompts: B non-empty lists of token ids.
        pages: memory that the rows see before their prompts, one table row per prompt.
        first_position: rotary position of a prompt's first token: the memory slots before it.
        stop: ids that end a row.
        padded_positions: see `PromptBatch.build`.
        on_token: called with (row, id) for every token as soon as it is known.

    Returns:
        B lists of new ids.
    """
    batch = PromptBatch.build(
        prompts, first_position, max_new_tokens, decoder.device, padded_positions
    )
    count, width = batch.ids.shape
    cache = decoder.new_cache(count, width + max_new_tokens)
    return_freed_memory(2 * cache.k.nbytes)
    last = first_position + width + max_new_tokens
    generator = torch.Generator(decoder.device).manual_seed(sampling.seed)
    out: list[list[int]] = [[] for _ in prompts]
    live = set(range(count))
    hidden = prefill(decoder, batch, cache, pages, last)
    return_freed_memory(2 * cache.k.nbytes)  # the prompts' activations
    positions = batch.positions[:, -1:]
    for step in range(1, max_new_tokens + 1):
        logits = decoder.logits(hidden)
        if sampling.greedy:
            largest, chosen = logits.max(dim=-1)
        else:
            largest = logits.amax(dim=-1)
            # where nothing can be drawn anything may be: the step is refused below
            odd = ~largest.isfinite()[:, None]
            weights = probabilities(logits, sampling).masked_fill(odd, 1.0)
            chosen = torch.multinomial(weights, 1, generator=generator)[:, 0]
        # both at once: a GPU is waited for once a step
        scores, tokens = torch.stack((largest.double(), chosen.double())).tolist()
        wrong = f"logits: expected finite numbers, got others at token {step} of a turn"
        check_scores(scores, wrong)
        for row, token in enumerate(map(int, tokens)):
            if row not in live:
                continue
            if token in stop:
                live.discard(row)
                continue
            out[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if not live or step == max_new_tokens:
            break
        positions = positions + 1
        hidden = decoder(
            chosen[:, None],
            positions=positions,
            max_position=last,
            cache=cache,
            pages=pages,
            valid=None if batch.valid is None else batch.valid[:, : width + step],
        )[:, 0]
    return out
