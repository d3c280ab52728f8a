"""Murmur-style decoding (arXiv 2606.01483): chunks of 300 s, and within a chunk windows over speech and output.

Two evictions: with every decoded token the oldest speech positions go, until `speech_window` of them are left; and of
the decoded tokens only the first and the latest are kept. The chunks are passes of `unique_asr.longform`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Method


@dataclass
class Murmur(Method):
    """At decode step t the positions [sink, sink + rate * (t - delay)) are gone, but never the last w of the prompt.

    Of the output, the first `output_sink` and the latest w tokens are read; w = (budget - sinks) / 2 for either.
    """

    name: ClassVar[str] = "murmur"
    sink: int = 32  # first positions of the prompt, always read
    delay: int = 32  # decoded tokens before eviction begins
    rate: float = 1.0  # positions evicted with every decoded token
    output_sink: int = 4

    def begin(self, config):
        super().begin(config)
        if config.budget is not None:
            self.window = (config.budget - self.sink - self.output_sink) // 2
            if self.window < 1:
                sinks = self.sink + self.output_sink
                raise ValueError(f"attention.budget is {config.budget}: Murmur's sinks alone are {sinks} tokens")

    def rank(self, query, keys, position):
        total, elapsed = keys.shape[2], keys.shape[2] - self.prompt
        padding = -position[..., :1]  # tokens before each row's first; the longest row has none
        most = (self.prompt - padding - self.sink - self.window).clamp(min=0)
        gone = most.clamp(max=max(0, int(self.rate * (elapsed - self.delay))))
        output = position - (self.prompt - padding)  # place in the output, negative in the prompt
        evicted = (position >= self.sink) & (position < self.sink + gone) & (output < 0)
        evicted |= (output >= self.output_sink) & (output < elapsed - self.window)
        ranks = torch.zeros(position.shape, device=keys.device).masked_fill(evicted, -torch.inf)
        return ranks, self._read(total, elapsed)

    def _read(self, total: int, elapsed: int) -> int:
        """Tokens that a row without padding reads."""
        gone = min(max(0, int(self.rate * (elapsed - self.delay))), max(0, self.prompt - self.sink - self.window))
        return total - gone - max(0, elapsed - self.window - self.output_sink)
