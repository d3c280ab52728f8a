"""Mixed precision: the model computes in a short type, the optimiser steps weights in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unique_asr.models.speech_llm.packing import GROUP, find_bits, round_to_bits


class MasterWeights:
    """Keeps the float32 weights of what trains while the model computes in `dtype`, until `close` puts them back.

    Weights that are frozen are kept as they are. Unlike autocast this casts each weight once a step, and activations
    between the layers are short as well.

    Args:
        model: its parameters with `requires_grad` are those that train.
        dtype: what the model computes in.
        bits: bits a value with which trained matrices will be stored, by name prefix; `give_weights` can round to them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, bits: Mapping[str, int] | None = None) -> None:
        self.parameters = list(model.parameters())
        self.weights = {
            parameter: parameter.data.float() if parameter.requires_grad else parameter.data
            for parameter in self.parameters
        }
        self.bits = {
            parameter: width
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.ndim == 2 and parameter.shape[-1] % GROUP == 0
            if (width := find_bits(name, bits or {})) is not None
        }
        # A weight that will be rounded needs memory of its own, even if the model computes in float32.
        self.short = [weight.to(dtype, copy=parameter in self.bits) for parameter, weight in self.weights.items()]
        self._shorten()

    def get_float32(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The float32 weights of these parameters, for an optimiser."""
        return [self.weights[parameter] for parameter in parameters]

    def take_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the parameters' gradients to their float32 weights."""
        for parameter in parameters:
            self.weights[parameter].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def give_weights(self, parameters: Sequence[nn.Parameter], as_stored: bool = False) -> None:
        """Copy the float32 weights to the parameters, in the type that the model computes in.

        Args:
            as_stored: round matrices to the values that a file of `bits` keeps of them.
        """
        torch._foreach_copy_([parameter.data for parameter in parameters], self.get_float32(parameters))
        for parameter in parameters if as_stored else ():
            if parameter in self.bits:
                parameter.data.copy_(round_to_bits(self.weights[parameter], self.bits[parameter]))

    @contextmanager
    def use_float32(self) -> Iterator[None]:
        """Within the block the model holds its float32 weights, to be saved."""
        self.close()
        try:
            yield
        finally:
            self._shorten()

    def close(self) -> None:
        """Give the model its float32 weights back."""
        for parameter in self.parameters:
            parameter.data = self.weights[parameter]

    def _shorten(self) -> None:
        for parameter, short in zip(self.parameters, self.short, strict=True):
            parameter.data = short  # always the same memory: captured graphs read it


@contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block all weights of a model that does not train are in `dtype`."""
    masters = MasterWeights(model, dtype)
    try:
        yield
    finally:
        masters.close()
