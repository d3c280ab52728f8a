"""The contract of what writes tokens: a `Sequence` is one text being written, an `Engine` what several of them share.

A sequence alone (`greedy.GreedyDecoder`) has every token at once. A sequence of an engine (`batch.BatchEngine`) has
its next token only after the engine's next step, which writes one token for each of its sequences. Until then it
gives PENDING, and whoever reads it passes PENDING on, up to the loop that calls `Engine.step`:

    for token in sequence.tokens(max_new_tokens=100, stop_ids={2}):
        if token is PENDING:
            yield PENDING                                # others go on; the engine makes a step when all are pending
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:  # the command line imports PENDING before its arguments are checked
    import torch
    from torch import Tensor

    from unique_asr.attention import SparsityCounters


class Pending(Enum):
    """The type of PENDING."""

    PENDING = "pending"


PENDING: Final = Pending.PENDING  # no token, word or segment yet: others decode beside it, and a step is needed first

PrefillProgress = Callable[[int, int], None]  # positions read, and all of them


class Sequence(Protocol):
    """One text being written: a prompt goes in, tokens come out, greedily.

    Attributes:
        log_probs: of the tokens since the last prefill, in nats.
        stop_reason: of the last `tokens`: "end" (a stop id), "length", or None if it was not exhausted.
        counters: what its decode steps read since it was made; `reset` keeps them.
        engine_seconds: its share of the time that an engine spent in steps, by stage (prefill, decode). Empty for a
            sequence alone, whose time is spent in its own methods.
    """

    log_probs: list[float]
    stop_reason: str | None
    counters: SparsityCounters
    engine_seconds: dict[str, float]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache that are allocated, which the next prompt takes over."""

    def reset(self) -> None:
        """Drop prompt and text; memory and counters are kept."""

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` positions of prompt and text before the prefill, where that is the caller's to do."""

    def prefill(self, inputs_embeds: Tensor, progress: PrefillProgress | None = None) -> None:
        """Append inputs_embeds [1, N, hidden] to the prompt; `progress(done, total)` counts positions."""

    def tokens(self, max_new_tokens: int, stop_ids: Collection[int] = ()) -> Iterator[int | Pending]:
        """Yield the tokens that follow, without the stop id; PENDING where the engine has to make a step first."""


class Engine(Protocol):
    """What several sequences share: a model, a cache, and steps that write one token for each of them.

    Attributes:
        device: where the model is.
        notice: one line about sequences that wait for memory; empty if none ever did.
    """

    device: torch.device
    notice: str

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache that are allocated, for all sequences together."""

    def new_sequence(self) -> Sequence:
        """Return a sequence that is decoded with the others from its prefill on."""

    def remove(self, sequence: Sequence) -> None:
        """Give up a sequence and its place, whether or not its text is complete."""

    def step(self) -> None:
        """Write the next token of every sequence that is pending.

        An error ends all texts under way; the engine can be used again with new prompts.
        """


class SequenceGroup(list[Sequence]):
    """Sequences of one engine that write parts of the same recording."""

    def __init__(self, engine: Engine, count: int) -> None:
        super().__init__(engine.new_sequence() for _ in range(count))
        self.engine = engine

    @property
    def counters(self) -> SparsityCounters:
        """The sum over the sequences."""
        first, *others = self
        total = first.counters.copy()
        for sequence in others:
            total.add(sequence.counters)
        return total

    @property
    def engine_seconds(self) -> dict[str, float]:
        """Seconds by stage, the sum over the sequences."""
        total: dict[str, float] = {}
        for sequence in self:
            for stage, seconds in sequence.engine_seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    @property
    def cache_bytes(self) -> int:
        """Bytes of the engine's cache."""
        return self.engine.cache_bytes


@contextmanager
def open_sequences(engine: Engine, count: int) -> Iterator[SequenceGroup]:
    """Give `count` new sequences of an engine, which are removed at the end of the block."""
    group = SequenceGroup(engine, count)
    try:
        yield group
    finally:
        for sequence in group:
            engine.remove(sequence)
