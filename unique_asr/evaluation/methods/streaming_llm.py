"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a window of the latest tokens; the rest is gone."""

from dataclasses import dataclass
from typing import ClassVar

from unique_asr.attention.selector import TokenSelector


@dataclass
class StreamingLLM(TokenSelector):
    """read = first `sink` tokens + the latest (budget - sink) tokens."""

    name: ClassVar[str] = "streaming_llm"
    sink: int = 4  # tokens; the paper's choice

    def configure(self, budget, page_size, sink_pages):
        super().configure(budget, page_size, sink_pages)
        if budget is not None and budget <= self.sink:
            raise ValueError(f"attention.budget is {budget}: StreamingLLM needs more than its {self.sink} sinks")

    def select(self, query, keys, position, last):
        newest = last + position[..., :1]  # position of the newest token
        return (position < self.sink) | (position > newest - (self.budget - self.sink))
