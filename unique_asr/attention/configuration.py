"""What a sparse decode step reads: one frozen dataclass for the cache, the attention function and the decoder."""

from dataclasses import asdict, dataclass

from unique_asr.attention.scores import SCORES

PAGE_SIZES = (8, 16, 32, 64)  # tokens
COMBINES = ("max", "share")
BACKENDS = ("auto", "torch")


@dataclass(frozen=True)
class SparseAttentionConfig:
    """Sizes are in tokens or pages as named; the method is in `unique_asr.attention.reference`.

    `budget=None` reads everything (dense) and keeps the same counters.
    """

    budget: int | None = 512  # tokens that one decode step reads of each KV head; sink, recent and last page included
    page_size: int = 8  # tokens of a page
    score: str = "unique"  # unique, mean, quest, second_moment
    scale: float = 0.5  # lambda: weight of the spread of a page against its mean
    combine: str = "max"  # over the query heads of a group: max (the paper), share (mean of softmax shares)
    sink_pages: int = 1  # first pages, always read
    recent_pages: int = 2  # last pages, always read; the page being written is the last of them
    dense_layers: int = 0  # first layers that stay dense
    backend: str = "auto"  # torch: plain PyTorch; auto: the fastest one for the device

    def __post_init__(self):
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"attention.page_size is {self.page_size}: choose one of {PAGE_SIZES}")
        if self.score not in SCORES:
            raise ValueError(f"attention.score is {self.score!r}: choose one of {', '.join(SCORES)}")
        if self.combine not in COMBINES:
            raise ValueError(f"attention.combine is {self.combine!r}: choose one of {', '.join(COMBINES)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"attention.backend is {self.backend!r}: choose one of {', '.join(BACKENDS)}")
        if self.sink_pages < 0 or self.recent_pages < 1:
            raise ValueError(
                f"attention.sink_pages is {self.sink_pages} and recent_pages {self.recent_pages}: "
                "give at least 0 and 1, for the page being written is always read"
            )
        if self.budget is None:
            return
        if self.budget % self.page_size:
            raise ValueError(
                f"attention.budget is {self.budget} tokens: give a multiple of the page size, {self.page_size}"
            )
        forced = self.sink_pages + self.recent_pages
        if self.pages < forced:
            raise ValueError(
                f"attention.budget is {self.budget} tokens, less than the {forced} pages of {self.page_size} that are "
                "always read: raise it, or lower sink_pages or recent_pages"
            )

    @property
    def pages(self) -> int | None:
        """Pages that one decode step reads of each KV head."""
        return None if self.budget is None else self.budget // self.page_size

    def reads_all(self, length: int) -> bool:
        """Whether the budget holds the whole context, so that the step is dense."""
        return self.budget is None or length <= self.budget

    def to_dict(self) -> dict:
        return asdict(self)
