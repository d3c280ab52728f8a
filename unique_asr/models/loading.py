"""What loading any model has in common: devices, precisions, and errors that are one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import torch
from safetensors import SafetensorError
from transformers.utils import logging


class ModelError(ValueError):
    """A model that cannot be loaded; the message is one line and names the remedy."""


@contextmanager
def convert_load_errors(
    name_or_path: str | PathLike[str], kind: str, remedy: str = "", option: str = "model"
) -> Iterator[None]:
    """Turn errors inside the block into a ModelError of one line, and hide the progress bars of transformers.

    Args:
        name_or_path: the model that is loaded, for the message.
        kind: what it is loaded as, for the message: `speech LLM`.
        remedy: the end of the message.
        option: the option that names the model, for the message.

    Raises:
        ModelError: the block raised an error of reading files, of unfit weights or of missing packages.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{option}={name_or_path}: cannot be loaded as a {kind} ({reason}){remedy}") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """Choose the device of an option.

    Args:
        device: `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1` ...

    Raises:
        ModelError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device={device}: not a device; use auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device={device}: no CUDA GPU is available here; use device=cpu")
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Choose the precision of an option.

    Args:
        dtype: `auto` (bfloat16 on CUDA, float32 elsewhere), `float32`, `bfloat16` or `float16`.
        device: where the model will be.

    Raises:
        ModelError: `dtype` is none of these.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    except KeyError:
        raise ModelError(f"dtype={dtype}: use auto, float32, bfloat16 or float16") from None
