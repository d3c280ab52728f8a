"""Recordings side by side: one decode step writes a token for each of them.

Every recording keeps its own transcription with its own passes, and asks a `Row` for tokens as it would ask a
`GreedyDecoder`. While its token is not there yet, it is set aside. Once all wait, the batch makes a step: for the
passes that are in it, until the last of them has ended, then for those that wait to begin. A static step begins before
the tokens of the one before it are looked at, so that the device works while the rows place their words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import DecodeStep, PagedCache, SparseAttentionConfig, SparsityStatistics
from .attention.cache import HEADROOM, pages_every_layer
from .attention.decode_step import Chosen
from .attention.huggingface import NAME, set_attention, settled
from .longform import PENDING
from .memory import decoding_memory, free_memory, held, shape_of


class Row:
    """The decoder of one recording in a batch; see `unique_asr.longform.Decoder`."""

    def __init__(self, batch: BatchDecoder) -> None:
        self.batch = batch
        self.log_probs: list[float] = []
        self.statistics = SparsityStatistics()  # its share of the batch's
        self.seconds = {"prefill": 0.0, "decode": 0.0}  # its share of the time
        self.embeds: Tensor | None = None  # [1, N, hidden], a prompt that waits for its prefill
        self.max_new_tokens = 0  # of its answer
        self.progress: Callable[[int, int], None] | None = None
        self.running = False
        self.stop_reason: str | None = None  # of the last `tokens`, as of `GreedyDecoder`
        self.next: tuple[int, float] | None = None  # token and log-probability that nobody took yet

    @property
    def held(self) -> int:
        """Bytes of the batch's cache, whose place the next one takes."""
        return self.batch.held

    def reset(self) -> None:
        self.running, self.next, self.embeds = False, None, None

    def prefill(self, inputs_embeds: Tensor, progress: Callable[[int, int], None] | None = None) -> None:
        self.embeds, self.progress, self.log_probs = inputs_embeds, progress, []

    def tokens(self, max_new_tokens: int, stop_ids: Collection[int] = ()) -> Iterator[int]:
        """As `GreedyDecoder.tokens`, with PENDING where the batch has to make a step first."""
        self.stop_reason, self.max_new_tokens = None, max_new_tokens
        for _ in range(max_new_tokens):
            while self.next is None:
                yield PENDING
            (token, log_prob), self.next = self.next, None
            if token in stop_ids:
                self.stop_reason = "end"
                break
            self.log_probs.append(log_prob)
            yield token
        self.stop_reason = self.stop_reason or "length"
        self.running = False


class Rows(list[Row]):
    """The decoders of several passes over one recording."""

    @property
    def statistics(self) -> SparsityStatistics:
        counted = SparsityStatistics()
        for row in self:
            counted.add(row.statistics)
        return counted

    @property
    def seconds(self) -> dict[str, float]:
        return {stage: sum(row.seconds[stage] for row in self) for stage in ("prefill", "decode")}

    def step(self) -> None:
        self[0].batch.step()


class BatchDecoder:
    """Greedy decoding of several rows over one paged cache, padded on the left.

        rows = BatchDecoder(model.language_model, SparseAttentionConfig(budget=512))
        first, second = rows.row(), rows.row()
        ...                                   # prefill each, and ask them for tokens until they are PENDING
        rows.step()

    Rows that would not fit into the free memory beside the others wait; `notice` says so.

    `static` and `prefill_chunk` as for `GreedyDecoder`.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        attention: SparseAttentionConfig | None = None,
        prefill_chunk: int = 2048,
        static: bool | None = None,
    ) -> None:
        self.model, self.prefill_chunk = language_model, prefill_chunk
        self.attention = settled(attention or SparseAttentionConfig(), language_model)
        self.device = language_model.get_input_embeddings().weight.device
        paged = pages_every_layer(language_model.config)
        self.static = paged and self.device.type == "cuda" if static is None else static
        set_attention(language_model, NAME)
        self.statistics = SparsityStatistics()
        self.rows: list[Row] = []
        self._wave: list[Row] = []  # the rows whose passes are in the cache, in its order
        self._made: DecodeStep | None = None  # for as many rows as the last wave had
        self._ahead: tuple[Chosen, SparsityStatistics] | None = None  # a step that nobody has looked at yet
        self._shape = shape_of(language_model)
        self._limit: int | None = None  # rows, the last time that memory had no room for all
        self.notice = ""  # one line about it

    def row(self) -> Row:
        self.rows.append(Row(self))
        return self.rows[-1]

    @contextmanager
    def rows_of(self, count: int) -> Iterator[Rows]:
        """Rows for the passes over one recording, until they are left."""
        rows = Rows(self.row() for _ in range(count))
        try:
            yield rows
        finally:
            for row in rows:
                self.remove(row)

    def remove(self, row: Row) -> None:
        row.reset()
        self.rows.remove(row)

    @property
    def held(self) -> int:
        """Bytes of the cache."""
        return held(self._made.cache) if self._made is not None else 0

    def step(self) -> None:
        """Give every row in the wave its next token, or begin a wave with those that wait, if memory has room for all.

        After an error the cache is gone, and with it the wave.
        """
        try:
            self._step()
        except BaseException:
            self._wave, self._made, self._ahead = [], None, None
            raise

    @torch.no_grad()
    def _step(self) -> None:
        begin = time.perf_counter()
        active = [row for row in self._wave if row.running]
        stage = "decode" if active else "prefill"
        if active:
            chosen, counted = self._ahead or self._begin(self._decode)
        else:
            self._wave = active = self._fitting([row for row in self.rows if row.embeds is not None])
            chosen, counted = self._begin(partial(self._prefill, [row.embeds[0] for row in active]))
            for row in active:
                row.embeds, row.running = None, True
        self._ahead = self._begin(self._decode) if self.static and stage == "decode" else None
        tokens, log_probs = chosen.tolist()
        for row, token, log_prob in zip(self._wave, tokens, log_probs, strict=True):
            if row.running:
                row.next = int(token), log_prob
                row.seconds[stage] += (time.perf_counter() - begin) / len(active)
                self._count(row.statistics, counted)

    def _begin(self, work: Callable[[], None]) -> tuple[Chosen, SparsityStatistics]:
        """What `work` chooses, and what it counted."""
        before = self.statistics.copy()
        work()
        return self._made.chosen(), self.statistics.since(before)

    def _fitting(self, rows: list[Row]) -> list[Row]:
        """As many of the first rows as memory has room for, one at least: a recording checks that it fits alone."""
        free = free_memory(self.device)
        if free is None:
            return rows
        free += self.held
        count = len(rows)
        while count > 1 and self._memory(rows[:count]) > free:
            count -= 1
        if count < len(rows) and count != self._limit:
            self._limit = count
            self.notice = (
                f"{len(rows)} recordings side by side need {self._memory(rows) / 1e9:.1f} GB and "
                f"{free / 1e9:.1f} GB are free on {self.device}: {count} at a time"
            )
        return rows[:count]

    def _memory(self, rows: list[Row]) -> int:
        """Bytes that a wave of these rows may take."""
        prompt = max(row.embeds.shape[1] for row in rows)
        tokens = prompt + max(HEADROOM, *(row.max_new_tokens for row in rows))
        dtype = rows[0].embeds.dtype
        how = self.attention, dtype, self.prefill_chunk, len(rows), self.device.type
        return decoding_memory(self._shape, prompt, tokens, prompt, *how).pass_bytes

    def _prefill(self, prompts: list[Tensor]) -> None:
        """Vectors [N_i, hidden] of every row, padded to the longest, densely and in chunks."""
        longest = max(map(len, prompts))
        self._starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        if self._made is None or len(self._made.token) != len(prompts):
            cache = PagedCache(self.model.config, self.attention, statistics=self.statistics)
            self._made = DecodeStep(self.model, cache, batch=len(prompts), starts=self._starts.clone())
        self._made.starts.copy_(self._starts)  # captured steps read it there
        cache = self._made.cache
        cache.reset()
        self._made.reserve(longest + HEADROOM)
        embeds = prompts[0].new_zeros(len(prompts), longest, prompts[0].shape[-1])
        for row, prompt in zip(embeds, prompts, strict=True):
            row[longest - len(prompt) :] = prompt
        size = math.ceil(longest / math.ceil(longest / self.prefill_chunk))  # equal: one token were a decode step
        for start in range(0, longest, size):
            logits = self._forward(start, inputs_embeds=embeds[:, start : start + size])
            for row in self._wave:
                if row.progress is not None:
                    row.progress(min(longest, start + size), longest)
        self._made.choose(logits)

    def _decode(self) -> None:
        if self.static:
            self._made.run()
        else:
            self._made.choose(self._forward(self._made.cache.length, input_ids=self._made.token))

    def _forward(self, start: int, **inputs: Tensor) -> Tensor:
        """Logits [B, V] of the last of the positions that begin at `start`."""
        end = start + next(iter(inputs.values())).shape[1]
        place = torch.arange(end, device=self.device) - self._starts[:, None]  # [B, end]
        output = self.model(
            **inputs,
            attention_mask=(place >= 0).long(),
            position_ids=place[:, start:].clamp(min=0),
            past_key_values=self._made.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _count(self, counters: SparsityStatistics, counted: SparsityStatistics) -> None:
        """Add a row's share of what a step of the batch has counted; its padding counts as read."""
        for name, value in vars(counted).items():
            share = value if name in ("steps", "sparse_steps") else value // len(self._wave)
            setattr(counters, name, getattr(counters, name) + share)
