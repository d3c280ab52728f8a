"""UNIQUE attention in plain PyTorch, read top to bottom: one decode step of one layer.

The keys of a KV head are cut into pages of S tokens. A few numbers of each page (`scores.py`) tell how promising it is
for the query; the step reads the best pages within the budget and nothing else (arXiv 2605.27740, section 3).

The page being written, which holds the newest token, is always read; sink and recent pages are forced in. All of them
count towards the budget, so a step reads k = budget / S pages: the newest, and k - 1 of the complete pages before it.

Nothing here synchronises with the host, and no shape depends on data. Shapes: B batch, H query heads, K KV heads,
G = H / K group, N tokens, P pages, S page size, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unique_asr.attention.configuration import SparseAttentionConfig
from unique_asr.attention.scores import PageScore

PARTIAL_SUM = 256  # tokens of a partial sum in `attend_biased`; cache capacities are multiples of it


def split_pages(tokens: Tensor, page_size: int) -> Tensor:
    """View tokens [B, K, N, D] as pages [B, K, N / S, S, D]; N is a multiple of S."""
    return tokens.unflatten(2, (-1, page_size))


def page_statistics(keys: Tensor, page_size: int, score: PageScore, valid: Tensor | None = None) -> tuple[Tensor, ...]:
    """Compute the statistics of pages from their keys alone: doing it again gives the same numbers, without drift.

    Args:
        keys: [B, K, N, D]; the last page may be partial.
        page_size: tokens of a page.
        score: says what the statistics are.
        valid: bool [B, N], False for padding; None: no padding.

    Returns:
        [B, K, P, width] each, in the dtype of the keys.
    """
    complete = keys.shape[2] // page_size * page_size
    parts = []
    if complete:
        mask = None if valid is None else valid[:, :complete].unflatten(1, (-1, page_size))
        parts.append(score.statistics(split_pages(keys[:, :, :complete], page_size), mask))
    if complete < keys.shape[2]:
        mask = None if valid is None else valid[:, None, complete:]
        parts.append(score.statistics(keys[:, :, None, complete:], mask))
    return tuple(torch.cat(part, dim=2) for part in zip(*parts))


def group_queries(query: Tensor, kv_heads: int) -> Tensor:
    """Sort the query of one step by KV head: [B, H, 1, D] -> [B, K, G, D]."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def combine_group(scores: Tensor, combine: str | None, scaling: float) -> Tensor:
    """Combine the scores of the heads of a group: [B, K, G, P] -> [B, K, P].

    Args:
        combine: max, or None: the maximum over the heads, as in the paper. share: the mean over the heads of each
            head's softmax over pages of score * scaling.
        scaling: of the attention logits.

    Returns:
        Finite scores, below those of forced pages, and -inf for pages that no head has a score of: where it is NaN, as
        a key may be, or -inf.
    """
    if combine == "share":
        scores = torch.nan_to_num(scores * scaling, nan=-torch.inf, neginf=-torch.inf)
        shares = scores.softmax(dim=-1).nan_to_num(0.0).mean(dim=2)  # of a head without any score: 0
        return shares.masked_fill(scores.amax(dim=2) == -torch.inf, -torch.inf)
    return torch.nan_to_num(scores, nan=-torch.inf, neginf=-torch.inf).amax(dim=2)


def force_pages(scores: Tensor, config: SparseAttentionConfig, newest: int) -> Tensor:
    """Set the scores [B, K, newest] of sink pages and recent pages to inf, in place, and return them.

    `newest` is the page that holds the newest token; it is read in any case and has no score.
    """
    scores[..., : config.sink_pages] = torch.inf
    scores[..., newest - config.recent_pages + 1 :] = torch.inf
    return scores


def page_bias(candidates: Tensor, config: SparseAttentionConfig, newest: int | Tensor) -> Tensor:
    """Do what `force_pages` does by a bias, for padded batches and for a `newest` that only the device knows.

    Args:
        candidates: bool [B, P], the complete pages that hold a token; the first of a row is its sink.
        newest: the page that holds the newest token, a number or int64 [1].

    Returns:
        float32 [B, P], to be added to scores: inf for forced pages, 0 for other candidates, -inf elsewhere.
    """
    page = torch.arange(candidates.shape[-1], device=candidates.device)
    first = candidates.int().argmax(dim=-1, keepdim=True)
    forced = (page < first + config.sink_pages) | (page > newest - config.recent_pages)
    bias = torch.zeros(candidates.shape, device=candidates.device)
    return bias.masked_fill(forced, torch.inf).masked_fill(~candidates, -torch.inf)


def combine_biased(scores: Tensor, combine: str | None, scaling: float, bias: Tensor) -> Tensor:
    """Combine the scores of a group with a `page_bias` [B, P]: [B, K, G, P] -> [B, K, P].

    What the statistics of pages hold that are no candidates does not matter, were it NaN.
    """
    bias = bias[:, None]
    if combine == "share":
        scores = scores.masked_fill(bias[:, None] == -torch.inf, -torch.inf)
    return torch.where(bias == 0, combine_group(scores, combine, scaling), bias)


def top_pages(scores: Tensor, count: int) -> Tensor:
    """Select the best pages, exactly and deterministically; of equal scores the earlier page wins, and NaN is -inf.

    Score and page number form one integer, so that no two are equal.

    Args:
        scores: float32 or float64 [B, K, P].
        count: pages to select.

    Returns:
        int64 [B, K, count], ascending.
    """
    scores = torch.where(scores > -torch.inf, scores + 0.0, -torch.inf)  # + 0.0 turns -0.0 into 0.0
    if scores.dtype == torch.float64:  # these leave no room for the page number
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return best.sort(dim=-1).values
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    page = torch.arange(scores.shape[-1], device=scores.device)
    best = ((ordered.long() << 32) - page).topk(count, sorted=False).indices
    return best.sort(dim=-1).values


def super_page_bias(bias: Tensor, pages_per_super: int, newest: int | Tensor) -> Tensor:
    """Turn the `page_bias` of pages into that of super-pages.

    A super-page that holds a forced page is forced. The newest super-page is left out: its pages are scored in any
    case.

    Args:
        bias: [B, P].
        pages_per_super: pages of a super-page.
        newest: the newest super-page.

    Returns:
        [B, P / pages_per_super], rounded up.
    """
    bias = F.pad(bias, (0, -bias.shape[-1] % pages_per_super), value=-torch.inf)
    bias = bias.unflatten(-1, (-1, pages_per_super)).amax(dim=-1)
    return bias.masked_fill(torch.arange(bias.shape[-1], device=bias.device) >= newest, -torch.inf)


def keep_super_pages(scores: Tensor, best: Tensor, pages_per_super: int, newest: int | Tensor) -> Tensor:
    """Set the scores [B, K, P] of pages outside of the super-pages `best` (int64 [B, K, m]) and `newest` to -inf."""
    supers = torch.arange(-(-scores.shape[-1] // pages_per_super), device=scores.device)
    keep = (supers == newest).expand(*best.shape[:2], -1).scatter(-1, best, True)
    return scores.masked_fill(~keep.repeat_interleave(pages_per_super, dim=-1)[..., : scores.shape[-1]], -torch.inf)


def gather_pages(tokens: Tensor, pages: Tensor, page_size: int) -> Tensor:
    """Copy pages out of a buffer.

    Args:
        tokens: [B, K, N, D], contiguous; N is a multiple of S.
        pages: int [B, K, k].

    Returns:
        [B, K, k * S, D].
    """
    batch, heads, length, dim = tokens.shape
    table = tokens.view(-1, page_size * dim)
    first = torch.arange(batch * heads, device=tokens.device).view(batch, heads, 1) * (length // page_size)
    return table.index_select(0, (first + pages).flatten()).view(batch, heads, -1, dim)


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Attend with one query token a row: softmax(q K^T * scaling) V.

    Args:
        query: [B, K, G, D].
        keys: [B, K, N, D]; values: [B, K, N, D].
        mask: bool [B, 1 or K, 1, N], True where a token may be read; None: everywhere.

    Returns:
        [B, K, G, D].
    """
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def attention_weights(query: Tensor, keys: Tensor, scaling: float, bias: Tensor) -> Tensor:
    """Compute softmax(q K^T * scaling + bias), at least in float32: [B, K, G, N]; arguments as for `attend_biased`."""
    logits = multiply_wide(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    if bias.dim() > 1:
        bias = bias.expand(-1, keys.shape[1], -1).flatten(0, 1).unsqueeze(1)
    return torch.add(bias, logits, alpha=scaling).softmax(dim=-1).unflatten(0, keys.shape[:2])


def multiply_wide(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [B, M, D] with [B, D, N], the result at least in float32: 16 bits overflow, or round what is summed."""
    if left.dtype not in (torch.float16, torch.bfloat16):
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def attend_biased(query: Tensor, keys: Tensor, values: Tensor, scaling: float, bias: Tensor) -> Tensor:
    """Attend in matrix products, for a length that only the device knows.

    Fused kernels give one block to a KV head here and leave a GPU idle; partial sums over tokens keep it busy.

    Args:
        query: [B, K, G, D].
        keys: [B, K, N, D]; values: [B, K, N, D].
        bias: float32 [N] or [B, K or 1, N]: 0, and -inf for what may not be read.

    Returns:
        [B, K, G, D].
    """
    batch, heads, length, dim = keys.shape
    weights = attention_weights(query, keys, scaling, bias).to(values.dtype).flatten(0, 1)  # [B K, G, N]
    chunk = length if length % PARTIAL_SUM else PARTIAL_SUM
    weights = weights.unflatten(-1, (-1, chunk)).transpose(1, 2).flatten(0, 1)  # [B K N/chunk, G, chunk]
    partial = multiply_wide(weights, values.reshape(-1, chunk, dim))
    return partial.view(batch, heads, -1, query.shape[2], dim).sum(dim=2).to(query.dtype)
