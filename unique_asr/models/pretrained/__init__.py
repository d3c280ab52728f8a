"""Known speech LLMs of transformers: one entry each in `catalogue.py`, decoded on the paged cache.

    segments, info = unique_asr.transcribe("meeting.m4a", model="hf-audio/MOSS-Transcribe-Diarize-HF")

`prompting.py` builds a model's request, `encoding.py` encodes its audio a bounded piece at a time, `formats.py` reads
its answer while it is written, `memory.py` estimates what a pass takes, and `loading.py` loads it, with `lora.py` for
weights that are kept apart. `python -m unique_asr.models.pretrained` prints the catalogue.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from unique_asr.models.languages import SHIPPED, chosen_hotwords, chosen_language
from unique_asr.models.pretrained.catalogue import KNOWN_MODELS, DecoderShape, KnownModel
from unique_asr.models.pretrained.formats import BracketParser, JsonParser, ParsedUtterance, Parser, PlainParser
from unique_asr.models.pretrained.loading import find, load
from unique_asr.models.pretrained.lora import load_lora, merge_lora
from unique_asr.models.pretrained.memory import Memory, estimate
from unique_asr.models.sources import read_model_type as _model_type

__all__ = [
    "KNOWN_MODELS",
    "BracketParser",
    "DecoderShape",
    "JsonParser",
    "KnownModel",
    "Memory",
    "ParsedUtterance",
    "Parser",
    "PlainParser",
    "check_hotwords",
    "check_language",
    "estimate",
    "find",
    "load",
    "load_lora",
    "make_transcriber",
    "merge_lora",
]


def check_language(language: str | None, model: str | PathLike[str]) -> str | None:
    """The code of a language (None for none), or a ValueError if the model cannot be told it, which is not loaded."""
    if not language:
        return None
    kind = _model_type(model)
    if kind is None:
        return language  # there is no such model: `models.load` says so
    known_model = KNOWN_MODELS.get(kind)
    taken = known_model.languages if known_model else SHIPPED.get(str(model), ())
    return chosen_language(language, taken, str(model))


def check_hotwords(hotwords: str | None, model: str | PathLike[str]) -> str | None:
    """Hotwords as a transcript's settings keep them, or a ValueError if the model, which is not loaded, takes none."""
    if not hotwords:
        return None
    kind = _model_type(model)
    known_model = KNOWN_MODELS.get(kind)
    taken = kind is None or (known_model is not None and known_model.hotwords is not None)
    return chosen_hotwords(hotwords, taken, str(model))


def make_transcriber(model: Any = "default", **settings: Any) -> Any:
    """What transcribes with a model: `PretrainedTranscriber` if it has an adapter, else `SpeechLLMTranscriber`.

    `parallel_passes` is for the latter alone: a pretrained model gets passes as long as it can, one after the other.
    """
    if find(model) is None:
        from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

        return SpeechLLMTranscriber(model, **settings)
    from unique_asr.transcribers.pretrained import PretrainedTranscriber

    settings.pop("parallel_passes", None)
    return PretrainedTranscriber(model, **settings)
