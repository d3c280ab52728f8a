"""The task `speech`: decode and score every system on every set of recordings, and write the results."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from unique_asr.data import Recording, join, take_evenly
from unique_asr.evaluation.decodings import Decodings
from unique_asr.evaluation.harness import System, evaluate
from unique_asr.evaluation.readers import read_recordings
from unique_asr.evaluation.report import find_dense, write_results
from unique_asr.evaluation.results import Hypothesis, SystemResult
from unique_asr.evaluation.scoring import compare_rates
from unique_asr.evaluation.streams import MAX_STREAMS, run_in_threads
from unique_asr.evaluation.system_builder import build_systems


def evaluate_speech(config: DictConfig, results: list[SystemResult]) -> None:
    """Evaluate the systems of a run, print a line for each, and write the files of `output.dir`.

    Args:
        config: of the command.
        results: those of the folder so far, from other jobs of a multirun; new ones are added.

    Raises:
        ValueError: options do not fit, or with `decode=false` nothing was decoded before.
    """
    sets = read_sets(config.data)
    for name, recordings in sets.items():
        hours = sum(recording.duration for recording in recordings) / 3600
        title = f" of {name}" if name else ""
        print(f"{len(recordings)} recordings{title}, {hours:.2f} h of {config.data.manifest}; "
              "scorer: Whisper's English normaliser")  # fmt: skip
    folder = Path(config.output.dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = OmegaConf.to_container(config)
    if config.concurrent > MAX_STREAMS:
        raise ValueError(f"concurrent={config.concurrent}: give at most {MAX_STREAMS}, one for each CUDA stream")
    dense = DenseHypotheses()
    systems = [
        (system, about, Decodings(folder / "decodings", about, config.resume))
        for system, about in build_systems(config)
    ]

    def decode(system: System, about: dict[str, Any], decodings: Decodings) -> None:
        pending = [(recordings, dense.find_reusable(recordings, about)) for recordings in sets.values()]
        for together in [pending] if config.together else [[each] for each in pending]:
            decode_sets(system, together, decodings)

    beside = []  # systems that are decoded beside each other, once dense is done
    if config.concurrent > 1:
        beside = [each for each in systems if "attention" in each[1] and each[0].name != "dense"]
    for system, about, decodings in systems:
        if config.decode and beside and system is beside[0][0]:
            run_in_threads([functools.partial(decode, *each) for each in beside], config.concurrent, config.device)
            beside = []
        elif config.decode and config.together:
            decode(system, about, decodings)
        for name, recordings in sets.items():
            reusable = dense.find_reusable(recordings, about)
            done = sum(recording in reusable or decodings.get(recording) is not None for recording in recordings)
            if done < len(recordings) and not config.decode:
                what = f"{system.name} {name}".strip()
                print(f"{what}: left out, {done} of {len(recordings)} recordings decoded", file=sys.stderr)
                continue
            stem = f"{system.name}@{name.replace(' ', '')}" if name else system.name
            result = evaluate_system(system, recordings, folder / f"{stem}.jsonl", decodings, reusable)
            result.set, result.budget = name, about.get("attention", {}).get("budget")
            dense.add(result, about)
            results[:] = [each for each in results if (each.system, each.set) != (result.system, name)] + [result]
            print(summarize(result, results), flush=True)
            if done < len(recordings):
                write_results(folder, results, settings)
    if not results:
        raise ValueError(f"{folder}: nothing was decoded yet with these settings; leave out decode=false")
    write_results(folder, results, settings)


def read_sets(data: DictConfig) -> dict[str, list[Recording]]:
    """Read the recordings, joined to each length in `data.join_minutes`.

    Args:
        data: the group `data` of conf/evaluate.yaml.

    Returns:
        Recordings by the name of their set, such as `10 min`; one set without a name if no lengths are listed.

    Raises:
        ValueError: lengths are given both in minutes and in seconds.
        ManifestError: the recordings cannot be read.
    """
    source = OmegaConf.to_container(data)["source"]
    recordings = read_recordings(data.manifest, data.audio, source, data.select)
    minutes = data.join_minutes
    if minutes is not None and data.join_seconds is not None:
        raise ValueError("data.join_minutes and data.join_seconds are both set: give one of them")
    if minutes is None:
        lengths = {"": data.join_seconds}
    elif isinstance(minutes, (int, float)):
        lengths = {"": 60 * minutes}
    else:
        lengths = {f"{each:g} min": 60 * each for each in minutes}
    sets = {}
    for name, seconds in lengths.items():
        joined = recordings
        if seconds is not None:
            joined = join(recordings, seconds, data.join_within or ("recording" if seconds <= 60 else "all"))
            if data.join_full:  # the last recording of a group is as short as what was left
                joined = [recording for recording in joined if recording.duration >= 0.8 * seconds] or joined
        sets[name] = take_evenly(joined, data.limit)
    return sets


def decode_sets(
    system: System, sets: Sequence[tuple[Sequence[Recording], Mapping[Recording, Hypothesis]]], decodings: Decodings
) -> None:
    """Decode what is missing of several sets in the same batches, the longest recordings first.

    Args:
        system: what decodes.
        sets: recordings, and the hypotheses that are known of them, which are not decoded again.
        decodings: what was decoded before; new hypotheses are added.
    """
    missing = {
        recording: None  # in order, and once
        for recordings, known in sets
        for recording in recordings
        if recording not in known and decodings.get(recording) is None
    }
    if not missing:
        return
    pending = sorted(missing, key=lambda recording: -recording.duration)
    for index, hypothesis in system.transcribe(pending):
        decodings.put(pending[index], hypothesis)


class DenseHypotheses:
    """What dense attention wrote: every method whose budget holds a recording's longest pass writes the same."""

    def __init__(self) -> None:
        self._about: dict[str, Any] = {}
        self._hypotheses: dict[Recording, Hypothesis] = {}

    def add(self, result: SystemResult, about: dict[str, Any]) -> None:
        """Keep the hypotheses of `result` if it is of dense attention; about: what its texts depend on."""
        if result.system == "dense":
            self._about = about
            self._hypotheses |= zip(result.recordings, result.hypotheses, strict=True)

    def find_reusable(self, recordings: Sequence[Recording], about: dict[str, Any]) -> dict[Recording, Hypothesis]:
        """Find the hypotheses that a system would write too; about: what its texts depend on."""
        own, dense = (
            {key: value for key, value in each.items() if key not in ("system", "attention")}
            for each in (about, self._about)
        )
        chunk = own.pop("chunk_seconds", None)
        budget = about.get("attention", {}).get("budget")
        if budget is None or own != dense:
            return {}
        found = {recording: self._hypotheses.get(recording) for recording in recordings}
        return {
            recording: hypothesis
            for recording, hypothesis in found.items()
            if hypothesis is not None
            and hypothesis.longest is not None
            and hypothesis.longest <= budget
            and (chunk is None or recording.duration <= chunk)
        }


def evaluate_system(
    system: System,
    recordings: Sequence[Recording],
    path: Path,
    decodings: Decodings | None = None,
    known: Mapping[Recording, Hypothesis] | None = None,
) -> SystemResult:
    """Score one system and write a row for each recording.

    Args:
        system: what transcribes.
        recordings: what is transcribed.
        path: the JSON lines file of the rows. A row is written as soon as its hypothesis is there; in the end the rows
            are in the order of `recordings`.
        decodings, known: hypotheses that are not decoded again; see `harness.evaluate`.
    """
    console = Console(stderr=True)
    bars = Progress(console=console, transient=True, disable=not console.is_terminal)
    with path.open("w", encoding="utf-8") as lines, bars:
        task = bars.add_task(system.name, total=sum(recording.duration for recording in recordings))

        def write_row(result: SystemResult) -> None:
            lines.write(json.dumps(result.make_row(-1), ensure_ascii=False) + "\n")
            lines.flush()
            bars.update(task, completed=result.audio_seconds, description=f"{system.name} {result.score.wer:.2%}")

        result = evaluate(system, recordings, write_row, decodings, known)
    rows = (json.dumps(result.make_row(index), ensure_ascii=False) + "\n" for index in range(len(recordings)))
    path.write_text("".join(rows), encoding="utf-8")
    return result


def summarize(result: SystemResult, results: Sequence[SystemResult]) -> str:
    """Write the console line of a system, compared with dense attention if that is among `results`."""
    dense = find_dense(result, results)
    if dense is None or not result.sum_counter("steps"):
        return str(result)
    difference, low, high = compare_rates(result.errors, dense.errors)
    interval = f"[{low:+.1%}, {high:+.1%}] " if len(result.recordings) > 1 else ""
    return f"{result} | {difference:+.1%} {interval}to dense"
