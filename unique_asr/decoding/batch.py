"""Recordings side by side: one decode step writes a token for each of them.

Every recording keeps its own transcription with its own passes, and asks a `Row` for tokens as it would ask a
`GreedyDecoder`. While its token is not there yet, it is set aside. Once all wait, the batch makes a step. Where a pass
has ended, the next one takes its place in the cache while the others go on: its prompt is read beside them and ends
where they are. A static step begins before the tokens of the one before it are looked at, so that the device works
while the rows place their words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unique_asr.attention import DecodeStep, PagedCache, SparseAttentionConfig, SparsityCounters
from unique_asr.attention.cache import is_fully_paged
from unique_asr.attention.decode_step import TokenTransfer
from unique_asr.attention.huggingface import NAME, resolve_combine, set_attention
from unique_asr.attention.paged_layer import HEADROOM
from unique_asr.decoding.memory import decoding_memory, free_memory, held, shape_of
from unique_asr.longform.passes import PENDING

PATIENCE = 4  # captured steps are held up to read prompts once one row waits for so many that run
THIN, THIN_CAPTURED = 2, 8  # see `BatchDecoder`; a capture takes as long as many steps


class Row:
    """The decoder of one recording in a batch; see `unique_asr.longform.passes.Decoder`."""

    def __init__(self, batch: BatchDecoder) -> None:
        self.batch = batch
        self.log_probs: list[float] = []
        self.counters = SparsityCounters()  # its share of the batch's
        self.seconds = {"prefill": 0.0, "decode": 0.0}  # its share of the time
        self.embeds: Tensor | None = None  # [1, N, hidden], a prompt that waits for its prefill
        self.prompt = self.length = 0  # tokens of the prompt in the cache, and of all that is there
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

    def begin(self) -> None:
        """Its prompt is in the cache."""
        self.prompt = self.length = self.embeds.shape[1]
        self.embeds, self.running = None, True

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
    def counters(self) -> SparsityCounters:
        counted = SparsityCounters()
        for row in self:
            counted.add(row.counters)
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

    Rows that would not fit into the free memory beside the others wait; `notice` says so. With models whose layers are
    not all paged, no pass begins before all that are under way have ended.

    `static` and `prefill_chunk` as for `GreedyDecoder`.
    thin: the batch gets narrower, and on CUDA is captured anew, once it has as many places for each row in use.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        attention: SparseAttentionConfig | None = None,
        prefill_chunk: int = 2048,
        static: bool | None = None,
        thin: int | None = None,
    ) -> None:
        self.model, self.prefill_chunk = language_model, prefill_chunk
        self.attention = resolve_combine(attention or SparseAttentionConfig(), language_model)
        self.device = language_model.get_input_embeddings().weight.device
        self._paged = is_fully_paged(language_model.config)
        self.static = self._paged and self.device.type == "cuda" if static is None else static
        set_attention(language_model, NAME)
        self.rows: list[Row] = []
        self._places: list[Row | None] = []  # the row of each place in the cache, if it has one
        self._starts: list[int] = []  # slots of padding on the left of each place
        self._made: DecodeStep | None = None  # for as many places
        self._ahead: TokenTransfer | None = None  # a step that nobody has looked at yet
        self._shape = shape_of(language_model)
        self._unit = math.lcm(2, *self.attention.level_sizes)  # slots by which all rows may be moved
        self._thin = thin or (THIN_CAPTURED if self.static else THIN)
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
        """Give every row that runs its next token, and begin with those that wait, as far as memory has room for them.

        After an error the cache is gone, and with it all that was under way.
        """
        try:
            self._step()
        except BaseException:
            self._places, self._made, self._ahead = [], None, None
            raise

    @torch.no_grad()
    def _step(self) -> None:
        begin = time.perf_counter()
        running = {place: row for place, row in enumerate(self._places) if row is not None and row.running}
        waiting = [row for row in self.rows if row.embeds is not None]
        if not running:
            fitting = self._fitting(waiting)
            chosen = self._begin(fitting).tolist()
            self._give(fitting, chosen, "prefill", time.perf_counter() - begin)
            return
        chosen, joined, reading = self._ahead or self._decode(), None, 0.0
        joining = self._joining(running, waiting)
        if joining:
            joined = self._join(running, joining)
            reading = time.perf_counter() - begin
        elif self._paged and len(running) * self._thin <= len(self._places):
            self._resize(running, 0)
        self._ahead = self._decode() if self.static else None
        if joined is not None:
            self._give(joining, joined.tolist(), "prefill", reading)
        for row in running.values():
            row.length += 1
            row.counters.add(self._made.cache.count_reads(row.length, row.prompt))
        of_places = chosen.tolist()  # of those before any row joined
        chosen = [[values[place] for place in running] for values in of_places]
        self._give(running.values(), chosen, "decode", time.perf_counter() - begin - reading)

    def _give(self, rows: Collection[Row], chosen: list[list[float]], stage: str, seconds: float) -> None:
        """Each row its token and log-probability, and its share of the seconds."""
        for row, token, log_prob in zip(rows, *chosen, strict=True):
            row.next = int(token), log_prob
            row.seconds[stage] += seconds / len(rows)

    def _fitting(self, rows: list[Row]) -> list[Row]:
        """As many of the first rows as memory has room for, one at least: a recording checks that it fits alone."""
        free = self._free()
        if free is None:
            return rows
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

    def _joining(self, running: dict[int, Row], waiting: list[Row]) -> list[Row]:
        """Those that may begin beside the rows that run, by their places."""
        if not waiting or not self._paged or (self.static and len(waiting) * PATIENCE < len(running)):
            return []
        free, count = self._free(), len(waiting)
        while free is not None and count and self._memory_beside(running, waiting[:count]) > free:
            count -= 1
        return waiting[:count]

    def _free(self) -> int | None:
        """Bytes, those of the cache included; None where the system does not tell."""
        free = free_memory(self.device)
        return None if free is None else free + self.held

    def _memory(self, rows: list[Row]) -> int:
        """Bytes that these rows may take alone."""
        prompt = longest_prompt(rows)
        return self._bytes(rows, len(rows), prompt + max(HEADROOM, *(row.max_new_tokens for row in rows)))

    def _memory_beside(self, running: dict[int, Row], joining: list[Row]) -> int:
        """Bytes that all of them may take, with the cache in which the prompts are read."""
        rows = [*running.values(), *joining]
        length = self._made.cache.length + self._shift(running, joining)
        tokens = max(self._made.cache.capacity, length + max(row.max_new_tokens for row in rows))
        return self._bytes(joining, max(len(self._places), len(rows)) + len(joining), tokens)

    def _bytes(self, prompts: list[Row], places: int, tokens: int) -> int:
        prompt = longest_prompt(prompts)
        how = self.attention, prompts[0].embeds.dtype, self.prefill_chunk, places, self.device.type
        return decoding_memory(self._shape, prompt, tokens, prompt, *how).pass_bytes

    def _begin(self, rows: list[Row]) -> TokenTransfer:
        """Rows that have the cache to themselves."""
        longest = longest_prompt(rows)
        self._places, self._starts, self._ahead = list(rows), [longest - row.embeds.shape[1] for row in rows], None
        if self._made is None or len(self._made.token) != len(rows):
            cache = PagedCache(self.model.config, self.attention)
            self._made = DecodeStep(self.model, cache, batch=len(rows), starts=self._tensor(self._starts))
        made = self._made
        made.starts.copy_(self._tensor(self._starts))  # captured steps read it there
        made.cache.reset()
        made.reserve(longest + HEADROOM)
        made.choose(self._read(rows, made.cache, made.starts, longest))
        return made.fetch()

    def _join(self, running: dict[int, Row], rows: list[Row]) -> TokenTransfer:
        """Read the prompts of rows beside those that run, so that they end where these are."""
        by = self._shift(running, rows)
        free = self._resize(running, len(rows))
        made = self._made
        made.reserve(made.cache.length + by)
        made.cache.shift(by)
        length = made.cache.length
        # Pages of the prompts are pages there.
        longest = longest_prompt(rows)
        longest += (length - longest) % self._unit
        starts = self._tensor([longest - row.embeds.shape[1] for row in rows])
        self._starts = [max(0, start + by) for start in self._starts]
        for place, row in zip(free, rows, strict=True):
            self._places[place], self._starts[place] = row, length - row.embeds.shape[1]
        made.starts.copy_(self._tensor(self._starts))
        cache, places = PagedCache(self.model.config, self.attention, capacity=longest), self._tensor(free)
        logits = self._read(rows, cache, starts, longest)
        made.cache.copy_rows(places, cache, starts)
        return TokenTransfer(made.choose_for(places, logits))

    def _shift(self, running: Iterable[int], joining: list[Row]) -> int:
        """Slots by which the cache moves to the right, so that the prompts fit, or to the left, where nobody is."""
        length, unit = self._made.cache.length, self._unit
        longest = longest_prompt(joining)
        longest += (length - longest) % unit
        empty = min(self._starts[place] for place in running) // unit * unit
        return max(longest - length, -empty if 4 * empty >= length else 0)

    def _resize(self, running: dict[int, Row], count: int) -> list[int]:
        """Places for `count` rows beside those that run, in a wider batch if need be, or a narrower one (`thin`)."""
        width = len(running) + count
        if len(self._places) < width * self._thin and width <= len(self._places):
            free = [place for place in range(len(self._places)) if place not in running]
            for place in free:
                self._places[place] = None
            return free[:count]
        kept = list(running)
        kept += kept[:1] * count  # what is there will be written over
        made, indices = self._made, self._tensor(kept)
        made.cache.batch_select_indices(indices)
        self._starts = [self._starts[place] for place in kept]
        self._places = [*running.values(), *[None] * count]
        self._made = DecodeStep(self.model, made.cache, batch=width, starts=self._tensor(self._starts))
        self._made.token.copy_(made.token[indices])
        return list(range(width - count, width))

    def _read(self, rows: list[Row], cache: PagedCache, starts: Tensor, length: int) -> Tensor:
        """Prefill the prompts densely and in chunks, padded on the left to `length`: the last logits [rows, V]."""
        embeds = rows[0].embeds.new_zeros(len(rows), length, rows[0].embeds.shape[-1])
        for row, padded in zip(rows, embeds, strict=True):
            padded[length - row.embeds.shape[1] :] = row.embeds[0]
        size = math.ceil(length / math.ceil(length / self.prefill_chunk))  # equal: one token were a decode step
        for start in range(0, length, size):
            logits = self._forward(cache, starts, start, inputs_embeds=embeds[:, start : start + size])
            for row in rows:
                if row.progress is not None:
                    row.progress(min(length, start + size), length)
        for row in rows:
            row.begin()
        return logits

    def _decode(self) -> TokenTransfer:
        made = self._made
        if self.static:
            made.run()
        else:
            made.choose(self._forward(made.cache, made.starts, made.cache.length, input_ids=made.token))
        return made.fetch()

    def _forward(self, cache: PagedCache, starts: Tensor, start: int, **inputs: Tensor) -> Tensor:
        """Logits [B, V] of the last of the positions that begin at `start`."""
        end = start + next(iter(inputs.values())).shape[1]
        place = torch.arange(end, device=self.device) - starts[:, None]  # [B, end]
        output = self.model(
            **inputs,
            attention_mask=(place >= 0).long(),
            position_ids=place[:, start:].clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)


def longest_prompt(rows: Iterable[Row]) -> int:
    """Tokens."""
    return max(row.embeds.shape[1] for row in rows)
