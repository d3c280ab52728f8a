"""Murmur-style decoding (arXiv 2606.01483): chunks of 300 s, and within a chunk windows over speech and output.

Two evictions: with every decoded token the oldest speech positions go, until a window of them is left; and of the
decoded tokens only the first and the latest are kept. The chunks are passes of `unique_asr.longform.passes`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from unique_asr.attention.selector import TokenSelector


@dataclass
class Murmur(TokenSelector):
    """At decode step t the positions [sink, sink + rate * (t - delay)) are gone, but never the last w of the prompt.

    Of the output, the first `output_sink` and the latest w tokens are read; w = (budget - sinks) / 2 for either. The
    budget must hold the sinks and more.
    """

    name: ClassVar[str] = "murmur"
    sink: int = 32  # first positions of the prompt, always read
    delay: int = 32  # decoded tokens before eviction begins
    rate: float = 1.0  # positions evicted with every decoded token
    output_sink: int = 4

    def configure(self, budget, page_size, sink_pages):
        super().configure(budget, page_size, sink_pages)
        self.prompt_tokens = 0  # slots up to the end of the prompt of all rows, on the host
        if budget is not None:
            self.window = (budget - self.sink - self.output_sink) // 2
            if self.window < 1:
                sinks = self.sink + self.output_sink
                raise ValueError(f"attention.budget is {budget}: Murmur's sinks alone are {sinks} tokens")

    def begin_sequence(self, keys):
        if getattr(self, "prompt_end", None) is None or len(self.prompt_end) != len(keys):
            # int64 [B, 1, 1]: slots of each row up to the end of its prompt, padding included.
            self.prompt_end = torch.zeros(len(keys), 1, 1, dtype=torch.long, device=keys.device)
        self.prompt_tokens = 0

    def shift(self, by, length, keys):
        super().shift(by, length, keys)
        self.prompt_end += by

    def copy_rows(self, rows, length, keys, other, other_length):
        super().copy_rows(rows, length, keys, other, other_length)
        self.prompt_end[rows] = length

    def select_rows(self, indices):
        super().select_rows(indices)
        self.prompt_end = self.prompt_end[indices]

    def read_prompt(self, query, keys, position, scaling):
        self.prompt_tokens = keys.shape[2]
        self.prompt_end.fill_(self.prompt_tokens)

    def select(self, query, keys, position, last):
        elapsed = last + 1 - self.prompt_end
        padding = -position[..., :1]  # slots before each row's first token
        most = (self.prompt_end - padding - self.sink - self.window).clamp(min=0)
        gone = most.minimum((self.rate * (elapsed - self.delay)).long().clamp(min=0))
        output = position - (self.prompt_end - padding)  # place in the output, negative in the prompt
        evicted = (position >= self.sink) & (position < self.sink + gone) & (output < 0)
        evicted |= (output >= self.output_sink) & (output < elapsed - self.window)
        return ~evicted

    def count_tokens(self, length, prompt=None):
        prompt = self.prompt_tokens if prompt is None else prompt
        elapsed = length - prompt
        most = max(0, prompt - self.sink - self.window)
        gone = min(max(0, int(self.rate * (elapsed - self.delay))), most)
        return length - gone - max(0, elapsed - self.window - self.output_sink)
