"""The command behind scripts/evaluate.py: one line a system on the console, everything else in output.dir."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from ..attention import SparseAttentionConfig
from ..data import Recording, join, spread
from ..overrides import conf_folder, run
from .decodings import Decodings
from .harness import Result, System, evaluate
from .methods import METHODS, RivalConfig, Sliding
from .readers import read_recordings
from .report import dense_of, write_results
from .scoring import relative_difference

PATHS = (
    "data.manifest",
    "data.audio",
    "reference",
    "output.dir",
    "model.name_or_path",
    "text.model",
    "text.file",
    "text.qa",
)
TASKS = ("speech", "ruler", "perplexity")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs and exits; what the user can cure is one line on the console and exit code 1."""
    # Before transformers is imported: its notices and bars would break into the table.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = 0

    def task(config: DictConfig) -> None:
        nonlocal code
        try:
            if config.task not in TASKS:
                raise ValueError(f"task is {config.task!r}: choose one of {', '.join(TASKS)}")
            if config.task == "speech":
                evaluate_systems(config)
            else:
                from .text import evaluate_text

                evaluate_text(config, attention_systems(config))
        except (OSError, ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1

    run(task, "evaluate", sys.argv[1:] if arguments is None else arguments, PATHS, {"model": "model.name_or_path"})
    sys.exit(code)


def evaluate_systems(config: DictConfig) -> None:
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
    settings, results = OmegaConf.to_container(config), []
    for system, made_of in build_systems(config):
        decodings = Decodings(folder / "decodings", made_of, config.resume)
        for name, recordings in sets.items():
            stem = f"{system.name}@{name.replace(' ', '')}" if name else system.name
            result = evaluate_system(system, recordings, folder / f"{stem}.jsonl", decodings)
            result.set, result.budget = name, made_of.get("attention", {}).get("budget")
            results.append(result)
            print(summary(result, results), flush=True)
            write_results(folder, results, settings)


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
    system: System, recordings: Sequence[Recording], path: Path, decodings: Decodings | None = None
) -> Result:
    """Score one system; every hypothesis is a row of `path` as soon as it is there."""
    console = Console(stderr=True)
    bars = Progress(console=console, transient=True, disable=not console.is_terminal)
    with path.open("w", encoding="utf-8") as lines, bars:
        task = bars.add_task(system.name, total=sum(recording.duration for recording in recordings))

        def done(result: Result) -> None:
            lines.write(json.dumps(result.row(-1), ensure_ascii=False) + "\n")
            lines.flush()
            bars.update(task, completed=result.audio_seconds, description=f"{system.name} {result.score.wer:.2%}")

        return evaluate(system, recordings, done, decodings)


def summary(result: Result, results: Sequence[Result]) -> str:
    """The line of a system, compared with dense attention if that came before it."""
    dense = dense_of(result, results)
    if dense is None or not result.total("steps"):
        return str(result)
    difference, low, high = relative_difference(result.errors, dense.errors)
    interval = f"[{low:+.1%}, {high:+.1%}] " if len(result.recordings) > 1 else ""
    return f"{result} | {difference:+.1%} {interval}to dense"


def build_systems(config: DictConfig) -> Iterator[tuple[System, dict[str, Any]]]:
    """The reference, the CTC head, then the model with every method and budget; each with what its texts depend on."""
    from . import systems

    if config.reference is not None:
        yield systems.Whisper(config.reference, config.device, threads=config.threads or 0), {
            "system": "whisper", "model": config.reference,
        }  # fmt: skip
    if config.model.name_or_path is None:
        return
    import torch

    from .. import models
    from ..models import adapters

    chosen = attention_systems(config)
    single = [name for name, method in chosen.items() if isinstance(method, (Sliding, RivalConfig))]
    if config.batch > 1 and single:
        raise ValueError(f"{single[0]} decodes one recording at a time: set batch=1")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pretrained = adapters.find(config.model.name_or_path) is not None
    if pretrained and (
        config.batch > 1 or config.ctc or any(isinstance(method, Sliding) for method in chosen.values())
    ):
        raise ValueError(f"model={config.model.name_or_path}: batch, ctc and sliding are for this package's own models")
    load = adapters.load if pretrained else models.load
    model, processor = load(config.model.name_or_path, config.device, config.dtype)
    encoder = None if pretrained else systems.Encoder(model, processor, keep=len(chosen) + config.ctc > 1)
    made_of = {"model": model_fingerprint(config.model.name_or_path), "dtype": config.dtype, "batch": config.batch}
    decoding = OmegaConf.to_container(config.decoding)
    if config.ctc:
        yield systems.GreedyCTC(encoder), made_of | {"system": "ctc"}
    for name, method in chosen.items():
        options, attention = dict(decoding), method
        if isinstance(method, Sliding):
            options["sliding"], attention = method, SparseAttentionConfig(budget=None)
        elif isinstance(method, RivalConfig) and method.method.name == "murmur":
            own = adapters.find(model).pass_seconds if pretrained else model.config.max_pass_seconds
            options["max_pass_seconds"] = min(config.rivals.murmur_chunk_seconds, options["max_pass_seconds"] or own)
        settings = asdict(method) | ({"budget": None} if isinstance(method, Sliding) else {})
        if isinstance(method, RivalConfig):
            settings["method_name"] = method.method.name
        plain = {key: value for key, value in options.items() if key != "sliding"}
        about = made_of | {"system": type(method).__name__, "attention": settings, "decoding": plain}
        if pretrained:
            yield systems.PretrainedLLM(name, (model, processor), attention, **options), about
        elif config.batch > 1:
            yield systems.BatchedSpeechLLM(name, encoder, attention, batch=config.batch, **options), about
        else:
            yield systems.SpeechLLM(name, encoder, attention, **options), about


def model_fingerprint(name: str) -> list:
    """The model's name, and the size and date of its files: other weights under the same name are another model."""
    from ..models import PRETRAINED

    folder = PRETRAINED / name if (PRETRAINED / name).is_dir() else Path(name)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [name, *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]


def attention_systems(config: DictConfig) -> dict[str, SparseAttentionConfig | Sliding]:
    """The methods of a run by the names of their systems: `attention`, or each of `methods` at each of its budgets."""
    attention, rivals = OmegaConf.to_container(config.attention), OmegaConf.to_container(config.rivals)
    if config.methods is None:
        return attention_settings(attention, rivals)
    budgets = attention["budget"] if isinstance(attention["budget"], list) else [attention["budget"]]
    budgets = [budget for budget in budgets if budget is not None]
    chosen: dict[str, SparseAttentionConfig | Sliding] = {}
    for name in config.methods:
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
