"""One greedy decode step for every row of a paged cache, with shapes and addresses that never change.

On CUDA a whole step (embedding, layers, arg-max, its log-probability) is one CUDA graph: one for dense steps and one
for sparse steps, captured anew when the cache grows. Elsewhere the steps run as they are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unique_asr.attention.buffers import make_buffer
from unique_asr.attention.cache import CACHE_ARGUMENT, PagedCache
from unique_asr.attention.cuda_graph import capture_graph
from unique_asr.attention.fused_linear import fuse_linears
from unique_asr.kernels.launch import use_device


class TokenTransfer:
    """The tokens of a step on their way to the host; the step may run again meanwhile.

    Args:
        result: float64 [2, B] on any device: tokens, and their log-probabilities in nats.
    """

    def __init__(self, result: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if result.is_cuda:
            with use_device(result):
                self._result = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
                self._result.copy_(result, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
        else:
            self._result = result.clone()

    def tolist(self) -> list[list[float]]:
        """Wait for the device, and return B tokens and their B log-probabilities in nats."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._result.tolist()


def pick_greedily(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the arg-max of logits [B, V], int64 [B], and its log-probability in nats, float32 [B]."""
    logits = logits.float()
    value, token = logits.max(dim=-1)
    return token, value - logits.logsumexp(dim=-1)


class DecodeStep:
    """One greedy decode step of a model switched to UNIQUE attention: write the last token, and choose the next.

        step = DecodeStep(model, cache, batch=8)
        step.choose(logits)                 # [B, V] of the prompt
        while ...:
            step.run()
            tokens, log_probs = step.fetch().tolist()

    Args:
        model: a causal language model of transformers.
        cache: holds the prompt.
        batch: rows.
        starts: int64 [B], the padding on the left of every row; None: no padding.
        capture: whether steps are captured in CUDA graphs; None: on CUDA.
        compile: whether to fuse the model first: linear layers of the same input, in place (`fuse_linears`), and small
            operations with torch.compile, which takes a minute once.
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
        like = torch.empty(0, dtype=torch.long, device=device)
        self.token = make_buffer(like, batch, 1)
        self.position = make_buffer(like, 1)
        self.result = make_buffer(like, 2, batch, dtype=torch.float64)  # tokens and their log-probabilities
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def choose(self, logits: Tensor) -> None:
        """Make the arg-max of logits [B, V] the next token of each row, without waiting for the device."""
        token, log_prob = pick_greedily(logits)
        self.token.copy_(token.unsqueeze(1))
        self.result[0].copy_(token)
        self.result[1].copy_(log_prob)

    def choose_for(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Do the same for some `rows` of the batch (int64 [R]) with logits [R, V].

        Returns:
            float64 [2, R]: their tokens and log-probabilities, for a `TokenTransfer`.
        """
        token, log_prob = pick_greedily(logits)
        self.token[rows] = token.unsqueeze(1)
        return torch.stack([token.double(), log_prob.double()])

    def fetch(self) -> TokenTransfer:
        """Begin to copy the tokens last chosen, and their log-probabilities, to the host."""
        return TokenTransfer(self.result)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in the cache; captured graphs are dropped if its buffers move."""
        before = self.cache.capacity
        self.cache.reserve(tokens)
        if self.cache.capacity != before:
            self._graphs.clear()

    @torch.no_grad()
    def run(self) -> None:
        """Run one step, without waiting for the device."""
        length = self.cache.length
        self.reserve(length + 1)
        sparse = self.cache.sparse_at(length + 1)
        if sparse:
            self.cache.update_statistics(self.starts)
        self.cache.clear_forgotten()
        self.position.fill_(length)
        if not self.capture:
            self.run_static(sparse)
        else:
            if sparse not in self._graphs:
                self._graphs[sparse] = capture_graph(partial(self.run_static, sparse), [self.token])
            self._graphs[sparse].replay()
        self.cache.advance()

    @torch.no_grad()
    def run_static(self, sparse: bool) -> None:
        """Run the part of a step that a CUDA graph captures: nothing is read or changed on the host."""
        positions = self.position if self.starts is None else self.position - self.starts.unsqueeze(1)
        with self.cache.static_step(self.position, sparse, self.starts):
            output = self._model(
                input_ids=self.token,
                position_ids=positions.expand(len(self.token), 1),
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_ARGUMENT: self.cache},
            )
        self.choose(output.logits[:, -1])
