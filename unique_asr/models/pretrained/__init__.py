"""Pretrained speech LLMs of transformers: one entry each in `catalogue.py`, decoded on the paged cache.

    segments, info = unique_asr.transcribe("meeting.m4a", model="hf-audio/MOSS-Transcribe-Diarize-HF")

`formats.py` reads their answers as they are written, `encoding.py` encodes audio a bounded piece at a time,
`prompting.py` puts it into a request, and `pass_memory.py` says what a pass takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoProcessor, PreTrainedConfig

from unique_asr.models import PRETRAINED, ModelError, loading, resolve_device, resolve_dtype
from unique_asr.models.pretrained.catalogue import KNOWN_MODELS, DecoderShape, KnownModel
from unique_asr.models.pretrained.formats import BracketParser, JsonParser, Parser, PlainParser, Utterance

MERGED = "lora_merged"  # in the configuration of a model whose LoRA weights for speech are in its own

__all__ = [
    "KNOWN_MODELS",
    "BracketParser",
    "DecoderShape",
    "JsonParser",
    "KnownModel",
    "Parser",
    "PlainParser",
    "Utterance",
    "find",
    "load",
    "merge_lora",
    "read_model_type",
]


def find(model: Any) -> KnownModel | None:
    """The adapter of a loaded model, a (model, processor) pair, a folder or a hub id; None for any other model."""
    return KNOWN_MODELS.get(read_model_type(model))


def read_model_type(model: Any) -> str | None:
    """Return `model_type` of a model's configuration without loading the model; None if there is no such model."""
    if isinstance(model, tuple):
        model = model[0]
    if hasattr(model, "config"):
        return getattr(model.config, "model_type", None)
    source, options = located(PRETRAINED / model if (PRETRAINED / model).is_dir() else model)
    try:
        return PreTrainedConfig.get_config_dict(source, **options)[0].get("model_type")
    except (OSError, ValueError):
        return None  # `models.load` says what is wrong


def load(name_or_path: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """A speech LLM that has an adapter, and its processor; see `unique_asr.models.load`.

    `name@revision` is a revision of a hub id.
    """
    chosen = resolve_device(device)
    known_model = find(name_or_path)
    kind = getattr(transformers, known_model.model_class, None)
    if kind is None:
        raise ModelError(f"model={name_or_path}: transformers {transformers.__version__} does not know it; upgrade it")
    source, options = located(name_or_path)
    with loading(name_or_path, "speech LLM", "; try model=default"):
        processor = AutoProcessor.from_pretrained(source, **options)
        model = kind.from_pretrained(source, dtype=resolve_dtype(dtype, chosen), **options)
        if known_model.lora and not getattr(model.config, MERGED, False):
            load_lora(model, known_model.lora, source, **options)
    return model.to(chosen).eval(), processor


def located(name_or_path: str | Path) -> tuple[str, dict[str, str]]:
    """A folder or a hub id, and the revision after an @."""
    name, _, revision = str(name_or_path).partition("@")
    if not revision or Path(name_or_path).exists():
        return str(name_or_path), {}
    return name, {"revision": revision}


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Make LoRA weights that came with a model part of its own; saved, it is loaded without them."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    if layers:
        model._hf_peft_config_loaded = False
        setattr(model.config, MERGED, True)


def load_lora(model: Any, folder: str, source: str, **options: str) -> None:
    """Switch on the LoRA weights that a model keeps for speech in a folder of their own."""
    if Path(source).is_dir():
        model.load_adapter(str(Path(source) / folder), adapter_name="speech")
    else:
        model.load_adapter(source, adapter_name="speech", adapter_kwargs={"subfolder": folder, **options})
    model.set_adapter("speech")
