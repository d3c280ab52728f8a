"""Greedy decoding of one long sequence: a chunked prefill of vectors, then one token a step over a paged cache.

On CUDA the step is `unique_asr.attention.DecodeStep`, captured in a CUDA graph, and the next one begins before the
token of the last is looked at, so that the device does not wait for the host. Elsewhere it runs eagerly.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unique_asr.attention import DecodeStep, PagedCache, SparseAttentionConfig, SparsityCounters
from unique_asr.attention.cache import CACHE_ARGUMENT, is_fully_paged
from unique_asr.attention.decode_step import TokenTransfer
from unique_asr.attention.huggingface import NAME, AttentionLoan, resolve_combine
from unique_asr.attention.paged_layer import HEADROOM
from unique_asr.decoding.engine import PrefillProgress, Sequence
from unique_asr.decoding.memory import measure_cache


class GreedyDecoder(Sequence):
    """A sequence alone, of a transformers causal LM whose attention it switches to UNIQUE (sdpa but for sparse steps).

        decoder = GreedyDecoder(model.language_model, SparseAttentionConfig(budget=512), capacity=32768)
        decoder.prefill(inputs_embeds)                       # [1, N, hidden]
        for token in decoder.tokens(max_new_tokens=4096, stop_ids={tokenizer.eos_token_id}):
            ...
        print(decoder.stop_reason, decoder.counters)

    Static steps begin ahead unless a layer keeps its selection, which is that of the token last yielded.

    Args:
        capacity: the largest number of positions, prompt and answer together; memory grows as they fill.
        prefill_chunk: positions of the prompt that are read at once.
        static: run the step whose shapes never change, which is what a CUDA graph needs; the default on CUDA if every
            layer has full attention.
        capture: capture it in a CUDA graph; the default on CUDA.
        compile: run it through torch.compile first.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        attention: SparseAttentionConfig | None = None,
        capacity: int = 32768,
        prefill_chunk: int = 2048,
        static: bool | None = None,
        capture: bool | None = None,
        compile: bool = False,
    ):
        self.model = language_model
        self.capacity = capacity
        self.prefill_chunk = prefill_chunk
        device = language_model.get_input_embeddings().weight.device
        paged = is_fully_paged(language_model.config)
        self.static = paged and device.type == "cuda" if static is None else static
        capture = self.static and device.type == "cuda" if capture is None else capture
        self._unique_attention = AttentionLoan(language_model, NAME)
        attention = resolve_combine(attention or SparseAttentionConfig(), language_model)
        self.cache = PagedCache(language_model.config, attention)
        self.step = DecodeStep(language_model, self.cache, capture=capture, compile=compile)
        self.log_probs: list[float] = []
        self.stop_reason: str | None = None
        self.engine_seconds: dict[str, float] = {}
        self._chosen: TokenTransfer | None = None  # a token that nobody has looked at yet

    @property
    def length(self) -> int:
        """Positions in the cache. The last token yielded is not among them unless the next step has begun."""
        return self.cache.length

    @property
    def counters(self) -> SparsityCounters:
        return self.cache.counters

    @property
    def cache_bytes(self) -> int:
        return measure_cache(self.cache)

    def reset(self) -> None:
        """Drop prompt and text; memory, captured graphs and counters are kept."""
        self.cache.reset()

    def reserve(self, tokens: int) -> None:
        """Allocate the cache for `tokens` positions at once, so that it neither grows on the way nor fails late."""
        self.capacity = max(self.capacity, tokens)
        self.step.reserve(tokens)

    @torch.no_grad()
    def prefill(self, inputs_embeds: Tensor, progress: PrefillProgress | None = None) -> None:
        """Append vectors [1, N, hidden] to the sequence, densely and in chunks; `progress(done, total)` counts them.

        Raises:
            ValueError: if they are more than the capacity.
        """
        total = inputs_embeds.shape[1]
        needed = self.length + total
        if needed > self.capacity:
            raise ValueError(
                f"the prompt needs {needed} positions and the decoder has {self.capacity}: "
                "raise its capacity or give it shorter audio"
            )
        self.step.reserve(min(self.capacity, needed + HEADROOM))
        size = math.ceil(total / math.ceil(total / self.prefill_chunk))  # equal: one token alone were a decode step
        for start in range(0, total, size):
            chunk = inputs_embeds[:, start : start + size]
            positions = torch.arange(self.length, self.length + chunk.shape[1], device=chunk.device).unsqueeze(0)
            logits = self._forward(inputs_embeds=chunk, position_ids=positions)
            if progress is not None:
                progress(min(total, start + size), total)
        self.step.choose(logits)
        self._chosen = self.step.fetch()
        self.log_probs = []

    def tokens(self, max_new_tokens: int, stop_ids: Collection[int] = ()) -> Iterator[int]:
        """Yield the answer token by token, without the stop id; `log_probs` grows beside it.

        The first token after a prefill needs no step. A later call goes on after the last token yielded. A full cache
        ends the answer as `max_new_tokens` does.
        """
        self.stop_reason = None
        ahead = self.static and not any(layer.keeps_selection for layer in self.cache.paged_layers)
        for left in range(max_new_tokens - 1, -1, -1):
            if self._chosen is None:
                if self.length == self.capacity:
                    break
                self._step()
            chosen, self._chosen, before = self._chosen, None, self.counters.copy()
            if ahead and left and self.length < self.capacity:
                self._step()
            (token,), (log_prob,) = chosen.tolist()
            token = int(token)
            if token in stop_ids:
                if self._chosen is not None:
                    self._undo_step(token, before)
                self.stop_reason = "end"
                return
            self.log_probs.append(log_prob)
            yield token
        self.stop_reason = "length"

    def _forward(self, **inputs: Tensor) -> Tensor:
        """Logits [1, V] of the last position."""
        with self._unique_attention:
            output = self.model(**inputs, **{CACHE_ARGUMENT: self.cache}, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    @torch.no_grad()
    def _step(self) -> None:
        """Write the chosen token to the cache and choose the next one."""
        if self.static:
            with self._unique_attention:
                self.step.run()
        else:
            position = self.step.position.fill_(self.length)
            self.step.choose(self._forward(input_ids=self.step.token, position_ids=position.unsqueeze(0)))
        self._chosen = self.step.fetch()

    def _undo_step(self, token: int, counters: SparsityCounters) -> None:
        """Take back the step that wrote a token too many to the cache."""
        for layer in self.cache.paged_layers:
            layer.crop(-1)
        self.step.token.fill_(token)
        vars(self.counters).update(vars(counters))
        self._chosen = None
