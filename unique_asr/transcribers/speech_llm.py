"""Recordings of any length with our speech LLM: encoded once, then decoded in passes, one by one or side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch

from unique_asr.attention import SparseAttentionConfig, SparsityCounters
from unique_asr.audio import AudioFile
from unique_asr.decoding.batch import BatchEngine
from unique_asr.decoding.engine import PENDING, Pending, Sequence, SequenceGroup, open_sequences
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.decoding.memory import free_memory
from unique_asr.longform.alignment import AlignmentConfig
from unique_asr.longform.page_reads import PageReads
from unique_asr.longform.parallel import ParallelTranscriber
from unique_asr.longform.passes import LongformConfig, LongformReport, LongformTranscriber, Progress, State
from unique_asr.longform.segmentation import SegmentationConfig
from unique_asr.models.languages import resolve_hotwords, resolve_language
from unique_asr.models.sources import list_shipped_languages
from unique_asr.models.speech_llm import load
from unique_asr.transcribers.base import Audio, PipelineError, Samples, Transcriber, open_audio
from unique_asr.transcript import Segment, TranscriptionInfo, Unfinished


class SpeechLLMTranscriber(Transcriber):
    """The default model, or another one of our architecture, with its settings.

    Args:
        model, attention, budget, device, dtype, progress, max_pass_seconds, prefill_chunk: see `Transcriber`; by
            default a pass is as long as the model was trained for.
        parallel_passes: passes over one recording that are decoded side by side; with 1, each begins where the text of
            the one before it ended.
        longform, alignment, segmentation: finer settings.
    """

    records_reads = True

    def __init__(
        self,
        model: str | PathLike[str] | tuple[Any, Any] = "default",
        *,
        attention: str | SparseAttentionConfig = "unique",
        budget: int | None = 512,
        device: str = "auto",
        dtype: str = "auto",
        max_pass_seconds: float | None = None,
        prefill_chunk: int = 2048,
        parallel_passes: int = 16,
        longform: LongformConfig | None = None,
        alignment: AlignmentConfig | None = None,
        segmentation: SegmentationConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        if parallel_passes < 1:
            raise PipelineError(f"parallel_passes={parallel_passes}: give at least 1")
        super().__init__(model, load, attention, budget, device, dtype, max_pass_seconds, prefill_chunk, progress)
        self.languages, self.parallel_passes = list_shipped_languages(self.name), parallel_passes
        self.longform = longform or LongformConfig()
        if max_pass_seconds is not None:
            self.longform = replace(self.longform, max_pass_seconds=max_pass_seconds)
        self.alignment, self.segmentation = alignment, segmentation
        self._decoder: GreedyDecoder | None = None  # the last one, with its memory and CUDA graphs
        self._keeps_selection = False  # of its steps
        self._engine: BatchEngine | None = None  # the last one for passes side by side

    def _prepare_decoding(self) -> None:
        self._decoder = self._engine = None

    def make_engine(self) -> BatchEngine:
        """Return an engine that decodes recordings, or passes over one, side by side."""
        return BatchEngine(self.model.language_model, self.attention, self.prefill_chunk)

    def transcribe(
        self,
        audio: Audio | AudioFile | Samples,
        *,
        prompt: str | None = None,
        language: str | None = None,
        hotwords: str | None = None,
        progress: Progress | None = None,
        unfinished: Unfinished | None = None,
        on_pass: Callable[[State], None] | None = None,
        sequence: Sequence | None = None,
        reads: PageReads | None = None,
    ) -> tuple[Iterator[Segment | Pending], TranscriptionInfo]:
        source = open_audio(audio)
        language = resolve_language(language, self.languages, self.name)
        resolve_hotwords(hotwords, False, self.name)
        info = self._describe(source, self.model.language_model, prompt=prompt, language=language)
        return self._segments(source, prompt, info, progress, unfinished, on_pass, sequence, reads), info

    def _segments(
        self,
        source: AudioFile | Samples,
        prompt: str | None,
        info: TranscriptionInfo,
        progress: Progress | None,
        unfinished: Unfinished | None,
        on_pass: Callable[[State], None] | None,
        sequence: Sequence | None,
        reads: PageReads | None,
    ) -> Iterator[Segment | Pending]:
        report = LongformReport()
        state = unfinished.state if unfinished else None
        earlier = SparsityCounters(**(state["sparsity"] if state else {}))
        settings = self.longform, self.alignment, self.segmentation, prompt, source.start, reads
        try:
            begin = time.perf_counter()
            encoded = self._encode(source, progress)
            info.timings["encode"] = time.perf_counter() - begin
            info.duration = encoded.duration
            info.warnings += source.warnings
            info.dropped = source.dropped
            transcriber = LongformTranscriber(self.model, self.processor, *settings)
            alone = sequence is None and reads is None and self.parallel_passes > 1
            if parallel := alone and encoded.duration > transcriber.max_pass_seconds:
                transcriber = ParallelTranscriber(self.model, self.processor, *settings)
            how = info, sequence, parallel, reads is not None
            with self._open_writer(transcriber.capacity(encoded), *how) as writer:
                before = writer.counters.copy()

                def sparsity() -> SparsityCounters:
                    counted = writer.counters.since(before)
                    counted.add(earlier)
                    return counted

                def pass_begins(state: State) -> None:
                    on_pass({**state, "sparsity": vars(sparsity())})

                how = report, progress, state, pass_begins if on_pass else None
                try:
                    for segment in transcriber.transcribe(encoded, writer, *how):
                        if segment is PENDING and parallel:
                            writer.engine.step()
                        else:
                            yield segment
                    info.stop_reason = report.stop_reason
                finally:
                    info.stop_reason = info.stop_reason or "interrupted"
                    info.coverage, info.passes = report.coverage, report.passes
                    info.sparsity = sparsity().to_dict()
                    info.timings |= report.timings
                    for stage, seconds in writer.engine_seconds.items():
                        info.timings[stage] += seconds
                    info.warnings += report.warnings
                    if info.stop_reason == "silence":
                        info.warnings.append(f"{info.audio}: no speech was heard; the transcript is empty")
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"{info.audio}: out of memory on {info.device} ({info.dtype}); lower max_pass_seconds or "
                "prefill_chunk, or use device=cpu"
            ) from error

    def _encode(self, source: AudioFile | Samples, progress: Progress | None) -> Any:
        def report(seconds: float) -> None:
            progress("encode", seconds, max(source.duration or 0.0, seconds))

        try:
            return self.model.encode(source.blocks(), self.processor, report if progress else None)
        except ValueError as error:
            message = str(error)
            raise PipelineError(message if source.name in message else f"{source.name}: {message}") from error

    @contextmanager
    def _open_writer(
        self, capacity: int, info: TranscriptionInfo, sequence: Sequence | None, parallel: bool, keeps_selection: bool
    ) -> Iterator[Sequence | SequenceGroup]:
        """What decodes passes of `capacity` tokens: the sequence that was given, a group of them, or one alone.

        The last two are kept, with their memory, for the next recording, and made anew while another one has them.
        """
        if sequence is not None:
            check_memory(self.model.language_model, capacity, info, sequence.cache_bytes)
            yield sequence
        elif parallel:
            engine, self._engine = self._engine or self.make_engine(), None
            try:
                check_memory(self.model.language_model, capacity, info, engine.cache_bytes)
                with open_sequences(engine, self.parallel_passes) as group:
                    yield group
            finally:
                self._engine = engine
        else:
            decoder, self._decoder = self._decoder, None
            if decoder is None or self._keeps_selection != keeps_selection:
                check_memory(self.model.language_model, capacity, info)
                decoder = GreedyDecoder(self.model.language_model, self.attention, capacity, self.prefill_chunk)
                self._keeps_selection = keeps_selection
                if keeps_selection:
                    for layer in decoder.cache.paged_layers:
                        layer.keeps_selection = True
            decoder.capacity = max(decoder.capacity, capacity)
            try:
                yield decoder
            finally:
                self._decoder = decoder


def check_memory(language_model: Any, capacity: int, info: TranscriptionInfo, freed: int = 0) -> None:
    """Raise PipelineError if the KV cache of `capacity` tokens cannot fit into the free memory of the device.

    freed: bytes of a cache whose place it takes.
    """
    config = language_model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight = language_model.get_input_embeddings().weight
    needed = 2 * config.num_hidden_layers * heads * width * weight.element_size() * capacity
    free = free_memory(weight.device)
    if free is not None and needed > free + freed:
        raise PipelineError(
            f"{info.audio}: a KV cache of {needed / 1e9:.1f} GB for {capacity} tokens does not fit into the "
            f"{free / 1e9:.1f} GB that are free on {weight.device}; lower max_pass_seconds or use another device"
        )
