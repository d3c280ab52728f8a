"""Speech LLMs in transformers' conventions, and `load`, which finds one by name, folder or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from unique_asr.models.speech_llm.configuration import SpeechLLMConfig
from unique_asr.models.speech_llm.modeling import EncodedAudio, SpeechLLMForConditionalGeneration
from unique_asr.models.speech_llm.packing import INDEX, load_packed
from unique_asr.models.speech_llm.processing import SpeechLLMProcessor

__all__ = [
    "EncodedAudio",
    "ModelError",
    "SpeechLLMConfig",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMProcessor",
    "load",
]

PRETRAINED = Path(__file__).parent.parent / "pretrained"


class ModelError(ValueError):
    """A model that cannot be loaded; the message is one line and names the remedy."""


def load(
    name_or_path: str | Path = "default", device: str = "auto", dtype: str = "auto"
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Load a speech LLM for inference.

    Args:
        name_or_path: `default` (shipped with this package), a folder, or a hub id.
        device: `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1` ...
        dtype: `auto` (bfloat16 on CUDA, float32 elsewhere), `float32`, `bfloat16`, `float16`.
    """
    chosen = resolve_device(device)
    precision = resolve_dtype(dtype, chosen)
    folder = PRETRAINED / name_or_path if (PRETRAINED / name_or_path).is_dir() else Path(name_or_path)
    source = str(folder) if folder.is_dir() else str(name_or_path)
    with loading(name_or_path, "speech LLM", "; try model=default"):
        kind = SpeechLLMConfig.get_config_dict(source)[0].get("model_type", "nothing")
        if kind != SpeechLLMConfig.model_type:
            raise ValueError(f"its config.json describes {kind}, not {SpeechLLMConfig.model_type}")
        processor = SpeechLLMProcessor.from_pretrained(source)
        options = {"dtype": precision, "output_loading_info": True}
        if (folder / INDEX).is_file():
            options |= {"config": SpeechLLMConfig.from_pretrained(folder), "state_dict": load_packed(folder, precision)}
            model, info = SpeechLLMForConditionalGeneration.from_pretrained(None, **options)
        else:
            model, info = SpeechLLMForConditionalGeneration.from_pretrained(source, **options)
        if info["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
    return model.to(chosen).eval(), processor


@contextmanager
def loading(name_or_path: str | Path, kind: str, remedy: str = "", option: str = "model") -> Iterator[None]:
    """Without progress bars; what goes wrong is a ModelError of one line, which names the option."""
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
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    except KeyError:
        raise ModelError(f"dtype={dtype}: use auto, float32, bfloat16 or float16") from None
