"""A session: recordings to transcripts on disk, with one transcriber in memory.

    session = Session()
    for job in plan(find_recordings("talks/"), "transcripts"):
        session.transcribe(job, TranscriptionSettings(), Output(["txt", "srt"]), Display())

The command line, the web page and a server differ in where their settings come from and in what they show; what is
done with a recording is here. Whatever stops a transcription, what was decoded until then is on disk.
"""

from __future__ import annotations

import errno
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unique_asr.application.display import Display, format_time
from unique_asr.application.file_identity import identify_file, identify_remote
from unique_asr.application.jobs import LOG, PLOT, STDIN, Job, OutputError
from unique_asr.attention import SparseAttentionConfig
from unique_asr.audio import AudioError, AudioFile, explain_temporary_errors
from unique_asr.decoding.engine import PENDING, Pending
from unique_asr.longform.page_reads import PageReads
from unique_asr.remote import FetchLimits, is_uri
from unique_asr.subtitles import SubtitleLimits
from unique_asr.transcript import Transcript, TranscriptionInfo, Unfinished, text_settings
from unique_asr.writers import WRITERS, ResultWriter, SegmentLog, make_writers, open_replacement, read_transcript

if TYPE_CHECKING:
    from unique_asr.decoding.engine import Engine
    from unique_asr.decoding.engine import Sequence as DecodedSequence
    from unique_asr.transcribers.base import Transcriber


@dataclass(frozen=True)
class TranscriptionSettings:
    """What decides the text of a transcript: model and attention, what the model is told, and the part it hears.

    Attributes:
        options: further keyword arguments of `unique_asr.transcribers.make_transcriber`, such as device and dtype.
        prompt, language, hotwords: what the model is told; None: nothing.
        start, end: seconds of the recording between which it is transcribed.
        channel: 1 for the first one; None for the mean of all.
        track: 1 for the first audio track; None for the one that a player takes.
        vad: drop what is not speech.
    """

    model: str = "default"
    attention: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    language: str | None = None
    hotwords: str | None = None
    start: float = 0.0
    end: float | None = None
    channel: int | None = None
    vad: bool = False
    track: int | None = None

    @property
    def told(self) -> dict[str, str | None]:
        """The keyword arguments of `Transcriber.transcribe` that the model is told."""
        return {"prompt": self.prompt, "language": self.language, "hotwords": self.hotwords}

    @property
    def part(self) -> dict[str, Any]:
        """The keyword arguments of `AudioFile` that choose what is heard."""
        part = {"start": self.start, "end": self.end, "channel": self.channel}
        return {**part, "track": self.track, "vad": self.vad}

    @property
    def provenance(self) -> dict[str, Any]:
        """What the info of a transcript says of its making: model, attention, and the settings that change the text."""
        attention = self.attention.to_dict()
        if attention["combine"] is None:  # the model chooses it
            del attention["combine"]
        text = text_settings(max_pass_seconds=self.options.get("max_pass_seconds"), **self.part, **self.told)
        return {"model": self.model, **attention, **text}


@dataclass(frozen=True)
class Output:
    """Which files a transcription writes.

    Attributes:
        formats: extensions, in the order in which they are written.
        overwrite: replace the files that are there already; else they are kept.
        resume: go on with what an interrupted transcription left.
        keep_log: keep the log of segments beside the transcript.
        page_reads: draw which part of the audio each token was read from.
        subtitles: limits of their cues.
    """

    formats: Sequence[str] = tuple(WRITERS)
    overwrite: bool = False
    resume: bool = False
    keep_log: bool = False
    page_reads: bool = False
    subtitles: SubtitleLimits = field(default_factory=SubtitleLimits)

    @property
    def writers(self) -> Mapping[str, ResultWriter]:
        """A writer for each format."""
        return make_writers(self.subtitles)


@dataclass
class Outcome:
    """What became of several recordings.

    Attributes:
        durations: seconds of audio of each one that was transcribed now.
        failed: how many were not.
    """

    durations: list[float] = field(default_factory=list)
    failed: int = 0


def load_transcriber(**arguments: Any) -> Transcriber:
    """Call `unique_asr.transcribers.make_transcriber`, which takes seconds to import, when it is needed."""
    from unique_asr.transcribers import make_transcriber

    return make_transcriber(**arguments)


class Session:
    """Transcribes recordings to files; the transcriber is loaded when it is first needed, and kept.

    Used in a `with` block, it removes its temporary files at the end.

    Args:
        load: makes the transcriber, as `unique_asr.transcribers.make_transcriber` does.
        batch: recordings that `transcribe_all` decodes side by side.
        limits: how much is fetched of a recording that lies elsewhere, and how long that may take.
        began: value of `time.perf_counter` from which the time of the first recording counts; None: when it begins.
    """

    def __init__(
        self,
        load: Callable[..., Transcriber] = load_transcriber,
        batch: int = 1,
        limits: FetchLimits | None = None,
        began: float | None = None,
    ) -> None:
        self.batch, self.limits = batch, limits or FetchLimits()
        self._began = began
        self._load = load
        self._loaded: tuple[TranscriptionSettings, Transcriber] | None = None
        self._load_failed = False
        self._engine: Engine | None = None  # if recordings are decoded side by side
        self._last_notice = ""
        self._temporary = ExitStack()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.close()

    def load(self, settings: TranscriptionSettings, display: Display) -> None:
        """Load the transcriber now, rather than for the first recording.

        Raises:
            ValueError: if the model cannot be loaded.
        """
        self._get_transcriber(settings, display)

    def transcribe(
        self, job: Job, settings: TranscriptionSettings, output: Output, display: Display
    ) -> TranscriptionInfo | None:
        """Transcribe one recording.

        Returns:
            How it was transcribed; None if there was nothing to do.

        Raises:
            AudioError: if the recording cannot be read.
            OutputError: if the transcripts cannot be written, or what is there was made with other settings.
            ValueError: if the model cannot be loaded or told what it is told, or memory runs out.
        """
        task = self._transcribe(job, settings, output, display, alone=True)
        while True:
            try:
                next(task)
            except StopIteration as stop:
                return stop.value

    def transcribe_all(
        self,
        jobs: Sequence[Job],
        settings: TranscriptionSettings,
        output: Output,
        display: Display,
        debug: bool = False,
    ) -> Outcome:
        """Transcribe recordings, `batch` at a time; one that fails does not stop the others, but for an interrupt.

        Args:
            display: gets a line about each recording that failed.
            debug: raise the first error instead.
        """
        outcome, self._load_failed = Outcome(), False
        tasks = (
            self._attempt(job, number, len(jobs), settings, output, display, outcome, debug)
            for number, job in enumerate(jobs, start=1)
        )
        if self.batch == 1:
            for task in tasks:
                for _ in task:
                    pass
            return outcome
        from unique_asr.transcribers.batch import interleave

        for _ in interleave(tasks, self.batch, lambda: self._step(display)):
            pass
        return outcome

    def _attempt(
        self,
        job: Job,
        number: int,
        total: int,
        settings: TranscriptionSettings,
        output: Output,
        display: Display,
        outcome: Outcome,
        debug: bool,
    ) -> Generator[Pending, None, None]:
        """Transcribe one of several recordings; what goes wrong is shown and counted."""
        if self._load_failed:  # for one recording: it would for the next one
            return
        shown = display.for_recording(job.name) if self.batch > 1 else display
        if total > 1:
            shown.note(f"{job.name} ({number} of {total})")
        try:
            info = yield from self._transcribe(job, settings, output, shown)
            if info is not None:
                outcome.durations.append(info.duration)
        except Exception as error:
            if debug:
                raise
            shown.error(describe_error(error, job), job.name)
            outcome.failed += 1

    def _transcribe(
        self, job: Job, settings: TranscriptionSettings, output: Output, display: Display, alone: bool = False
    ) -> Generator[Pending, None, TranscriptionInfo | None]:
        """Transcribe one recording; yields where the engine has to make a step first."""
        begin, self._began = self._began or time.perf_counter(), None
        if job.audio == STDIN:
            job = replace(job, audio=self._copy_stdin())
        source = None
        if not is_uri(job.audio) or (not output.overwrite and job.has_changed()):
            job, source = self._open(job, settings, display)
        formats = find_missing_formats(job, output, settings.provenance, display)
        if not formats:
            return None
        if source is None:  # a URI is not fetched before it is needed
            job, source = self._open(job, settings, display)
        unfinished, keep = None, 0
        if output.resume:
            unfinished, keep = job.read_unfinished(settings.provenance)
        transcriber = self._get_transcriber(settings, display)
        sequence = self._engine.new_sequence() if self._engine and not alone else None
        log = SegmentLog(job.path(LOG), keep)
        reads = PageReads() if output.page_reads else None
        try:
            transcript, files = yield from write_transcript(
                job,
                source,
                formats,
                log,
                transcriber,
                settings.told,
                unfinished,
                display,
                reads,
                sequence,
                output.writers,
            )
        finally:
            if sequence is not None:
                self._engine.remove(sequence)
        log.close(keep=output.keep_log)
        job.remove_partial(output.keep_log)
        for warning in transcript.info.warnings:
            display.warning(warning)
        display.summary(transcript.info, time.perf_counter() - begin, files)
        return transcript.info

    def _open(self, job: Job, settings: TranscriptionSettings, display: Display) -> tuple[Job, AudioFile]:
        """Open a recording; that of a URI is a copy, which is also that of the job from now on."""
        if not is_uri(job.audio):
            return job, AudioFile(job.audio, **settings.part, name=job.name)
        with display:
            display.note(f"Fetching {job.name} ...")
            fetching = {"limits": self.limits, "progress": display.progress}
            source = AudioFile(job.audio, **settings.part, name=job.name, **fetching)
        return replace(job, audio=source.path, title=job.name), source

    def _get_transcriber(self, settings: TranscriptionSettings, display: Display) -> Transcriber:
        """Return the transcriber for these settings; with another attention alone, its model is taken over."""
        if self._loaded is not None:
            loaded, transcriber = self._loaded
            if (loaded.model, loaded.options) == (settings.model, settings.options):
                if loaded.attention != settings.attention:
                    self._keep(settings, transcriber.with_attention(settings.attention), display)
                return self._loaded[1]
            self._loaded = self._engine = None  # their memory is free before another model is loaded
            del transcriber
        try:
            with display:
                display.loading(settings.model)
                transcriber = self._load(
                    model=settings.model, attention=settings.attention, **settings.options, progress=display.progress
                )
        except Exception:
            self._load_failed = True
            raise
        self._keep(settings, transcriber, display)
        return transcriber

    def _keep(self, settings: TranscriptionSettings, transcriber: Transcriber, display: Display) -> None:
        self._loaded = settings, transcriber
        self._engine = transcriber.make_engine() if self.batch > 1 else None
        if self.batch > 1 and self._engine is None:
            display.note(f"batch={self.batch}: {transcriber.name} takes recordings one by one")

    def _step(self, display: Display) -> None:
        """Write the next token of every recording that is pending."""
        from unique_asr.transcribers.batch import step

        step(self._engine)
        if self._engine.notice != self._last_notice:
            self._last_notice = self._engine.notice
            display.note(self._last_notice)

    def _copy_stdin(self) -> Path:
        """Copy standard input to a temporary file: many containers are read from several places."""
        if sys.stdin is None:
            raise AudioError("audio=-: standard input is closed; pipe a recording into it")
        stream = sys.stdin.buffer
        if stream.isatty():
            raise AudioError("audio=-: standard input is a terminal; pipe a recording into it")
        with explain_temporary_errors():
            folder = self._temporary.enter_context(tempfile.TemporaryDirectory(prefix="unique-asr-"))
            path = Path(folder) / "stdin"
            with path.open("wb") as file:
                shutil.copyfileobj(stream, file)
        return path


def find_missing_formats(job: Job, output: Output, provenance: Mapping[str, Any], display: Display) -> list[str]:
    """Return the formats that are still to be transcribed; what cannot work is found before the model is loaded.

    What a .json of the same recording and provenance holds is written from there.

    Raises:
        OutputError: if files that are there were made with other settings, or the folder is not writable.
    """
    job.check_outputs()
    existing = [] if output.overwrite else job.find_existing(output.formats)
    missing = [extension for extension in output.formats if extension not in existing]
    difference = None if output.overwrite else job.find_difference(provenance)
    if existing and difference:
        raise OutputError(
            f"{job.path('json')}: was made from {difference}; "
            "output.overwrite=true replaces it, output.dir=FOLDER writes elsewhere"
        )
    if existing:
        display.kept(job.name, [job.path(extension) for extension in existing])
    if not missing:
        return []
    job.check_writable()
    if not output.overwrite and not difference and job.path("json").exists():
        files = job.write(read_transcript(job.path("json")), missing, output.writers)
        display.note(f"{job.name}: wrote {', '.join(map(str, files))} from {job.path('json')}")
        return []
    return missing


def write_transcript(
    job: Job,
    source: AudioFile,
    formats: Sequence[str],
    log: SegmentLog,
    transcriber: Transcriber,
    told: Mapping[str, str | None],
    unfinished: Unfinished | None,
    display: Display,
    reads: PageReads | None = None,
    sequence: DecodedSequence | None = None,
    writers: Mapping[str, ResultWriter] = WRITERS,
) -> Generator[Pending, None, tuple[Transcript, list[Path]]]:
    """Transcribe a recording to its files; whatever stops it, the segments decoded until then are on disk.

    Args:
        log: gets each segment as it is decoded; stays open at the end.
        told: prompt, language and hotwords for the model.
        unfinished: where to go on; its segments are shown and written too.
        reads: is drawn as one of the files.
        sequence: of the engine that decodes; PENDING comes where the engine has to make a step first.
        writers: of the formats.

    Returns:
        The transcript, and the files.
    """
    transcript: Transcript | None = None
    try:
        with display:
            if reads is not None and not transcriber.records_reads:
                raise ValueError(f"reads=true: model={transcriber.name} does not record what its steps read")
            segments, info = transcriber.transcribe(
                source,
                **told,
                progress=display.progress,
                unfinished=unfinished,
                on_pass=log.begin_pass,
                reads=reads,
                sequence=sequence,
            )
            info.file = identify_remote(source.copy) if source.copy else identify_file(source.path)
            log.info = info
            transcript = Transcript([], info)
            if unfinished is not None and unfinished.segments:
                display.note(f"{job.name}: going on from {format_time(unfinished.segments[-1].end)}")
                for segment in unfinished.segments:
                    transcript.segments.append(segment)
                    display.segment(segment, job.name)
            for segment in segments:
                if segment is PENDING:
                    yield PENDING
                    continue
                transcript.segments.append(segment)
                log.append(segment)
                display.segment(segment, job.name)
        files = job.write(transcript, formats, writers)
        if reads is not None:
            files.append(job.path(PLOT))
            with open_replacement(files[-1]) as file:
                file.write(reads.svg())
    except BaseException as error:
        log.close(keep=True)
        if transcript is not None and transcript.segments:
            segments.close()  # the transcriber completes the info
            info.stop_reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
            files = keep_partial(job, transcript, formats, log, writers)
            reached = format_time(transcript.segments[-1].end)
            display.note(
                f"{job.name}: stopped at {reached}; kept {', '.join(map(str, files))}; resume=true goes on from there"
            )
        raise
    return transcript, files


def keep_partial(
    job: Job,
    transcript: Transcript,
    formats: Sequence[str],
    log: SegmentLog,
    writers: Mapping[str, ResultWriter] = WRITERS,
) -> list[Path]:
    """Write what there is of a transcript that broke off; return the files, the log first."""
    files = [log.path] if log.path.exists() else []
    try:
        return files + job.write_partial(transcript, formats, writers)
    except OSError:  # the disk is full: the log is what is left
        job.remove_partial(keep_log=True)
        return files


def describe_error(error: Exception, job: Job) -> str:
    """Return one line: the message of an error of ours, of any other its type and a way to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{job.name}: the disk of {job.base.parent} is full; free some space, then resume=true goes on"
    if isinstance(error, ValueError):
        return message
    return f"{job.name}: {message or 'failed'} ({type(error).__name__}; debug=true shows where)"
