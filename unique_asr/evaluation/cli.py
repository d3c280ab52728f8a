"""The command behind scripts/evaluate.py: one line a system on the console, everything else in output.dir."""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from unique_asr.application.overrides import conf_folder, run, whole_number
from unique_asr.attention import SparseAttentionConfig
from unique_asr.data import Recording, join, spread
from unique_asr.evaluation.decodings import Decodings, identity
from unique_asr.evaluation.harness import Hypothesis, Result, System, evaluate
from unique_asr.evaluation.methods import METHODS, RivalConfig, Sliding
from unique_asr.evaluation.readers import read_recordings
from unique_asr.evaluation.report import dense_of, write_results
from unique_asr.evaluation.scoring import relative_difference
from unique_asr.evaluation.streams import STREAMS, in_threads

PATHS = (
    "data.manifest",
    "data.audio",
    "reference",
    "encoded",
    "output.dir",
    "model.name_or_path",
    "text.model",
    "text.file",
    "text.qa",
)
TASKS = ("speech", "ruler", "counting", "perplexity")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs and exits; what the user can cure is one line on the console and exit code 1."""
    # Before transformers is imported: its notices and bars would break into the table.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = 0
    tables: dict[str, list] = {}  # by folder: the jobs of a multirun that share one share its table

    def task(config: DictConfig) -> None:
        nonlocal code
        try:
            if config.task not in TASKS:
                raise ValueError(f"task is {config.task!r}: choose one of {', '.join(TASKS)}")
            if config.task == "speech":
                evaluate_systems(config, tables.setdefault(config.output.dir, []))
            else:
                from unique_asr.evaluation.text import evaluate_text

                evaluate_text(config, attention_systems(config), tables.setdefault(config.output.dir, []))
        except (OSError, ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1

    run(task, "evaluate", sys.argv[1:] if arguments is None else arguments, PATHS, {"model": "model.name_or_path"})
    sys.exit(code)


def evaluate_systems(config: DictConfig, results: list[Result]) -> None:
    """Adds to `results`, which are those of the folder, and writes all of them."""
    if OmegaConf.is_missing(config.data, "manifest"):
        raise ValueError("data.manifest is missing: evaluate.py data.manifest=FILE (--help shows every option)")
    sets = load_sets(config.data)
    for name, recordings in sets.items():
        hours = sum(recording.duration for recording in recordings) / 3600
        title = f" of {name}" if name else ""
        print(f"{len(recordings)} recordings{title}, {hours:.2f} h of {config.data.manifest}; "
              "scorer: Whisper's English normaliser")  # fmt: skip
    folder = Path(config.output.dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = OmegaConf.to_container(config)
    dense, concurrent = Dense(), whole_number(config, "concurrent", "methods and budgets")
    if concurrent > STREAMS:
        raise ValueError(f"concurrent={concurrent}: give at most {STREAMS}, one for each CUDA stream")
    systems = [
        (system, made_of, Decodings(folder / "decodings", made_of, config.resume))
        for system, made_of in build_systems(config)
    ]

    def decode(system: System, made_of: dict[str, Any], decodings: Decodings) -> None:
        pending = [(each, dense.same(each, made_of)) for each in sets.values()]
        for together in [pending] if config.together else [[each] for each in pending]:
            decode_together(system, together, decodings)

    beside = [each for each in systems if "attention" in each[1] and each[0].name != "dense"] if concurrent > 1 else []
    for system, made_of, decodings in systems:
        if config.decode and beside and system is beside[0][0]:
            in_threads([functools.partial(decode, *each) for each in beside], concurrent, config.device)
            beside = []
        elif config.decode and config.together:
            decode(system, made_of, decodings)
        for name, recordings in sets.items():
            known = dense.same(recordings, made_of)
            there = sum(recording in known or decodings.get(recording) is not None for recording in recordings)
            if there < len(recordings) and not config.decode:
                what = f"{system.name} {name}".strip()
                print(f"{what}: left out, {there} of {len(recordings)} recordings decoded", file=sys.stderr)
                continue
            stem = f"{system.name}@{name.replace(' ', '')}" if name else system.name
            result = evaluate_system(system, recordings, folder / f"{stem}.jsonl", decodings, known)
            result.set, result.budget = name, made_of.get("attention", {}).get("budget")
            dense.add(result, made_of)
            results[:] = [each for each in results if (each.system, each.set) != (result.system, name)] + [result]
            print(summary(result, results), flush=True)
            if there < len(recordings):
                write_results(folder, results, settings)
    if not results:
        raise ValueError(f"{folder}: nothing was decoded yet with these settings; leave out decode=false")
    write_results(folder, results, settings)


def decode_together(
    system: System, sets: Sequence[tuple[Sequence[Recording], Mapping[Recording, Hypothesis]]], decodings: Decodings
) -> None:
    """Decode what is missing of the recordings of every set, and not known, in the same batches, the longest first."""
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


class Dense:
    """What dense attention wrote: so does every method whose budget holds the whole of a recording's passes."""

    def __init__(self) -> None:
        self._made_of: dict[str, Any] = {}
        self._hypotheses: dict[Recording, Hypothesis] = {}

    def add(self, result: Result, made_of: dict[str, Any]) -> None:
        if result.system == "dense":
            self._made_of = made_of
            self._hypotheses |= zip(result.recordings, result.hypotheses, strict=True)

    def same(self, recordings: Sequence[Recording], made_of: dict[str, Any]) -> dict[Recording, Hypothesis]:
        """The hypotheses of dense attention that a system made of this would write too."""
        own, its = (
            {key: value for key, value in about.items() if key not in ("system", "attention")}
            for about in (made_of, self._made_of)
        )
        chunk = own.pop("chunk_seconds", None)
        budget = made_of.get("attention", {}).get("budget")
        if budget is None or own != its:
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


def load_sets(data: DictConfig) -> dict[str, list[Recording]]:
    """The recordings by the name of their set: one for each length in data.join_minutes, one without a name if none."""
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
            if data.join_full:  # the last of a group is as short as what was left
                joined = [recording for recording in joined if recording.duration >= 0.8 * seconds] or joined
        sets[name] = spread(joined, data.limit)
    return sets


def evaluate_system(
    system: System,
    recordings: Sequence[Recording],
    path: Path,
    decodings: Decodings | None = None,
    known: Mapping[Recording, Hypothesis] | None = None,
) -> Result:
    """Score one system; a hypothesis is a row of `path` as soon as it is there, and all are in order in the end."""
    console = Console(stderr=True)
    bars = Progress(console=console, transient=True, disable=not console.is_terminal)
    with path.open("w", encoding="utf-8") as lines, bars:
        task = bars.add_task(system.name, total=sum(recording.duration for recording in recordings))

        def done(result: Result) -> None:
            lines.write(json.dumps(result.row(-1), ensure_ascii=False) + "\n")
            lines.flush()
            bars.update(task, completed=result.audio_seconds, description=f"{system.name} {result.score.wer:.2%}")

        result = evaluate(system, recordings, done, decodings, known)
    rows = (json.dumps(result.row(index), ensure_ascii=False) + "\n" for index in range(len(recordings)))
    path.write_text("".join(rows), encoding="utf-8")
    return result


def summary(result: Result, results: Sequence[Result]) -> str:
    """The line of a system, compared with dense attention if that came before it."""
    dense = dense_of(result, results)
    if dense is None or not result.total("steps"):
        return str(result)
    difference, low, high = relative_difference(result.errors, dense.errors)
    interval = f"[{low:+.1%}, {high:+.1%}] " if len(result.recordings) > 1 else ""
    return f"{result} | {difference:+.1%} {interval}to dense"


def build_systems(config: DictConfig) -> Iterator[tuple[System, dict[str, Any]]]:
    """The reference, the CTC head, then the model with every method and budget; each with what its texts depend on.

    Models are loaded when there is something to decode.
    """
    from unique_asr.evaluation import systems
    from unique_asr.models import pretrained as adapters
    from unique_asr.models import resolve_device, resolve_dtype

    if config.reference is not None:

        def reference() -> System:
            return systems.Whisper(config.reference, config.device, threads=config.threads or 0)

        yield systems.Deferred("whisper", reference), {"system": "whisper", "model": identity(config.reference)}
    name = config.model.name_or_path
    if name is None:
        return
    chosen = attention_systems(config)
    pretrained = adapters.find(name) is not None
    batch, passes = whole_number(config, "batch", "recordings"), whole_number(config, "parallel_passes", "passes")
    concurrent = whole_number(config, "concurrent", "methods and budgets")
    if batch > 1 and passes > 1:
        raise ValueError(f"batch={batch} parallel_passes={passes}: recordings or passes go side by side; set one to 1")
    sliding = any(isinstance(method, Sliding) for method in chosen.values())
    if pretrained and (batch > 1 or passes > 1 or concurrent > 1 or config.ctc or sliding):
        raise ValueError(
            f"model={name}: batch, parallel_passes, concurrent, ctc and sliding are for this package's own models"
        )
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    model = identity(name)
    decoding = OmegaConf.to_container(config.decoding)

    loading = threading.Lock()

    @functools.cache
    def loaded() -> Any:
        """The pair of model and processor, or for this package's own models the encoder that holds it."""
        import torch

        from unique_asr import models

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        pair = (adapters.load if pretrained else models.load)(name, config.device, config.dtype)
        if pretrained:
            return pair
        folder = None if config.encoded is None else Path(config.encoded)
        return systems.Encoder(*pair, keep=len(chosen) + config.ctc > 1, folder=folder)

    made_of = {"model": model, "dtype": str(dtype), "batch": batch, "decoding": decoding}
    if config.ctc:
        yield systems.Deferred("ctc", lambda: systems.GreedyCTC(loaded())), made_of | {"system": "ctc"}
    for label, method in chosen.items():
        options, attention, about = dict(decoding), method, {"system": type(method).__name__}
        about["attention"] = {"budget": None} | asdict(method)
        if isinstance(method, Sliding):
            options["sliding"], attention = method, SparseAttentionConfig(budget=None)
        elif isinstance(method, RivalConfig):
            about["attention"]["method_name"] = method.method.name
            if method.method.name == "murmur":
                options["chunk_seconds"] = about["chunk_seconds"] = config.rivals.murmur_chunk_seconds
        if pretrained:
            kind = systems.PretrainedLLM
        elif batch > 1:
            kind = functools.partial(systems.BatchedSpeechLLM, batch=batch)
        elif passes > 1 and not isinstance(method, Sliding):
            kind = functools.partial(systems.ParallelSpeechLLM, passes=passes)
            about["parallel_passes"] = passes
        else:
            kind = systems.SpeechLLM

        def make(kind=kind, label=label, attention=attention, options=options) -> System:
            with loading:
                own = loaded().share() if concurrent > 1 else loaded()
            return kind(label, own, attention, **options)

        yield systems.Deferred(label, make), made_of | about


def attention_systems(config: DictConfig) -> dict[str, SparseAttentionConfig | Sliding]:
    """The methods of a run by the names of their systems: `attention`, or each of `methods` at each of its budgets."""
    attention, rivals = OmegaConf.to_container(config.attention), OmegaConf.to_container(config.rivals)
    if config.methods is None:
        return attention_settings(attention, rivals)
    budgets = attention["budget"] if isinstance(attention["budget"], list) else [attention["budget"]]
    budgets = [budget for budget in budgets if budget is not None]
    chosen: dict[str, SparseAttentionConfig | Sliding] = {}
    for name in sorted(config.methods, key=lambda name: name != "dense"):  # what the others are compared with
        own = method_settings(name)
        if own["budget"] is not None:
            if not budgets:
                raise ValueError(f"methods names {name}, which needs a budget: attention.budget=[256,512]")
            own["budget"] = budgets
        chosen |= attention_settings(own, rivals)
    return chosen


def method_settings(name: str) -> dict[str, Any]:
    """conf/attention/NAME.yaml with the files that it stands on."""
    path = conf_folder() / "attention" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"methods names {name!r}: choose from {known}")
    own = OmegaConf.to_container(OmegaConf.load(path))
    settings: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        if base != "_self_":
            settings |= method_settings(base)
    return settings | own


def attention_settings(
    attention: dict[str, Any], rivals: dict[str, Any] | None = None
) -> dict[str, SparseAttentionConfig | Sliding]:
    """Settings for each combination of the values that are lists: `dense`, `unique-512`, `mean-512-page_size16` ...

    What has no budget is dense, once, whatever else varies. Scores that the library does not have are the rivals';
    `rivals` holds what only they know: {"h2o": {"recent": 0.5}}.
    """
    rivals = rivals or {}
    lists = {key: value if isinstance(value, list) else [value] for key, value in attention.items()}
    varying = [key for key, values in lists.items() if len(values) > 1 and key not in ("budget", "score")]
    settings: dict[str, SparseAttentionConfig | Sliding] = {}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        score = chosen["score"]
        if score == "sliding":
            settings["sliding"] = Sliding(**rivals.get("sliding", {}))
            continue
        if chosen["budget"] is None:
            name = "dense"
        else:
            name = "-".join([score, str(chosen["budget"]), *(f"{key}{chosen[key]}" for key in varying)])
        if score in METHODS and name != "dense":
            known = {field.name for field in fields(METHODS[score])}
            options = rivals.get(score, {})
            if unknown := set(options) - known:
                raise ValueError(
                    f"rivals.{score} has {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}"
                )
            config = RivalConfig(**chosen | {"score": "mean"}, method=METHODS[score](**options))
        else:
            config = SparseAttentionConfig(**chosen | ({"score": "unique"} if name == "dense" else {}))
        settings.setdefault(name, config)
    return settings
