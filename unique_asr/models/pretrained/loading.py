"""Finding and loading a known speech LLM."""

from __future__ import annotations

from os import PathLike
from typing import Any

import transformers
from transformers import AutoProcessor

from unique_asr.models.loading import ModelError, convert_load_errors, resolve_device, resolve_dtype
from unique_asr.models.pretrained.catalogue import KNOWN_MODELS, KnownModel
from unique_asr.models.pretrained.lora import MERGED, load_lora
from unique_asr.models.sources import locate_model, read_model_type


def find(model: Any) -> KnownModel | None:
    """Find the entry of a model in the catalogue.

    Args:
        model: a loaded model, a (model, processor) pair, a name, a folder or a hub id.

    Returns:
        None for a model that is not in the catalogue.
    """
    return KNOWN_MODELS.get(read_model_type(model))


def load(name_or_path: str | PathLike[str], device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a known model for inference; arguments, results and errors are those of `unique_asr.models.load`.

    Raises:
        ModelError: also for a model that is not in the catalogue, or not in this version of transformers.
    """
    chosen = resolve_device(device)
    known_model = find(name_or_path)
    if known_model is None:
        raise ModelError(f"model={name_or_path}: is no known speech LLM; see conf/model/")
    architecture = getattr(transformers, known_model.model_class, None)
    if architecture is None:
        raise ModelError(f"model={name_or_path}: transformers {transformers.__version__} does not know it; upgrade it")
    source, options = locate_model(name_or_path)
    with convert_load_errors(name_or_path, "speech LLM", "; try model=default"):
        processor = AutoProcessor.from_pretrained(source, **options)
        model = architecture.from_pretrained(source, dtype=resolve_dtype(dtype, chosen), **options)
        if known_model.lora and not getattr(model.config, MERGED, False):
            load_lora(model, known_model.lora, source, **options)
    return model.to(chosen).eval(), processor
