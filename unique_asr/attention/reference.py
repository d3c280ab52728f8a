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
    """[B, K, N, D] -> [B, K, N / S, S, D], a view; N is a multiple of S."""
    return tokens.unflatten(2, (-1, page_size))


def page_statistics(keys: Tensor, page_size: int, score: PageScore, valid: Tensor | None = None) -> tuple[Tensor, ...]:
    """Statistics [B, K, P, width] of the pages of keys [B, K, N, D]; the last page may be partial.

    Computed from the keys alone, so doing it again for a touched page gives the same numbers (no drift).
    `valid` [B, N] is False for padding.
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
    """The query of one step by KV head: [B, H, 1, D] -> [B, K, G, D]."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def combine_group(scores: Tensor, combine: str | None, scaling: float) -> Tensor:
    """One score for the whole group: [B, K, G, P] -> [B, K, P].

    max, or None: the paper's. share: mean over the heads of each head's softmax over pages of its scaled score.
    """
    if combine == "share":
        return torch.softmax(scores * scaling, dim=-1).mean(dim=2)
    return scores.amax(dim=2)


def force_pages(scores: Tensor, config: SparseAttentionConfig, newest: int) -> Tensor:
    """Lift the sink pages and the recent pages before page `newest` above all others, in scores [B, K, newest]."""
    scores[..., : config.sink_pages] = torch.inf
    scores[..., newest - config.recent_pages + 1 :] = torch.inf
    return scores


def page_bias(candidates: Tensor, config: SparseAttentionConfig, newest: int | Tensor) -> Tensor:
    """What to add to scores instead, [B, P]: inf for forced pages, 0 for the other `candidates` [B, P], -inf elsewhere.

    For padded batches, where the sink is the first page with a token, and for a `newest` that only the device knows.
    """
    page = torch.arange(candidates.shape[-1], device=candidates.device)
    first = candidates.int().argmax(dim=-1, keepdim=True)
    forced = (page < first + config.sink_pages) | (page > newest - config.recent_pages)
    bias = torch.zeros(candidates.shape, device=candidates.device)
    return bias.masked_fill(forced, torch.inf).masked_fill(~candidates, -torch.inf)


def combine_biased(scores: Tensor, combine: str | None, scaling: float, bias: Tensor) -> Tensor:
    """`combine_group` with a `page_bias`: [B, K, G, P] -> [B, K, P]."""
    if combine == "share":
        scores = scores + bias.clamp(max=0)[:, None, None]
    return combine_group(scores, combine, scaling) + bias[:, None]


def top_pages(scores: Tensor, count: int) -> Tensor:
    """The `count` best pages of float32 scores [B, K, P], ascending: int64 [B, K, count].

    Exact and deterministic: score and page number form one integer, so no two are equal, and of equal scores the
    earlier page wins.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
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
    """Copy pages [B, K, k] out of tokens [B, K, N, D] (contiguous, N a multiple of S): [B, K, k * S, D]."""
    batch, heads, length, dim = tokens.shape
    table = tokens.view(-1, page_size * dim)
    first = torch.arange(batch * heads, device=tokens.device).view(batch, heads, 1) * (length // page_size)
    return table.index_select(0, (first + pages).flatten()).view(batch, heads, -1, dim)


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q K^T * scaling) V for queries [B, K, G, D] that share the keys of their group: [B, K, G, D].

    `mask` [B, 1 or K, 1, N] is True where a token may be read.
    """
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def attention_weights(query: Tensor, keys: Tensor, scaling: float, bias: Tensor) -> Tensor:
    """softmax(q K^T * scaling + bias) of queries [B, K, G, D]: float32 [B, K, G, N]; `bias` as for `attend_biased`."""
    flat_query, flat_keys = query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
    if query.is_cuda and query.dtype != torch.float32:
        logits = torch.bmm(flat_query, flat_keys, out_dtype=torch.float32)
    else:
        logits = torch.bmm(flat_query, flat_keys)
    if bias.dim() > 1:
        bias = bias.expand(-1, keys.shape[1], -1).flatten(0, 1).unsqueeze(1)
    return torch.add(bias, logits, alpha=scaling).softmax(dim=-1).unflatten(0, keys.shape[:2])


def attend_biased(query: Tensor, keys: Tensor, values: Tensor, scaling: float, bias: Tensor) -> Tensor:
    """`attend` in matrix products, for a length that only the device knows.

    `bias` [N] or [B, K or 1, N] is 0, and -inf for what may not be read. Fused kernels give one block to a KV head here
    and leave a GPU idle; partial sums over tokens keep it busy.
    """
    batch, heads, length, dim = keys.shape
    half = query.is_cuda and query.dtype != torch.float32
    weights = attention_weights(query, keys, scaling, bias).to(values.dtype).flatten(0, 1)  # [B K, G, N]
    chunk = length if length % PARTIAL_SUM else PARTIAL_SUM
    weights = weights.unflatten(-1, (-1, chunk)).transpose(1, 2).flatten(0, 1)  # [B K N/chunk, G, chunk]
    chunks = values.reshape(-1, chunk, dim)
    partial = torch.bmm(weights, chunks, out_dtype=torch.float32) if half else torch.bmm(weights, chunks)
    return partial.view(batch, heads, -1, query.shape[2], dim).sum(dim=2).to(query.dtype)
