"""Greedy decoding of one long sequence: a chunked prefill of vectors, then one token a step over a paged cache.

On CUDA a whole step (embedding, layers, arg-max, its log-probability, the next position) is one CUDA graph: one for
dense steps and one for sparse steps, captured anew when the cache grows. Elsewhere the steps run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unique_asr.attention import PagedCache, SparseAttentionConfig, SparsityStatistics
from unique_asr.attention.cache import HEADROOM
from unique_asr.attention.huggingface import NAME, set_attention


class GreedyDecoder:
    """Decodes with a transformers causal LM, whose attention it switches to UNIQUE (the same as sdpa elsewhere).

        decoder = GreedyDecoder(model.language_model, SparseAttentionConfig(budget=512), capacity=32768)
        decoder.prefill(inputs_embeds)                       # [1, N, hidden]
        for token in decoder.tokens(max_new_tokens=4096, stop_ids={tokenizer.eos_token_id}):
            ...
        print(decoder.stop_reason, decoder.statistics)

    `capacity` is the largest number of positions, prompt and answer together; memory grows as they fill.
    `static` runs the step whose shapes never change, which is what a CUDA graph needs (the default on CUDA), and
    `capture` captures it.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        attention: SparseAttentionConfig | None = None,
        capacity: int = 32768,
        prefill_chunk: int = 2048,
        static: bool | None = None,
        capture: bool | None = None,
    ):
        self.model = language_model
        self.capacity = capacity
        self.prefill_chunk = prefill_chunk
        device = language_model.get_input_embeddings().weight.device
        self.static = device.type == "cuda" if static is None else static
        self.capture = self.static and device.type == "cuda" if capture is None else capture
        set_attention(language_model, NAME)
        self.cache = PagedCache(language_model.config, attention)
        self.log_probs: list[float] = []  # of the tokens yielded since the last prefill
        self.stop_reason: str | None = None  # of the last `tokens`: "end" (a stop id), "length" or None (closed early)

        # The step reads and writes these in place: captured addresses stay valid.
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._result = torch.zeros(2, dtype=torch.float64, device=device)  # token and log-probability: one transfer
        self._waiting = False  # a token was chosen and not looked at yet
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    @property
    def length(self) -> int:
        """Positions in the cache. The last token yielded is not among them: the next step would write it."""
        return self.cache.length

    @property
    def statistics(self) -> SparsityStatistics:
        return self.cache.statistics

    def reset(self) -> None:
        """Forget the sequence; memory, captured graphs and counters are kept."""
        self.cache.reset()

    @torch.no_grad()
    def prefill(self, inputs_embeds: Tensor, progress: Callable[[int, int], None] | None = None) -> None:
        """Append vectors [1, N, hidden] to the sequence, densely and in chunks; `progress(done, total)` counts them."""
        total = inputs_embeds.shape[1]
        needed = self.length + total
        if needed > self.capacity:
            raise ValueError(
                f"the prompt needs {needed} positions and the decoder has {self.capacity}: "
                "raise its capacity or give it shorter audio"
            )
        self._reserve(min(self.capacity, needed + HEADROOM))
        for start in range(0, total, self.prefill_chunk):
            chunk = inputs_embeds[:, start : start + self.prefill_chunk]
            positions = torch.arange(self.length, self.length + chunk.shape[1], device=chunk.device).unsqueeze(0)
            logits = self._forward(inputs_embeds=chunk, position_ids=positions)
            if progress is not None:
                progress(min(total, start + self.prefill_chunk), total)
        self._choose(logits)
        self._waiting = True
        self.log_probs = []

    def tokens(self, max_new_tokens: int, stop_ids: Collection[int] = ()) -> Iterator[int]:
        """Yield the answer token by token, without the stop id; `log_probs` grows beside it.

        The first token after a prefill needs no step. A later call goes on after the last token yielded. When the
        generator ends, `stop_reason` says why.
        """
        self.stop_reason = None
        for _ in range(max_new_tokens):
            if not self._waiting:
                if self.length == self.capacity:
                    break
                self._step()
            token, log_prob = self._result.tolist()
            self._waiting = False
            if int(token) in stop_ids:
                self.stop_reason = "end"
                return
            self.log_probs.append(log_prob)
            yield int(token)
        self.stop_reason = "length"

    def _forward(self, **inputs: Tensor) -> Tensor:
        """Logits [V] of the last position."""
        output = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]

    def _choose(self, logits: Tensor) -> None:
        """Make the arg-max the next token, on the device."""
        logits = logits.float()
        best, token = logits.max(dim=-1)
        self._token.copy_(token)
        self._result[0].copy_(token)
        self._result[1].copy_(best - logits.logsumexp(dim=-1))

    def _reserve(self, tokens: int) -> None:
        before = self.cache.capacity
        self.cache.reserve(tokens)
        if self.cache.capacity != before:
            self._graphs.clear()

    @torch.no_grad()
    def _step(self) -> None:
        """Write the chosen token to the cache and choose the next one."""
        if not self.static:
            position = self._position.fill_(self.length)
            self._choose(self._forward(input_ids=self._token, position_ids=position.unsqueeze(0)))
            return
        self._reserve(self.length + 1)
        sparse = any(layer.sparse_at(self.length + 1) for layer in self.cache.paged_layers)
        if sparse:
            self.cache.update_statistics()
        self._position.fill_(self.length)
        if not self.capture:
            self._static_step(sparse)
        else:
            if sparse not in self._graphs:
                self._graphs[sparse] = self._captured(sparse)
            self._graphs[sparse].replay()
        self.cache.advance()

    def _static_step(self, sparse: bool) -> None:
        """The step as a CUDA graph sees it: fixed shapes and addresses, nothing read on the host."""
        with self.cache.static_step(self._position, sparse):
            self._choose(self._forward(input_ids=self._token, position_ids=self._position.unsqueeze(0)))

    def _captured(self, sparse: bool) -> torch.cuda.CUDAGraph:
        """Capture the step. The warm-up run writes what the first replay writes again, but for the token chosen."""
        token = self._token.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._static_step(sparse)
        torch.cuda.current_stream().wait_stream(stream)
        self._token.copy_(token)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
            self._static_step(sparse)
        return graph
