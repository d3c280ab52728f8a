"""How sparse decoding was: counted on the host from lengths alone, so that counting never waits for a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass
class SparsityCounters:
    """Counters of decode steps; prefill is dense and not counted.

    A step has one query token a row, or is dense: it verifies a draft of several tokens. Pages are summed over layers,
    rows and KV heads; bytes are those of keys, values and page statistics.
    """

    steps: int = 0
    sparse_steps: int = 0  # steps in which at least one layer selected pages
    pages_read: int = 0
    pages_total: int = 0
    bytes_read: int = 0
    bytes_dense: int = 0  # what a dense step would have read

    @property
    def share_of_pages_read(self) -> float:
        """From 0 to 1; 1 before the first step."""
        return self.pages_read / self.pages_total if self.pages_total else 1.0

    def add(self, other: SparsityCounters, times: int = 1) -> None:
        """Add other counters, `times` times."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + times * value)

    def since(self, before: SparsityCounters) -> SparsityCounters:
        """Return what was counted after the copy `before` was made."""
        return SparsityCounters(**{name: value - getattr(before, name) for name, value in asdict(self).items()})

    def copy(self) -> SparsityCounters:
        """Return counters of the same values."""
        return replace(self)

    def to_dict(self) -> dict:
        """Return all counters and the share of pages read, as in a transcript's JSON."""
        return asdict(self) | {"share_of_pages_read": round(self.share_of_pages_read, 6)}

    def __str__(self) -> str:
        if not self.steps:
            return "no decode step yet: nothing was generated with this cache"
        saved = f"{self.bytes_read / 1e9:.2f} of {self.bytes_dense / 1e9:.2f} GB"
        return (
            f"{self.sparse_steps} of {self.steps} steps sparse, "
            f"{100 * self.share_of_pages_read:.1f} % of pages and {saved} read"
        )


class StepCounting:
    """Counts the steps of a cache's layers, which run one after the other: what each reads, and the step once.

    Which layers there are does not matter: a step ends when a layer that took part in it begins another.
    """

    def __init__(self, counters: SparsityCounters) -> None:
        self.counters = counters
        self._layers: set[int] = set()  # that took part in the step under way
        self._sparse = False  # whether one of them selected pages

    def count(self, layer: int, reads: SparsityCounters, sparse: bool) -> None:
        """Count the step of one layer, given by its index, and what it reads."""
        if layer in self._layers:
            self._layers.clear()
        if not self._layers:
            self.counters.steps += 1
            self._sparse = False
        self._layers.add(layer)
        self.counters.sparse_steps += sparse and not self._sparse
        self._sparse |= sparse
        self.counters.add(reads)
