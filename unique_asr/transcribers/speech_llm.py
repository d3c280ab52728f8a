"""Recordings of any length with our speech LLM: encoded once, then decoded in passes, one by one or side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import torch

from unique_asr.attention import SparseAttentionConfig, SparsityCounters
from unique_asr.audio import AudioFile
from unique_asr.decoding.batch import BatchEngine
from unique_asr.decoding.engine import PENDING, Pending, Sequence, SequenceGroup, open_sequences
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.decoding.memory import estimate_memory, measure_free_memory, read_shape
from unique_asr.longform.alignment import AlignmentConfig
from unique_asr.longform.configuration import LongformConfig
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.page_reads import PageReads
from unique_asr.longform.parallel import ParallelPassRunner
from unique_asr.longform.passes import PassRunner, State
from unique_asr.longform.segmentation import SegmentationConfig
from unique_asr.models.languages import LANGUAGES, resolve_hotwords, resolve_language
from unique_asr.models.sources import list_shipped_languages
from unique_asr.models.speech_llm import EncodedAudio, load
from unique_asr.transcribers.base import Audio, AudioPart, PipelineError, Samples, Transcriber, open_audio
from unique_asr.transcript import Progress, Segment, TranscriptionInfo, Unfinished


class SpeechLLMTranscriber(Transcriber):
    """The default model, or another one of our architecture, with its settings.

    Args:
        model, attention, budget, device, dtype, progress, max_pass_seconds, prefill_chunk: see `Transcriber`; by
            default a pass is as long as the model was trained for.
        parallel_passes: passes over one recording that are decoded side by side; with 1, each begins where the text of
            the one before it ended.
        longform, alignment, segmentation: finer settings.

    Raises:
        ValueError: if a setting or the model cannot be used, in one line.
    """

    records_reads = True
    loader = staticmethod(load)

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
        super().__init__(
            model, self.loader, attention, budget, device, dtype, max_pass_seconds, prefill_chunk, progress
        )
        self.languages, self.parallel_passes = list_shipped_languages(self.name), parallel_passes
        self.longform = longform or LongformConfig()
        if max_pass_seconds is not None:
            self.longform = replace(self.longform, max_pass_seconds=max_pass_seconds)
        self.alignment, self.segmentation = alignment, segmentation
        self._prepare_decoding()

    def _prepare_decoding(self) -> None:
        self._decoder: GreedyDecoder | None = None  # the last one, with its memory and CUDA graphs
        self._keeps_selection = False  # of its steps
        self._engine: BatchEngine | None = None  # the last one for passes side by side

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
        part, told = AudioPart.of(source), {"prompt": prompt, "language": language}
        info = self._describe(source.name, source.duration, self.model.language_model, part, **told)
        encode = partial(self._encode, source, info, progress)
        settings = prompt, source.start, reads
        return self._transcribe(encode, info, settings, LongformReport(), progress, unfinished, on_pass, sequence), info

    def transcribe_encoded(
        self,
        encoded: EncodedAudio,
        *,
        name: str = "<encoded>",
        prompt: str | None = None,
        progress: Progress | None = None,
        sequence: Sequence | None = None,
        report: LongformReport | None = None,
    ) -> tuple[Iterator[Segment | Pending], TranscriptionInfo]:
        info = self._describe(name, encoded.duration, self.model.language_model, AudioPart(), prompt=prompt)
        report = LongformReport() if report is None else report
        settings = prompt, 0.0, None
        return self._transcribe(lambda: encoded, info, settings, report, progress, None, None, sequence), info

    def _encode(self, source: AudioFile | Samples, info: TranscriptionInfo, progress: Progress | None) -> EncodedAudio:
        def report(seconds: float) -> None:
            progress("encode", seconds, max(source.duration, seconds) if source.duration else 0.0)

        begin = time.perf_counter()
        try:
            encoded = self.model.encode(source.blocks(), self.processor, report if progress else None)
        except ValueError as error:
            message = str(error)
            raise PipelineError(message if source.name in message else f"{source.name}: {message}") from error
        info.timings["encode"] = time.perf_counter() - begin
        info.duration, info.dropped, info.padded = encoded.duration, source.dropped, source.padded
        info.warnings += source.warnings
        return encoded

    def _transcribe(
        self,
        encode: Callable[[], EncodedAudio],
        info: TranscriptionInfo,
        settings: tuple[str | None, float, PageReads | None],
        report: LongformReport,
        progress: Progress | None,
        unfinished: Unfinished | None,
        on_pass: Callable[[State], None] | None,
        sequence: Sequence | None,
    ) -> Iterator[Segment | Pending]:
        """Segments of a recording; `settings` are those of a `PassRunner`: prompt, offset, reads."""
        state = unfinished.state if unfinished else None
        earlier = SparsityCounters(**(state["sparsity"] if state else {}))
        keeps_selection = isinstance(settings[-1], PageReads)
        try:
            encoded = encode()
            runner = self._make_runner(settings)
            alone = sequence is None and not keeps_selection and self.parallel_passes > 1
            if parallel := alone and encoded.duration > runner.max_pass_seconds:
                runner = self._make_runner(settings, ParallelPassRunner)
            positions = runner.count_positions(encoded)
            with self._open_writer(positions, info, sequence, parallel, keeps_selection) as writer:
                before = writer.counters.copy()

                def count_sparsity() -> SparsityCounters:
                    counters = writer.counters.since(before)
                    counters.add(earlier)
                    return counters

                def report_pass(state: State) -> None:
                    on_pass({**state, "sparsity": vars(count_sparsity())})

                try:
                    for segment in runner.run(encoded, writer, report, progress, state, on_pass and report_pass):
                        if segment is PENDING and parallel:
                            writer.engine.step()
                        else:
                            yield segment
                    info.stop_reason = report.stop_reason
                finally:
                    info.stop_reason = info.stop_reason or "interrupted"
                    info.coverage, info.passes = report.coverage, report.passes
                    info.sparsity = count_sparsity().to_dict()
                    info.timings |= report.timings
                    for stage, seconds in writer.engine_seconds.items():
                        info.timings[stage] += seconds
                    info.warnings += report.warnings
                    if unsure := report.describe_unsure(settings[1], [LANGUAGES[code] for code in self.languages]):
                        info.warnings.append(unsure)
                    if info.stop_reason == "silence":
                        info.warnings.append(f"{info.audio}: no speech was heard; the transcript is empty")
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"{info.audio}: out of memory on {info.device} ({info.dtype}); lower max_pass_seconds or "
                "prefill_chunk, or use device=cpu"
            ) from error

    def _make_runner(self, settings: tuple[Any, ...], kind: type[PassRunner] = PassRunner) -> PassRunner:
        """Make what runs the passes over a recording."""
        return kind(self.model, self.processor, self.longform, self.alignment, self.segmentation, *settings)

    @contextmanager
    def _open_writer(
        self,
        positions: tuple[int, int],
        info: TranscriptionInfo,
        sequence: Sequence | None,
        parallel: bool,
        keeps_selection: bool,
    ) -> Iterator[Sequence | SequenceGroup]:
        """What decodes passes of so many positions: the sequence that was given, a group of them, or one alone.

        The last two are kept, with their memory, for the next recording, and made anew while another one has them.
        """
        if sequence is not None:
            self._check_memory(positions, info, sequence.cache_bytes)
            yield sequence
        elif parallel:
            engine, self._engine = self._engine or self.make_engine(), None
            try:
                self._check_memory(positions, info, engine.cache_bytes)
                with open_sequences(engine, self.parallel_passes) as group:
                    yield group
            finally:
                self._engine = engine
        else:
            decoder, self._decoder = self._decoder, None
            _, capacity = positions
            if decoder is None or self._keeps_selection != keeps_selection:
                self._check_memory(positions, info)
                decoder = GreedyDecoder(self.model.language_model, self.attention, capacity, self.prefill_chunk)
                self._keeps_selection = keeps_selection
                if keeps_selection:
                    for layer in decoder.cache.paged_layers:
                        layer.keeps_selection = True
            decoder.capacity = max(decoder.capacity, capacity)  # its memory grows as it fills
            try:
                yield decoder
            finally:
                self._decoder = decoder

    def _check_memory(self, positions: tuple[int, int], info: TranscriptionInfo, freed: int = 0) -> None:
        """Raise PipelineError if a pass cannot fit into the free memory of the device.

        positions: of its prompt, and with its text.
        freed: bytes of a cache whose place it takes.
        """
        model, (prompt, tokens) = self.model.language_model, positions
        weight = model.get_input_embeddings().weight
        how = self.attention, weight.dtype, self.prefill_chunk
        needed = estimate_memory(read_shape(model), prompt, tokens, prompt, *how, device=weight.device.type).pass_bytes
        free = measure_free_memory(weight.device)
        if free is not None and needed > free + freed:
            raise PipelineError(
                f"{info.audio}: a pass of {tokens} tokens takes {needed / 1e9:.1f} GB, which does not fit into the "
                f"{free / 1e9:.1f} GB that are free on {weight.device}; lower max_pass_seconds or use another device"
            )
