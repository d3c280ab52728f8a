"""Sequences side by side: one decode step writes a token for each of them.

Every recording, or pass over one, asks a `BatchSequence` for tokens as it would ask a `GreedyDecoder`. While its token
is not there yet, it is set aside. Once all are pending, the engine makes a step. Where a text has ended, the next one
takes its place in the cache while the others go on: its prompt is read beside them and ends where they are. A static
step begins before the tokens of the one before it are looked at, so that the device works while the host places words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unique_asr.attention import DecodeStep, PagedCache, SparseAttentionConfig, SparsityCounters
from unique_asr.attention.cache import CACHE_ARGUMENT, is_fully_paged
from unique_asr.attention.decode_step import TokenTransfer
from unique_asr.attention.huggingface import NAME, AttentionLoan, resolve_combine
from unique_asr.attention.paged_layer import HEADROOM
from unique_asr.decoding.engine import PENDING, Engine, Pending, PrefillProgress, Sequence
from unique_asr.decoding.memory import estimate_memory, measure_cache, measure_free_memory, read_shape

RUNNING_PER_WAITING = 4  # captured steps are held up to read prompts once one sequence waits for so many that run
SPARE_PLACES = 2  # the batch gets narrower once it has so many places for each sequence that runs;
SPARE_PLACES_CAPTURED = 8  # more where it is captured anew then, which takes as long as many steps


class BatchSequence(Sequence):
    """One sequence of a `BatchEngine`; `next`, `start` and what says where it is in the cache are the engine's."""

    def __init__(self, engine: BatchEngine) -> None:
        self.engine = engine
        self.log_probs: list[float] = []
        self.stop_reason: str | None = None
        self.counters = SparsityCounters()
        self.engine_seconds = {"prefill": 0.0, "decode": 0.0}
        self.embeds: Tensor | None = None  # [1, N, hidden], a prompt that waits for its prefill
        self.prompt = self.length = 0  # tokens of the prompt in the cache, and of all that is there
        self.max_new_tokens = 0
        self.progress: PrefillProgress | None = None
        self.running = False  # whether each step of the engine writes a token of it
        self.next: tuple[int, float] | None = None  # token and log-probability that nobody took yet

    @property
    def cache_bytes(self) -> int:
        return self.engine.cache_bytes

    def reset(self) -> None:
        self.running, self.next, self.embeds = False, None, None

    def reserve(self, tokens: int) -> None:
        """Do nothing: the engine makes room when it reads the prompt."""

    def prefill(self, inputs_embeds: Tensor, progress: PrefillProgress | None = None) -> None:
        """Hand in a prompt [1, N, hidden], which one of the engine's next steps reads."""
        self.embeds, self.progress, self.log_probs = inputs_embeds, progress, []

    def start(self) -> None:
        """Note that the prompt is in the cache (for the engine)."""
        self.prompt = self.length = self.embeds.shape[1]
        self.embeds, self.running = None, True

    def tokens(self, max_new_tokens: int, stop_ids: Collection[int] = ()) -> Iterator[int | Pending]:
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


class BatchEngine(Engine):
    """Greedy decoding of several sequences over one paged cache, padded on the left.

        engine = BatchEngine(model.language_model, SparseAttentionConfig(budget=512))
        first, second = engine.new_sequence(), engine.new_sequence()
        ...                                   # prefill each, and ask them for tokens until they are PENDING
        engine.step()

    Sequences that would not fit into the free memory beside the others wait; `notice` says so. With models whose layers
    are not all paged, no text begins before all that are under way have ended.

    Args:
        static, prefill_chunk: as for `GreedyDecoder`.
        spare_places: the batch gets narrower, and on CUDA is captured anew, once it has as many places for each
            sequence that runs.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        attention: SparseAttentionConfig | None = None,
        prefill_chunk: int = 2048,
        static: bool | None = None,
        spare_places: int | None = None,
    ) -> None:
        self.model, self.prefill_chunk = language_model, prefill_chunk
        self.attention = resolve_combine(attention or SparseAttentionConfig(), language_model)
        self.device = language_model.get_input_embeddings().weight.device
        self._paged = is_fully_paged(language_model.config)
        self.static = self._paged and self.device.type == "cuda" if static is None else static
        self._unique_attention = AttentionLoan(language_model, NAME)
        self.sequences: list[BatchSequence] = []
        self._places: list[BatchSequence | None] = []  # the sequence in each row of the cache; None: it is free
        self._starts: list[int] = []  # slots of padding on the left of each place
        self._decode_step: DecodeStep | None = None  # for as many places, with the cache
        self._ahead: TokenTransfer | None = None  # a step that nobody has looked at yet
        self._shape = read_shape(language_model)
        self._unit = math.lcm(2, *self.attention.level_sizes)  # slots by which all rows may be moved
        self._spare_places = spare_places or (SPARE_PLACES_CAPTURED if self.static else SPARE_PLACES)
        self._limit: int | None = None  # sequences, the last time that memory had no room for all
        self.notice = ""

    def new_sequence(self) -> BatchSequence:
        self.sequences.append(BatchSequence(self))
        return self.sequences[-1]

    def remove(self, sequence: BatchSequence) -> None:
        sequence.reset()
        self.sequences.remove(sequence)

    @property
    def cache_bytes(self) -> int:
        return measure_cache(self._decode_step.cache) if self._decode_step is not None else 0

    def step(self) -> None:
        """Write a token of every sequence that runs, and begin those that wait as far as memory has room for them.

        After an error the cache is gone, and with it all that was under way.
        """
        try:
            self._step()
        except BaseException:
            self._places, self._decode_step, self._ahead = [], None, None
            raise

    @torch.no_grad()
    def _step(self) -> None:
        begin = time.perf_counter()
        running = {place: each for place, each in enumerate(self._places) if each is not None and each.running}
        waiting = [sequence for sequence in self.sequences if sequence.embeds is not None]
        if not running:
            fitting = self._fit_alone(waiting)
            chosen = self._begin(fitting).tolist()
            self._hand_out(fitting, chosen, "prefill", time.perf_counter() - begin)
            return
        chosen, joined, reading = self._ahead or self._decode(), None, 0.0
        joining = self._fit_beside(running, waiting)
        if joining:
            joined = self._join(running, joining)
            reading = time.perf_counter() - begin
        elif self._paged and len(running) * self._spare_places <= len(self._places):
            self._resize(running, 0)
        self._ahead = self._decode() if self.static else None
        if joined is not None:
            self._hand_out(joining, joined.tolist(), "prefill", reading)
        for sequence in running.values():
            sequence.length += 1
            sequence.counters.add(self._decode_step.cache.count_reads(sequence.length, sequence.prompt))
        of_places = chosen.tolist()  # of the places as they were before any sequence joined
        chosen = [[values[place] for place in running] for values in of_places]
        self._hand_out(running.values(), chosen, "decode", time.perf_counter() - begin - reading)

    def _hand_out(
        self, sequences: Collection[BatchSequence], chosen: list[list[float]], stage: str, seconds: float
    ) -> None:
        """Give each sequence its token and log-probability, and its share of the seconds."""
        for sequence, token, log_prob in zip(sequences, *chosen, strict=True):
            sequence.next = int(token), log_prob
            sequence.engine_seconds[stage] += seconds / len(sequences)

    def _fit_alone(self, waiting: list[BatchSequence]) -> list[BatchSequence]:
        """As many of the first that wait as memory has room for; at least one, whose recording checks that it fits."""
        free = self._free_bytes()
        if free is None:
            return waiting
        count = len(waiting)
        while count > 1 and self._bytes_alone(waiting[:count]) > free:
            count -= 1
        if count < len(waiting) and count != self._limit:
            self._limit = count
            self.notice = (
                f"{len(waiting)} recordings side by side need {self._bytes_alone(waiting) / 1e9:.1f} GB and "
                f"{free / 1e9:.1f} GB are free on {self.device}: {count} at a time"
            )
        return waiting[:count]

    def _fit_beside(self, running: dict[int, BatchSequence], waiting: list[BatchSequence]) -> list[BatchSequence]:
        """Those that may begin now beside the sequences that run, which are given by their places."""
        few = self.static and len(waiting) * RUNNING_PER_WAITING < len(running)
        if not waiting or not self._paged or few:
            return []
        free, count = self._free_bytes(), len(waiting)
        while free is not None and count and self._bytes_beside(running, waiting[:count]) > free:
            count -= 1
        return waiting[:count]

    def _free_bytes(self) -> int | None:
        """Free memory with that of the cache; None where the system does not tell."""
        free = measure_free_memory(self.device)
        return None if free is None else free + self.cache_bytes

    def _bytes_alone(self, sequences: list[BatchSequence]) -> int:
        """What these sequences may take with the cache to themselves."""
        prompt = count_longest_prompt(sequences)
        most = max(HEADROOM, *(sequence.max_new_tokens for sequence in sequences))
        return self._estimate_bytes(sequences, len(sequences), prompt + most)

    def _bytes_beside(self, running: dict[int, BatchSequence], joining: list[BatchSequence]) -> int:
        """What all of them may take, with the second cache into which the new prompts are read."""
        sequences = [*running.values(), *joining]
        cache = self._decode_step.cache
        length = cache.length + self._shift(running, joining)
        tokens = max(cache.capacity, length + max(sequence.max_new_tokens for sequence in sequences))
        return self._estimate_bytes(joining, max(len(self._places), len(sequences)) + len(joining), tokens)

    def _estimate_bytes(self, prompts: list[BatchSequence], places: int, tokens: int) -> int:
        prompt = count_longest_prompt(prompts)
        how = self.attention, prompts[0].embeds.dtype, self.prefill_chunk, places, self.device.type
        return estimate_memory(self._shape, prompt, tokens, prompt, *how).pass_bytes

    def _begin(self, sequences: list[BatchSequence]) -> TokenTransfer:
        """Read the prompts of sequences that have the cache to themselves."""
        longest = count_longest_prompt(sequences)
        self._places, self._ahead = list(sequences), None
        self._starts = [longest - sequence.embeds.shape[1] for sequence in sequences]
        if self._decode_step is None or len(self._decode_step.token) != len(sequences):
            cache = PagedCache(self.model.config, self.attention)
            starts = self._tensor(self._starts)
            self._decode_step = DecodeStep(self.model, cache, batch=len(sequences), starts=starts)
        step = self._decode_step
        step.starts.copy_(self._tensor(self._starts))  # captured steps read it there
        step.cache.reset()
        step.reserve(longest + HEADROOM)
        step.choose(self._read(sequences, step.cache, step.starts, longest))
        return step.fetch()

    def _join(self, running: dict[int, BatchSequence], joining: list[BatchSequence]) -> TokenTransfer:
        """Read new prompts beside the sequences that run, so that they end where these are."""
        by = self._shift(running, joining)
        free = self._resize(running, len(joining))
        step = self._decode_step
        step.reserve(step.cache.length + by)
        step.cache.shift(by)
        length = step.cache.length
        # The pages of the new cache have to be pages of the old one.
        longest = count_longest_prompt(joining)
        longest += (length - longest) % self._unit
        starts = self._tensor([longest - sequence.embeds.shape[1] for sequence in joining])
        self._starts = [max(0, start + by) for start in self._starts]
        for place, sequence in zip(free, joining, strict=True):
            self._places[place], self._starts[place] = sequence, length - sequence.embeds.shape[1]
        step.starts.copy_(self._tensor(self._starts))
        cache, places = PagedCache(self.model.config, self.attention, capacity=longest), self._tensor(free)
        logits = self._read(joining, cache, starts, longest)
        step.cache.copy_rows(places, cache, starts)
        return TokenTransfer(step.choose_for(places, logits))

    def _shift(self, running: Iterable[int], joining: list[BatchSequence]) -> int:
        """Slots by which the cache moves to the right, so that the prompts fit, or to the left, where all is empty."""
        length, unit = self._decode_step.cache.length, self._unit
        longest = count_longest_prompt(joining)
        longest += (length - longest) % unit
        empty = min(self._starts[place] for place in running) // unit * unit
        return max(longest - length, -empty if 4 * empty >= length else 0)

    def _resize(self, running: dict[int, BatchSequence], count: int) -> list[int]:
        """Return free places for `count` sequences beside those that run, in a wider or narrower batch if need be."""
        width = len(running) + count
        if len(self._places) < width * self._spare_places and width <= len(self._places):
            free = [place for place in range(len(self._places)) if place not in running]
            for place in free:
                self._places[place] = None
            return free[:count]
        kept = list(running)
        kept += kept[:1] * count  # what is there will be written over
        former, indices = self._decode_step, self._tensor(kept)
        former.cache.batch_select_indices(indices)
        self._starts = [self._starts[place] for place in kept]
        self._places = [*running.values(), *[None] * count]
        self._decode_step = DecodeStep(self.model, former.cache, batch=width, starts=self._tensor(self._starts))
        self._decode_step.token.copy_(former.token[indices])
        return list(range(width - count, width))

    def _read(self, sequences: list[BatchSequence], cache: PagedCache, starts: Tensor, length: int) -> Tensor:
        """Prefill prompts densely and in chunks, padded on the left to `length`; return the last logits [B, V]."""
        first = sequences[0].embeds
        embeds = first.new_zeros(len(sequences), length, first.shape[-1])
        for sequence, padded in zip(sequences, embeds, strict=True):
            padded[length - sequence.embeds.shape[1] :] = sequence.embeds[0]
        size = math.ceil(length / math.ceil(length / self.prefill_chunk))  # equal: one token would be a decode step
        for start in range(0, length, size):
            logits = self._forward(cache, starts, start, inputs_embeds=embeds[:, start : start + size])
            for sequence in sequences:
                if sequence.progress is not None:
                    sequence.progress(min(length, start + size), length)
        for sequence in sequences:
            sequence.start()
        return logits

    def _decode(self) -> TokenTransfer:
        step = self._decode_step
        if self.static:
            with self._unique_attention:
                step.run()
        else:
            step.choose(self._forward(step.cache, step.starts, step.cache.length, input_ids=step.token))
        return step.fetch()

    def _forward(self, cache: PagedCache, starts: Tensor, start: int, **inputs: Tensor) -> Tensor:
        """Logits [B, V] of the last of the positions that begin at `start`."""
        end = start + next(iter(inputs.values())).shape[1]
        position = torch.arange(end, device=self.device) - starts[:, None]  # [B, end]
        with self._unique_attention:
            output = self.model(
                **inputs,
                attention_mask=(position >= 0).long(),
                position_ids=position[:, start:].clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_ARGUMENT: cache},
            )
        return output.logits[:, -1]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)


def count_longest_prompt(sequences: Iterable[BatchSequence]) -> int:
    """Return the tokens of the longest prompt that waits."""
    return max(sequence.embeds.shape[1] for sequence in sequences)
