"""InfLLM-style block selection (Xiao et al., arXiv 2402.04617): blocks ranked by their representative tokens.

A token represents its block if the queries of the local window after it score it highest. The original gives all
distant blocks one position and chooses them for a layer; here positions stay, and each KV head chooses its own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Method


@dataclass
class InfLLM(Method):
    """r_m = 1/L sum_{j=1..L} q_{m+j} . k_m ranks the tokens of a block, sum_j q . k_{r_j} ranks the blocks.

    read = first `sink_pages` blocks + the best blocks + the latest L = local * budget tokens; a block is a page.
    """

    name: ClassVar[str] = "infllm"
    representatives: int = 4  # tokens of a block; the paper's choice
    local: float = 0.5  # share of the budget for the latest tokens

    def begin(self, config):
        super().begin(config)
        self.block = config.page_size
        if config.budget is not None:
            self.window = int(self.local * config.budget)
            need = self.window + (config.sink_pages + 2) * self.block
            if config.budget < need:
                raise ValueError(
                    f"attention.budget is {config.budget}: InfLLM with blocks of {self.block} needs {need} tokens; "
                    "raise it, or lower attention.page_size"
                )
        self.sums = None  # [B, K, n, D] float64: sums of the queries before token `first`, and before each one after it
        self.first = 0  # tokens whose blocks are represented
        self.represented = None  # [B, K, blocks, D]: sum of the representative keys of each block

    def observe(self, query, keys, position, scaling, sparse):
        asked = (position[..., -query.shape[3] :] >= 0).unsqueeze(-1)  # by queries that are no padding
        new = (query.sum(dim=2, dtype=torch.float64) * asked).cumsum(dim=2)  # [B, K, T, D]
        if self.sums is None:
            self.sums = F.pad(new, (0, 0, 1, 0))
            self.represented = keys.new_zeros(*keys.shape[:2], 0, keys.shape[-1], dtype=torch.float32)
        else:
            self.sums = torch.cat([self.sums, self.sums[:, :, -1:] + new], dim=2)
        self._represent(keys, position)

    def rank(self, query, keys, position):
        total, sink = keys.shape[2], self.config.sink_pages
        local = self.first  # the latest tokens begin where the represented blocks end
        scores = torch.matmul(query.float(), self.represented.transpose(-1, -2)).sum(dim=2)
        block = torch.arange(scores.shape[-1], device=keys.device) - (-position[..., :1]) // self.block
        # The first blocks of a row are read in any case; those before them are padding.
        best = scores.masked_fill(block < sink, -torch.inf).topk(self._blocks(total - local), dim=-1).indices
        chosen = torch.full_like(scores, -torch.inf).scatter_(-1, best, 0.0)
        chosen = chosen.masked_fill((block >= 0) & (block < sink), 0.0)
        ranks = F.pad(chosen.repeat_interleave(self.block, dim=-1), (0, total - local))
        return ranks, (self._blocks(total - local) + sink) * self.block + total - local

    def _blocks(self, local: int) -> int:
        """Blocks to choose beside `local` latest tokens and the first blocks."""
        return (self.config.budget - local) // self.block - self.config.sink_pages

    def _represent(self, keys, position):
        """Choose the representatives of the complete blocks that have left the local window."""
        last = (keys.shape[2] - self.window) // self.block * self.block
        if last <= self.first:
            return
        count, window = last - self.first, self.window
        after = self.sums[:, :, 1 + window : 1 + window + count] - self.sums[:, :, 1 : 1 + count]
        padding = (position[..., self.first : last] < 0).unsqueeze(-1)
        tokens = keys[:, :, self.first : last].float().masked_fill(padding, 0)
        importance = (after.float() * tokens).sum(dim=-1) / window
        importance = importance.masked_fill(padding.squeeze(-1), -torch.inf).unflatten(-1, (-1, self.block))
        best = importance.topk(min(self.representatives, self.block), dim=-1).indices.unsqueeze(-1)
        tokens = tokens.unflatten(2, (-1, self.block))
        new = tokens.gather(3, best.expand(*best.shape[:-1], tokens.shape[-1])).sum(dim=3)
        self.represented = torch.cat([self.represented, new], dim=2)
        self.sums, self.first = self.sums[:, :, count:], last
