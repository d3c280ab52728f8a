"""A paged KV cache for transformers: its full-attention layers are paged (`paged_layer.py`), with page statistics.

All rows have the same length; shorter ones are padded on the left. Lengths are kept on the host; `StaticStep` adds the
device's view of one decode step, so that the step can be captured in a CUDA graph.

Shapes: B batch.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import utils as generation

from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.counters import SparsityCounters, StepCounting
from unique_asr.attention.paged_layer import NOT_SWITCHED, PagedLayer
from unique_asr.attention.static_step import StaticStep

ACTIVE = threading.local()  # .cache: the one in a static step on this thread, for the operator of compiled models


def is_fully_paged(config: PreTrainedConfig) -> bool:
    """Whether all layers of a model have full attention, which a static step needs; sliding ones are not paged."""
    return all(type(layer) is DynamicLayer for layer in make_plain_layers(config))


def make_plain_layers(config: PreTrainedConfig) -> list[CacheLayerMixin]:
    """Make the layers of transformers' own cache; a sliding window as long as the longest text is full attention."""
    layers, longest = DynamicCache(config=config).layers, getattr(config, "max_position_embeddings", None)
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer and longest is not None and layer.sliding_window >= longest:
            layers[index] = DynamicLayer()  # Phi-4 multimodal has such windows
    return layers


# The keyword by which models and `generate` take a cache: transformers 5.24 renamed `past_key_values`.
CACHE_ARGUMENT = "cache" if "cache" in getattr(generation, "ALL_CACHE_NAMES", ()) else "past_key_values"


def list_mixed_layers(layers: Sequence[CacheLayerMixin]) -> list[str]:
    """Return the types of layers that hold more than keys and values of full attention, by name."""
    kinds = {type(layer) for layer in layers if isinstance(layer, DynamicLayer)} - {DynamicLayer}
    return sorted(kind.__name__ for kind in kinds if not issubclass(kind, DynamicSlidingWindowLayer))


class DetachedCopies(TorchFunctionMode):
    """Lets `copy.deepcopy` copy tensors that a graph of gradients holds, without that graph, within the block."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__ and args[0].requires_grad and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))


class PagedCache(Cache):
    """A transformers cache whose full-attention layers are paged; sliding and other layers stay what they were.

        cache = PagedCache(model.config, SparseAttentionConfig(budget=512))
        model.generate(**inputs, **{CACHE_ARGUMENT: cache})     # the model switched with `sparse_attention`
        print(cache.counters)

    Args:
        config: of the text decoder.
        attention: what steps read. What it leaves open (`combine`) is as in the paper: only `sparse_attention` and the
            decoders ask the model.
        capacity: tokens allocated at the first write; 0: a little more than the prompt.
        counters: to which steps are added; None: new ones.

    Raises:
        ValueError: the model has no layer with full attention and nothing beside it, or `dense_layers` are all of them.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        attention: SparseAttentionConfig | None = None,
        capacity: int = 0,
        counters: SparsityCounters | None = None,
    ):
        self.attention = attention or SparseAttentionConfig()
        if self.attention.combine is None:
            self.attention = replace(self.attention, combine="max")
        self.counters = SparsityCounters() if counters is None else counters
        self._config = config
        layers = make_plain_layers(config)
        counting = StepCounting(self.counters)
        self.paged_layers: list[PagedLayer] = []
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[index] = PagedLayer(self.attention, self.counters, capacity)
                layers[index].is_sparse &= index >= self.attention.dense_layers
                layers[index].index, layers[index].counting = index, counting
                self.paged_layers.append(layers[index])
        if not self.paged_layers and (mixed := list_mixed_layers(layers)):
            raise ValueError(
                f"{type(config).__name__} caches more than keys and values beside its full attention "
                f"({', '.join(mixed)}): there is nothing to read by pages"
            )
        if not self.paged_layers:
            raise ValueError(f"{type(config).__name__} has no full-attention layer: there is nothing to read by pages")
        last = max(index for index, layer in enumerate(layers) if isinstance(layer, PagedLayer))
        if self.attention.budget is not None and self.attention.dense_layers > last:
            raise ValueError(
                f"attention.dense_layers is {self.attention.dense_layers}, but {type(config).__name__} has "
                f"{len(layers)} layers, and no page would be read: "
                f"give at most {last}, or budget=null for dense attention"
            )
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens of one layer, see `PagedLayer.update`; keys of other layers have `paged_layer` None."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not isinstance(self.layers[layer_idx], PagedLayer):
            keys.paged_layer = None
        return keys, values

    @property
    def length(self) -> int:
        """Tokens written."""
        return self.paged_layers[0].length

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers grow."""
        return self.paged_layers[0].capacity

    @property
    def max_cache_len(self) -> int:
        """No limit: -1. PEFT asks."""
        return -1

    def __deepcopy__(self, memo: dict) -> PagedCache:
        """Copy the cache, without gradients, as for several answers to one prompt; it adds to the same counters."""
        memo[id(self.counters)] = self.counters
        memo[id(self)] = new = type(self).__new__(type(self))
        with DetachedCopies():
            vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all."""
        if tokens <= self.capacity:
            return
        for layer in self.paged_layers:
            if layer.is_initialized:
                layer.reserve(tokens)
            else:
                layer.initial_capacity = max(layer.initial_capacity, tokens)

    def reset(self) -> None:
        """Drop all tokens; paged layers keep their buffers."""
        # Sliding layers are made anew: transformers 5.17's reset leaves zeros in them.
        for index, fresh in enumerate(make_plain_layers(self._config)):
            if isinstance(self.layers[index], PagedLayer):
                self.layers[index].reset()
            else:
                self.layers[index] = fresh

    def clear_forgotten(self) -> None:
        """Zero what is left of forgotten tokens; before a captured static step runs again, `static_step` does it."""
        for layer in self.paged_layers:
            layer.clear_forgotten()

    def shift(self, by: int) -> None:
        """Move all tokens, see `PagedLayer.shift`; for models with full attention in every layer."""
        if by:
            for layer in self.paged_layers:
                layer.shift(by)

    def copy_rows(self, rows: Tensor, other: PagedCache, starts: Tensor) -> None:
        """Copy all rows of another cache into `rows` of this one, see `PagedLayer.copy_rows`.

        Args:
            rows: int64 [R].
            starts: int64 [R], the padding on the left of the rows of `other`.
        """
        other.update_statistics(starts)
        for layer, its in zip(self.paged_layers, other.paged_layers, strict=True):
            layer.copy_rows(rows, its)

    @contextmanager
    def static_step(self, position: Tensor, sparse: bool, starts: Tensor | None = None) -> Iterator[None]:
        """Run one static step within the block: `update` and the attention function work at `position`.

        Lengths on the host stay: call `advance` after every run, or replay, of the step.

        Args:
            position: int64 [1], where every row writes its token.
            sparse: whether the step selects, in layers that are sparse.
            starts: int64 [B], the padding on the left of every row; None: no padding.

        Raises:
            ValueError: a layer of the model is not paged, or its attention is another one.
        """
        if len(self.paged_layers) != len(self.layers):
            raise ValueError("a static decode step needs full attention in every layer")
        self.clear_forgotten()
        step = StaticStep(position, sparse, self.attention, self.capacity, starts)
        former = getattr(ACTIVE, "cache", None)
        ACTIVE.cache = self
        for layer in self.paged_layers:
            layer.step = step
        try:
            yield
            if not step.has_written:
                raise ValueError(NOT_SWITCHED)
        finally:
            ACTIVE.cache = former
            for layer in self.paged_layers:
                layer.step = None

    def sparse_at(self, length: int) -> bool:
        """Whether a decode step at this context length selects pages in any layer."""
        return any(layer.sparse_at(length) for layer in self.paged_layers)

    def count_reads(self, length: int, prompt: int | None = None, rows: int = 1) -> SparsityCounters:
        """Count one decode step of `rows` rows, all layers together; other arguments as for a layer."""
        step = SparsityCounters(steps=1, sparse_steps=int(self.sparse_at(length)))
        for layer, layers in self._kinds.values():
            step.add(layer.count_reads(length, prompt), times=rows * layers)
        return step

    @cached_property
    def _kinds(self) -> dict[tuple, tuple[PagedLayer, int]]:
        """One layer of each kind that reads alike, and how many of it there are."""
        kinds: dict[tuple, tuple[PagedLayer, int]] = {}
        for layer in self.paged_layers:
            kind = layer.is_sparse, layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
            kinds[kind] = layer, kinds.get(kind, (layer, 0))[1] + 1
        return kinds

    def update_statistics(self, starts: Tensor | None = None) -> None:
        """Bring the page statistics of every layer up to date; `starts` [B] is the padding on the left of every row."""
        layers = [layer for layer in self.paged_layers if layer.is_sparse]
        valid = None
        if starts is not None and any(layer.has_stale_pages for layer in layers):
            valid = torch.arange(self.length, device=starts.device) >= starts.unsqueeze(1)
        for layer in layers:
            layer.update_statistics(valid, starts)

    def advance(self) -> None:
        """Account for one static step on the host: its token, its pages and the counters."""
        for layer in self.paged_layers:
            layer.advance()
        self.counters.add(self.count_reads(self.length, rows=self.paged_layers[0].keys.shape[0]))
