"""The command line: `python scripts/transcribe.py audio=talk.m4a`, or `unique-asr audio=talk.m4a` once installed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.display import Display, JSONLines, format_time, speed
from unique_asr.application.jobs import STDIN, Job, OutputError, find_recordings, plan, resolve_formats
from unique_asr.application.overrides import run, whole_number
from unique_asr.audio import AudioError, AudioFile, parse_time
from unique_asr.decoding.engine import PENDING
from unique_asr.longform.page_reads import PageReads
from unique_asr.transcript import Segment, Transcript, TranscriptionInfo, Unfinished, text_settings
from unique_asr.writers import SegmentLog, read_transcript

SUCCESS, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes
LITERAL_KEYS = (
    *("audio", "start", "end", "language", "hotwords"),
    *("output.dir", "output.format", "model.name_or_path", "decoding.prompt"),
)
LITERAL_GROUPS = {"model": "model.name_or_path"}


class Transcriber(Protocol):
    """`unique_asr.transcribers.speech_llm.SpeechLLMTranscriber`, or a stand-in for it in a test."""

    name: str
    records_reads: bool  # whether `transcribe` takes `reads`, a PageReads, too

    def make_engine(self) -> Any: ...

    def transcribe(
        self,
        audio: AudioFile,
        *,
        prompt: str | None,
        language: str | None,
        hotwords: str | None,
        progress: Callable[[str, float, float], None],
        unfinished: Unfinished | None,
        on_pass: Callable[[dict[str, Any]], None],
    ) -> tuple[Iterator[Segment | None], TranscriptionInfo]: ...


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
        run(task, "transcribe", [*saved_attention(arguments), *arguments], LITERAL_KEYS, LITERAL_GROUPS)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def saved_attention(arguments: Sequence[str]) -> list[str]:
    """Options with the attention that the model's folder was fine-tuned for; none if `attention=` chooses another."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    model = given.get("model") or given.get("model.name_or_path")
    if not model or "attention" in given or not (path := Path(model) / "config.json").is_file():
        return []
    try:
        saved = json.loads(path.read_text(encoding="utf-8")).get("sparse_attention") or {}
    except (ValueError, AttributeError):
        return []  # loading will say what is wrong
    return [f"attention.{name}={'null' if value is None else value}" for name, value in saved.items()]


def load_transcriber(**settings: Any) -> Transcriber:
    from unique_asr.transcribers import make_transcriber

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
        batch = batch_size(config)
        settings = transcriber_settings(config)
        told = told_of_recordings(config)
        part = audio_part(config)
    except AudioError as error:
        display.error(str(error))
        return FAILED
    except ValueError as error:
        display.error(str(error))
        return USAGE

    from unique_asr.transcribers.batch import interleave

    with ExitStack() as temporary:
        run = Run(config, formats, settings, told, part, load, display, temporary)
        tasks = (run.recording(job, number, len(jobs)) for number, job in enumerate(jobs, start=1))
        begin = time.perf_counter()
        try:
            for _ in interleave(tasks, batch, run.step):
                pass
        except KeyboardInterrupt:
            return INTERRUPTED
    if batch > 1 and len(run.done) > 1:
        display.note(f"{len(run.done)} recordings: {speed(sum(run.done), time.perf_counter() - begin)}")
    return run.code


class Run:
    """What the recordings of one command share: settings, the model, and the exit code."""

    def __init__(
        self,
        config: DictConfig,
        formats: Sequence[str],
        settings: dict[str, Any],
        told: dict[str, str | None],
        part: dict[str, Any],
        load: Callable[..., Transcriber],
        display: Display,
        temporary: ExitStack,
    ) -> None:
        self.config, self.formats, self.settings, self.told, self.part = config, formats, settings, told, part
        self._load, self.display, self.temporary = load, display, temporary
        self.transcriber: Transcriber | None = None  # from the first recording that needs it
        self.engine: Any = None  # if they are decoded side by side
        self.code = SUCCESS
        self.done: list[float] = []  # seconds of the recordings that were transcribed
        self._unusable = False  # a model that does not load for one recording does not load for the next one
        self._noticed = ""

    def recording(self, job: Job, number: int, total: int) -> Generator[None, None, None]:
        """One recording to its files; yields where its next token waits for `step`. An error ends it alone."""
        if self._unusable:
            return
        config, sequence = self.config, None
        display = self.display.beside(job.name) if config.batch > 1 else self.display
        if total > 1:
            display.note(f"{job.name} ({number} of {total})")
        begin = time.perf_counter()
        try:
            if job.audio == STDIN:
                job = replace(job, audio=spool(sys.stdin.buffer, self.temporary))
            source = AudioFile(job.audio, **self.part, name=job.name)
            text = text_settings(max_pass_seconds=config.decoding.max_pass_seconds, **self.part, **self.told)
            made_from = made_with(self.settings, text)
            missing = missing_formats(job, self.formats, config.output.overwrite, source, made_from, display)
            if not missing:
                return
            unfinished, keep = job.unfinished(source.duration, made_from) if config.resume else (None, 0)
            self.load()
            sequence = self.engine.new_sequence() if self.engine else None
            log = SegmentLog(job.partial_path("jsonl"), keep)
            reads = PageReads() if config.output.reads else None
            keep_log = config.output.keep_log
            info = yield from transcription(
                *(job, source, missing, log, keep_log, self.transcriber),
                *(self.told, unfinished, display, begin, reads, sequence),
            )
            self.done.append(info.duration)
        except Exception as error:
            if config.debug:
                raise
            display.error(_describe(error, job), job.name)
            self.code = FAILED
            self._unusable = self.transcriber is None and not isinstance(error, AudioError | OutputError)
        finally:
            if sequence is not None:
                self.engine.remove(sequence)

    def load(self) -> None:
        """The model, if it is not there yet."""
        if self.transcriber is not None:
            return
        from unique_asr.transcribers.batch import make_engine

        with self.display as display:
            self.transcriber = self._load(**self.settings, progress=display.progress)
        self.engine = make_engine(self.transcriber, self.config.batch)
        if self.config.batch > 1 and self.engine is None:
            self.display.note(f"batch={self.config.batch}: {self.transcriber.name} takes recordings one by one")

    def step(self) -> None:
        """Give every recording that waits its next token."""
        from unique_asr.transcribers.batch import step

        step(self.engine)
        if self.engine.notice != self._noticed:
            self._noticed = self.engine.notice
            self.display.note(self._noticed)


def batch_size(config: DictConfig) -> int:
    batch = whole_number(config, "batch", "recordings")
    if batch > 1 and config.output.reads:
        raise ValueError("output.reads=true: draws what one recording alone was read from; use batch=1")
    return batch


def told_of_recordings(config: DictConfig) -> dict[str, str | None]:
    """What the model is told: prompt, code of the language, and hotwords; the last two only if it can be told them."""
    told = {"prompt": config.decoding.prompt, "language": None, "hotwords": None}
    if config.language or config.hotwords:
        from unique_asr.transcribers import check_hotwords, check_language

        model = config.model.name_or_path
        told["language"] = check_language(config.language and str(config.language), model)
        told["hotwords"] = check_hotwords(config.hotwords and str(config.hotwords), model)
    return told


def transcriber_settings(config: DictConfig) -> dict[str, Any]:
    """The keyword arguments of `unique_asr.transcribers.speech_llm.SpeechLLMTranscriber`."""
    from unique_asr.attention import SparseAttentionConfig

    decoding = OmegaConf.to_container(config.decoding)
    del decoding["prompt"]  # of a recording, not of the transcriber
    return {
        "model": config.model.name_or_path,
        "attention": SparseAttentionConfig(**OmegaConf.to_container(config.attention)),
        "device": config.device,
        "dtype": config.dtype,
        "parallel_passes": whole_number(config, "parallel_passes", "passes"),
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
    attention = settings["attention"].to_dict()
    if attention["combine"] is None:  # the model chooses it
        del attention["combine"]
    return {"model": settings["model"], **attention, **text}


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


def transcribe_one(*arguments: Any) -> None:
    """`transcription` of a recording that has none beside it."""
    for _ in transcription(*arguments):
        pass


def transcription(
    job: Job,
    source: AudioFile,
    formats: Sequence[str],
    log: SegmentLog,
    keep_log: bool,
    transcriber: Transcriber,
    told: dict[str, str | None],
    unfinished: Unfinished | None,
    display: Display,
    begin: float,
    reads: PageReads | None = None,
    sequence: Any = None,
) -> Generator[None, None, TranscriptionInfo]:
    """One recording to its files. Whatever stops it, the segments decoded until then are on disk.

    told: prompt, language and hotwords for the model.
    begin: the clock when work on the recording began; loading the model for it counts.
    reads: is drawn as one of the files; see `unique_asr.longform.page_reads.PageReads`.
    sequence: of the engine that decodes; the generator yields where the engine has to make a step.
    """
    transcript: Transcript | None = None
    try:
        with display:
            if reads is not None and not transcriber.records_reads:
                raise ValueError(f"reads=true: model={transcriber.name} does not record what its steps read")
            more = ({} if reads is None else {"reads": reads}) | ({} if sequence is None else {"sequence": sequence})
            iterator, info = transcriber.transcribe(
                source,
                **told,
                progress=display.progress,
                unfinished=unfinished,
                on_pass=log.pass_begins,
                **more,
            )
            log.info = info
            transcript = Transcript([], info)
            if unfinished is not None and unfinished.segments:
                display.note(f"{job.name}: going on from {format_time(unfinished.segments[-1].end)}")
                for segment in unfinished.segments:
                    transcript.segments.append(segment)
                    display.segment(segment, job.name)
            for segment in iterator:
                if segment is PENDING:
                    yield PENDING
                    continue
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
    return info


def _describe(error: Exception, job: Job) -> str:
    """One line: what we raise ourselves says all there is to say, anything else gets its type and a way to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{job.name}: the disk of {job.base.parent} is full; free some space, then resume=true goes on"
    if isinstance(error, ValueError):
        return message
    return f"{job.name}: {message or 'failed'} ({type(error).__name__}; debug=true shows where)"
