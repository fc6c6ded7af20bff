# SPDX-License-Identifier: Apache-2.0
"""The Gate: which chunks are worth reading for a question, given the working memory.

It reads [chunk memory; update prompt; notes] with the decoder and low-rank adapters of its own, as
if the notes were to be written again unchanged. A linear head sees, at each position that a token
of the notes follows, the activations and how strongly that token is expected: where a chunk tells
something new, it is not. The log-sum-exp over these positions is the logit.

Two things keep the gate far cheaper than a reading turn: only the last few positions (the tail)
look into the chunk and are adapted, so that everything before them is computed once for all chunks;
and it may use only the first layers. There is no vocabulary projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_kernels as lk
from lychee.allocator import return_freed_memory
from lychee.decoder import Decoder, Layer, Pages, rotate
from lychee.errors import MemoryConfigError
from lychee.generate import PromptBatch, prefill_step
from lychee.lora import LoraLinear, LowRank, merged_copy
from lychee.projection import linear_into

# Tokens of prompts in one pass over several questions, which bounds its activations.
PASS_TOKENS = 4096
# Of the head's inputs, so that one learning rate suits the head and the adapters.
HEAD_SCALE = 4.0


@dataclass(frozen=True)
class GateConfig:
    """Shape of a gate; in config.json each field stands as `lychee_memory_gate_<name>`.

    Attributes:
        layers: decoder layers used, from the first on.
        tail: last positions that see the chunk; 1 is the last position alone, as in the paper.
            Of these, the ones behind which the notes stand give the logit.
        opening: chunks at the beginning of a text that are read without asking the gate.
        targets: projections with an adapter, of q, k, v, o.
        rank, alpha: size of the adapters; alpha / rank scales them.
        threshold: least probability at which a chunk is read.
    """

    layers: int
    tail: int = 1
    opening: int = 0
    targets: tuple[str, ...] = ("q", "v")
    rank: int = 8
    alpha: float = 16.0
    threshold: float = 0.5

    def __post_init__(self):
        # Memory tokens all enter the first layer as one embedding: only later ones tell chunks
        # apart.
        for name, least in (("layers", 2), ("tail", 1), ("opening", 0), ("rank", 1)):
            if getattr(self, name) < least:
                raise MemoryConfigError(
                    f"gate: {name}: expected at least {least}, got {getattr(self, name)}"
                )
        if not self.targets or set(self.targets) - set("qkvo"):
            raise MemoryConfigError(
                f"gate: targets: expected letters of q, k, v, o, got {list(self.targets)}"
            )
        if not 0 <= self.threshold <= 1:
            raise MemoryConfigError(
                f"gate: threshold: expected a probability, got {self.threshold}"
            )


@dataclass(frozen=True)
class GatePrompts:
    """What chunks do not change about R prompts of T positions, the last P of which are the tail.

    Attributes:
        tail: [R, P, E] activations behind the first layer.
        following: [R, P, E] output embeddings of the tokens that follow each position.
        counts: [R, P] bool, positions behind which a token of the notes or their end stands.
        keys, values: per layer from the second on [R, Hkv, T, D], keys rotated; the last P places
            are room for the tail's, which `score` fills.
        cos, sin: [R, 1, P, D / 2] of the tail's positions.
        valid: [R, T] bool, or None where nothing is padded.
    """

    tail: Tensor
    following: Tensor
    counts: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor
    valid: Tensor | None


class Gate(nn.Module):
    """Adapters and head; the decoder stays outside and unchanged.

    In evaluation mode the adapters are merged into copies of the weights they adapt.
    """

    def __init__(self, decoder: Decoder, config: GateConfig, seed: int = 0):
        super().__init__()
        layers = decoder.config.num_hidden_layers
        if config.layers > layers:
            raise MemoryConfigError(
                f"gate: layers: expected at most {layers}, as the model has, got {config.layers}"
            )
        self.config = config
        # In a tuple, so that the decoder's parameters are not the gate's.
        self._outside = (decoder,)
        generator = torch.Generator().manual_seed(seed)

        def adapter(layer: Layer, letter: str) -> LowRank:
            linear = layer.self_attn.linear(letter)
            sizes = linear.in_features, linear.out_features
            return LowRank(*sizes, config.rank, config.alpha, generator)

        self.layers = nn.ModuleList(
            nn.ModuleDict({letter: adapter(layer, letter) for letter in config.targets})
            for layer in decoder.model.layers[1 : config.layers]
        )
        # Over activations, and how strongly each position expects the token that follows it.
        self.head = nn.Linear(decoder.config.hidden_size + 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(decoder.device)
        self.train()

    @property
    def decoder(self) -> Decoder:
        return self._outside[0]

    def train(self, mode: bool = True) -> Gate:
        """Switch between adapters beside the weights and copies with the adapters merged in."""
        super().train(mode)
        self.tail_linears = []
        for layer, adapters in zip(self.decoder.model.layers[1:], self.layers, strict=False):
            linears = own_linears(layer)
            for letter, adapter in adapters.items():
                adapted = LoraLinear(linears[letter], adapter)
                linears[letter] = adapted if mode else merged_copy(adapted)
            self.tail_linears.append(linears)
        return self

    @torch.no_grad()
    def prepare(
        self, prompts: Sequence[list[int]], notes: Sequence[list[int]], first_position: int
    ) -> GatePrompts:
        """Run prompts and the notes behind them as far as neither chunk nor adapters are needed.

        `first_position` is that of a prompt's first token: the memory slots before it.
        """
        decoder, config, tail = self.decoder, self.decoder.config, self.config.tail
        end = min(config.eos_token_ids, default=0)
        rows = [prompt + draft for prompt, draft in zip(prompts, notes, strict=True)]
        batch = PromptBatch.build(rows, first_position, 0, decoder.device)
        batch = batch.widened(tail + 1)  # every row has a tail and something before it
        width = batch.ids.shape[1]
        cos, sin = decoder.rope_tables(first_position + width)
        cos, sin = cos[batch.positions][:, None], sin[batch.positions][:, None]
        size = max(1, PASS_TOKENS // width)
        shape = len(rows), config.num_key_value_heads, width, config.head_dim
        kept = [[cos.new_empty(shape, dtype=decoder.dtype) for _ in "kv"] for _ in self.layers]
        return_freed_memory(kept_bytes := sum(k.nbytes + v.nbytes for k, v in kept))
        tails = []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            valid = None if batch.valid is None else batch.valid[part]
            into = [[k[part], v[part]] for k, v in kept]
            tails.append(self._pass(batch.ids[part], cos[part], sin[part], valid, into))
        following = F.pad(batch.ids[:, width - tail + 1 :], (0, 1), value=end)
        first = torch.tensor([[tail - len(draft) - 1] for draft in notes], device=cos.device)
        return_freed_memory(kept_bytes)
        return GatePrompts(
            torch.cat(tails),
            decoder.lm_head.weight[following],
            torch.arange(tail, device=cos.device) >= first,
            *map(list, zip(*kept, strict=True)),
            cos[:, :, width - tail :],
            sin[:, :, width - tail :],
            batch.valid,
        )

    def _pass(
        self, ids: Tensor, cos: Tensor, sin: Tensor, valid: Tensor | None, into: list[list[Tensor]]
    ) -> Tensor:
        """Activations of the tail of prompts ids [R, T]; `into` gets keys and values before it."""
        decoder, width = self.decoder, ids.shape[1]
        # In pieces, a quarter of prefill's: what is kept leaves less room than prefill's cache.
        before, step = width - self.config.tail, max(1, prefill_step(ids.device, len(ids)) // 4)
        k, v = into[0]
        into, tails = [[t.new_empty(*t.shape[:2], width, t.shape[3]) for t in (k, v)], *into], []
        for start in range(0, width, step):
            x = decoder.model.embed_tokens(ids[:, start : start + step])
            for index, layer in enumerate(decoder.model.layers[: self.config.layers]):
                stop, linears = start + x.shape[1], own_linears(layer)
                turns = cos[:, :, start:stop], sin[:, :, start:stop]
                k, v = (heads(layer, linears, letter, x) for letter in "kv")
                for kept, new in zip(into[index], (rotate(k, *turns), v), strict=True):
                    kept[:, :, start:stop] = new
                if index < self.config.layers - 1:
                    q = rotate(heads(layer, linears, "q", x), *turns)
                    k, v = (kept[:, :, :stop] for kept in into[index])
                    seen = None if valid is None else valid[:, :stop].contiguous()
                    x = close(layer, linears, x, lk.memory_attention(q, k, v, valid=seen)[0])
                if index == 0:
                    x, tail = x.tensor_split((max(0, before - start),), dim=1)
                    tails.append(tail.clone())
                if not x.shape[1]:
                    break
        return torch.cat(tails, dim=1)

    def score(self, prompts: GatePrompts, rows: Tensor | None, pages: Pages) -> Tensor:
        """Logits [N] of N pairs of a prompt and a chunk.

        Args:
            prompts: what `prepare` returned.
            rows: [N] int64, each pair's prompt; None takes the prompts in order.
            pages: the chunk of each pair.
        """
        if rows is not None and len(rows) == (count := len(prompts.tail)):
            # One chunk for each prompt, as where prompts are long: nothing need be copied.
            rows = None if torch.equal(rows, torch.arange(count, device=rows.device)) else rows

        def spread(tensor: Tensor) -> Tensor:
            if rows is None:
                return tensor
            if tensor.shape[0] == 1:
                return tensor.expand(len(rows), *tensor.shape[1:])
            return tensor[rows]

        x, cos, sin = prompts.tail, prompts.cos, prompts.sin
        valid = None if prompts.valid is None else spread(prompts.valid).contiguous()
        earlier = zip(prompts.keys, prompts.values, strict=True)
        for index, (before, linears) in enumerate(
            zip(earlier, self.tail_linears, strict=True), start=1
        ):
            layer = self.decoder.model.layers[index]
            q, k, v = (heads(layer, linears, letter, x) for letter in "qkv")
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if index > 1 and rows is not None:
                before = (tensor[rows] for tensor in before)
            k, v = (put_last(*pair) for pair in zip(before, (k, v), strict=True))
            if index == 1:
                # Still the same for every chunk.
                q, k, v, x, cos, sin = map(spread, (q, k, v, x, cos, sin))
            out, _ = lk.memory_attention(q, k, v, valid=valid, **pages.attention_arguments(index))
            x = close(layer, linears, x, out)
        expected = self.decoder.model.norm(x) * spread(prompts.following)
        x = HEAD_SCALE * F.rms_norm(x.float(), x.shape[-1:])
        scores = self.head(torch.cat((x, expected.float().sum(-1, keepdim=True)), dim=-1))[..., 0]
        return scores.masked_fill(~spread(prompts.counts), float("-inf")).logsumexp(dim=1)


def put_last(room: Tensor, tail: Tensor) -> Tensor:
    """`room` [R, H, T, D] with `tail` [R, H, P, D] in its last places; without gradients in place,
    as a copy of all prompts' keys would be the gate's largest tensor."""
    if torch.is_grad_enabled():
        return torch.cat((room[:, :, : -tail.shape[2]], tail), dim=2)
    room[:, :, -tail.shape[2] :] = tail
    return room


def own_linears(layer: Layer) -> dict[str, nn.Module]:
    return {letter: layer.self_attn.linear(letter) for letter in "qkvo"}


def heads(layer: Layer, linears: dict[str, nn.Module], letter: str, x: Tensor) -> Tensor:
    """Projection q, k or v of activations [B, T, E] -> [B, heads, T, D], not rotated."""
    linear, norm = linears[letter], layer.input_layernorm
    if torch.is_grad_enabled():
        rows = linear(norm(x))
    else:
        rows = x.new_empty(*x.shape[:2], linear.out_features)
        linear_into(linear, x.flatten(0, 1), rows.flatten(0, 1), norm=norm)
    return layer.self_attn.split_heads(letter, rows).transpose(1, 2)


def close(layer: Layer, linears: dict[str, nn.Module], x: Tensor, out: Tensor) -> Tensor:
    """Output projection, residual and MLP behind attention `out` [B, H, T, D]; a new tensor."""
    rows = out.transpose(1, 2).flatten(2)
    if torch.is_grad_enabled():
        x = x + linears["o"](rows)
        return x + layer.mlp(layer.post_attention_layernorm(x))
    x = x.clone(memory_format=torch.contiguous_format)
    linear_into(linears["o"], rows.flatten(0, 1), x.flatten(0, 1), add=True)
    layer.add_mlp(x.flatten(0, 1))
    return x
