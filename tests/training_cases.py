"""What several tests of training share: tiny recordings, stages, and what a run wrote."""

import json
from pathlib import Path

from hydra import compose, initialize_config_dir

from unique_asr.training.augment import AugmentConfig
from unique_asr.training.stages import StageConfig

ROOT = Path(__file__).parents[1]
CLEAN = AugmentConfig(speed=0, gain_db=0, noise_share=0, frequency_masks=0, time_masks=0)
EVERYTHING = {"encoder": 3e-3, "projector": 1e-2, "residual": 1e-2, "language_model": 3e-3}
SEGMENTS = {"a.wav": [{"start": 0, "end": 2, "text": "the cat sat", "cased": "The cat sat."}]}
LONG = {
    "a.wav": [
        {"start": n, "end": n + 1, "text": f"the cat number {n} sat", "cased": f"The cat number {n} sat."}
        for n in range(8)
    ]
}
SOFT = {"mode": "soft", "budget": 40}


def stage(name="stage", steps=12, train=EVERYTHING, seconds=(2.0, 2.5), windows=2, **options):
    options = {"warmup": 0.0, "llm_weight": 1.0, "cased_share": 1.0, **options}
    return StageConfig(name, steps, train, seconds=seconds, windows=windows, **options)


def configuration(*overrides, name="finetune"):
    """A configuration of conf/ as a program gets it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def rows(trainer):
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def metrics(trainer, name="loss"):
    """One measure of every line of a run's metrics."""
    return [row[name] for row in rows(trainer)]


class Stopped(Exception):
    """A run was interrupted."""


def stop_after(lines):
    """A log of a trainer that interrupts it at the line after so many."""
    seen = []

    def log(line):
        seen.append(line)
        if len(seen) > lines:
            raise Stopped

    return log
