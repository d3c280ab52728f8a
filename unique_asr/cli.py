"""The command line: `python scripts/transcribe.py audio=talk.m4a`, or `unique-asr audio=talk.m4a` once installed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from unique_asr.audio import AudioError, AudioFile
from unique_asr.console import Display, format_time
from unique_asr.jobs import Job, OutputError, find_recordings, plan, resolve_formats
from unique_asr.overrides import run
from unique_asr.transcript import Segment, Transcript, TranscriptionInfo
from unique_asr.writers import SegmentLog

Transcribe = Callable[..., tuple[Iterator[Segment], TranscriptionInfo]]

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes
LITERAL_KEYS = ("audio", "output.dir", "output.format", "model.name_or_path")
LITERAL_GROUPS = {"model": "model.name_or_path"}


def main(arguments: Sequence[str] | None = None, transcribe: Transcribe | None = None) -> None:
    """Runs and exits; `transcribe` stands in for `unique_asr.transcribe`."""
    # Before transformers is imported: its notices and bars would break into the transcript.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    code = 0

    def task(config: DictConfig) -> None:
        nonlocal code
        code = transcribe_all(config, transcribe)

    try:
        run(task, "transcribe", arguments, LITERAL_KEYS, LITERAL_GROUPS)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def transcribe_all(config: DictConfig, transcribe: Transcribe | None = None) -> int:
    """Every recording that config.audio names; one that fails does not stop the others. Returns the exit code."""
    display = Display(config.quiet)
    if OmegaConf.is_missing(config, "audio") or not config.audio:
        program = "unique-asr" if sys.argv[0].endswith("unique-asr") else "python scripts/transcribe.py"
        display.usage(
            f"usage: {program} audio=FILE [output.format=srt] [output.dir=FOLDER] [attention=dense] [device=cpu] ..."
            " (--help shows every option)"
        )
        return USAGE
    try:
        audio = OmegaConf.to_container(config.audio) if OmegaConf.is_list(config.audio) else config.audio
        formats = resolve_formats(config.output.format)
        jobs = plan(find_recordings(audio), config.output.dir)
    except (AudioError, OutputError) as error:
        display.error(str(error))
        return FAILED if isinstance(error, AudioError) else USAGE
    try:
        settings = transcription_settings(config)
    except ValueError as error:
        display.error(str(error))
        return USAGE
    if transcribe is None:
        from unique_asr.pipeline import transcribe

    failures = 0
    for number, job in enumerate(jobs, start=1):
        if len(jobs) > 1:
            display.note(f"{job.audio} ({number} of {len(jobs)})")
        try:
            transcribe_one(job, formats, config.output, settings, display, transcribe)
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            if config.debug:
                raise
            failures += 1
            display.error(_describe(error, job))
    return FAILED if failures else 0


def transcription_settings(config: DictConfig) -> dict[str, Any]:
    """The keyword arguments of `transcribe`."""
    from unique_asr.attention import SparseAttentionConfig

    return {
        "model": config.model.name_or_path,
        "attention": SparseAttentionConfig(**OmegaConf.to_container(config.attention)),
        "device": config.device,
        "dtype": config.dtype,
        **OmegaConf.to_container(config.decoding),
    }


def transcribe_one(
    job: Job,
    formats: Sequence[str],
    output: DictConfig,
    settings: dict[str, Any],
    display: Display,
    transcribe: Transcribe,
) -> None:
    """One recording to its files. Whatever stops it, the segments decoded until then are on disk."""
    duration = AudioFile(job.audio).duration  # a file that cannot be read fails here, before the model is loaded
    if not output.overwrite and (existing := job.existing(formats)):
        asked = {"model": settings["model"], **asdict(settings["attention"])}
        if difference := job.difference(duration, asked):
            raise OutputError(
                f"{job.path('json')}: was made from {difference}; "
                "output.overwrite=true replaces it, output.dir=FOLDER writes elsewhere"
            )
        kept = ", ".join(str(job.path(extension)) for extension in existing)
        formats = [extension for extension in formats if extension not in existing]
        if not formats:
            display.note(f"{job.audio}: transcribed already ({kept}); output.overwrite=true does it again")
            return
        display.note(f"{job.audio}: {kept} kept; output.overwrite=true replaces")
    _check_writable(job)

    begin = time.perf_counter()
    log = SegmentLog(job.partial_path("jsonl"))
    segments: list[Segment] = []
    info: TranscriptionInfo | None = None
    try:
        with display:
            iterator, info = transcribe(job.audio, progress=display.progress, **settings)
            for segment in iterator:
                segments.append(segment)
                log.append(segment)
                display.segment(segment)
    except BaseException as error:
        log.close(keep=True)
        if segments and info is not None:
            info.stop_reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
            info.coverage = min(1.0, segments[-1].end / info.duration) if info.duration else 0.0
            files = [log.path, *job.write_partial(Transcript(segments, info), formats)]
            display.note(f"{job.audio}: stopped at {format_time(segments[-1].end)}; kept {', '.join(map(str, files))}")
        raise
    files = job.write(Transcript(segments, info), formats)
    log.close(keep=output.keep_log)
    job.remove_partial(keep_log=output.keep_log)
    for warning in info.warnings:
        display.warning(warning)
    display.summary(info, time.perf_counter() - begin, [*files, *([log.path] if output.keep_log and segments else [])])


def _check_writable(job: Job) -> None:
    folder = job.base.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); output.dir=FOLDER writes elsewhere") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: is not writable; output.dir=FOLDER writes elsewhere")


def _describe(error: Exception, job: Job) -> str:
    """One line: what we raise ourselves says all there is to say, anything else gets its type and a way to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, AudioError | OutputError):
        return message
    if not message.startswith(str(job.audio)):
        message = f"{job.audio}: {message or type(error).__name__}"
    return message if isinstance(error, ValueError) else f"{message} ({type(error).__name__}; debug=true shows where)"
