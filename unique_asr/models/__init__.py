"""Speech LLMs: our own architecture and known ones of transformers. `load` finds one by name, folder or hub id."""

from unique_asr.models.loading import ModelError, convert_load_errors, resolve_device, resolve_dtype
from unique_asr.models.registry import ModelEntry, identify_model, load
from unique_asr.models.sources import SHIPPED_MODELS
from unique_asr.models.speech_llm import (
    EncodedAudio,
    SpeechLLMConfig,
    SpeechLLMForConditionalGeneration,
    SpeechLLMProcessor,
)

__all__ = [
    "SHIPPED_MODELS",
    "EncodedAudio",
    "ModelEntry",
    "ModelError",
    "SpeechLLMConfig",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMProcessor",
    "convert_load_errors",
    "identify_model",
    "load",
    "resolve_device",
    "resolve_dtype",
]
