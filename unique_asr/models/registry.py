"""What a name means: the model that ships, another of our architecture, or a known speech LLM; and `load` for all."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from unique_asr.models.listening_llm import ListeningLLMConfig, load_listening_llm
from unique_asr.models.pretrained.catalogue import KNOWN_MODELS, KnownModel
from unique_asr.models.pretrained.loading import load as load_known_model
from unique_asr.models.sources import SHIPPED_MODELS, list_shipped_languages, read_model_type
from unique_asr.models.speech_llm.configuration import SpeechLLMConfig
from unique_asr.models.speech_llm.loading import load as load_speech_llm


@dataclass(frozen=True)
class ModelEntry:
    """What is known of a model before its weights are loaded."""

    name: str
    kind: Literal["shipped", "speech_llm", "listening_llm", "known", "other", "missing"]
    known_model: KnownModel | None = None  # of the kind `known`

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model can be told."""
        return self.known_model.languages if self.known_model else list_shipped_languages(self.name)

    @property
    def takes_hotwords(self) -> bool:
        """Whether the model can be told words to expect."""
        if self.kind == "listening_llm":
            return True
        return self.known_model is not None and self.known_model.hotwords is not None


def identify_model(name_or_path: str | PathLike[str]) -> ModelEntry:
    """Say what a model is, from its name and its configuration alone.

    Args:
        name_or_path: the name of a shipped model, a folder, or a hub id (`owner/model@revision`).

    Returns:
        An entry of the kind `shipped` (its weights are in this package), `speech_llm` (our architecture),
        `listening_llm` (our architecture that reads words), `known` (in the catalogue of pretrained speech LLMs),
        `other` (any other model) or `missing` (no configuration is found).
    """
    name = str(name_or_path)
    if name in SHIPPED_MODELS:
        return ModelEntry(name, "shipped")
    model_type = read_model_type(name_or_path)
    if model_type in KNOWN_MODELS:
        return ModelEntry(name, "known", KNOWN_MODELS[model_type])
    if model_type == SpeechLLMConfig.model_type:
        return ModelEntry(name, "speech_llm")
    if model_type == ListeningLLMConfig.model_type:
        return ModelEntry(name, "listening_llm")
    return ModelEntry(name, "other" if model_type else "missing")


def load(name_or_path: str | PathLike[str] = "default", device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a speech LLM for inference: one of our architecture, or a known one of transformers.

    Args:
        name_or_path: `default` (shipped with this package), a folder, or a hub id (`owner/model@revision`).
        device: `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1` ...
        dtype: `auto` (bfloat16 on CUDA, float32 elsewhere), `float32`, `bfloat16`, `float16`.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        ModelError: the model is no speech LLM that we know, its files are damaged or missing, or the device or the
            precision does not exist. The message is one line.
    """
    loaders = {"known": load_known_model, "listening_llm": load_listening_llm}
    return loaders.get(identify_model(name_or_path).kind, load_speech_llm)(name_or_path, device, dtype)
