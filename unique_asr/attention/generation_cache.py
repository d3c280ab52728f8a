"""The cache that `generate` of transformers gets from a switched model: methods of the model are replaced meanwhile.

Several switches of a model share what stands in for a method. The newest that is still on decides, so that they may be
taken back in any order. All of it can be copied and pickled with the model: the copy is switched, too, and counts for
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from unique_asr.attention.cache import CACHE_ARGUMENT, PagedCache
from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.counters import SparsityCounters


@dataclass(eq=False)
class CacheMaker:
    """Makes the caches of one switch."""

    config: SparseAttentionConfig
    counters: SparsityCounters

    def make(self, decoder: PreTrainedConfig, capacity: int = 0) -> PagedCache:
        """Make an empty cache for a text decoder of this configuration; `capacity` as for `PagedCache`."""
        return PagedCache(decoder, self.config, capacity, self.counters)


class MethodHook:
    """Stands in for a method of a module while a switch is on."""

    method: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.former: Callable[..., Any] | None = vars(module).get(self.method)  # of the module itself, not of its class
        self.makers: list[CacheMaker] = []

    @classmethod
    def add(cls, module: nn.Module, maker: CacheMaker) -> MethodHook:
        """Put a maker in charge, until `remove`."""
        hook = vars(module).get(cls.method)
        if not isinstance(hook, cls):
            hook = cls(module)
            setattr(module, cls.method, hook)
        hook.makers.append(maker)
        return hook

    def remove(self, maker: CacheMaker) -> None:
        """Take a maker out; the last one leaves the method as it was, unless somebody else has replaced it since."""
        self.makers.remove(maker)
        if self.makers or vars(self.module).get(self.method) is not self:
            return
        delattr(self.module, self.method)
        if self.former is not None:
            setattr(self.module, self.method, self.former)

    def call_former(self, *args: Any, **kwargs: Any) -> Any:
        """Call what this stands in for."""
        if self.former is not None:
            return self.former(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def make_cache(self) -> PagedCache:
        """Make an empty cache with the newest maker."""
        return self.makers[-1].make(self.module.config.get_text_config(decoder=True))


class CachePreparation(MethodHook):
    """Lets `generate` make a `PagedCache` where it would make a cache of its own."""

    method = "_prepare_cache_for_generation"

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Prepare the cache; the signature is that of transformers. Raises ValueError for a cache without pages."""
        given = model_kwargs.get(CACHE_ARGUMENT)
        if not self.makers:
            pass
        elif given is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} cannot be read by pages: "
                    "leave it out, sparse attention brings its own cache"
                )
            model_kwargs[CACHE_ARGUMENT] = self.make_cache()
        elif given is not None and not isinstance(given, PagedCache):
            raise ValueError(
                f"{type(given).__name__} cannot be read by pages: pass a PagedCache as {CACHE_ARGUMENT}, or none"
            )
        return self.call_former(generation_config, model_kwargs, *args, **kwargs)


class PrefixConversion(MethodHook):
    """Puts the prefix of PEFT's prefix tuning, which begins every text in the cache, into a `PagedCache`."""

    method = "get_prompt"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what PEFT does, but for a `DynamicCache` that is to be generated with (`max_cache_len` is given)."""
        prefix = self.call_former(*args, **kwargs)
        if not self.makers or "max_cache_len" not in kwargs or not isinstance(prefix, DynamicCache):
            return prefix
        cache: Cache = self.make_cache()
        for index, layer in enumerate(prefix.layers):
            cache.update(layer.keys, layer.values, index)
        return cache
