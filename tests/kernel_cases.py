"""Random inputs of the kernels, laid out by position or by a block table, and what the kernels are to make of them.

Everything expected is written out in float64 from the definitions. What must not be read holds NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unique_asr.attention import reference
from unique_asr.attention.scores import LARGEST, SCORES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """One decode step; the buffers that kernels see are `keys`, `values` and `statistics`, the others by position."""

    query: Tensor  # [B, H, D]
    plain_keys: Tensor  # [B, K, N, D]
    plain_values: Tensor
    lengths: Tensor  # [B]
    starts: Tensor | None
    page_size: int
    score: str
    statistics_dtype: str
    block_table: Tensor | None
    block_tokens: int | None

    def __post_init__(self):
        valid = torch.arange(self.plain_keys.shape[2], device=self.lengths.device) < self.lengths[:, None]
        if self.starts is not None:
            valid &= torch.arange(self.plain_keys.shape[2], device=self.lengths.device) >= self.starts[:, None]
        self.valid = valid
        hidden = ~valid[:, None, :, None]
        self.keys = self.physical(self.plain_keys.masked_fill(hidden, torch.nan))
        self.values = self.physical(self.plain_values.masked_fill(hidden, torch.nan))
        self.plain_statistics = self.expected_statistics(self.page_size)
        self.statistics = self.readable(self.plain_statistics, self.page_size)

    @property
    def heads(self) -> int:
        return self.plain_keys.shape[1]

    def physical(self, plain: Tensor, fill: float = torch.nan) -> Tensor:
        """Buffers by position [B, K, n, width] as the kernels see them."""
        if self.block_table is None:
            return plain.clone()
        per_block = plain.shape[2] // self.block_table.shape[1]
        blocks = plain.unflatten(2, (-1, per_block)).transpose(1, 2).flatten(0, 1)  # [B blocks, K, per_block, width]
        pool = torch.full((len(blocks) + 3, *blocks.shape[1:]), fill, dtype=torch.float32, device=plain.device)
        pool = pool.to(plain.dtype)
        raw(pool)[self.block_table.flatten().long()] = raw(blocks)
        return pool

    def by_position(self, buffer: Tensor) -> Tensor:
        """The inverse of `physical`."""
        if self.block_table is None:
            return buffer
        blocks = raw(buffer)[self.block_table.long()]  # [B, blocks, K, per_block, width]
        return blocks.transpose(1, 2).flatten(2, 3).view(buffer.dtype)

    def expected_statistics(self, size: int) -> tuple[Tensor, ...]:
        """As stored, of all pages of `size` tokens, by position; padding left out."""
        new = reference.page_statistics(self.plain_keys.double(), size, SCORES[self.score], self.valid)
        dtype = self.plain_keys.dtype
        kept = SCORES[self.score].encode([each.to(dtype) for each in new], self.statistics_dtype)
        return tuple(kept)

    def readable(self, plain: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
        """Statistics as the kernels see them, with NaN in the pages that are not complete."""
        pages = torch.arange(plain[0].shape[2], device=self.lengths.device)
        hidden = (pages >= (self.lengths[:, None] - 1) // size)[:, None, :, None]
        if self.starts is not None:
            hidden |= (pages < (self.starts // size)[:, None])[:, None, :, None]
        poisoned = []
        for each in plain:
            poison = torch.full_like(each.float(), torch.nan if each.is_floating_point() else 127).to(each.dtype)
            whole = torch.where(hidden, raw(poison), raw(each)).view(each.dtype)
            poisoned.append(self.physical(whole, fill=torch.nan if each.is_floating_point() else 127))
        return tuple(poisoned)

    def empty_statistics(self, size: int) -> tuple[Tensor, ...]:
        """Poisoned buffers for the kernels to write."""
        return tuple(torch.full_like(each.float(), 99.0).to(each.dtype) for each in self.readable(
            self.expected_statistics(size), size
        ))  # fmt: skip

    def head_scores(self, scale: float, size: int | None = None) -> Tensor:
        """Scores [B, K, G, P] in float64, from the statistics as stored."""
        stored = list(self.plain_statistics if size is None else self.expected_statistics(size))
        values = []
        while stored:
            value = stored.pop(0)
            values.append(value.double() * stored.pop(0).double() if value.dtype in LARGEST else value.double())
        query = self.query.double().unflatten(1, (self.heads, -1))  # [B, K, G, D]
        if self.score == "mean":
            return torch.einsum("bkgd,bkpd->bkgp", query, values[0])
        if self.score == "quest":
            low, high = (torch.einsum("bkgd,bkpd->bkgpd", query, value) for value in values)
            return torch.maximum(low, high).sum(-1)
        mean = torch.einsum("bkgd,bkpd->bkgp", query, values[0])
        if self.score == "unique":
            return mean + scale * query.norm(dim=-1, keepdim=True) * values[1].transpose(-1, -2)
        spread = torch.einsum("bkgd,bkpd->bkgp", query.square(), values[1])
        return mean + scale * query.shape[-1] ** -0.5 * spread

    def scores(self, scale: float, combine: str, sink: int, recent: int, per_super: int = 1) -> Tensor:
        """[B, K, P] in float64: of the pages, or with `per_super` > 1 of super-pages."""
        size = self.page_size * per_super
        scores = self.head_scores(scale, size)
        page = torch.arange(scores.shape[-1], device=scores.device)
        first = torch.zeros_like(self.lengths) if self.starts is None else self.starts // self.page_size
        newest = (self.lengths - 1) // self.page_size
        eligible = (page >= (first // per_super)[:, None]) & (page < (newest // per_super)[:, None])
        small = torch.arange(scores.shape[-1] * per_super, device=scores.device)
        must = (small >= first[:, None]) & (small < first[:, None] + sink)
        must |= (small > newest[:, None] - recent) & (small < newest[:, None])
        must = must.unflatten(1, (-1, per_super)).any(-1)
        if combine == "max":
            scores = scores.amax(2)
        else:
            hidden = ~eligible[:, None, None]
            scores = (scores * self.query.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1).mean(2)
        return scores.masked_fill(must[:, None], torch.inf).masked_fill(~eligible[:, None], -torch.inf)

    def output(self, pages: Tensor, scaling: float) -> Tensor:
        """Attention in float64 over `pages` [B, K, k] and the newest one: [B, H, D]."""
        rows = []
        for b in range(len(self.query)):
            length = int(self.lengths[b])
            for h in range(self.heads):
                chosen = [page for page in pages[b, h].tolist() if page >= 0] + [(length - 1) // self.page_size]
                tokens = torch.cat(
                    [torch.arange(page * self.page_size, (page + 1) * self.page_size) for page in chosen]
                )
                tokens = tokens[self.valid[b, tokens].cpu()].to(self.query.device)
                query = self.query[b].unflatten(0, (self.heads, -1))[h].double()
                weights = (query @ self.plain_keys[b, h, tokens].double().T * scaling).softmax(-1)
                rows.append(weights @ self.plain_values[b, h, tokens].double())
        return torch.stack(rows).view(self.query.shape)


def raw(buffer: Tensor) -> Tensor:
    """8-bit floats as bytes, for operations that PyTorch has for few types."""
    return buffer.view(torch.uint8) if buffer.element_size() == 1 else buffer


def make_case(
    lengths: list[int],
    capacity: int,
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 64,
    page_size: int = 8,
    dtype: torch.dtype = torch.float32,
    score: str = "unique",
    statistics_dtype: str = "keys",
    starts: list[int] | None = None,
    block_tokens: int | None = None,
    device: str = "cpu",
) -> Case:
    """Keys with a mean of their own for every four tokens, so that pages differ; seeded by torch's generator."""
    batch = len(lengths)
    shape = batch, heads, capacity, dim
    keys = torch.randn(*shape, device=device) + torch.randn(
        batch, heads, capacity // 4, dim, device=device
    ).repeat_interleave(4, dim=2)
    table = None
    if block_tokens is not None:
        blocks = capacity // block_tokens
        order = torch.randperm(batch * blocks + 3, device=device)[: batch * blocks]
        table = order.view(batch, blocks).to(torch.int32)
    return Case(
        torch.randn(batch, heads * group, dim, device=device).to(dtype),
        keys.to(dtype),
        torch.randn(*shape, device=device).to(dtype),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        None if starts is None else torch.tensor(starts, device=device),
        page_size,
        score,
        statistics_dtype,
        table,
        block_tokens,
    )
