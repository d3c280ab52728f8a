"""The LLM's decoder as training runs it: plainly, or as CUDA graphs, one for each shape of its inputs.

Launching the kernels of thirty thin layers takes the host several times what the GPU needs to run them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unique_asr.attention.cuda_graph import pause_garbage_collection
from unique_asr.attention.huggingface_training import TrainingAttention


class PlainDecoder(nn.Module):
    """A transformers decoder from embeddings to last hidden states, without a cache."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.train(decoder.training)

    def forward(self, embeds: Tensor, decoded: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
        """Last hidden states [B, N, hidden] of `embeds` [B, N, hidden].

        Args:
            decoded: bool [B, N], the tokens that inference decodes one by one; for `TrainingAttention`.
            starts: int [B, N], the first token of each token's item, where items share a row; for the same.
        """
        more = {} if decoded is None else {"decoded": decoded}
        if starts is not None:
            position = torch.arange(starts.shape[1], device=starts.device)
            more |= {"position_ids": position - starts, "attention_mask": starts[:, None, None]}
        return self.decoder(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state


class GraphedDecoder:
    """The same as CUDA graphs, forward and backward; one is captured at the first use of a shape.

    Weights must keep their addresses as long as it is used. All graphs share their memory, so a backward pass has to
    come before the next forward pass.

    Args:
        attention: of sparsity-aware training; its `config` may change, and each has graphs of its own.
    """

    def __init__(self, decoder: nn.Module, attention: TrainingAttention | None = None) -> None:
        self.decoder, self.attention = decoder, attention
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple, nn.Module] = {}

    def __call__(self, embeds: Tensor, *more: Tensor) -> Tensor:
        """The same as `PlainDecoder.forward`."""
        inputs = (embeds if embeds.requires_grad else embeds.detach().requires_grad_(), *more)
        config = self.attention.config if self.attention else None
        if config and not (config.masks and embeds.shape[1] > config.sparse.budget):
            config = None  # every query reads everything, whatever the budget
        kind = tuple(embeds.shape), len(inputs), config
        if kind not in self.graphs:
            samples = (torch.randn_like(embeds, requires_grad=True), *(each.clone() for each in more))
            with pause_garbage_collection():
                self.graphs[kind] = torch.cuda.make_graphed_callables(
                    PlainDecoder(self.decoder),
                    samples,
                    num_warmup_iters=2,
                    allow_unused_input=True,  # embeddings may be trained, and take no part: the inputs are vectors
                    pool=self.pool,
                )
        return self.graphs[kind](*inputs)
