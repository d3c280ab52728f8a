"""Mixed precision: the model computes in a short type, the optimiser steps weights in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MasterWeights:
    """Keeps the float32 weights of what trains while the model computes in `dtype`, until `close` puts them back.

    Weights that are frozen are kept as they are. Unlike autocast this casts each weight once a step, and activations
    between the layers are short as well.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.parameters = list(model.parameters())
        self.weights = {
            parameter: parameter.data.float() if parameter.requires_grad else parameter.data
            for parameter in self.parameters
        }
        self.short = [weight.to(dtype) for weight in self.weights.values()]
        self._shorten()

    def of(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The float32 weights of these parameters, for an optimiser."""
        return [self.weights[parameter] for parameter in parameters]

    def take_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the parameters' gradients to their float32 weights."""
        for parameter in parameters:
            self.weights[parameter].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def give_weights(self, parameters: Sequence[nn.Parameter]) -> None:
        """Round the float32 weights to the parameters."""
        torch._foreach_copy_([parameter.data for parameter in parameters], self.of(parameters))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within the block the model holds its float32 weights, to be saved."""
        self.close()
        try:
            yield
        finally:
            self._shorten()

    def close(self) -> None:
        for parameter in self.parameters:
            parameter.data = self.weights[parameter]

    def _shorten(self) -> None:
        for parameter, short in zip(self.parameters, self.short, strict=True):
            parameter.data = short  # always the same memory: captured graphs read it


@contextmanager
def rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block all weights of a model that does not train are in `dtype`."""
    masters = MasterWeights(model, dtype)
    try:
        yield
    finally:
        masters.close()
