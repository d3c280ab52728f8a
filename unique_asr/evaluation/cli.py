"""The command behind scripts/evaluate.py: one line a system on the console, everything else in output.dir."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from ..attention import SparseAttentionConfig
from ..data import Recording, join, read_manifest, spread
from ..overrides import run
from .harness import Result, System, evaluate
from .scoring import relative_difference

PATHS = ("data.manifest", "reference", "output.dir", "model.name_or_path")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs and exits; what the user can cure is one line on the console and exit code 1."""
    # Before transformers is imported: its notices and bars would break into the table.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = 0

    def task(config: DictConfig) -> None:
        nonlocal code
        try:
            evaluate_systems(config)
        except (OSError, ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1

    run(task, "evaluate", sys.argv[1:] if arguments is None else arguments, PATHS, {"model": "model.name_or_path"})
    sys.exit(code)


def evaluate_systems(config: DictConfig) -> None:
    if OmegaConf.is_missing(config.data, "manifest"):
        raise ValueError("data.manifest is missing: evaluate.py data.manifest=FILE (--help shows every option)")
    recordings = load_recordings(config.data)
    hours = sum(recording.duration for recording in recordings) / 3600
    print(
        f"{len(recordings)} recordings, {hours:.2f} h of {config.data.manifest}; scorer: Whisper's English normaliser"
    )
    folder = Path(config.output.dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for system in build_systems(config):
        results.append(evaluate_system(system, recordings, folder))
        print(summary(results[-1], results))
        settings = OmegaConf.to_container(config)
        table = {"settings": settings, "results": [result.to_dict() for result in results]}
        (folder / "results.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def load_recordings(data: DictConfig) -> list[Recording]:
    recordings = read_manifest(data.manifest, data.source, data.select)
    if data.join_seconds is not None:
        within = data.join_within or ("recording" if data.join_seconds <= 60 else "all")
        recordings = join(recordings, data.join_seconds, within)
    return spread(recordings, data.limit)


def evaluate_system(system: System, recordings: Sequence[Recording], folder: Path) -> Result:
    """Score one system; every hypothesis is in <system>.jsonl as soon as it is there."""
    path, console = folder / f"{system.name}.jsonl", Console(stderr=True)
    bars = Progress(console=console, transient=True, disable=not console.is_terminal)
    with path.open("w", encoding="utf-8") as lines, bars:
        task = bars.add_task(system.name, total=sum(recording.duration for recording in recordings))

        def done(result: Result) -> None:
            lines.write(json.dumps(result.row(-1), ensure_ascii=False) + "\n")
            lines.flush()
            bars.update(task, completed=result.audio_seconds, description=f"{system.name} {result.score.wer:.2%}")

        return evaluate(system, recordings, done)


def summary(result: Result, results: Sequence[Result]) -> str:
    """The line of a system, compared with dense attention if that came before it."""
    dense = next((other for other in results if other.system == "dense" and other is not result), None)
    if dense is None or not result.total("sparse_steps"):
        return str(result)
    difference, low, high = relative_difference(result.errors, dense.errors)
    interval = f"[{low:+.1%}, {high:+.1%}] " if len(result.recordings) > 1 else ""
    return f"{result} | {difference:+.1%} {interval}to dense"


def build_systems(config: DictConfig) -> Iterator[System]:
    """The reference, the CTC head, then the model with every combination of the attention's listed values."""
    from . import systems

    if config.reference is not None:
        yield systems.Whisper(config.reference, config.device, threads=config.threads or 0)
    if config.model.name_or_path is None:
        return
    import torch

    from .. import models

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, processor = models.load(config.model.name_or_path, config.device, config.dtype)
    attentions = attention_settings(OmegaConf.to_container(config.attention))
    encoder = systems.Encoder(model, processor, keep=len(attentions) + config.ctc > 1)
    if config.ctc:
        yield systems.GreedyCTC(encoder)
    for name, attention in attentions.items():
        if config.batch > 1:
            yield systems.BatchedSpeechLLM(name, encoder, attention, config.batch)
        else:
            yield systems.SpeechLLM(name, encoder, attention, **config.decoding)


def attention_settings(attention: dict[str, Any]) -> dict[str, SparseAttentionConfig]:
    """Settings for each combination of the values that are lists: `dense`, `unique-512`, `mean-512-page_size16` ...

    What has no budget is dense, once, whatever else varies.
    """
    lists = {key: value if isinstance(value, list) else [value] for key, value in attention.items()}
    varying = [key for key, values in lists.items() if len(values) > 1 and key not in ("budget", "score")]
    settings: dict[str, SparseAttentionConfig] = {}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        if chosen["budget"] is None:
            name = "dense"
        else:
            name = "-".join([chosen["score"], str(chosen["budget"]), *(f"{key}{chosen[key]}" for key in varying)])
        settings.setdefault(name, SparseAttentionConfig(**chosen))
    return settings
