"""The public calls: `transcribe` for one recording, `transcribe_batch` for many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

from unique_asr.attention import SparseAttentionConfig
from unique_asr.longform.page_reads import PageReads
from unique_asr.transcribers import check_hotwords, check_language, check_prompt, make_transcriber
from unique_asr.transcribers.base import Audio, PipelineError, open_audio
from unique_asr.transcribers.batch import BatchProgress, OnSegment, transcribe_side_by_side
from unique_asr.transcript import Progress, Segment, Transcript, TranscriptionInfo


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
    track: int | None = None,
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

    Segments come while the recording is decoded, and `info` is complete once they are exhausted.

    Args:
        audio: a file that FFmpeg reads, or samples [N] at 16 kHz: floats between -1 and 1, int16, int32 or uint8.
        model: `default`, a folder, a hub id, or a (model, processor) pair.
        attention: `unique` reads `budget` tokens of the context a step, `dense` all of it; or a SparseAttentionConfig.
        budget: tokens, for `unique`.
        device, dtype: see `unique_asr.models.load`.
        prompt: an instruction for the model.
        language: that is spoken, as a code or in English (`fr`, `French`), for models that can be told; the default
            model takes `en` alone. None: the model finds out.
        hotwords: words or names to expect, separated by commas, for models that can be told; the default one cannot.
        start, end, channel, track: the part of a file that is transcribed; see `AudioFile`. Times count from its
            beginning. Of an array, start and end.
        vad: drop what is not speech (needs silero-vad); `info.dropped` counts the seconds. Times stay.
        progress: called as progress(stage, done, total); stages are load, encode, prefill and decode.
        reads: records which part of the recording each token was read from; see `PageReads`. For the default model.
        options: of the model's transcriber, `SpeechLLMTranscriber` or `PretrainedTranscriber`.

    Raises:
        ValueError: if the file cannot be read or an option cannot work, in one line that names the remedy.
    """
    source = open_audio(audio, start, end, channel, vad, track)  # before the model, which takes longer
    if not isinstance(model, tuple):
        check_language(language, model)
        check_hotwords(hotwords, model)
        check_prompt(prompt, model)
    transcriber = make_transcriber(
        model, attention=attention, budget=budget, device=device, dtype=dtype, progress=progress, **options
    )
    if reads is not None and not transcriber.records_reads:
        raise PipelineError(f"reads: model={transcriber.name} does not record what its steps read")
    told = {"prompt": prompt, "language": language, "hotwords": hotwords}
    return transcriber.transcribe(source, **told, progress=progress, reads=reads)


def transcribe_batch(
    audios: Iterable[Audio],
    model: str | PathLike[str] | tuple[Any, Any] = "default",
    *,
    batch: int = 8,
    attention: str | SparseAttentionConfig = "unique",
    budget: int | None = 512,
    device: str = "auto",
    dtype: str = "auto",
    prompt: str | None = None,
    language: str | None = None,
    hotwords: str | None = None,
    vad: bool = False,
    progress: BatchProgress | None = None,
    on_segment: OnSegment | None = None,
    **options: Any,
) -> Iterator[tuple[int, Transcript]]:
    """Transcribe recordings side by side: one decode step writes a token for each of `batch` of them.

        for index, transcript in transcribe_batch(files, batch=8):
            print(files[index], transcript.text, transcript.info.coverage)

    Yields (index, transcript) as recordings are complete, which need not be their order. One that cannot be read or
    decoded has `info.stop_reason == "error"`, and its last warning says why.

    Dense steps write what they write one by one. Sparse ones may not: padding shifts the pages of a recording, and
    so what is selected. Phi-4-multimodal decodes one by one, as the length of one recording would change the text of
    another.

    Args:
        batch: recordings that are in memory and decoded at once; fewer where their KV caches would not fit beside
            each other into the memory that is free.
        progress: called as progress(index, stage, done, total).
        on_segment: called as on_segment(index, segment), the moment a segment is decoded.
        all else: as for `transcribe`.

    Raises:
        ValueError: at once if an option cannot work, in one line that names the remedy.
    """
    if batch < 1:
        raise PipelineError(f"batch={batch}: give at least 1")
    if not isinstance(model, tuple):
        check_language(language, model)
        check_hotwords(hotwords, model)
        check_prompt(prompt, model)
    transcriber = make_transcriber(model, attention=attention, budget=budget, device=device, dtype=dtype, **options)
    return transcribe_side_by_side(transcriber, audios, batch, prompt, vad, progress, on_segment, language, hotwords)
