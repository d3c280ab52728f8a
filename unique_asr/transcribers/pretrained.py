"""Recordings of any length with a pretrained speech LLM: passes as long as the model knows, one by one or side by side.

`longform/timestamped.py` says what a pass hears and what becomes of its answer; here it is encoded and decoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unique_asr.attention import SparseAttentionConfig, SparsityCounters
from unique_asr.audio import AudioFile, spool_samples
from unique_asr.decoding.batch import BatchEngine
from unique_asr.decoding.engine import PENDING, Pending, Sequence
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.decoding.memory import measure_free_memory, read_shape
from unique_asr.generation import stop_ids
from unique_asr.longform.configuration import TimestampedConfig
from unique_asr.longform.page_reads import PageReads
from unique_asr.longform.timestamped import PassRequest, TimestampedRecording
from unique_asr.models.languages import resolve_hotwords, resolve_language
from unique_asr.models.pretrained import find, load
from unique_asr.models.pretrained.pass_memory import estimate_pass_memory, limit_text_tokens
from unique_asr.models.pretrained.prompting import embed_prompt
from unique_asr.transcribers.base import Audio, AudioPart, PipelineError, Samples, Transcriber, open_audio
from unique_asr.transcript import Progress, Segment, TranscriptionInfo, Unfinished


class PretrainedTranscriber(Transcriber):
    """A known speech LLM of transformers (`unique_asr.models.pretrained`) with its settings.

    Args:
        model: a folder, a hub id, or a (model, processor) pair.
        attention, budget, device, dtype, progress, max_pass_seconds, prefill_chunk: see `Transcriber`; by default a
            pass is as long as the model's authors say.
        passes: finer settings.
    """

    def __init__(
        self,
        model: str | PathLike[str] | tuple[Any, Any],
        *,
        attention: str | SparseAttentionConfig = "unique",
        budget: int | None = 512,
        device: str = "auto",
        dtype: str = "auto",
        max_pass_seconds: float | None = None,
        prefill_chunk: int = 2048,
        passes: TimestampedConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        known_model = find(model)
        if known_model is None:
            raise PipelineError(f"model={model}: is no known speech LLM; see conf/model/")
        self.known_model, self.languages, self.passes = (
            known_model,
            known_model.languages,
            passes or TimestampedConfig(),
        )
        if max_pass_seconds is None:
            max_pass_seconds = self.passes.max_pass_seconds
        super().__init__(model, load, attention, budget, device, dtype, max_pass_seconds, prefill_chunk, progress)
        self.passes = replace(self.passes, max_pass_seconds=max_pass_seconds)
        self.stop_ids = stop_ids(self.model, self.processor.tokenizer)
        self._prepare_decoding()

    def _prepare_decoding(self) -> None:
        """Make the decoder for one recording after the other, which keeps its memory and CUDA graphs."""
        chunk = self.prefill_chunk if self.known_model.chunked else 1 << 30
        static = None if self.known_model.static else False
        self.decoder = GreedyDecoder(self.model, self.attention, capacity=0, prefill_chunk=chunk, static=static)

    def transcribe(
        self,
        audio: Audio | AudioFile | Samples,
        *,
        prompt: str | None = None,
        language: str | None = None,
        hotwords: str | None = None,
        progress: Progress | None = None,
        unfinished: Unfinished | None = None,
        on_pass: Callable[[Any], None] | None = None,
        sequence: Sequence | None = None,
        reads: PageReads | None = None,
    ) -> tuple[Iterator[Segment | Pending], TranscriptionInfo]:
        if reads is not None:
            raise PipelineError(f"reads: {self.name} gives no times of words to draw them at; leave it out")
        source = open_audio(audio)
        language = resolve_language(language, self.languages, self.name)
        hotwords = resolve_hotwords(hotwords, self.known_model.hotwords is not None, self.name)
        told = {"prompt": prompt, "language": language, "hotwords": hotwords}
        info = self._describe(source.name, source.duration, self.model, AudioPart.of(source), **told)
        info.timings |= {"encode": 0.0, "prefill": 0.0, "decode": 0.0}
        keywords: list[str] = []
        if hotwords and self.known_model.hotwords == "keywords":
            keywords = hotwords.split(", ")
        elif hotwords:
            prompt = ", ".join(filter(None, (prompt, hotwords)))
        told = prompt, language, keywords
        return self._segments(source, *told, info, progress, unfinished, on_pass, sequence), info

    def make_engine(self) -> BatchEngine | None:
        """Return an engine for recordings side by side; None if the length of one would change the text of another."""
        if not self.known_model.static:
            return None
        return BatchEngine(self.model, self.attention, self.prefill_chunk)

    def _segments(
        self,
        source: Any,
        prompt: str | None,
        language: str | None,
        keywords: Collection[str],
        info: TranscriptionInfo,
        progress: Progress | None,
        unfinished: Unfinished | None,
        on_pass: Callable[[Any], None] | None,
        sequence: Sequence | None,
    ) -> Iterator[Segment | Pending]:
        samples = spool_samples(source.blocks())
        info.warnings += source.warnings
        info.dropped, info.padded = source.dropped, source.padded
        tokenizer, sequence = self.processor.tokenizer, sequence or self.decoder
        how = self.known_model, tokenizer, self.passes, info, prompt, source.start, unfinished
        recording = TimestampedRecording(samples, *how)
        earlier = SparsityCounters(**recording.earlier_sparsity)
        before = sequence.counters.copy()

        def count_sparsity() -> SparsityCounters:
            counters = sequence.counters.since(before)
            counters.add(earlier)
            return counters

        try:
            while recording.has_speech_left:
                if on_pass is not None:
                    on_pass(recording.make_state(vars(count_sparsity())))
                yield from self._decode(recording, sequence, language, keywords, info, progress)
            if progress:
                progress("decode", info.duration, info.duration)
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"{info.audio}: out of memory on {info.device} ({info.dtype}); lower max_pass_seconds or prefill_chunk"
            ) from error
        finally:
            info.stop_reason = info.stop_reason or "interrupted"
            info.sparsity = count_sparsity().to_dict()
            for stage, seconds in sequence.engine_seconds.items():
                info.timings[stage] += seconds

    def _decode(
        self,
        recording: TimestampedRecording,
        sequence: Sequence,
        language: str | None,
        keywords: Collection[str],
        info: TranscriptionInfo,
        progress: Progress | None,
    ) -> Iterator[Segment | Pending]:
        """Segments of the next pass."""
        request = recording.begin()
        with measure(info, "encode"):
            report = partial(progress, "encode") if progress else None
            embeds = self.embed_prompt(request.samples, request.prompt, language, report, keywords)
        limit = self._limit_tokens(embeds.shape[1], request, info, sequence)
        report = partial(progress, "prefill") if progress else None
        with measure(info, "prefill"):
            sequence.reserve(embeds.shape[1] + limit)
            sequence.reset()
            sequence.prefill(embeds, report)
        tokens = sequence.tokens(limit, self.stop_ids)
        while not recording.looped:
            with measure(info, "decode"):
                token = next(tokens, None)
            if token is None:
                break
            if token is PENDING:
                yield PENDING
                continue
            yield from recording.push(token, sequence.log_probs[-1])
            if progress:
                progress("decode", recording.reached, info.duration)
        tokens.close()
        yield from recording.end("loop" if recording.looped else sequence.stop_reason)

    def _limit_tokens(self, prompt: int, request: PassRequest, info: TranscriptionInfo, sequence: Sequence) -> int:
        """The most tokens of the answer, or an error if a prompt of so many positions leaves no room for one."""
        seconds, room = request.end - request.start, self.known_model.context - prompt
        if room <= 0:
            raise PipelineError(
                f"{info.audio}: {seconds / 60:.0f} minutes are {prompt} positions and {self.name} knows "
                f"{self.known_model.context}; lower max_pass_seconds"
            )
        limit = min(limit_text_tokens(self.known_model, seconds), room)
        self._check_memory(prompt + limit, seconds, info, sequence)
        return limit

    @torch.no_grad()
    def embed_prompt(
        self,
        samples: np.ndarray,
        prompt: str | None = None,
        language: str | None = None,
        progress: Any = None,
        keywords: Collection[str] = (),
    ) -> Tensor:
        """Return the request for samples [S] at 16 kHz as vectors [1, N, hidden], encoded piece by piece."""
        told = prompt, language, keywords, self.passes.encode_windows, progress
        return embed_prompt(self.known_model, self.model, self.processor, samples, *told)

    def _check_memory(self, tokens: int, seconds: float, info: TranscriptionInfo, sequence: Sequence) -> None:
        if sequence is self.decoder and tokens <= sequence.cache.capacity:
            return
        shape, known_model = read_shape(self.model), self.known_model
        how = self.attention, self.model.dtype, self.prefill_chunk
        device = self.model.device.type
        needed = estimate_pass_memory(known_model, seconds, shape, *how, tokens, device=device).pass_bytes
        free = measure_free_memory(self.model.device)
        room = None if free is None else free + sequence.cache_bytes  # the pass before leaves its place to the next
        if room is not None and needed > room:
            fits = int(seconds * room / needed * 0.9)
            raise PipelineError(
                f"{info.audio}: {seconds / 60:.0f} minutes in one pass need {needed / 1e9:.1f} GB beside the weights "
                f"and {free / 1e9:.1f} GB are free on {info.device}; try max_pass_seconds={fits} or another device"
            )


@contextmanager
def measure(info: TranscriptionInfo, stage: str) -> Iterator[None]:
    """Add the seconds of a block to a stage of the timings."""
    begin = time.perf_counter()
    yield
    info.timings[stage] += time.perf_counter() - begin
