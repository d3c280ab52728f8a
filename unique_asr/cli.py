"""The command line: `python scripts/transcribe.py audio=talk.m4a`, or `unique-asr audio=talk.m4a` once installed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from unique_asr.audio import AudioError, AudioFile
from unique_asr.console import Display, format_time
from unique_asr.jobs import Job, OutputError, find_recordings, plan, resolve_formats
from unique_asr.overrides import run
from unique_asr.transcript import Segment, Transcript, TranscriptionInfo
from unique_asr.writers import SegmentLog

SUCCESS, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes
LITERAL_KEYS = ("audio", "output.dir", "output.format", "model.name_or_path", "decoding.prompt")
LITERAL_GROUPS = {"model": "model.name_or_path"}


class Transcriber(Protocol):
    """`unique_asr.pipeline.Transcriber`, or a stand-in for it in a test."""

    def transcribe(self, audio: Any, *, prompt: Any, progress: Any) -> tuple[Iterator[Segment], TranscriptionInfo]: ...


def main(arguments: Sequence[str] | None = None, load: Callable[..., Transcriber] | None = None) -> None:
    """Runs and exits; `load` makes the transcriber from the settings."""
    # Before transformers is imported: its notices and bars would break into the transcript.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    code = SUCCESS

    def task(config: DictConfig) -> None:
        nonlocal code
        code = transcribe_all(config, load or load_transcriber)

    try:
        run(task, "transcribe", arguments, LITERAL_KEYS, LITERAL_GROUPS)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def load_transcriber(**settings: Any) -> Transcriber:
    from unique_asr.pipeline import Transcriber

    return Transcriber(**settings)


def transcribe_all(config: DictConfig, load: Callable[..., Transcriber]) -> int:
    """Every recording that config.audio names; one that fails does not stop the others. Returns the exit code."""
    display = Display(config.quiet)
    if OmegaConf.is_missing(config, "audio") or not config.audio:
        program = "unique-asr" if sys.argv[0].endswith("unique-asr") else "python scripts/transcribe.py"
        display.usage(
            f"{program} audio=FILE [output.format=srt] [output.dir=FOLDER] [attention=dense] [device=cpu] ..."
        )
        return USAGE
    try:
        audio = OmegaConf.to_container(config.audio) if OmegaConf.is_list(config.audio) else config.audio
        formats = resolve_formats(config.output.format)
        jobs = plan(find_recordings(audio), config.output.dir)
        settings = transcriber_settings(config)
    except AudioError as error:
        display.error(str(error))
        return FAILED
    except ValueError as error:
        display.error(str(error))
        return USAGE

    transcriber = None
    code = SUCCESS
    for number, job in enumerate(jobs, start=1):
        if len(jobs) > 1:
            display.note(f"{job.audio} ({number} of {len(jobs)})")
        begin = time.perf_counter()
        try:
            missing = missing_formats(job, formats, config.output.overwrite, settings, display)
            if not missing:
                continue
            if transcriber is None:
                with display:
                    transcriber = load(**settings, progress=display.progress)
            transcribe_one(job, missing, config.output.keep_log, transcriber, config.decoding.prompt, display, begin)
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            if config.debug:
                raise
            display.error(_describe(error, job))
            code = FAILED
            if transcriber is None and not isinstance(error, AudioError | OutputError):
                break  # a model that does not load for this recording does not load for the next one
    return code


def transcriber_settings(config: DictConfig) -> dict[str, Any]:
    """The keyword arguments of `unique_asr.pipeline.Transcriber`."""
    from unique_asr.attention import SparseAttentionConfig

    decoding = OmegaConf.to_container(config.decoding)
    del decoding["prompt"]  # of a recording, not of the transcriber
    return {
        "model": config.model.name_or_path,
        "attention": SparseAttentionConfig(**OmegaConf.to_container(config.attention)),
        "device": config.device,
        "dtype": config.dtype,
        **decoding,
    }


def missing_formats(
    job: Job, formats: Sequence[str], overwrite: bool, settings: dict[str, Any], display: Display
) -> list[str]:
    """The formats that are still to be written; what cannot work is found here, before the model is loaded."""
    duration = AudioFile(job.audio).duration
    existing = [] if overwrite else job.existing(formats)
    if existing:
        made_from = job.difference(duration, {"model": settings["model"], **settings["attention"].to_dict()})
        if made_from:
            raise OutputError(
                f"{job.path('json')}: was made from {made_from}; "
                "output.overwrite=true replaces it, output.dir=FOLDER writes elsewhere"
            )
        kept = ", ".join(str(job.path(extension)) for extension in existing)
        display.note(f"{job.audio}: keeping {kept}; output.overwrite=true replaces what is there")
    job.check_writable()
    return [extension for extension in formats if extension not in existing]


def transcribe_one(
    job: Job,
    formats: Sequence[str],
    keep_log: bool,
    transcriber: Transcriber,
    prompt: str | None,
    display: Display,
    begin: float,
) -> None:
    """One recording to its files. Whatever stops it, the segments decoded until then are on disk.

    begin: the clock when work on the recording began; loading the model for it counts.
    """
    log = SegmentLog(job.partial_path("jsonl"))
    transcript: Transcript | None = None
    try:
        with display:
            iterator, info = transcriber.transcribe(job.audio, prompt=prompt, progress=display.progress)
            transcript = Transcript([], info)
            for segment in iterator:
                transcript.segments.append(segment)
                log.append(segment)
                display.segment(segment)
    except BaseException as error:
        log.close(keep=True)
        if transcript is not None and transcript.segments:
            iterator.close()  # the pipeline completes the info
            info.stop_reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
            files = [log.path, *job.write_partial(transcript, formats)]
            reached = format_time(transcript.segments[-1].end)
            display.note(f"{job.audio}: stopped at {reached}; kept {', '.join(map(str, files))}")
        raise
    files = job.write(transcript, formats)
    log.close(keep=keep_log)
    job.remove_partial(keep_log)
    for warning in info.warnings:
        display.warning(warning)
    display.summary(info, time.perf_counter() - begin, files)


def _describe(error: Exception, job: Job) -> str:
    """One line: what we raise ourselves says all there is to say, anything else gets its type and a way to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return message
    return f"{job.audio}: {message or 'failed'} ({type(error).__name__}; debug=true shows where)"
