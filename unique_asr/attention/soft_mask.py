"""Training through the page selection: attention over whole sequences with a soft or hard mask of pages.

Every query that inference would decode sparsely sees page p through a gate (arXiv 2605.27740, section 3):

    theta = stop_gradient((s_(k) + s_(k+1)) / 2)            scores of the pages that compete, sorted
    g_p   = sigmoid((s_p - theta) / temperature)            temperature = tau * standard deviation of those scores
    logits of every key of page p += log g_p

so that gradients reach the query and the keys of a page through its score, with the norm of the query held constant.
`hard` keeps the pages from theta on and drops the others, without a gradient through the scores. As in decoding
(`reference.py`) the query's own page is always read, and so are sink and recent pages; the complete pages before its
own compete for the rest of the budget, and where it holds them all the row is dense.

Several documents in a row, and padding, are one thing: `starts` [B, N], the first token that each query may see. A page
in which a document begins has statistics of that document alone, as a page with padding on its left has in decoding.

This file is plain PyTorch in slices of queries that the backward pass computes again, so that memory is bounded; on
CUDA `kernels/soft_mask_attention.py` does the same in one pass. `huggingface_training.py` is the glue.

Shapes: B batch, H query heads, K KV heads, G = H / K group, N tokens, T queries of a slice, P pages, S page size,
D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unique_asr.attention.configuration import SparseAttentionConfig, is_number

MODES = ("dense", "soft", "hard")
QUERIES = ("decoded", "all")
SCORES = ("unique", "mean")  # those whose gradient is known here
LOGITS = 1 << 24  # of a slice of queries, computed at once


@dataclass(frozen=True)
class TrainingAttentionConfig:
    """The mask of training; `sparse` is what decoding will read.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    mode: str = "soft"  # dense, soft, hard
    tau: float = 0.05  # softness, in standard deviations of the scores that compete; 0.5 hardly masks
    queries: str = "decoded"  # which queries the mask is for: decoded (the transcript's), or all
    hard_last: float = 0.0  # share of a stage's steps, at its end, in which soft becomes hard
    backend: str = "auto"  # torch, triton, or auto: triton on CUDA wherever the kernel can
    sparse: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)

    def __post_init__(self):
        if self.sparse.combine is None:  # what the training kernel does
            object.__setattr__(self, "sparse", replace(self.sparse, combine="max"))
        if self.mode not in MODES:
            raise ValueError(f"attention.mode is {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.queries not in QUERIES:
            raise ValueError(f"attention.queries is {self.queries!r}: choose one of {', '.join(QUERIES)}")
        if self.backend not in ("auto", "torch", "triton"):
            raise ValueError(f"attention.backend is {self.backend!r}: choose one of auto, torch, triton")
        if not is_number(self.tau) or self.tau <= 0:
            raise ValueError(f"attention.tau is {self.tau!r}: give a number above 0, or mode=hard for no softness")
        if not is_number(self.hard_last) or not 0 <= self.hard_last <= 1:
            raise ValueError(f"attention.hard_last is {self.hard_last!r}: give a share of the steps, from 0 to 1")
        if self.mode == "dense" or self.sparse.budget is None:
            return
        if self.sparse.score not in SCORES:
            raise ValueError(f"attention.score is {self.sparse.score!r}: training knows {' and '.join(SCORES)}")
        if self.sparse.pages <= self.sparse.sink_pages + self.sparse.recent_pages:
            raise ValueError(
                f"attention.budget is {self.sparse.budget} tokens, all of them in pages that are always read: "
                "training needs a page more, or fewer sink_pages or recent_pages"
            )

    @property
    def masks(self) -> bool:
        """Whether any query is masked."""
        return self.mode != "dense" and self.sparse.budget is not None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingAttentionConfig:
        """Make a configuration from fields of this class and of `SparseAttentionConfig` together.

        Raises:
            ValueError: neither has a field of a name, or a value is not allowed.
        """
        own = {item.name for item in fields(cls)} - {"sparse"}
        known = own | {item.name for item in fields(SparseAttentionConfig) if item.name != "selector"}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"attention has no {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        sparse = SparseAttentionConfig(**{name: value for name, value in values.items() if name not in own})
        return cls(**{name: value for name, value in values.items() if name in own}, sparse=sparse)


def page_statistics(key: Tensor, starts: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Compute the statistics of pages, differentiable and at least in float32.

    Of the tokens of a page those count that belong to the document of its last one. The last page may be partial.

    Args:
        key: [B, K, N, D].
        starts: int [B, N], the first token that each query may see.
        page_size: tokens of a page.

    Returns:
        Mean [B, K, P, D] and spread [B, K, P].
    """
    wide, tokens = _wide(key), key.shape[2]
    missing = -tokens % page_size
    pages = F.pad(wide, (0, 0, 0, missing)).unflatten(2, (-1, page_size))
    document = F.pad(starts, (0, missing), value=-1).unflatten(1, (-1, page_size))  # [B, P, S]
    last = starts[:, (torch.arange(1, pages.shape[2] + 1, device=key.device) * page_size - 1).clamp(max=tokens - 1)]
    weight = (document == last.unsqueeze(-1)).to(wide.dtype)[:, None, :, :, None]
    count = weight.sum(-2)  # [B, 1, P, 1]
    mean = (pages * weight).sum(-2) / count
    variance = ((pages - mean.unsqueeze(-2)).square() * weight).sum((-2, -1)) / count.squeeze(-1)
    spread = variance > 0  # the root has no gradient at zero
    return mean, variance.where(spread, torch.ones_like(variance)).sqrt() * spread


def page_scores(query: Tensor, mean: Tensor, std: Tensor, config: SparseAttentionConfig) -> Tensor:
    """Score pages; the norm of a query carries no gradient.

    Args:
        query: [B, K, G, T, D].
        mean: [B, K, P, D]; std: [B, K, P].

    Returns:
        [B, K, G, T, P].
    """
    wide = _wide(query)
    product = torch.einsum("bkgtd,bkpd->bkgtp", wide, mean)
    if config.score == "mean":
        return product
    norm = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True)
    return product + config.scale * norm * std[:, :, None, None]


def compute_log_gates(
    scores: Tensor, position: Tensor, starts: Tensor, masked: Tensor, config: TrainingAttentionConfig, scaling: float
) -> Tensor:
    """Compute log g, which is added to the logits of all keys of a page (arXiv 2605.27740, section 3).

    Args:
        scores: of each head, [B, K, G, T, P].
        position: int [T], the positions of the queries.
        starts: int [B, T], the first token that each query may see.
        masked: bool [B, T], False for queries that read everything.
        scaling: of the attention logits, for combine=share.

    Returns:
        [B, K, T, P]: 0 where there is no gate, -inf for pages that a hard mask drops.
    """
    sparse = config.sparse
    newest, first = position // sparse.page_size, (starts // sparse.page_size)[..., None]  # [T], [B, T, 1]
    page = torch.arange(scores.shape[-1], device=scores.device)
    candidate = (page >= first) & (page < newest[:, None])  # [B, T, P]
    forced = (page < first + sparse.sink_pages) | (page > newest[:, None] - sparse.recent_pages)
    competing = candidate & ~forced
    active = masked & (candidate.sum(-1) > sparse.pages - 1)  # [B, T]: k - 1 pages beside the query's own
    gated = (competing & active[..., None])[:, None]
    candidate, competing = candidate[:, None], competing[:, None]

    if sparse.combine == "share":
        lowest = torch.finfo(scores.dtype).min
        scores = (scores * scaling).masked_fill(~candidate[:, :, None], lowest).softmax(-1).mean(2)
    else:
        scores = scores.amax(2)  # [B, K, T, P]
    if scores.shape[-1] < sparse.pages:
        return torch.zeros_like(scores)
    with torch.no_grad():
        ranked = scores.masked_fill(~candidate, -torch.inf).masked_fill(candidate & ~competing, torch.inf)
        theta = ranked.topk(sparse.pages, dim=-1).values[..., -2:].mean(-1, keepdim=True)
        theta = theta.masked_fill(~active[:, None, :, None], 0)
        number = competing.sum(-1, keepdim=True).clamp(min=1)
        level = scores.masked_fill(~competing, 0).sum(-1, keepdim=True) / number
        variance = (scores - level).masked_fill(~competing, 0).square().sum(-1, keepdim=True) / number
        temperature = config.tau * variance.sqrt().clamp(min=torch.finfo(scores.dtype).tiny ** 0.5)
    if config.mode == "hard":
        gate = torch.zeros_like(scores).masked_fill(scores < theta, -torch.inf)
    else:
        gate = F.logsigmoid((scores - theta) / temperature)
    return torch.where(gated, gate, 0)


def attend_slice(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    begin: int,
    starts: Tensor,
    masked: Tensor,
    config: TrainingAttentionConfig,
    scaling: float,
) -> Tensor:
    """Attend with a slice of queries.

    Args:
        query: [B, K, G, T, D] of the tokens from `begin` on.
        key: [B, K, n, D] of the tokens up to the last query; value: [B, K, n, D].
        mean: [B, K, P, D] of the pages of these keys; std: [B, K, P]; None: no row is masked.
        starts: int [B, T]; masked: bool [B, T]; both as for `compute_log_gates`.

    Returns:
        [B, K, G, T, D].
    """
    count, tokens = query.shape[3], key.shape[2]
    position = torch.arange(begin, begin + count, device=key.device)
    token = torch.arange(tokens, device=key.device)
    logits = torch.einsum("bkgtd,bkjd->bkgtj", _wide(query), _wide(key)) * scaling
    if mean is not None:
        gates = compute_log_gates(
            page_scores(query, mean, std, config.sparse), position, starts, masked, config, scaling
        )
        logits = logits + gates.repeat_interleave(config.sparse.page_size, -1)[..., :tokens].unsqueeze(2)
    seen = (token <= position[:, None]) & (token >= starts[..., None])  # [B, T, n]
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bkgtj,bkjd->bkgtd", weights, _wide(value)).to(query.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TrainingAttentionConfig,
    starts: Tensor | None = None,
    masked: Tensor | None = None,
    scaling: float | None = None,
    slice_tokens: int | None = None,
) -> Tensor:
    """Attend to whole sequences through the page mask.

    Args:
        query: [B, H, N, D]; key: [B, K, N, D]; value: [B, K, N, D].
        starts: int [B, N], the first token that each query may see; None: one document a row.
        masked: bool [B, N], the queries that decoding would run sparsely; None: all.
        scaling: of the attention logits; None: 1 / sqrt(D).
        slice_tokens: queries computed at once; None: by memory; 0: the whole sequence is one slice that the backward
            pass does not compute again, which is the plain definition.

    Returns:
        [B, H, N, D].
    """
    batch, heads, tokens, dim = query.shape
    scaling = dim**-0.5 if scaling is None else scaling
    starts = torch.zeros(batch, tokens, dtype=torch.int, device=query.device) if starts is None else starts
    starts = starts.expand(batch, -1)
    masked = torch.ones_like(starts, dtype=torch.bool) if masked is None else masked.bool().expand(batch, -1)
    queries = query.unflatten(1, (key.shape[1], -1))
    size = config.sparse.page_size
    mean = std = None
    if config.masks and tokens > config.sparse.budget:
        mean, std = page_statistics(key, starts, size)
    step = max(1, LOGITS // (batch * heads * tokens)) if slice_tokens is None else slice_tokens or tokens
    parts = []
    for begin in range(0, tokens, step):
        end = min(begin + step, tokens)
        arguments = [queries[:, :, :, begin:end], key[:, :, :end], value[:, :, :end]]
        gates = mean is not None and end > config.sparse.budget
        gates = gates and (torch.compiler.is_compiling() or bool(masked[:, begin:end].any()))  # saves work, if known
        pages = -(-end // size)
        arguments += [mean[:, :, :pages], std[:, :, :pages]] if gates else [None, None]
        arguments += [begin, starts[:, begin:end], masked[:, begin:end], config, scaling]
        if slice_tokens == 0:
            parts.append(attend_slice(*arguments))
        else:
            parts.append(checkpoint(attend_slice, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts, dim=3).flatten(1, 2)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
