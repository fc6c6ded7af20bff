# SPDX-License-Identifier: Apache-2.0
"""One training run in several processes, started by `accelerate launch` or `torchrun`.

`accelerate launch --cpu --num_processes 2` starts one process only, which is refused here.

Every process draws the same batch from the same seed and computes its own part of it, so that a run
gives the same losses in any number of processes. Either every process holds all weights (DDP), or
weights, gradients and optimiser state are spread over the processes (FSDP2).
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lychee.errors import InputError

# What `accelerate launch` may ask for that training here does not do.
UNSUPPORTED = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "FSDP_VERSION": "2",
    "FSDP_OFFLOAD_PARAMS": "false",
}


class LossModule(nn.Module):
    """The modules in training, with a run's loss as the forward pass that is wrapped."""

    def __init__(self, modules: nn.ModuleDict, loss: Callable[[Any], tuple[Tensor, dict]]):
        super().__init__()
        self.modules_in_training = modules
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, dict]:
        return self.loss(batch)


def refuse_unsupported(environment: Mapping[str, str]) -> None:
    for name, supported in UNSUPPORTED.items():
        if environment.get(name, supported).lower() != supported:
            raise InputError(
                f"accelerate: {name}: expected {supported}, got {environment[name]}",
                "launch with --mixed_precision no (the recipe's `precision` says it), and "
                "--fsdp_version 2 where you use FSDP",
            )
    # What it sets where it was asked for several processes and starts this one alone.
    asked = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys()
    if asked and "WORLD_SIZE" not in environment:
        raise InputError(
            "accelerate: expected to be one of several processes, got started alone",
            "launch with --multi_gpu, also where there are only CPUs, or by torchrun",
        )


class Processes:
    """The processes of this run; a run that nobody launched as several has one."""

    def __init__(self, device: str = "auto", shard: bool = False):
        """`shard` spreads the weights; `accelerate launch --use_fsdp` asks for it as well."""
        environment = os.environ
        refuse_unsupported(environment)
        self.count = int(environment.get("WORLD_SIZE", "1"))
        self.rank = int(environment.get("RANK", "0"))
        local = int(environment.get("LOCAL_RANK", "0"))
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and kind == "cpu":
            raise InputError("device: expected cpu, as torch sees no GPU here, got cuda")
        if device != "auto":
            kind = device
        self.device = torch.device(f"cuda:{local}" if kind == "cuda" else kind)
        self.shard = shard or environment.get("ACCELERATE_USE_FSDP", "") == "true"
        if self.count == 1:
            self.shard = False
            return
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def wrap(self, modules: nn.ModuleDict, loss: Callable) -> nn.Module:
        """A module that computes `loss` of a batch's part and averages gradients over processes."""
        module = LossModule(modules, loss)
        if self.count == 1:
            return module
        if self.shard:
            # One group, gathered once a step: a group per layer would be gathered as often as the
            # layer is called, and processes whose turns differ in number call it differently often.
            return fully_shard(module, mesh=init_device_mesh(self.device.type, (self.count,)))
        # Every process makes its own rotary tables, as long as it needs; torch 2.13 has a new name.
        names = ("forward_sync_buffers", "broadcast_buffers")
        known = inspect.signature(DistributedDataParallel).parameters
        options = {next(name for name in names if name in known): False}
        # Nothing reads the last layer's memory queries, so a few parameters get no gradient.
        return DistributedDataParallel(module, find_unused_parameters=True, **options)

    def part(self, batch: Any) -> Any:
        """This process's part of a batch, by the batch's method `part(index, count)`."""
        if self.count == 1:
            return batch
        part = batch.part(self.rank, self.count)
        if part is None:
            raise InputError(f"batch: expected a row for each of {self.count} processes, got fewer")
        return part

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes, without gradient."""
        if self.count == 1:
            return value.detach()
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, total: Tensor, count: int) -> Tensor:
        """Mean over the rows of every process, as this process's part of the loss.

        Args:
            total: [] sum over this process's rows (or tokens), 0 where it has none.
            count: number of them.

        Gradients are averaged over processes, so the parts' average, not their sum, is the mean.
        """
        if self.count == 1:
            return total / max(1, count)
        everywhere = self.sum(torch.tensor(float(count), device=total.device)).clamp_(min=1)
        return total * (self.count / everywhere)

    def gather(self, value: Any) -> list[Any]:
        """Picklable values of every process, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def whole(self, value: Any) -> Any:
        """A tensor as it would be in one process, on the CPU; spread ones only where `first`."""
        if isinstance(value, DTensor):
            full = value.detach().full_tensor()
            return full.cpu() if self.first else full.new_empty(0)
        return value.detach().cpu() if isinstance(value, Tensor) else value

    @staticmethod
    def like(value: Any, other: Any) -> Any:
        """`value`, a whole tensor, spread over the processes as `other` is."""
        if isinstance(other, DTensor) and isinstance(value, Tensor) and value.dim():
            return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
        return value

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        """Whole weights inside a wrapped module, for work outside its forward pass."""
        if isinstance(module, FSDPModule):
            module.unshard()
        try:
            yield
        finally:
            if isinstance(module, FSDPModule):
                module.reshard()

    def leave(self) -> None:
        """End the group and its threads; whoever holds a wrapped module lets go of it before."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # Wrapped modules are cycles that hold the group. A thread of it that is still alive
            # when the interpreter ends can abort the process (pytorch issue 190489).
            gc.collect()


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`: looks into dataclasses, lists, tuples and dicts."""
    if device.type == "cpu":
        return value
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{n: to_device(v, device) for n, v in fields.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return value
