"""A model and its settings: recordings in, segments out. `make_transcriber` makes one for any model."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from unique_asr.models.languages import SHIPPED, chosen_hotwords, chosen_language
from unique_asr.models.pretrained import KNOWN_MODELS, find, read_model_type

if TYPE_CHECKING:
    from unique_asr.transcribers.base import Transcriber


def make_transcriber(model: str | PathLike[str] | tuple[Any, Any] = "default", **settings: Any) -> Transcriber:
    """Load a model and return its transcriber: `PretrainedTranscriber` for a known model, else `SpeechLLMTranscriber`.

    Args:
        model: `default`, a folder, a hub id, or a (model, processor) pair.
        settings: of the transcriber. `parallel_passes` is for `SpeechLLMTranscriber` alone and dropped for a known
            model, which gets passes as long as it can, one after the other.

    Raises:
        ValueError: if the model or a setting cannot be used, in one line.
    """
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
    model_type = read_model_type(model)
    if model_type is None:
        return language  # there is no such model: loading it says so
    known_model = KNOWN_MODELS.get(model_type)
    taken = known_model.languages if known_model else SHIPPED.get(str(model), ())
    return chosen_language(language, taken, str(model))


def check_hotwords(hotwords: str | None, model: str | PathLike[str]) -> str | None:
    """Return hotwords as a transcript's settings keep them, None for none, without loading the model.

    Raises:
        ValueError: if the model cannot be told any.
    """
    if not hotwords:
        return None
    model_type = read_model_type(model)
    known_model = KNOWN_MODELS.get(model_type)
    taken = model_type is None or (known_model is not None and known_model.hotwords is not None)
    return chosen_hotwords(hotwords, taken, str(model))
