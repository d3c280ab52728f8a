"""H2O, the heavy-hitter oracle (Zhang et al., arXiv 2306.14048): what got most attention so far stays, the rest goes.

Accumulated attention starts with the whole prefill and is summed over the query heads of a group, which share their
keys. Eviction is for good: a token that falls out of the budget is never read again.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from unique_asr.attention.buffers import grow_buffer
from unique_asr.attention.selector import TokenSelector

LOGITS = 1 << 24  # attention weights computed at once in the prefill, and on CUDA 4 times as many


@dataclass
class H2O(TokenSelector):
    """read = latest (recent * budget) tokens + those with most attention, sum over past queries of softmax(q K^T)."""

    name: ClassVar[str] = "h2o"
    watches_attention: ClassVar[bool] = True
    buffer_names: ClassVar[tuple[str, ...]] = ("masses",)
    recent: float = 0.5  # share of the budget for the latest tokens; the paper's choice

    def begin_sequence(self, keys):
        if getattr(self, "masses", None) is None or self.masses.shape[:3] != keys.shape[:3]:
            # float32 [B, K, N, 2]: attention that each token has got, -inf once it is evicted. A step at slot t reads
            # the one of t % 2 and writes the other.
            self.masses = torch.zeros(*keys.shape[:3], 2, device=keys.device)

    def resize(self, keys):
        self.masses = grow_buffer(self.masses, self.masses.shape[2], keys.shape[2])

    def read_prompt(self, query, keys, position, scaling):
        new, total = query.shape[3], keys.shape[2]
        before = torch.tensor([total - new], device=keys.device)
        place, padding = torch.arange(total, device=keys.device), (position < 0).unsqueeze(2)  # [B, 1, 1, N]
        past = keys.float().transpose(-1, -2).unsqueeze(2)  # [B, K, 1, D, N]
        logits_at_once = LOGITS << 2 if keys.is_cuda else LOGITS
        rows = max(1, logits_at_once // (total * query.shape[0] * query.shape[1] * query.shape[2]))
        mass = self._mass(before, total)
        for start in range(0, new, rows):
            part = query[:, :, :, start : start + rows].float()
            logits = torch.matmul(part, past) * scaling
            last = place[total - new + start :][: part.shape[3]]
            logits = logits.masked_fill((place > last.unsqueeze(-1)) | padding.unsqueeze(2), -torch.inf)
            asked = (position[..., last] >= 0)[:, :, None, :, None]  # by queries that are no padding
            mass += logits.softmax(dim=-1).masked_fill(~asked, 0).sum(dim=(2, 3))
        self._keep(mass, before + new)

    def select(self, query, keys, position, last):
        mass = self._mass(last, keys.shape[2])
        slot = torch.arange(keys.shape[2], device=keys.device)
        mass = mass.masked_fill(slot > last - max(1, int(self.recent * self.budget)), torch.inf)
        best = mass.masked_fill(position < 0, -torch.inf).topk(min(self.budget, keys.shape[2]), dim=-1)
        return torch.zeros_like(mass, dtype=torch.bool).scatter_(2, best.indices, best.values > -torch.inf)

    def observe_attention(self, weights, read, last):
        mass = self._mass(last, weights.shape[-1]) + weights.sum(dim=2)
        self._keep(mass.masked_fill(~read, -torch.inf), last + 1)

    def _mass(self, slot, total):
        """Return the attention [B, K, total] that tokens got before `slot` (int64 [1]); later tokens have got none."""
        mass = self.masses.index_select(3, slot % 2)[:, :, :total, 0]
        return mass.masked_fill(torch.arange(total, device=slot.device) >= slot, 0)

    def _keep(self, mass, slot):
        """Write the attention [B, K, n] that tokens have got when the token of `slot` comes."""
        self.masses[:, :, : mass.shape[2]].index_copy_(3, slot % 2, mass.unsqueeze(3))
