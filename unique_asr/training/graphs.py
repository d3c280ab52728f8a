"""The LLM's forward and backward pass as CUDA graphs, one for each shape of its inputs.

Launching the kernels of thirty thin layers takes the host several times what the GPU needs to run them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """Vectors [B, N, hidden] -> last hidden states [B, N, hidden] of a transformers decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.train(decoder.training)

    def forward(self, embeds: Tensor, decoded: Tensor | None = None) -> Tensor:
        """decoded: bool [B, N], for the attention of sparsity-aware training."""
        more = {} if decoded is None else {"decoded": decoded}
        return self.decoder(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state


class GraphedDecoder:
    """Captures a graph at the first use of a shape; weights must keep their addresses as long as it is used.

    All graphs share their memory: a backward pass has to come before the next forward pass.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple[int, ...], nn.Module] = {}

    def __call__(self, embeds: Tensor) -> Tensor:
        shape = tuple(embeds.shape)
        if shape not in self.graphs:
            sample = torch.randn_like(embeds, requires_grad=True)
            self.graphs[shape] = torch.cuda.make_graphed_callables(
                Decoder(self.decoder), (sample,), num_warmup_iters=2, pool=self.pool
            )
        return self.graphs[shape](embeds if embeds.requires_grad else embeds.detach().requires_grad_())
