"""The command behind scripts/finetune.py; conf/finetune.yaml has the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from unique_asr.application.overrides import run

if TYPE_CHECKING:
    from omegaconf import DictConfig

PATHS = (
    "init.model",
    "init.encoder",
    "init.language_model",
    "init.projector",
    "init.ctc_texts",
    "text.model",
    "text.files",
    "data.manifests",
    "data.synthetic",
    "data.heard",
    "data.texts",
    "data.listener_tokenizer",
    "validation.manifest",
    "output.dir",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say (default: those of the command line) and exit.

    Exit codes: 0; 1 for what the user can cure, in one line; 2 for options that do not exist.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notices would break into the log
    code = 0

    def task(config: DictConfig) -> None:
        nonlocal code
        from unique_asr.application.display import show_imports

        first = os.environ.get("RANK", "0") == "0"  # of the processes that accelerate starts
        with show_imports() if first else nullcontext():  # after the options were checked
            from unique_asr.training.finetune import finetune

        try:
            finetune(config)
        except (OSError, ValueError, ImportError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1

    refused = run(task, "finetune", sys.argv[1:] if arguments is None else arguments, PATHS)
    sys.exit(code or refused)
