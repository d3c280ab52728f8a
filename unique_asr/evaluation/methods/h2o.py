"""H2O, the heavy-hitter oracle (Zhang et al., arXiv 2306.14048): what got most attention so far stays, the rest goes.

Accumulated attention starts with the whole prefill and is summed over the query heads of a group, which share their
keys. Eviction is for good: a token that falls out of the budget is never read again.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Method

LOGITS = 1 << 24  # attention weights computed at once in the prefill


@dataclass
class H2O(Method):
    """read = latest (recent * budget) tokens + those with most attention, sum over past queries of softmax(q K^T)."""

    name: ClassVar[str] = "h2o"
    watches: ClassVar[bool] = True
    recent: float = 0.5  # share of the budget for the latest tokens; the paper's choice

    def begin(self, config):
        super().begin(config)
        self.mass = None  # [B, K, N] float32: attention that each token has got
        self.evicted = None  # [B, K, N]

    def observe(self, query, keys, position, scaling, sparse):
        new = query.shape[3]
        if self.mass is None:
            self.mass = torch.zeros(*keys.shape[:2], 0, device=keys.device)
            self.evicted = torch.zeros(*keys.shape[:2], 0, dtype=torch.bool, device=keys.device)
        self.mass, self.evicted = F.pad(self.mass, (0, new)), F.pad(self.evicted, (0, new))
        if sparse:
            return  # counted in `attended`
        total = keys.shape[2]
        place, padding = torch.arange(total, device=keys.device), (position < 0).unsqueeze(2)  # [B, 1, 1, N]
        past = keys.float().transpose(-1, -2).unsqueeze(2)  # [B, K, 1, D, N]
        rows = max(1, LOGITS // (total * query.shape[0] * query.shape[1] * query.shape[2]))
        for start in range(0, new, rows):
            part = query[:, :, :, start : start + rows].float()
            logits = torch.matmul(part, past) * scaling
            last = place[total - new + start :][: part.shape[3]]
            logits = logits.masked_fill((place > last.unsqueeze(-1)) | padding.unsqueeze(2), -torch.inf)
            asked = (position[..., last] >= 0)[:, :, None, :, None]  # by queries that are no padding
            self.mass += logits.softmax(dim=-1).masked_fill(~asked, 0).sum(dim=(2, 3))

    def rank(self, query, keys, position):
        ranks = self.mass.masked_fill(self.evicted, -torch.inf)
        ranks[..., -max(1, int(self.recent * self.config.budget)) :] = torch.inf
        return ranks, self.config.budget

    def attended(self, tokens, weights):
        self.mass.scatter_add_(2, tokens, weights.sum(dim=2))
        self.evicted.fill_(True).scatter_(2, tokens, False)
