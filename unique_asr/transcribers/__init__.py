"""A model and its settings: recordings in, segments out. `make_transcriber` makes one for any model."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from unique_asr.models import identify_model
from unique_asr.models.languages import resolve_hotwords, resolve_language, resolve_prompt
from unique_asr.models.listening_llm import ListeningLLMConfig
from unique_asr.models.pretrained import find
from unique_asr.models.sources import SHIPPED_MODELS, read_model_type

if TYPE_CHECKING:
    from unique_asr.transcribers.base import Transcriber


def make_transcriber(model: str | PathLike[str] | tuple[Any, Any] = "default", **settings: Any) -> Transcriber:
    """Load a model and return its transcriber, a class for each kind of model.

    Args:
        model: `default`, a folder, a hub id, or a (model, processor) pair.
        settings: of the transcriber. `parallel_passes` is for `SpeechLLMTranscriber` alone and dropped for others,
            which get passes as long as they can, one after the other.

    Raises:
        ValueError: if the model or a setting cannot be used, in one line.
    """
    if read_model_type(model) == ListeningLLMConfig.model_type:
        from unique_asr.transcribers.listening_llm import ListeningTranscriber

        settings.pop("parallel_passes", None)
        return ListeningTranscriber(model, **settings)
    if find(model) is None:
        from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

        return SpeechLLMTranscriber(model, **settings)
    from unique_asr.transcribers.pretrained import PretrainedTranscriber

    settings.pop("parallel_passes", None)
    return PretrainedTranscriber(model, **settings)


def check_language(language: str | None, model: str | PathLike[str]) -> str | None:
    """Return the code of a language, None for none, without loading the model.

    Raises:
        ValueError: if the model cannot be told the language.
    """
    if not language:
        return None
    entry = identify_model(model)
    if entry.kind == "missing":
        return language  # loading it says that there is no such model
    return resolve_language(language, entry.languages, entry.name)


def check_hotwords(hotwords: str | None, model: str | PathLike[str]) -> str | None:
    """Return hotwords as a transcript's settings keep them, None for none, without loading the model.

    Raises:
        ValueError: if the model cannot be told any.
    """
    if not hotwords:
        return None
    entry = identify_model(model)
    return resolve_hotwords(hotwords, entry.takes_hotwords or entry.kind == "missing", entry.name)


def check_prompt(prompt: str | None, model: str | PathLike[str] | tuple[Any, Any]) -> str | None:
    """Return an instruction, None for none, without loading the model.

    Raises:
        ValueError: if the model is known not to know it.
    """
    shipped = None if isinstance(model, tuple) else SHIPPED_MODELS.get(str(model))
    return resolve_prompt(prompt, shipped and shipped.prompts, str(model))
