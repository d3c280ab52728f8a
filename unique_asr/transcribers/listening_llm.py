"""Recordings with a `ListeningLLM`: heard once, then written by the LLM in passes of up to an hour."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

from unique_asr.attention import SparseAttentionConfig
from unique_asr.audio import AudioFile
from unique_asr.decoding.engine import Pending, Sequence
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.heard_passes import HeardPassConfig, HeardPassRunner, State
from unique_asr.longform.page_reads import PageReads
from unique_asr.longform.segmentation import SegmentationConfig
from unique_asr.models.languages import resolve_hotwords, resolve_language
from unique_asr.models.listening_llm import HeardSpeech, load_listening_llm
from unique_asr.transcribers.base import Audio, AudioPart, PipelineError, Samples, open_audio
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber
from unique_asr.transcript import Progress, Segment, TranscriptionInfo, Unfinished


class ListeningTranscriber(SpeechLLMTranscriber):
    """A speech LLM that reads words; arguments and errors as for `SpeechLLMTranscriber`, without passes side by side.

    Args:
        passes: finer settings of passes.
    """

    records_reads = False
    loader = staticmethod(load_listening_llm)

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
        passes: HeardPassConfig | None = None,
        segmentation: SegmentationConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            model,
            attention=attention,
            budget=budget,
            device=device,
            dtype=dtype,
            max_pass_seconds=max_pass_seconds,
            prefill_chunk=prefill_chunk,
            parallel_passes=1,
            segmentation=segmentation,
            progress=progress,
        )
        self.passes = replace(passes or HeardPassConfig(), max_pass_seconds=max_pass_seconds)
        self.listener = self.processor.make_listener(self.model)
        self.languages = (self.model.config.language,) if self.model.config.language else ()

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
        if prompt:
            raise PipelineError(f"{self.name}: takes no prompt; leave it out, or give names as hotwords")
        source = open_audio(audio)
        language = resolve_language(language, self.languages, self.name)
        names = resolve_hotwords(hotwords, True, self.name)
        part, told = AudioPart.of(source), {"prompt": None, "language": language, "hotwords": names}
        info = self._describe(source.name, source.duration, self.model.language_model, part, **told)
        encode = partial(self._encode, source, info, progress)
        settings = names, source.start
        return self._transcribe(encode, info, settings, LongformReport(), progress, unfinished, on_pass, sequence), info

    def transcribe_encoded(
        self,
        encoded: HeardSpeech,
        *,
        name: str = "<encoded>",
        prompt: str | None = None,
        progress: Progress | None = None,
        sequence: Sequence | None = None,
        report: LongformReport | None = None,
    ) -> tuple[Iterator[Segment | Pending], TranscriptionInfo]:
        info = self._describe(name, encoded.duration, self.model.language_model, AudioPart(), prompt=None)
        report = LongformReport() if report is None else report
        return self._transcribe(lambda: encoded, info, (None, 0.0), report, progress, None, None, sequence), info

    def _encode(self, source: AudioFile | Samples, info: TranscriptionInfo, progress: Progress | None) -> HeardSpeech:
        begin, heard = time.perf_counter(), HeardSpeech()
        try:
            for heard in self.listener.listen(source.blocks(), 16 if self.model.device.type == "cuda" else 4):
                if progress:
                    progress("encode", heard.duration, max(source.duration or 0.0, heard.duration))
        except ValueError as error:
            message = str(error)
            raise PipelineError(message if source.name in message else f"{source.name}: {message}") from error
        if not heard.cuts:
            raise PipelineError(f"{source.name}: the recording has no samples")
        info.timings["encode"] = time.perf_counter() - begin
        info.duration, info.dropped = heard.duration, source.dropped
        info.warnings += source.warnings
        return heard

    def _make_runner(self, settings: tuple[Any, ...]) -> HeardPassRunner:
        hotwords, offset = settings
        names = [name.strip() for name in (hotwords or "").split(",") if name.strip()]
        return HeardPassRunner(self.model, self.processor, self.passes, self.segmentation, names, offset)
