"""Our speech LLM, in the conventions of transformers: an audio encoder, a projector and a causal LM."""

from unique_asr.models.speech_llm.configuration import SpeechLLMConfig
from unique_asr.models.speech_llm.loading import load
from unique_asr.models.speech_llm.modeling import EncodedAudio, SpeechLLMForConditionalGeneration
from unique_asr.models.speech_llm.processing import SpeechLLMProcessor

__all__ = ["EncodedAudio", "SpeechLLMConfig", "SpeechLLMForConditionalGeneration", "SpeechLLMProcessor", "load"]
