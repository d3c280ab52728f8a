"""InfLLM-style block selection (Xiao et al., arXiv 2402.04617): blocks ranked by their representative tokens.

A token represents its block if the queries of the local window after it score it highest. The original gives all
distant blocks one position and chooses them for a layer; here positions stay, and each KV head chooses its own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from unique_asr.attention.buffers import grow_buffer
from unique_asr.attention.selector import TokenSelector


@dataclass
class InfLLM(TokenSelector):
    """r_m = 1/L sum_{j=1..L} q_{m+j} . k_m ranks the tokens of a block, sum_j q . k_{r_j} ranks the blocks.

    read = first `sink_pages` blocks + the best blocks + the latest L = local * budget tokens; a block is a page. Its
    budget must hold the latest tokens and two blocks more than the first ones.
    """

    name: ClassVar[str] = "infllm"
    buffer_names: ClassVar[tuple[str, ...]] = ("block_keys",)
    representatives: int = 4  # tokens of a block; the paper's choice
    local: float = 0.5  # share of the budget for the latest tokens

    def configure(self, budget, page_size, sink_pages):
        super().configure(budget, page_size, sink_pages)
        self.block = page_size  # tokens
        if budget is not None:
            self.window = int(self.local * budget)
            self.ring = self.window + 2 * self.block  # slots whose sums a step may need
            need = self.window + (sink_pages + 2) * self.block
            if budget < need:
                raise ValueError(
                    f"attention.budget is {budget}: InfLLM with blocks of {self.block} needs {need} tokens; "
                    "raise it, or lower attention.page_size"
                )

    def begin_sequence(self, keys):
        batch, heads, slots, dim = keys.shape
        shape = batch, heads, slots // self.block, dim
        if getattr(self, "block_keys", None) is None or self.block_keys.shape != shape:
            # float32 [B, K, slots / S, D]: the sum of the representative keys of each block.
            self.block_keys = torch.zeros(shape, device=keys.device)
            # float64 [B, K, ring, D]: the sum of the queries before slot s at s % ring.
            self.sums = torch.zeros(batch, heads, self.ring, dim, dtype=torch.float64, device=keys.device)
        self.sums.zero_()

    def resize(self, keys):
        self.block_keys = grow_buffer(self.block_keys, self.block_keys.shape[2], keys.shape[2] // self.block)

    def shift(self, by, length, keys):
        super().shift(by, length, keys)
        self.sums.copy_(self.sums.roll(by, dims=2))

    def copy_rows(self, rows, length, keys, other, other_length):
        super().copy_rows(rows, length, keys, other, other_length)
        self.sums[rows] = other.sums.roll(length - other_length, dims=2)

    def select_rows(self, indices):
        super().select_rows(indices)
        self.sums = self.sums[indices]

    def read_prompt(self, query, keys, position, scaling):
        total, device = keys.shape[2], keys.device
        before = total - query.shape[3]
        first, last = self._count_represented(before), self._count_represented(total)
        asked = (position[..., before:] >= 0).unsqueeze(-1)  # by queries that are no padding
        sums = self.sums[:, :, torch.arange(first, before + 1, device=device) % self.ring]  # from slot `first` on
        new = (query.sum(dim=2, dtype=torch.float64) * asked).cumsum(dim=2)  # [B, K, T, D]
        sums = torch.cat([sums, sums[:, :, -1:] + new], dim=2)
        if last > first:
            after = sums[:, :, 1 + self.window :] - sums[:, :, 1 : -self.window]
            blocks = slice(first // self.block, last // self.block)
            count = last - first
            self.block_keys[:, :, blocks] = self._sum_representatives(
                after[:, :, :count], keys[:, :, first:last], position[..., first:last]
            )
        kept = min(self.ring, sums.shape[2])
        self.sums[:, :, torch.arange(total + 1 - kept, total + 1, device=device) % self.ring] = sums[:, :, -kept:]

    def observe(self, query, keys, position, last):
        past = self.sums.index_select(2, last % self.ring)
        new = past + query.sum(dim=2, keepdim=True, dtype=torch.float64)
        self.sums.index_copy_(2, (last + 1) % self.ring, new)
        # The block that left the local window last, which is the same for some steps. Before one has, the first, too
        # early: it is done again when it has.
        block = (self._count_represented(last + 1) // self.block - 1).clamp(min=0)
        slots = block * self.block + torch.arange(self.block, device=last.device)
        slots = slots.clamp(max=keys.shape[2] - 1)
        after = self.sums.index_select(2, (slots + 1 + self.window) % self.ring)
        after = after - self.sums.index_select(2, (slots + 1) % self.ring)
        representatives = self._sum_representatives(after, keys.index_select(2, slots), position.index_select(2, slots))
        self.block_keys.index_copy_(2, block, representatives)

    def select(self, query, keys, position, last):
        slots, sink = keys.shape[2], self.sink_pages
        first = self._count_represented(last + 1)  # the latest tokens begin where the blocks with representatives end
        scores = torch.matmul(query.float(), self.block_keys[:, :, : slots // self.block].transpose(-1, -2))
        scores = scores.sum(dim=2)  # [B, K, blocks]
        number = torch.arange(scores.shape[-1], device=keys.device)
        block = number - (-position[..., :1]) // self.block
        # The first blocks of a row are read in any case; those before them are padding.
        scores = scores.masked_fill((block < sink) | (number >= first // self.block), -torch.inf)
        most = min(self._count_blocks(self.window), scores.shape[-1])
        best = scores.topk(most, dim=-1)
        # A longer window of the latest tokens leaves room for fewer blocks.
        taken = torch.arange(most, device=keys.device) < self._count_blocks(last + 1 - first)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(2, best.indices, taken & (best.values > -torch.inf))
        chosen = chosen | ((block >= 0) & (block < sink))
        latest = torch.arange(slots, device=keys.device) >= first
        return F.pad(chosen.repeat_interleave(self.block, dim=-1), (0, slots % self.block)) | latest

    def count_tokens(self, length, prompt=None):
        local = length - self._count_represented(length)
        return (self._count_blocks(local) + self.sink_pages) * self.block + local

    def _count_represented(self, length):
        """Count the tokens, of `length`, whose blocks are complete and have left the local window."""
        if isinstance(length, int):
            return max(0, length - self.window) // self.block * self.block
        return (length - self.window).clamp(min=0) // self.block * self.block

    def _count_blocks(self, local):
        """Count the blocks to choose beside `local` latest tokens and the first blocks."""
        return (self.budget - local) // self.block - self.sink_pages

    def _sum_representatives(self, after, keys, position):
        """Sum the keys of each block, of [B, K, n S, D], that the queries after it scored highest: [B, K, n, D]."""
        padding = (position < 0).unsqueeze(-1)
        tokens = keys.float().masked_fill(padding, 0)
        importance = (after.float() * tokens).sum(dim=-1) / self.window
        importance = importance.masked_fill(padding.squeeze(-1), -torch.inf).unflatten(-1, (-1, self.block))
        best = importance.topk(min(self.representatives, self.block), dim=-1).indices.unsqueeze(-1)
        tokens = tokens.unflatten(2, (-1, self.block))
        return tokens.gather(3, best.expand(*best.shape[:-1], tokens.shape[-1])).sum(dim=3)
