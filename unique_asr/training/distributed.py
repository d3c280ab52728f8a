"""Data-parallel training: each process draws its own items, and all step with the mean of their gradients.

accelerate starts the processes: accelerate launch --num_processes 8 scripts/finetune.py ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among all that train together."""

    rank: int = 0
    count: int = 1  # of all; one alone communicates with nobody
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def start(cls, device: torch.device) -> Processes:
        """Join the processes that a launcher started, if one did; on CUDA each gets a device of its own."""
        from accelerate import PartialState

        if "cuda" in device.type or not dist.is_available():
            state = PartialState()
        else:
            state = PartialState(cpu=True)
        if state.num_processes == 1:
            return cls(device=device)
        return cls(state.process_index, state.num_processes, state.device if device.type == "cuda" else device)

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def average_gradients(self, weights: Sequence[Tensor]) -> None:
        """Replace the gradients of `weights` by their means over all processes; a missing one counts as zero."""
        if self.count == 1:
            return
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        flat = torch.cat([weight.grad.flatten() for weight in weights])
        dist.all_reduce(flat)
        flat /= self.count
        for weight, gradient in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
            weight.grad.copy_(gradient.view_as(weight))

    def share_first(self, seconds: float) -> float:
        """The `seconds` of the first process, so that all stop and save at the same step."""
        if self.count == 1:
            return seconds
        value = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.broadcast(value, 0)
        return value.item()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()
