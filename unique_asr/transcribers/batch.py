"""Many recordings: `transcribe_batch` decodes several side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import islice, starmap
from os import PathLike
from typing import Any, TypeVar

import torch

from unique_asr.attention import SparseAttentionConfig
from unique_asr.decoding.batch import BatchDecoder
from unique_asr.longform.passes import Progress
from unique_asr.transcribers.speech_llm import Audio, PipelineError, open_audio
from unique_asr.transcript import Segment, Transcript, TranscriptionInfo

BatchProgress = Callable[[int, str, float, float], None]  # index of the recording, stage, done, total
OnSegment = Callable[[int, Segment], None]  # index of the recording, and what was just decoded of it
Result = TypeVar("Result")


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

    Dense steps write what they write one by one. Sparse ones may not: padding shifts a row's pages, and so what is
    selected. Phi-4-multimodal decodes one by one, as the length of one recording would change the text of another.

    Args:
        batch: recordings that are in memory and decoded at once; fewer where their KV caches would not fit beside
            each other into the memory that is free.
        progress: called as progress(index, stage, done, total).
        on_segment: called as on_segment(index, segment), the moment a segment is decoded.
        all else: as for `transcribe`.
    """
    from unique_asr.models.pretrained import check_hotwords, check_language, make_transcriber

    if batch < 1:
        raise PipelineError(f"batch={batch}: give at least 1")
    if not isinstance(model, tuple):
        check_language(language, model)
        check_hotwords(hotwords, model)
    transcriber = make_transcriber(model, attention=attention, budget=budget, device=device, dtype=dtype, **options)
    return side_by_side(transcriber, audios, batch, prompt, vad, progress, on_segment, language, hotwords)


def side_by_side(
    transcriber: Any,
    audios: Iterable[Audio],
    batch: int,
    prompt: str | None = None,
    vad: bool = False,
    progress: BatchProgress | None = None,
    on_segment: OnSegment | None = None,
    language: str | None = None,
    hotwords: str | None = None,
) -> Iterator[tuple[int, Transcript]]:
    """See `transcribe_batch`; with batch=1, any transcriber does."""
    rows = batch_rows(transcriber, batch)
    told = {"prompt": prompt, "language": language, "hotwords": hotwords}

    def begun(index: int, audio: Audio) -> Generator[None, None, Transcript]:
        callbacks = (partial(callback, index) if callback else None for callback in (progress, on_segment))
        return recording(transcriber, audio, told, vad, *callbacks, rows)

    return interleave(starmap(begun, enumerate(audios)), batch if rows else 1, partial(step, rows))


def batch_rows(transcriber: Any, batch: int) -> BatchDecoder | None:
    """What decodes `batch` recordings side by side; None if they go one by one."""
    make = getattr(transcriber, "batch_decoder", None)
    return make() if make and batch > 1 else None


def step(rows: BatchDecoder) -> None:
    try:
        rows.step()
    except torch.OutOfMemoryError as error:
        raise PipelineError(f"out of memory on {rows.device}; lower batch or max_pass_seconds") from error


def interleave(
    tasks: Iterable[Generator[None, None, Result]], batch: int, step: Callable[[], None]
) -> Iterator[tuple[int, Result]]:
    """Advances `batch` generators in turn, and calls `step` whenever all of them wait for it.

    Yields (index, what a generator returned) as they end, which need not be their order. What `step` raises is raised
    in each generator that waits. What a generator raises, or an interrupt, ends them all, each with that error.
    """
    waiting, running, failure = enumerate(tasks), {}, None
    try:
        while True:
            running.update(islice(waiting, batch - len(running)))
            if not running:
                return
            ended = False
            for index, task in list(running.items()):
                try:
                    task.throw(failure) if failure else next(task)
                except StopIteration as stop:
                    ended = True
                    del running[index]
                    yield index, stop.value
            failure = None
            if not ended:
                try:
                    step()
                except Exception as error:
                    failure = error
    except BaseException as error:
        for task in running.values():
            with suppress(BaseException):
                task.throw(error)
        raise


def recording(
    transcriber: Any,
    audio: Audio,
    told: dict[str, str | None],
    vad: bool,
    progress: Progress | None,
    on_segment: Callable[[Segment], None] | None,
    rows: BatchDecoder | None,
) -> Generator[None, None, Transcript]:
    """Yields where the batch has to make a step; returns the transcript, of which an error says why it is not whole."""
    transcript = Transcript([], TranscriptionInfo(str(audio) if isinstance(audio, str | PathLike) else "<array>"))
    row = rows.row() if rows else None
    try:
        source, where = open_audio(audio, vad=vad), {"row": row} if row else {}
        segments, transcript.info = transcriber.transcribe(source, **told, progress=progress, **where)
        with closing(segments):
            for segment in segments:
                if segment is None:
                    yield
                    continue
                transcript.segments.append(segment)
                if on_segment is not None:
                    on_segment(segment)
    except ValueError as error:
        transcript.info.stop_reason = "error"
        transcript.info.warnings.append(str(error))
    finally:
        if row is not None:
            rows.remove(row)
    return transcript
