"""The command behind scripts/benchmark.py: prints the device, then the lines of one task as they come."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.overrides import run

PATHS = ("selection.text", "selection.audio", "selection.model", "models.output")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit; an error that the user can cure is one line on the console and exit code 1.

    Args:
        arguments: overrides of conf/benchmark.yaml; None: those of the command line.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = 0

    def task(config: DictConfig) -> None:
        nonlocal code
        try:
            benchmark(config)
        except (OSError, ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1

    refused = run(task, "benchmark", sys.argv[1:] if arguments is None else arguments, PATHS)
    sys.exit(code or refused)


def benchmark(config: DictConfig) -> None:
    """Run the task of a composed configuration.

    Raises:
        ValueError: a setting is missing or not allowed, or the task needs a GPU.
    """
    import torch

    from unique_asr.attention import SparseAttentionConfig
    from unique_asr.benchmark import decode, selection
    from unique_asr.benchmark.timing import describe

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else (
        torch.bfloat16 if device.type == "cuda" else torch.float32
    )  # fmt: skip
    options = OmegaConf.to_container(config)
    attention = SparseAttentionConfig(**options["attention"])
    print(f"task={config.task}: {describe(device)}", flush=True)
    if config.task == "kernel":
        if device.type != "cuda":
            raise ValueError("task=kernel measures CUDA kernels: it needs a GPU")
        from unique_asr.benchmark import kernel

        kernel.benchmark(device=device, dtype=dtype, **options["kernel"])
    elif config.task == "decode":
        decode.benchmark(attention=attention, device=device, dtype=dtype, **options["decode"])
    elif config.task == "selection":
        choice = options["selection"]
        configurations = selection.make_configurations(choice["table"], attention)
        probe = selection.Probe(configurations, choice["every"], choice["steps"])
        if choice["audio"] is not None:
            files = choice["audio"] if isinstance(choice["audio"], list) else [choice["audio"]]
            selection.benchmark_speech(choice["model"], files, choice["minutes"], probe, name, config.dtype)
        elif choice["text"] is not None:
            steps = choice["steps"] * choice["every"]
            selection.benchmark_text(choice["model"], choice["text"], choice["context"], steps, probe, device, dtype)
        else:
            raise ValueError("task=selection needs selection.text=FILE or selection.audio=FILE")
        probe.report()
    elif config.task == "models":
        from unique_asr.benchmark import models

        models.benchmark(attention=attention, device=device, dtype=dtype, **options["models"])
    else:
        raise ValueError(f"task is {config.task!r}: choose kernel, decode, models or selection")
