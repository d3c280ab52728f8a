"""What a sparse decode step reads: one interface for UNIQUE and for every other method.

`SparseAttentionConfig.selector` holds a selector and its settings, or None for UNIQUE (`page_selector.py`). Each layer
of a cache works with a copy of its own (`Selector.for_layer`), which may keep state of the layer's tokens
(`TokenState`). A step (`steps.py`) asks the selector of its layer and attends to nothing else. Prefill is dense with
every selector, and positions stay those of the whole sequence.

A method that is not UNIQUE is a `TokenSelector`: it says for each KV head which tokens a step reads. These steps are
plain PyTorch that masks what is not read. They compare quality; they do not save time. They can be captured in CUDA
graphs.

Rows of a batch are padded on the left. `position` [B or 1, 1, N] counts the tokens of each row from its own first one;
negative positions are padding, or slots that are not written yet, which are never read. `last` (int64 [1]) is the slot
of the newest token, the same in every row.

Shapes: B batch, K KV heads, G query heads of a group, T new tokens, N slots, S slots of an entry, D head dim.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from unique_asr.attention.buffers import shift_entries, writable_in_any_mode


class TokenState:
    """Per-token state kept aligned with cache slots.

    `buffer_names` are the attributes that hold it: buffers [B, K, slots / S, width]. Every step writes them by its own
    slot, in place, so that a captured step finds them again and a step that runs twice (the warm-up of a capture, or a
    step that was taken back) writes the same again. When its slots move, a layer of the cache calls the methods below,
    unless `slots` is 0.
    """

    buffer_names: ClassVar[tuple[str, ...]] = ()
    slots: int = 0  # that the buffers cover; 0 before the first sequence

    def resize(self, keys: Tensor) -> None:
        """Give the buffers room for the slots of keys [B, K, N, D], and keep what they hold."""

    def fit(self, keys: Tensor) -> None:
        """Resize the buffers if the cache has grown since."""
        if self.slots != keys.shape[2]:
            with writable_in_any_mode():
                self.resize(keys)
            self.slots = keys.shape[2]

    def buffers(self) -> Iterator[tuple[Tensor, int]]:
        """Yield each buffer and S, the slots that one of its entries covers."""
        for name in self.buffer_names:
            buffer = getattr(self, name)
            yield buffer, self.slots // buffer.shape[2]

    def shift(self, by: int, length: int, keys: Tensor) -> None:
        """Follow the tokens of the layer, which have moved `by` slots to the right (to the left if negative).

        Args:
            by: a multiple of every page size.
            length: tokens in the layer after the move, padding included.
            keys: [B, K, N, D] of the layer after the move.
        """
        self.fit(keys)
        for buffer, size in self.buffers():
            shift_entries(buffer, by // size, (length - by) // size)

    def copy_rows(self, rows: Tensor, length: int, keys: Tensor, other: TokenState, other_length: int) -> None:
        """Put the state of all rows of another layer into `rows` (int64 [R]), so that both end at the same slot.

        Args:
            length: tokens in this layer; keys: [B, K, N, D] of it.
            other: the state of the other layer, which has `other_length` tokens.
        """
        self.fit(keys)
        for (buffer, size), (new, _) in zip(self.buffers(), other.buffers(), strict=True):
            count, first = -(-other_length // size), (length - other_length) // size
            buffer[rows, :, first : first + count] = new[:, :, :count]

    def select_rows(self, indices: Tensor) -> None:
        """Keep the rows `indices` (int64 [R]) only, in that order."""
        for name in self.buffer_names:
            setattr(self, name, getattr(self, name)[indices])


class Selector(TokenState, ABC):
    """Chooses what a sparse decode step of one layer reads."""

    @abstractmethod
    def count_pages(self, length: int, prompt: int | None = None) -> int:
        """Count the pages that a sparse step reads of each KV head, for the counters.

        Args:
            length: tokens of a row without padding, the new one included.
            prompt: tokens of the row's prompt; None: those of the prompt that all rows had.
        """


class TokenSelector(Selector):
    """Chooses single tokens. Dataclass fields of a subclass are its settings; other attributes belong to one layer."""

    name: ClassVar[str]
    watches_attention: ClassVar[bool] = False  # whether `observe_attention` is called

    def for_layer(self, budget: int | None, page_size: int, sink_pages: int) -> TokenSelector:
        """Return a copy for one layer. Raises ValueError if the method cannot work with the budget."""
        own = copy.copy(self)
        own.configure(budget, page_size, sink_pages)
        return own

    def configure(self, budget: int | None, page_size: int, sink_pages: int) -> None:
        """Take the settings of `SparseAttentionConfig`.

        Args:
            budget: tokens that a step may read of each KV head; None: every step is dense.
            page_size: tokens of a page.
            sink_pages: first pages that are always read.

        Raises:
            ValueError: the budget is too small for the method.
        """
        self.budget, self.page_size, self.sink_pages = budget, page_size, sink_pages

    def prepare(self, keys: Tensor, is_new_sequence: bool = False) -> None:
        """Have buffers for all slots of keys [B, K, N, D]; `steps.py` calls it before it asks anything else."""
        if is_new_sequence or not self.slots:
            with writable_in_any_mode():
                self.begin_sequence(keys)
            self.slots = keys.shape[2]
        self.fit(keys)

    def begin_sequence(self, keys: Tensor) -> None:
        """Make the buffers for the slots [B, K, N, D] of a new sequence, or keep those that have the right shape."""

    def read_prompt(self, query: Tensor, keys: Tensor, position: Tensor, scaling: float) -> None:
        """See a chunk of the prompt: queries [B, K, G, T, D] of the last T of keys [B, K, N, D], all written."""

    def observe(self, query: Tensor, keys: Tensor, position: Tensor, last: Tensor) -> None:
        """See the query [B, K, G, D] of a decode step, dense steps included, before anything is chosen."""

    @abstractmethod
    def select(self, query: Tensor, keys: Tensor, position: Tensor, last: Tensor) -> Tensor:
        """Choose the tokens that a sparse step reads.

        Args:
            query: [B, K, G, D].
            keys: [B, K, N, D].
            position: int64 [B or 1, 1, N].
            last: int64 [1].

        Returns:
            bool [B or 1, K or 1, N]; what it says of padding does not matter.
        """

    def observe_attention(self, weights: Tensor, read: Tensor, last: Tensor) -> None:
        """See the attention weights [B, K, G, N] of a decode step and what it read, bool [B or 1, K or 1, N]."""

    def count_tokens(self, length: int, prompt: int | None = None) -> int:
        """Count the tokens that a sparse step reads of each KV head; arguments as for `count_pages`."""
        return self.budget

    def count_pages(self, length: int, prompt: int | None = None) -> int:
        """Count the pages that the tokens of a sparse step would fill."""
        return -(-self.count_tokens(length, prompt) // self.page_size)
