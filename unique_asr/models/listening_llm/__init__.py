"""A speech LLM that reads words: Whisper listens, and a causal LM writes the transcript from what it heard.

The LLM's positions are the tokens of the words heard, in its own vocabulary, so that none of their letters is lost and
copying them is what any LLM can do. Where the listener was unsure, its next best words stand beside them.
"""

from unique_asr.models.listening_llm.configuration import ListeningLLMConfig
from unique_asr.models.listening_llm.heard import HeardSpeech, HeardWord
from unique_asr.models.listening_llm.listener import WhisperListener
from unique_asr.models.listening_llm.modeling import ListeningLLM, load_listening_llm
from unique_asr.models.listening_llm.prompts import HeardPrompt

__all__ = [
    "HeardPrompt",
    "HeardSpeech",
    "HeardWord",
    "ListeningLLM",
    "ListeningLLMConfig",
    "WhisperListener",
    "load_listening_llm",
]
