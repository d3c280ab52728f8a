"""Where the files of a model are: shipped with this package, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ShippedModel:
    """A model whose weights are part of this package."""

    folder: Path
    languages: tuple[str, ...]  # codes of the languages that it transcribes
    prompts: tuple[str, ...]  # the instructions that it was trained with


SHIPPED_MODELS = {
    "default": ShippedModel(
        Path(__file__).parents[1] / "pretrained" / "default", languages=("en",), prompts=("lower case",)
    )
}


def list_shipped_languages(name: str) -> tuple[str, ...]:
    """List the codes of the languages of a shipped model; none for any other name."""
    return SHIPPED_MODELS[name].languages if name in SHIPPED_MODELS else ()


def locate_model(name_or_path: str | PathLike[str]) -> tuple[str, dict[str, str]]:
    """Find what `from_pretrained` has to be given for a model.

    Args:
        name_or_path: the name of a shipped model, a folder, or a hub id; `owner/model@revision` names a revision.

    Returns:
        A folder or a hub id, and the options that go with it (`revision`, if one is named).
    """
    name = str(name_or_path)
    if name in SHIPPED_MODELS:
        return str(SHIPPED_MODELS[name].folder), {}
    hub_id, _, revision = name.partition("@")
    if not revision or Path(name).exists():
        return name, {}
    return hub_id, {"revision": revision}


def read_model_type(model: Any) -> str | None:
    """Read the `model_type` of a configuration, without loading weights.

    Args:
        model: a loaded model, a (model, processor) pair, the name of a shipped model, a folder or a hub id.

    Returns:
        None if there is no such model or no configuration of it.
    """
    if isinstance(model, tuple):
        model = model[0]
    if hasattr(model, "config"):
        return getattr(model.config, "model_type", None)
    source, options = locate_model(model)
    try:
        return PreTrainedConfig.get_config_dict(source, **options)[0].get("model_type")
    except (OSError, ValueError):
        return None  # loading it says what is wrong
