"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a window of the latest tokens; the rest is gone."""

from dataclasses import dataclass
from typing import ClassVar

from unique_asr.evaluation.methods.base import Method


@dataclass
class StreamingLLM(Method):
    """read = first `sink` tokens + the latest (budget - sink) tokens."""

    name: ClassVar[str] = "streaming_llm"
    sink: int = 4  # tokens; the paper's choice

    def begin(self, config):
        super().begin(config)
        if config.budget is not None and config.budget <= self.sink:
            raise ValueError(f"attention.budget is {config.budget}: StreamingLLM needs more than its {self.sink} sinks")

    def choose(self, query, keys, position, last):
        newest = last + position[..., :1]  # position of the newest token
        return (position < self.sink) | (position > newest - (self.config.budget - self.sink))
