"""Many recordings with one transcriber, several of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import islice, starmap
from os import PathLike
from typing import TypeVar

import torch

from unique_asr.decoding.engine import PENDING, Engine, Pending
from unique_asr.remote import shown_name
from unique_asr.transcribers.base import Audio, PipelineError, Transcriber, open_audio
from unique_asr.transcript import Progress, Segment, Transcript, TranscriptionInfo

BatchProgress = Callable[[int, str, float, float], None]  # index of the recording, stage, done, total
OnSegment = Callable[[int, Segment], None]  # index of the recording, and what was just decoded of it
Result = TypeVar("Result")


def transcribe_side_by_side(
    transcriber: Transcriber,
    audios: Iterable[Audio],
    batch: int,
    prompt: str | None = None,
    vad: bool = False,
    progress: BatchProgress | None = None,
    on_segment: OnSegment | None = None,
    language: str | None = None,
    hotwords: str | None = None,
) -> Iterator[tuple[int, Transcript]]:
    """Transcribe recordings with a transcriber, `batch` at a time; see `unique_asr.transcribe_batch`.

    With batch=1, and with transcribers that make no engine, they go one by one.
    """
    engine = make_engine(transcriber, batch)
    told = {"prompt": prompt, "language": language, "hotwords": hotwords}

    def transcribe(index: int, audio: Audio) -> Generator[Pending, None, Transcript]:
        callbacks = (partial(callback, index) if callback else None for callback in (progress, on_segment))
        return transcribe_recording(transcriber, audio, told, vad, *callbacks, engine)

    return interleave(starmap(transcribe, enumerate(audios)), batch if engine else 1, partial(step, engine))


def make_engine(transcriber: Transcriber, batch: int) -> Engine | None:
    """Return the engine that decodes `batch` recordings side by side; None if they go one by one."""
    return transcriber.make_engine() if batch > 1 else None


def step(engine: Engine) -> None:
    """Make a step of an engine.

    Raises:
        PipelineError: if memory runs out.
    """
    try:
        engine.step()
    except torch.OutOfMemoryError as error:
        raise PipelineError(f"out of memory on {engine.device}; lower batch or max_pass_seconds") from error


def interleave(
    tasks: Iterable[Generator[Pending, None, Result]], batch: int, step: Callable[[], None]
) -> Iterator[tuple[int, Result]]:
    """Advance `batch` generators in turn, and call `step` whenever all of them are pending.

    Yields (index, what a generator returned) as they end, which need not be their order. What `step` raises is raised
    in each generator that is pending. What a generator raises, or an interrupt, ends them all, each with that error.
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


def transcribe_recording(
    transcriber: Transcriber,
    audio: Audio,
    told: dict[str, str | None],
    vad: bool,
    progress: Progress | None,
    on_segment: Callable[[Segment], None] | None,
    engine: Engine | None,
) -> Generator[Pending, None, Transcript]:
    """Transcribe one recording with a sequence of an engine, or alone; yields where the engine has to make a step.

    Returns the transcript; an error that cut it short is its stop reason and its last warning.
    """
    name = shown_name(str(audio)) if isinstance(audio, str | PathLike) else "<array>"
    transcript = Transcript([], TranscriptionInfo(name))
    sequence = engine.new_sequence() if engine else None
    try:
        source = open_audio(audio, vad=vad)
        segments, transcript.info = transcriber.transcribe(source, **told, progress=progress, sequence=sequence)
        with closing(segments):
            for segment in segments:
                if segment is PENDING:
                    yield PENDING
                    continue
                transcript.segments.append(segment)
                if on_segment is not None:
                    on_segment(segment)
    except ValueError as error:
        transcript.info.stop_reason = "error"
        transcript.info.warnings.append(str(error))
    finally:
        if sequence is not None:
            engine.remove(sequence)
    return transcript
