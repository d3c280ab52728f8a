"""Murmur-style decoding (arXiv 2606.01483): chunks of 300 s, and within a chunk windows over speech and output.

Two evictions: with every decoded token the oldest speech positions go, until `speech_window` of them are left; and of
the decoded tokens only the first and the latest are kept. The chunks are passes of `unique_asr.longform.passes`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from unique_asr.evaluation.methods.base import Method


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

    def reset(self, keys):
        if getattr(self, "prompted", None) is None or len(self.prompted) != len(keys):
            # Of every row, the slots up to the end of its prompt, with padding.
            self.prompted = torch.zeros(len(keys), 1, 1, dtype=torch.long, device=keys.device)
        self.prompt_tokens = 0  # of all rows, on the host

    def move(self, by, layer):
        super().move(by, layer)
        self.prompted += by

    def take(self, rows, layer, other):
        super().take(rows, layer, other)
        self.prompted[rows] = layer.length

    def select(self, indices):
        super().select(indices)
        self.prompted = self.prompted[indices]

    def prompt(self, query, keys, position, scaling):
        self.prompt_tokens = keys.shape[2]
        self.prompted.fill_(self.prompt_tokens)

    def choose(self, query, keys, position, last):
        elapsed = last + 1 - self.prompted
        padding = -position[..., :1]  # slots before each row's first token
        most = (self.prompted - padding - self.sink - self.window).clamp(min=0)
        gone = most.minimum((self.rate * (elapsed - self.delay)).long().clamp(min=0))
        output = position - (self.prompted - padding)  # place in the output, negative in the prompt
        evicted = (position >= self.sink) & (position < self.sink + gone) & (output < 0)
        evicted |= (output >= self.output_sink) & (output < elapsed - self.window)
        return ~evicted

    def reads(self, length, prompt=None):
        prompt = self.prompt_tokens if prompt is None else prompt
        elapsed = length - prompt
        most = max(0, prompt - self.sink - self.window)
        gone = min(max(0, int(self.rate * (elapsed - self.delay))), most)
        return length - gone - max(0, elapsed - self.window - self.output_sink)
