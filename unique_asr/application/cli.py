"""The command line: `unique-asr audio=talk.m4a`, or in a checkout `python scripts/transcribe.py audio=talk.m4a`."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from unique_asr import _BEGAN
from unique_asr.application.display import ConsoleDisplay, JSONLines, format_speed
from unique_asr.application.jobs import Job, find_recordings, plan, resolve_formats
from unique_asr.application.overrides import FAILED, INTERRUPTED, SUCCESS, USAGE, run, whole_number
from unique_asr.application.session import Outcome, Output, Session, TranscriptionSettings, load_transcriber
from unique_asr.attention import SparseAttentionConfig
from unique_asr.audio import AudioError, check_part, parse_time
from unique_asr.remote import FetchLimits
from unique_asr.subtitles import SubtitleLimits

if TYPE_CHECKING:
    from unique_asr.transcribers.base import Transcriber

# Transcribes jobs elsewhere than in this process, with transcribers that the last argument makes. It raises ValueError
# before it begins, if an option does not fit.
Runner = Callable[
    [DictConfig, Sequence[Job], TranscriptionSettings, Output, ConsoleDisplay, Callable[..., "Transcriber"]], Outcome
]

LITERAL_KEYS = (
    *("audio", "start", "end", "language", "hotwords", "ray.address"),
    *("output.dir", "output.format", "model.name_or_path", "decoding.prompt"),
)
LITERAL_GROUPS = {"model": "model.name_or_path"}


def main(
    arguments: Sequence[str] | None = None,
    load: Callable[..., Transcriber] = load_transcriber,
    runners: Mapping[str, Runner] | None = None,
) -> None:
    """Transcribe what the arguments name, and exit.

    Args:
        arguments: by default those of the process.
        load: makes the transcriber from its settings.
        runners: by the names that `runner=` has for them, besides `local`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container that is stopped keeps its work too
    began = _BEGAN if arguments is None else time.perf_counter()
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = [*read_saved_attention(arguments), *arguments]
    sys.exit(
        run(
            lambda config: transcribe(config, load, runners, began),
            "transcribe",
            arguments,
            LITERAL_KEYS,
            LITERAL_GROUPS,
        )
    )


def transcribe(
    config: DictConfig,
    load: Callable[..., Transcriber] = load_transcriber,
    runners: Mapping[str, Runner] | None = None,
    began: float | None = None,
) -> int:
    """Transcribe every recording that config.audio names, and return the exit code.

    Args:
        load, runners: as for `main`.
        began: value of `time.perf_counter` from which the time of the summary counts, imports included; None: now.
    """
    began = began or time.perf_counter()
    display = (JSONLines if config.jsonl else ConsoleDisplay)(config.quiet)
    if OmegaConf.is_missing(config, "audio") or not config.audio:
        program = "unique-asr" if sys.argv[0].endswith("unique-asr") else "python scripts/transcribe.py"
        display.usage(
            f"{program} audio=FILE [output.format=srt] [output.dir=FOLDER] [attention=dense] [device=cpu] ..."
        )
        return USAGE
    try:
        audio = OmegaConf.to_container(config.audio) if OmegaConf.is_list(config.audio) else config.audio
        output = read_output(config)
        jobs = plan(find_recordings(audio), config.output.dir)
        batch, limits = read_batch(config), read_limits(config)
        settings = read_settings(config)
        runner = find_runner(config, runners or {})
    except AudioError as error:
        display.error(str(error))
        return FAILED
    except ValueError as error:
        display.error(str(error))
        return USAGE
    try:
        if runner is not None:
            outcome = runner(config, jobs, settings, output, display, load)
            return FAILED if outcome.failed else SUCCESS
        with Session(load, batch, limits, began) as session:
            outcome = session.transcribe_all(jobs, settings, output, display, config.debug)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:  # an option of the runner; the session's are told by the session
        if config.debug:
            raise
        display.error(str(error))
        return USAGE
    if batch > 1 and len(outcome.durations) > 1:
        speed = format_speed(sum(outcome.durations), time.perf_counter() - began)
        display.note(f"{len(outcome.durations)} recordings: {speed}")
    return FAILED if outcome.failed else SUCCESS


def read_saved_attention(arguments: Sequence[str]) -> list[str]:
    """Return options with the attention that the model's folder was fine-tuned for; none if `attention=` is given."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    model = given.get("model") or given.get("model.name_or_path")
    if not model or "attention" in given or not (path := Path(model) / "config.json").is_file():
        return []
    try:
        saved = json.loads(path.read_text(encoding="utf-8")).get("sparse_attention") or {}
    except (ValueError, AttributeError):
        return []  # loading will say what is wrong
    return [f"attention.{name}={'null' if value is None else value}" for name, value in saved.items()]


def read_output(config: DictConfig) -> Output:
    """Return which files are wanted. Raises ValueError if a format is unknown, or a limit of subtitles does not fit."""
    limits = {limit.name: config.output[limit.name] for limit in fields(SubtitleLimits)}
    return Output(
        formats=resolve_formats(config.output.format),
        overwrite=config.output.overwrite,
        resume=config.resume,
        keep_log=config.output.keep_log,
        page_reads=config.output.reads,
        subtitles=SubtitleLimits(**limits),
    )


def find_runner(config: DictConfig, runners: Mapping[str, Runner]) -> Runner | None:
    """Return what `runner=` names, None for this process. Raises ValueError if there is no such runner."""
    if config.runner != "local" and config.runner not in runners:
        raise ValueError(f"runner={config.runner}: choose from {', '.join(['local', *runners])}")
    return runners.get(config.runner)


def read_limits(config: DictConfig) -> FetchLimits:
    """Return how much is fetched of a URI. Raises ValueError if a limit is no positive number."""
    for name, value in config.fetch.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"fetch.{name}={value}: give a positive number")
    return FetchLimits(**config.fetch)


def read_batch(config: DictConfig) -> int:
    """Return how many recordings are decoded side by side. Raises ValueError if that is no number, or cannot be."""
    batch = whole_number(config, "batch", "recordings")
    if batch > 1 and config.output.reads:
        raise ValueError("output.reads=true: draws what one recording alone was read from; use batch=1")
    return batch


def read_settings(config: DictConfig) -> TranscriptionSettings:
    """Return the settings of the transcription. Raises ValueError, in one line, if one does not fit."""
    options = OmegaConf.to_container(config.decoding)
    prompt = options.pop("prompt")
    whole_number(config.decoding, "prefill_chunk", "audio positions")
    longest = config.decoding.max_pass_seconds
    if longest is not None and (not isinstance(longest, int | float) or isinstance(longest, bool) or not longest > 0):
        raise ValueError(f"decoding.max_pass_seconds={longest}: give a positive number of seconds")
    return TranscriptionSettings(
        model=config.model.name_or_path,
        attention=SparseAttentionConfig(**OmegaConf.to_container(config.attention)),
        options={
            "device": config.device,
            "dtype": config.dtype,
            "parallel_passes": whole_number(config, "parallel_passes", "passes"),
            **options,
        },
        prompt=prompt,
        **_read_told(config),
        **_read_part(config),
    )


def _read_told(config: DictConfig) -> dict[str, str | None]:
    """Code of the language and hotwords; the prompt is checked too: not every model can be told everything."""
    prompt = config.decoding.prompt
    if not (config.language or config.hotwords or prompt):
        return {}
    from unique_asr.transcribers import check_hotwords, check_language, check_prompt

    model = config.model.name_or_path
    check_prompt(prompt and str(prompt), model)
    return {
        "language": check_language(config.language and str(config.language), model),
        "hotwords": check_hotwords(config.hotwords and str(config.hotwords), model),
    }


def _read_part(config: DictConfig) -> dict[str, Any]:
    """The part of a recording that is transcribed."""
    channel = config.channel
    if channel != "mix" and not (isinstance(channel, int) and channel >= 1):
        raise ValueError(f"channel={channel}: give mix, or a number: 1 is the left one")
    track = config.track
    if track is not None and not (isinstance(track, int) and track >= 1):
        raise ValueError(f"track={track}: give null, or a number: 1 is the first audio track")
    try:
        start, end = parse_time(config.start) or 0.0, parse_time(config.end)
    except ValueError as error:
        raise ValueError(f"start={config.start} end={config.end}: {error}") from error
    try:
        check_part(start, end)
    except AudioError as error:  # of the option, not of a recording
        raise ValueError(str(error)) from error
    channel = None if channel == "mix" else channel
    return {"start": start, "end": end, "channel": channel, "track": track, "vad": config.vad}
