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

    def rank(self, query, keys):
        total = keys.shape[2]
        most = max(0, self.prompt - self.sink - self.window)
        gone = min(max(0, int(self.rate * (total - self.prompt - self.delay))), most)
        ranks = torch.zeros(total, device=keys.device)
        ranks[self.sink : self.sink + gone] = -torch.inf
        first, last = self.prompt + self.output_sink, max(self.prompt + self.output_sink, total - self.window)
        ranks[first:last] = -torch.inf
        return ranks.view(1, 1, -1), total - gone - (last - first if first < total else 0)
