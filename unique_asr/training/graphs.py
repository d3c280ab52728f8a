"""The LLM's forward and backward pass as CUDA graphs, one for each shape of its inputs.

Launching the kernels of thirty thin layers takes the host several times what the GPU needs to run them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unique_asr.attention.cuda_graph import pause_garbage_collection

if TYPE_CHECKING:
    from unique_asr.attention.soft_mask import TrainingAttention


class Decoder(nn.Module):
    """Vectors [B, N, hidden] -> last hidden states [B, N, hidden] of a transformers decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.train(decoder.training)

    def forward(self, embeds: Tensor, decoded: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
        """For `TrainingAttention`: decoded, bool [B, N], and starts, int [B, N], the first token of each one's item."""
        more = {} if decoded is None else {"decoded": decoded}
        if starts is not None:
            position = torch.arange(starts.shape[1], device=starts.device)
            more |= {"position_ids": position - starts, "attention_mask": starts[:, None, None]}
        return self.decoder(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state


class GraphedDecoder:
    """Captures a graph at the first use of a shape; weights must keep their addresses as long as it is used.

    attention: of sparsity-aware training; its configuration may change, and each has graphs of its own.
    All graphs share their memory: a backward pass has to come before the next forward pass.
    """

    def __init__(self, decoder: nn.Module, attention: TrainingAttention | None = None) -> None:
        self.decoder, self.attention = decoder, attention
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple, nn.Module] = {}

    def __call__(self, embeds: Tensor, *more: Tensor) -> Tensor:
        """As `Decoder`."""
        inputs = (embeds if embeds.requires_grad else embeds.detach().requires_grad_(), *more)
        kind = tuple(embeds.shape), len(inputs), self.attention and self.attention.config
        if kind not in self.graphs:
            samples = (torch.randn_like(embeds, requires_grad=True), *(each.clone() for each in more))
            with pause_garbage_collection():
                self.graphs[kind] = torch.cuda.make_graphed_callables(
                    Decoder(self.decoder),
                    samples,
                    num_warmup_iters=2,
                    allow_unused_input=True,  # embeddings may be trained, and take no part: the inputs are vectors
                    pool=self.pool,
                )
        return self.graphs[kind](*inputs)
