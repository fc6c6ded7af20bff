# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv:2106.09685): y = W x + scale * B (A x) with W frozen.

`attach` puts them into a decoder's projections for training, `merge` turns them into plain weights
again; the gate keeps its own beside a decoder that it must not change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lychee.errors import CheckpointError, MemoryConfigError


class LowRank(nn.Module):
    """The product B A of two thin matrices, added to a frozen weight; zero at the start.

    Parameters are float32 whatever the weight's dtype, and are cast to that of the input.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, generator=None):
        """`alpha` / `rank` is the scale; `generator` makes the start repeatable."""
        super().__init__()
        if not 1 <= rank <= min(inputs, outputs):
            limit = min(inputs, outputs)
            raise MemoryConfigError(f"rank: expected 1 to {limit} for this model, got {rank}")
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.randn(rank, inputs, generator=generator) * inputs**-0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """scale * B (A x) for rows x [..., inputs] -> [..., outputs]."""
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """weight + scale * B A, a new tensor [outputs, inputs] of the weight's dtype."""
        return (weight.float() + self.scale * (self.b @ self.a)).to(weight.dtype)


class LoraLinear(nn.Module):
    """A linear layer, frozen by `attach`, with an adapter; stands where an nn.Linear stood.

    `weight` is the weight of both together, so that code which multiplies by it directly computes
    the same as a call does.
    """

    def __init__(self, base: nn.Linear, adapter: LowRank):
        super().__init__()
        self.base = base
        self.adapter = adapter

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        return self.adapter.merged(self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


def attach(
    decoder: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int = 0
) -> list[nn.Parameter]:
    """Freeze a decoder and give the named projections of every layer an adapter.

    Args:
        decoder: changed in place; every parameter it has now is frozen.
        targets: names such as q_proj, v_proj, down_proj, lychee_memory_k_proj.
        rank, alpha: size of the adapters, and what times 1 / rank scales them.
        seed: of the adapters' start; their product starts at zero.

    Returns:
        The adapters' parameters, which alone require gradients.

    Raises:
        MemoryConfigError: a target that the decoder does not have, or an impossible rank.
    """
    found = [
        (parent, name, module)
        for parent in decoder.modules()
        for name, module in parent.named_children()
        if isinstance(module, nn.Linear) and name in targets
    ]
    missing = sorted(set(targets) - {name for _, name, _ in found})
    if missing or not found:
        raise MemoryConfigError(
            f"targets: expected projections of this model, got {', '.join(missing) or 'none'}"
        )
    generator = torch.Generator().manual_seed(seed)
    decoder.requires_grad_(False)
    parameters = []
    for parent, name, base in found:
        adapter = LowRank(base.in_features, base.out_features, rank, alpha, generator)
        adapter.to(base.weight.device)
        setattr(parent, name, LoraLinear(base, adapter))
        parameters += adapter.parameters()
    return parameters


def adapters(module: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Every adapter in a module, with the name of what it adapts."""
    for name, child in module.named_modules():
        if isinstance(child, LowRank):
            yield name.removesuffix(".adapter"), child


@torch.no_grad()
def merge(decoder: nn.Module) -> None:
    """Replace every adapted projection by a plain one with the same result, in place."""
    for parent in list(decoder.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LoraLinear):
                module.base.weight.copy_(module.weight)
                setattr(parent, name, module.base)


def save_adapters(path: Path, module: nn.Module) -> None:
    """Write a module's adapters to one safetensors file, first under a temporary name.

    Tensors are `<projection>.lora_A` and `.lora_B`; the scale is in the file's metadata.

    Raises:
        CheckpointError: a place that cannot be written.
    """
    tensors, scales = {}, set()
    for name, adapter in adapters(module):
        tensors[f"{name}.lora_A"] = adapter.a.detach().cpu().contiguous()
        tensors[f"{name}.lora_B"] = adapter.b.detach().cpu().contiguous()
        scales.add(adapter.scale)
    (scale,) = scales
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(tensors, part, metadata={"format": "pt", "lora_scale": repr(scale)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a writable file, got: {error}", "") from error


@torch.no_grad()
def load_adapters(path: Path, module: nn.Module) -> None:
    """Read what `save_adapters` wrote into a module with the same adapters.

    Raises:
        CheckpointError: a file that is no such file, or one for other projections, rank or scale.
    """
    found = dict(adapters(module))
    expected = {
        f"{name}.{letter}": tensor
        for name, adapter in found.items()
        for letter, tensor in (("lora_A", adapter.a), ("lora_B", adapter.b))
    }
    scales = {repr(adapter.scale) for adapter in found.values()}
    try:
        with safe_open(path, framework="pt") as file:
            names, scale = set(file.keys()), (file.metadata() or {}).get("lora_scale")
            if wrong := sorted(names ^ set(expected)):
                got = "none" if wrong[0] in expected else "one"
                wanted = "one" if wrong[0] in expected else "none"
                raise CheckpointError(f"{path}: {wrong[0]}: expected {wanted}, got {got}", "")
            if {scale} != scales:
                raise CheckpointError(f"{path}: scale: expected {min(scales)}, got {scale}", "")
            for name, tensor in expected.items():
                stored = file.get_tensor(name)
                if stored.shape != tensor.shape:
                    raise CheckpointError(
                        f"{path}: {name}: expected {list(tensor.shape)}, got {list(stored.shape)}",
                        "",
                    )
                tensor.copy_(stored)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a file of adapters, got: {error}", "") from error


@torch.no_grad()
def merged_copy(adapted: LoraLinear) -> nn.Linear:
    """A plain layer that computes what an adapted one does, beside the one it adapts."""
    linear = nn.Linear(adapted.in_features, adapted.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(adapted.weight, requires_grad=False)
    linear.bias = adapted.bias
    return linear
