"""The command line: `python scripts/transcribe.py audio=talk.m4a`, or `unique-asr audio=talk.m4a` once installed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from unique_asr.audio import AudioError, AudioFile, parse_time
from unique_asr.console import Display, JSONLines, format_time
from unique_asr.jobs import STDIN, Job, OutputError, find_recordings, plan, resolve_formats
from unique_asr.overrides import run
from unique_asr.page_reads import PageReads
from unique_asr.transcript import Segment, Transcript, TranscriptionInfo, Unfinished, text_settings
from unique_asr.writers import SegmentLog, read_transcript

SUCCESS, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes
LITERAL_KEYS = ("audio", "start", "end", "output.dir", "output.format", "model.name_or_path", "decoding.prompt")
LITERAL_GROUPS = {"model": "model.name_or_path"}


class Transcriber(Protocol):
    """`unique_asr.pipeline.Transcriber`, or a stand-in for it in a test."""

    name: str
    records_reads: bool  # whether `transcribe` takes `reads`, a PageReads, too

    def transcribe(
        self,
        audio: AudioFile,
        *,
        prompt: str | None,
        progress: Callable[[str, float, float], None],
        unfinished: Unfinished | None,
        on_pass: Callable[[dict[str, Any]], None],
    ) -> tuple[Iterator[Segment], TranscriptionInfo]: ...


def main(arguments: Sequence[str] | None = None, load: Callable[..., Transcriber] | None = None) -> None:
    """Runs and exits; `load` makes the transcriber from the settings."""
    # Before transformers is imported: its notices and bars would break into the transcript.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container that is stopped keeps its work too
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
    from unique_asr.models.adapters import make_transcriber

    return make_transcriber(**settings)


def transcribe_all(config: DictConfig, load: Callable[..., Transcriber]) -> int:
    """Every recording that config.audio names; one that fails does not stop the others. Returns the exit code."""
    display = (JSONLines if config.jsonl else Display)(config.quiet)
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
        part = audio_part(config)
    except AudioError as error:
        display.error(str(error))
        return FAILED
    except ValueError as error:
        display.error(str(error))
        return USAGE

    transcriber, prompt = None, config.decoding.prompt
    code = SUCCESS
    with ExitStack() as temporary:
        for number, job in enumerate(jobs, start=1):
            if len(jobs) > 1:
                display.note(f"{job.name} ({number} of {len(jobs)})")
            begin = time.perf_counter()
            try:
                if job.audio == STDIN:
                    job = replace(job, audio=spool(sys.stdin.buffer, temporary))
                source = AudioFile(job.audio, **part, name=job.name)
                made_from = made_with(settings, text_settings(prompt, config.decoding.max_pass_seconds, **part))
                missing = missing_formats(job, formats, config.output.overwrite, source, made_from, display)
                if not missing:
                    continue
                unfinished, keep = job.unfinished(source.duration, made_from) if config.resume else (None, 0)
                if transcriber is None:
                    with display:
                        transcriber = load(**settings, progress=display.progress)
                log = SegmentLog(job.partial_path("jsonl"), keep)
                reads = PageReads() if config.output.reads else None
                keep_log = config.output.keep_log
                transcribe_one(
                    job, source, missing, log, keep_log, transcriber, prompt, unfinished, display, begin, reads
                )
            except KeyboardInterrupt:
                return INTERRUPTED
            except Exception as error:
                if config.debug:
                    raise
                display.error(_describe(error, job), job.name)
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


def audio_part(config: DictConfig) -> dict[str, Any]:
    """The keyword arguments of `AudioFile` that choose a part of it."""
    channel = config.channel
    if channel != "mix" and not (isinstance(channel, int) and channel >= 1):
        raise ValueError(f"channel={channel}: give mix, or a number: 1 is the left one")
    try:
        start, end = parse_time(config.start) or 0.0, parse_time(config.end)
    except ValueError as error:
        raise ValueError(f"start={config.start} end={config.end}: {error}") from error
    return {"start": start, "end": end, "channel": None if channel == "mix" else channel, "vad": config.vad}


def made_with(settings: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """What a transcript's info says of its making: model, attention, and the settings that change the text."""
    return {"model": settings["model"], **settings["attention"].to_dict(), **text}


def spool(stream: Any, temporary: ExitStack) -> Path:
    """Standard input as a file: many containers are read from several places."""
    if stream.isatty():
        raise AudioError("audio=-: standard input is a terminal; pipe a recording into it")
    path = Path(temporary.enter_context(tempfile.TemporaryDirectory(prefix="unique-asr-"))) / "stdin"
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file)
    return path


def missing_formats(
    job: Job, formats: Sequence[str], overwrite: bool, source: AudioFile, made_from: dict[str, Any], display: Display
) -> list[str]:
    """The formats that are still to be written; what cannot work is found here, before the model is loaded.

    What a .json with the same settings already holds is written from there.
    """
    existing = [] if overwrite else job.existing(formats)
    missing = [extension for extension in formats if extension not in existing]
    difference = job.difference(source.duration, made_from)
    if existing and difference:
        raise OutputError(
            f"{job.path('json')}: was made from {difference}; "
            "output.overwrite=true replaces it, output.dir=FOLDER writes elsewhere"
        )
    if existing:
        kept = [job.path(extension) for extension in existing]
        display.kept(job.name, kept)
    job.check_writable()
    if missing and not overwrite and not difference and job.path("json").exists():
        files = job.write(read_transcript(job.path("json")), missing)
        display.note(f"{job.name}: wrote {', '.join(map(str, files))} from {job.path('json')}")
        return []
    return missing


def transcribe_one(
    job: Job,
    source: AudioFile,
    formats: Sequence[str],
    log: SegmentLog,
    keep_log: bool,
    transcriber: Transcriber,
    prompt: str | None,
    unfinished: Unfinished | None,
    display: Display,
    begin: float,
    reads: PageReads | None = None,
) -> None:
    """One recording to its files. Whatever stops it, the segments decoded until then are on disk.

    begin: the clock when work on the recording began; loading the model for it counts.
    reads: is drawn as one of the files; see `unique_asr.page_reads.PageReads`.
    """
    transcript: Transcript | None = None
    try:
        with display:
            if reads is not None and not transcriber.records_reads:
                raise ValueError(f"reads=true: model={transcriber.name} does not record what its steps read")
            recorded = {} if reads is None else {"reads": reads}
            iterator, info = transcriber.transcribe(
                source,
                prompt=prompt,
                progress=display.progress,
                unfinished=unfinished,
                on_pass=log.pass_begins,
                **recorded,
            )
            log.info = info
            transcript = Transcript([], info)
            if unfinished is not None and unfinished.segments:
                display.note(f"{job.name}: going on from {format_time(unfinished.segments[-1].end)}")
                for segment in unfinished.segments:
                    transcript.segments.append(segment)
                    display.segment(segment, job.name)
            for segment in iterator:
                transcript.segments.append(segment)
                log.append(segment)
                display.segment(segment, job.name)
        files = job.write(transcript, formats)
        if reads is not None:
            files.append(job.path("reads.svg"))
            files[-1].write_text(reads.svg(), encoding="utf-8")
    except BaseException as error:
        log.close(keep=True)
        if transcript is not None and transcript.segments:
            iterator.close()  # the pipeline completes the info
            info.stop_reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
            files = [log.path] if log.path.exists() else []
            try:
                files += job.write_partial(transcript, formats)
            except OSError:  # the disk is full: the log is what is left
                job.remove_partial(keep_log=True)
            reached = format_time(transcript.segments[-1].end)
            display.note(
                f"{job.name}: stopped at {reached}; kept {', '.join(map(str, files))}; resume=true goes on from there"
            )
        raise
    log.close(keep=keep_log)
    job.remove_partial(keep_log)
    for warning in info.warnings:
        display.warning(warning)
    display.summary(info, time.perf_counter() - begin, files)


def _describe(error: Exception, job: Job) -> str:
    """One line: what we raise ourselves says all there is to say, anything else gets its type and a way to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{job.name}: the disk of {job.base.parent} is full; free some space, then resume=true goes on"
    if isinstance(error, ValueError):
        return message
    return f"{job.name}: {message or 'failed'} ({type(error).__name__}; debug=true shows where)"
