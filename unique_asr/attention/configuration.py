"""What a sparse decode step reads: one frozen dataclass for the cache, the attention function and the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unique_asr.attention.selector import TokenSelector

SCORES = ("unique", "mean", "quest", "second_moment")  # names of those in scores.py, which needs torch
PAGE_SIZES = (8, 16, 32, 64)  # tokens
SUPER_PAGE_SIZES = (16, 32, 64, 128, 256)  # tokens
COMBINES = ("max", "share")
STATISTICS_DTYPES = ("keys", "fp8", "int8")
BACKENDS = ("auto", "torch", "triton")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SparseAttentionConfig:
    """Settings of sparse decoding; sizes are in tokens or pages as named.

    The method is in `unique_asr.attention.reference`. `budget=None` reads everything (dense) and keeps the same
    counters. Every field but `selector` is a plain value, as `conf/attention` has it.

    Raises:
        ValueError: a field has a value that is not allowed, or the budget is too small for what is always read.
    """

    budget: int | None = 512  # tokens that one decode step reads of each KV head; sink, recent and last page included
    page_size: int = 8  # tokens of a page
    score: str = "unique"  # unique, mean, quest, second_moment
    scale: float = 0.5  # lambda: weight of the spread of a page against its mean
    # How the scores of a group's query heads become one: max (the paper), share (mean of their softmaxes over pages) or
    # None: chosen by the model (`huggingface.resolve_combine`).
    combine: str | None = None
    sink_pages: int = 1  # first pages, always read
    recent_pages: int = 2  # last pages, always read; the page being written is the last of them
    dense_layers: int = 0  # first layers that stay dense
    super_page_size: int | None = None  # tokens of a super-page, scored first; null: every page is scored
    super_pages: int | None = None  # super-pages whose pages are scored; null: as many as pages are read
    statistics_dtype: str = "keys"  # of page statistics: keys (the dtype of the keys), fp8 or int8 with a scale a page
    backend: str = "auto"  # torch: plain PyTorch; triton: kernels, CUDA only; auto: triton on CUDA
    # Chooses what a step reads instead of UNIQUE's pages (selector.py); `to_dict` leaves it out.
    selector: TokenSelector | None = field(default=None, hash=False)

    def __post_init__(self):
        if self.budget is not None and not is_whole(self.budget):
            raise ValueError(f"attention.budget is {self.budget!r}: give a whole number, or null for dense attention")
        if not is_whole(self.page_size) or self.page_size not in PAGE_SIZES:
            raise ValueError(f"attention.page_size is {self.page_size!r}: choose one of {PAGE_SIZES}")
        if self.score not in SCORES:
            raise ValueError(f"attention.score is {self.score!r}: choose one of {', '.join(SCORES)}")
        if self.combine is not None and self.combine not in COMBINES:
            raise ValueError(f"attention.combine is {self.combine!r}: choose one of {', '.join(COMBINES)}, or null")
        if self.statistics_dtype not in STATISTICS_DTYPES:
            raise ValueError(
                f"attention.statistics_dtype is {self.statistics_dtype!r}: choose one of {', '.join(STATISTICS_DTYPES)}"
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"attention.backend is {self.backend!r}: choose one of {', '.join(BACKENDS)}")
        for name in ("sink_pages", "recent_pages", "dense_layers"):
            if not is_whole(getattr(self, name)):
                raise ValueError(f"attention.{name} is {getattr(self, name)!r}: give a whole number")
        if self.dense_layers < 0:
            raise ValueError(f"attention.dense_layers is {self.dense_layers}: give 0 or more layers")
        if not is_number(self.scale) or self.scale < 0:
            raise ValueError(f"attention.scale is {self.scale!r}: give a finite number of at least 0")
        if self.sink_pages < 0 or self.recent_pages < 1:
            raise ValueError(
                f"attention.sink_pages is {self.sink_pages} and recent_pages {self.recent_pages}: "
                "give at least 0 and 1, for the page being written is always read"
            )
        self._check_super_page_size()
        if self.selector is not None:
            self._check_selector()
        if self.budget is None:
            return
        if self.budget % self.page_size:
            raise ValueError(
                f"attention.budget is {self.budget} tokens: give a multiple of the page size, {self.page_size}"
            )
        if self.super_page_size is not None:
            self._check_super_pages()
        forced = self.sink_pages + self.recent_pages
        if self.pages < forced:
            raise ValueError(
                f"attention.budget is {self.budget} tokens, less than the {forced} pages of {self.page_size} that are "
                "always read: raise it, or lower sink_pages or recent_pages"
            )
        if self.selector is not None:
            self.selector.for_layer(self.budget, self.page_size, self.sink_pages)  # refuses a budget that is too small

    def _check_selector(self) -> None:
        from unique_asr.attention.selector import TokenSelector  # needs torch

        if not isinstance(self.selector, TokenSelector):
            raise ValueError(f"attention.selector is a {type(self.selector).__name__}: give a TokenSelector, or None")

    def _check_super_page_size(self) -> None:
        if self.super_pages is not None and (not is_whole(self.super_pages) or self.super_pages < 1):
            raise ValueError(f"attention.super_pages is {self.super_pages!r}: give a whole number above 0, or null")
        if self.super_page_size is None:
            if self.super_pages is not None:
                raise ValueError(
                    f"attention.super_pages is {self.super_pages} without super_page_size: give both, or neither"
                )
            return
        sizes = [size for size in SUPER_PAGE_SIZES if size > self.page_size]
        if not is_whole(self.super_page_size) or self.super_page_size not in sizes:
            raise ValueError(
                f"attention.super_page_size is {self.super_page_size!r}: choose one of {SUPER_PAGE_SIZES} "
                f"above the page size, {self.page_size}"
            )

    def _check_super_pages(self) -> None:
        forced = self.sink_pages + self.recent_pages
        if self.super_count * self.pages_per_super < self.pages or self.super_count < forced:
            least = max(forced, -(-self.pages // self.pages_per_super))
            raise ValueError(
                f"attention.super_pages is {self.super_count}: give at least {least}, for they hold the pages read"
            )

    @property
    def level_sizes(self) -> list[int]:
        """Tokens of a page, and of a super-page if there are any."""
        return [self.page_size] + ([] if self.super_page_size is None else [self.super_page_size])

    @property
    def pages_per_super(self) -> int:
        """Pages of a super-page; 1 without super-pages."""
        return 1 if self.super_page_size is None else self.super_page_size // self.page_size

    @property
    def super_count(self) -> int | None:
        """Super-pages whose pages are scored, besides the newest one."""
        return self.pages if self.super_pages is None else self.super_pages

    @property
    def pages(self) -> int | None:
        """Pages that one decode step reads of each KV head."""
        return None if self.budget is None else self.budget // self.page_size

    def reads_all(self, length: int) -> bool:
        """Whether the budget holds the whole context, so that the step is dense."""
        return self.budget is None or length <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """Return the fields except `selector`: plain values from which `SparseAttentionConfig(**values)` is made."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "selector"}
