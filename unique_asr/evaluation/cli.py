"""The command behind scripts/evaluate.py: one line a system on the console, everything else in output.dir."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.display import show_imports
from unique_asr.application.overrides import run, whole_number

# Options whose values are file names, taken as they are written.
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
    """Run the command and exit; what the user can cure is one line on the console and exit code 1.

    Args:
        arguments: `key=value` options of conf/evaluate.yaml; None: those of the command line.
    """
    # Before transformers is imported: its notices and progress bars would break into the table.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    exit_code = 0
    tables: dict[str, list] = {}  # results by folder: the jobs of a multirun that share a folder share its table

    def run_task(config: DictConfig) -> None:
        nonlocal exit_code
        try:
            check_options(config)
            results = tables.setdefault(config.output.dir, [])
            with show_imports():
                if config.task == "speech":
                    from unique_asr.evaluation.speech_evaluation import evaluate_speech as evaluate
                else:
                    from unique_asr.evaluation.text_evaluation import evaluate_text as evaluate
            evaluate(config, results)
        except (OSError, ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            exit_code = 1

    options = sys.argv[1:] if arguments is None else arguments
    refused = run(run_task, "evaluate", options, PATHS, {"model": "model.name_or_path"})
    sys.exit(exit_code or refused)


def check_options(config: DictConfig) -> None:
    """Check what can be checked before torch and transformers, which take seconds, are imported.

    Raises:
        ValueError: an option is missing or does not fit the others.
    """
    if config.task not in TASKS:
        raise ValueError(f"task is {config.task!r}: choose one of {', '.join(TASKS)}")
    batch = whole_number(config, "batch", "samples" if config.task != "speech" else "recordings")
    if config.task != "speech":
        if config.text.model is None:
            raise ValueError(f"text.model is missing: evaluate.py task={config.task} text.model=FOLDER")
        return
    if OmegaConf.is_missing(config.data, "manifest"):
        raise ValueError("data.manifest is missing: evaluate.py data.manifest=FILE (--help shows every option)")
    passes = whole_number(config, "parallel_passes", "passes")
    whole_number(config, "concurrent", "methods and budgets")
    if batch > 1 and passes > 1:
        raise ValueError(f"batch={batch} parallel_passes={passes}: recordings or passes go side by side; set one to 1")
