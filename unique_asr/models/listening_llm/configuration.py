"""The configuration of a speech LLM whose listener writes words."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


class ListeningLLMConfig(PretrainedConfig):
    """Configuration of a Whisper model and of the causal LM that reads what it heard.

    Args:
        audio_config: configuration of the Whisper model, encoder and decoder.
        text_config: configuration of the causal LM.
        language: code of the language that the listener is asked for; None: it finds out.
        window_seconds: audio that the listener gets at once, at most: 30 s is all that Whisper takes.
        search_seconds: a window that is not the last one ends in the quietest moment of so many seconds at its end.
        beams: hypotheses that the listener follows; 1 is greedy.
        alternatives: hypotheses beside the best one whose other words the LLM gets to read.
        max_pass_seconds: audio in one pass of the LLM, at most.
    """

    model_type = "unique_listening_llm"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        audio_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        language: str | None = "en",
        window_seconds: float = 30.0,
        search_seconds: float = 12.0,
        beams: int = 1,
        alternatives: int = 0,
        max_pass_seconds: float = 3600.0,
        **kwargs: Any,
    ) -> None:
        self.audio_config = _make_config(audio_config, "whisper")
        self.text_config = _make_config(text_config, "llama")
        self.language = language
        self.window_seconds = window_seconds
        self.search_seconds = search_seconds
        self.beams = beams
        self.alternatives = alternatives
        self.max_pass_seconds = max_pass_seconds
        if not 0 < search_seconds <= window_seconds / 2:
            raise ValueError(f"search_seconds={search_seconds}: give at most half of window_seconds={window_seconds}")
        if alternatives >= max(beams, 1):
            raise ValueError(f"alternatives={alternatives}: give less than beams={beams}")
        super().__init__(**kwargs)


def _make_config(config: PretrainedConfig | dict[str, Any] | None, default_type: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(config or {})
    return CONFIG_MAPPING[config.pop("model_type", default_type)](**config)


AutoConfig.register(ListeningLLMConfig.model_type, ListeningLLMConfig)
