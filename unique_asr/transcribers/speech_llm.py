"""From a file to segments: load, encode, decode. `transcribe` is the one call, `SpeechLLMTranscriber` keeps a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import torch

from unique_asr.attention import SparseAttentionConfig, SparsityCounters
from unique_asr.attention.huggingface import resolve_combine
from unique_asr.audio import SAMPLE_RATE, AudioFile, check_vad, speech_blocks
from unique_asr.decoding.batch import BatchDecoder, Row, Rows
from unique_asr.decoding.greedy import GreedyDecoder
from unique_asr.decoding.memory import free_memory
from unique_asr.longform.alignment import AlignmentConfig
from unique_asr.longform.page_reads import PageReads
from unique_asr.longform.parallel import ParallelTranscriber
from unique_asr.longform.passes import LongformConfig, LongformReport, LongformTranscriber, Progress, State
from unique_asr.longform.segmentation import SegmentationConfig
from unique_asr.models.languages import SHIPPED, chosen_hotwords, chosen_language
from unique_asr.models.speech_llm import load
from unique_asr.transcript import Segment, TranscriptionInfo, Unfinished, text_settings

Audio = str | PathLike[str] | np.ndarray  # a file, or float32 samples at 16 kHz


class PipelineError(ValueError):
    """A transcription that cannot start or go on; the message is one line and names the remedy."""


def transcribe(
    audio: Audio,
    model: str | PathLike[str] | tuple[Any, Any] = "default",
    *,
    attention: str | SparseAttentionConfig = "unique",
    budget: int | None = 512,
    device: str = "auto",
    dtype: str = "auto",
    prompt: str | None = None,
    language: str | None = None,
    hotwords: str | None = None,
    start: float = 0.0,
    end: float | None = None,
    channel: int | None = None,
    vad: bool = False,
    progress: Progress | None = None,
    reads: PageReads | None = None,
    **options: Any,
) -> tuple[Iterator[Segment], TranscriptionInfo]:
    """Transcribe a recording of any length.

        segments, info = transcribe("talk.m4a")
        for segment in segments:
            print(segment.start, segment.end, segment.text)
        print(info.stop_reason, info.coverage)

    Segments come while the recording is decoded, and `info` is complete once they are exhausted. Files and options that
    cannot work raise a ValueError here, in one line.

    Args:
        audio: a file that FFmpeg reads, or float32 samples at 16 kHz.
        model: `default`, a folder, a hub id, or a (model, processor) pair.
        attention: `unique` reads `budget` tokens of the context a step, `dense` all of it; or a SparseAttentionConfig.
        budget: tokens, for `unique`.
        device, dtype: see `unique_asr.models.load`.
        prompt: an instruction for the model.
        language: that is spoken, as a code or in English (`fr`, `French`), for models that can be told; the default
            model takes `en` alone. None: the model finds out.
        hotwords: words or names to expect, separated by commas, for models that can be told; the default one cannot.
        start, end, channel: the part of a file that is transcribed; see `AudioFile`. Times count from its beginning.
        vad: drop what is not speech (needs silero-vad); `info.dropped` counts the seconds. Times stay.
        progress: called as progress(stage, done, total); stages are load, encode, prefill and decode.
        reads: records which part of the recording each token was read from; see `PageReads`. Not for adapters' models.
        options: of `SpeechLLMTranscriber`.
    """
    from unique_asr.models.pretrained import check_hotwords, check_language, make_transcriber  # which need what is here

    source = open_audio(audio, start, end, channel, vad)  # before the model, which takes longer
    if not isinstance(model, tuple):
        check_language(language, model)
        check_hotwords(hotwords, model)
    transcriber = make_transcriber(
        model, attention=attention, budget=budget, device=device, dtype=dtype, progress=progress, **options
    )
    told = {"prompt": prompt, "language": language, "hotwords": hotwords}
    if reads is None:
        return transcriber.transcribe(source, **told, progress=progress)
    if not transcriber.records_reads:
        raise PipelineError(f"reads: model={transcriber.name} does not record what its steps read")
    return transcriber.transcribe(source, **told, progress=progress, reads=reads)


class LoadedModel:
    """A speech LLM in memory and its settings: what every transcriber has."""

    records_reads = False  # whether `transcribe` takes `reads`
    languages: tuple[str, ...] = ()  # codes of those that the model can be told

    def __init__(
        self,
        model: str | PathLike[str] | tuple[Any, Any],
        loader: Callable[..., tuple[Any, Any]],
        attention: str | SparseAttentionConfig,
        budget: int | None,
        device: str,
        dtype: str,
        max_pass_seconds: float | None,
        prefill_chunk: int,
        progress: Progress | None,
    ) -> None:
        self.attention = attention_config(attention, budget)
        if max_pass_seconds is not None and max_pass_seconds <= 0:
            raise PipelineError(f"max_pass_seconds={max_pass_seconds}: give a positive number of seconds")
        self.max_pass_seconds, self.prefill_chunk = max_pass_seconds, prefill_chunk
        begin = time.perf_counter()
        if isinstance(model, tuple):
            self.name = getattr(model[0].config, "name_or_path", "") or type(model[0]).__name__
            self.model, self.processor = model
        else:
            self.name = str(model)
            if progress:
                progress("load", 0, 1)
            self.model, self.processor = loader(model, device, dtype)
            if progress:
                progress("load", 1, 1)
        self.attention = resolve_combine(self.attention, self.model)
        self.load_seconds = time.perf_counter() - begin

    def describe(self, source: AudioFile | Samples, language_model: Any, **told: str | None) -> TranscriptionInfo:
        """What is known of a transcription before it begins; `told`: prompt, language and hotwords."""
        weight = language_model.get_input_embeddings().weight
        return TranscriptionInfo(
            audio=source.name,
            duration=source.duration or 0.0,
            model=self.name,
            device=str(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."),
            attention=self.attention.to_dict(),
            settings=text_settings(
                max_pass_seconds=self.max_pass_seconds,
                start=source.start,
                end=source.end,
                channel=source.channel,
                vad=source.vad,
                **told,
            ),
            timings={"load": self.load_seconds},
        )


class SpeechLLMTranscriber(LoadedModel):
    """A loaded model with its settings.

    Args:
        model, attention, budget, device, dtype, progress: see `transcribe`.
        max_pass_seconds: the longest audio that the LLM gets at once; by default what the model was trained for.
        prefill_chunk: audio positions that the LLM reads at once, which bounds the memory of the prefill.
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
        self.languages, self.parallel_passes = SHIPPED.get(self.name, ()), parallel_passes
        self.longform = longform or LongformConfig()
        if max_pass_seconds is not None:
            self.longform = replace(self.longform, max_pass_seconds=max_pass_seconds)
        self.alignment, self.segmentation = alignment, segmentation
        self._decoder: GreedyDecoder | None = None  # the last one, with its memory and CUDA graphs
        self._keeps_selection = False  # of its steps
        self._batch: BatchDecoder | None = None  # the last one for passes side by side

    def with_attention(self, attention: SparseAttentionConfig) -> SpeechLLMTranscriber:
        """A transcriber with the same model in memory that reads its KV cache in another way."""
        other = copy(self)
        other.attention, other.load_seconds = resolve_combine(attention, self.model), 0.0
        other._decoder = other._batch = None
        return other

    def batch_decoder(self) -> BatchDecoder:
        """For recordings or passes side by side."""
        return BatchDecoder(self.model.language_model, self.attention, self.prefill_chunk)

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
        row: Row | None = None,
        reads: PageReads | None = None,
    ) -> tuple[Iterator[Segment | None], TranscriptionInfo]:
        """Segments of one recording, and how they were made; see the function `transcribe`.

        on_pass: called with a state whenever a pass of the LLM begins. With that state and the segments until then as
        `unfinished`, a later call gives the segments that were still to come.
        language, hotwords, reads: see `transcribe`.
        row: of a `BatchDecoder`, which decodes; None comes among the segments where the batch has to make a step.
        """
        source = open_audio(audio)
        language = chosen_language(language, self.languages, self.name)
        chosen_hotwords(hotwords, False, self.name)
        info = self.describe(source, self.model.language_model, prompt=prompt, language=language)
        return self._segments(source, prompt, info, progress, unfinished, on_pass, row, reads), info

    def _segments(
        self,
        source: AudioFile | Samples,
        prompt: str | None,
        info: TranscriptionInfo,
        progress: Progress | None,
        unfinished: Unfinished | None,
        on_pass: Callable[[State], None] | None,
        row: Row | None,
        reads: PageReads | None,
    ) -> Iterator[Segment | None]:
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
            alone = row is None and reads is None and self.parallel_passes > 1
            if parallel := alone and encoded.duration > transcriber.max_pass_seconds:
                transcriber = ParallelTranscriber(self.model, self.processor, *settings)
            with self._decoder_for(transcriber.capacity(encoded), info, row, parallel, reads is not None) as decoder:
                before = decoder.counters.copy()

                def sparsity() -> SparsityCounters:
                    counted = decoder.counters.since(before)
                    counted.add(earlier)
                    return counted

                def pass_begins(state: State) -> None:
                    on_pass({**state, "sparsity": vars(sparsity())})

                how = report, progress, state, pass_begins if on_pass else None
                try:
                    for segment in transcriber.transcribe(encoded, decoder, *how):
                        if segment is None and parallel:
                            decoder.step()
                        else:
                            yield segment
                    info.stop_reason = report.stop_reason
                finally:
                    info.stop_reason = info.stop_reason or "interrupted"
                    info.coverage, info.passes = report.coverage, report.passes
                    info.sparsity = sparsity().to_dict()
                    info.timings |= report.timings
                    if row is not None or parallel:
                        for stage, seconds in decoder.seconds.items():
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
    def _decoder_for(
        self, capacity: int, info: TranscriptionInfo, row: Row | None, parallel: bool, keeps_selection: bool
    ) -> Iterator[Row | Rows | GreedyDecoder]:
        """What decodes passes of `capacity` tokens: the row that was given, rows of our own, or one sequence alone.

        The last two are kept, with their memory, for the next recording, and made anew while another one has them.
        """
        if row is not None:
            check_memory(self.model.language_model, capacity, info, row.held)
            yield row
        elif parallel:
            batch, self._batch = self._batch or self.batch_decoder(), None
            try:
                check_memory(self.model.language_model, capacity, info, batch.held)
                with batch.rows_of(self.parallel_passes) as rows:
                    yield rows
            finally:
                self._batch = batch
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


class Samples:
    """An array in the place of an `AudioFile`."""

    name = "<array>"
    start, end, channel = 0.0, None, None

    def __init__(self, samples: np.ndarray, vad: bool = False) -> None:
        if samples.ndim != 1:
            raise PipelineError(f"audio: give samples of one channel, [N], not an array of shape {samples.shape}")
        self.samples = samples.astype(np.float32, copy=False)
        self.duration = len(samples) / SAMPLE_RATE
        self.vad, self.dropped = vad, 0.0
        self.warnings: list[str] = []
        if vad:
            check_vad()

    def blocks(self, seconds: float = 30.0) -> Iterator[np.ndarray]:
        self.warnings = []
        yield from speech_blocks([self.samples], seconds, self) if self.vad else [self.samples]


def open_audio(
    audio: Audio | AudioFile | Samples,
    start: float = 0.0,
    end: float | None = None,
    channel: int | None = None,
    vad: bool = False,
) -> AudioFile | Samples:
    """start, end, channel: of a file; an array is taken as it is."""
    if isinstance(audio, (AudioFile, Samples)):
        return audio
    return Samples(audio, vad) if isinstance(audio, np.ndarray) else AudioFile(audio, start, end, channel, vad=vad)


def attention_config(attention: str | SparseAttentionConfig, budget: int | None = 512) -> SparseAttentionConfig:
    """`unique` with a budget in tokens, or `dense`, as the settings of the cache."""
    if isinstance(attention, SparseAttentionConfig):
        return attention
    if attention not in ("unique", "dense"):
        raise PipelineError(f"attention={attention}: use unique or dense, or give a SparseAttentionConfig")
    return SparseAttentionConfig(budget=budget if attention == "unique" else None)


def check_memory(language_model: Any, capacity: int, info: TranscriptionInfo, held: int = 0) -> None:
    """Raise PipelineError if the KV cache of `capacity` tokens cannot fit into the free memory of the device.

    held: bytes of a cache whose place it takes.
    """
    config = language_model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight = language_model.get_input_embeddings().weight
    needed = 2 * config.num_hidden_layers * heads * width * weight.element_size() * capacity
    free = free_memory(weight.device)
    if free is not None and needed > free + held:
        raise PipelineError(
            f"{info.audio}: a KV cache of {needed / 1e9:.1f} GB for {capacity} tokens does not fit into the "
            f"{free / 1e9:.1f} GB that are free on {weight.device}; lower max_pass_seconds or use another device"
        )
