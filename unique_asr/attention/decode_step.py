"""One greedy decode step for every row of a paged cache, with shapes and addresses that never change.

On CUDA a whole step (embedding, layers, arg-max, its log-probability) is one CUDA graph: one for dense steps and one
for sparse steps, captured anew when the cache grows. Elsewhere the steps run as they are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unique_asr.attention.cache import PagedCache
from unique_asr.attention.cuda_graph import captured
from unique_asr.attention.fused_linear import fuse_linears


class Chosen:
    """The `result` [2, B] of a step on its way to the host; the step may run again meanwhile."""

    def __init__(self, result: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if result.is_cuda:
            self._result = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            self._result.copy_(result, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._result = result.clone()

    def tolist(self) -> list[list[float]]:
        """B tokens, and their B log-probabilities in nats; waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._result.tolist()


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The arg-max of logits [B, V], and its log-probability in nats."""
    logits = logits.float()
    value, token = logits.max(dim=-1)
    return token, value - logits.logsumexp(dim=-1)


class DecodeStep:
    """Writes the token last chosen to the cache and chooses the next, for a model switched to UNIQUE attention.

        step = DecodeStep(model, cache, batch=8)
        step.choose(logits)                 # [B, V] of the prompt
        while ...:
            step.run()
            tokens, log_probs = step.chosen().tolist()

    `starts` (int64 [B]) is the padding on the left of every row. `compile` fuses the model first: linear layers of the
    same input, in place (`fuse_linears`), and small operations with torch.compile, which takes a minute once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        batch: int = 1,
        starts: Tensor | None = None,
        capture: bool | None = None,
        compile: bool = False,
    ):
        device = model.get_input_embeddings().weight.device
        self.cache = cache
        self.starts = starts
        self.capture = device.type == "cuda" if capture is None else capture
        self._model = model
        if compile:
            fuse_linears(model)
            self._model = torch.compile(model, fullgraph=True, dynamic=False)

        # The step reads and writes these in place: captured addresses stay valid.
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.result = torch.zeros(2, batch, dtype=torch.float64, device=device)  # tokens and their log-probabilities
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def choose(self, logits: Tensor) -> None:
        """Make the arg-max of logits [B, V] the next token, on the device."""
        token, log_prob = best(logits)
        self.token.copy_(token.unsqueeze(1))
        self.result[0].copy_(token)
        self.result[1].copy_(log_prob)

    def choose_for(self, rows: Tensor, logits: Tensor) -> Tensor:
        """The same for some `rows` of the batch (int64 [R]), of logits [R, V]; returns their `result`, [2, R]."""
        token, log_prob = best(logits)
        self.token[rows] = token.unsqueeze(1)
        return torch.stack([token.double(), log_prob.double()])

    def chosen(self) -> Chosen:
        """The tokens last chosen, and their log-probabilities."""
        return Chosen(self.result)

    def reserve(self, tokens: int) -> None:
        """Make room in the cache; a graph holds the addresses of its buffers, so it goes when they move."""
        before = self.cache.capacity
        self.cache.reserve(tokens)
        if self.cache.capacity != before:
            self._graphs.clear()

    @torch.no_grad()
    def run(self) -> None:
        """One step; nothing waits for the device."""
        length = self.cache.length
        self.reserve(length + 1)
        sparse = self.cache.sparse_at(length + 1)
        if sparse:
            self.cache.update_statistics(self.starts)
        self.position.fill_(length)
        if not self.capture:
            self.static(sparse)
        else:
            if sparse not in self._graphs:
                self._graphs[sparse] = captured(partial(self.static, sparse), [self.token])
            self._graphs[sparse].replay()
        self.cache.advance()

    @torch.no_grad()
    def static(self, sparse: bool) -> None:
        """The step as a CUDA graph sees it: nothing read on the host."""
        positions = self.position if self.starts is None else self.position - self.starts.unsqueeze(1)
        with self.cache.static_step(self.position, sparse, self.starts):
            output = self._model(
                input_ids=self.token,
                position_ids=positions.expand(len(self.token), 1),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.choose(output.logits[:, -1])
