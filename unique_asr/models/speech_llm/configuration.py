"""The configuration of a speech LLM: an audio encoder, a projector and a causal LM."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


class SpeechLLMConfig(PretrainedConfig):
    """Configuration of a speech LLM of any audio encoder and any causal LM of transformers.

    Args:
        audio_config: configuration of the encoder (Whisper, wav2vec2-BERT, Parakeet ...).
        text_config: configuration of the causal LM.
        encoder_frame_seconds: seconds between two output frames of the encoder (Whisper: 0.02).
        stack_factor: encoder frames that the projector stacks into one frame.
        projector_size: hidden width of the projector.
        context_layers: transformer layers in the projector, over the frames of a window; 0: none.
        context_dropout: dropout of these layers in training.
        merge: `ctc` merges the frames between two CTC spikes into one position of the LLM, `none` keeps every frame,
            `decoder` makes a position of each token that Whisper's own decoder writes.
        listener: for `decoder`: `prompt`, `stop`, `heads` and `suppressed`, as in `Listener`.
        ctc_vocabulary_size: number of tokens that the CTC head may emit; None: all of the LLM's.
        merge_frames: frames that one merged position covers, at most.
        window_seconds: audio that the encoder gets at once; longer recordings are encoded window by window.
        margin_seconds: audio at each inner end of a window that is encoded as context and then dropped.
        audio_token_id: the prompt's placeholder for the whole recording.
        max_pass_seconds: audio in one pass of the LLM, at most; what it was trained for.

    Raises:
        ValueError: `merge` is unknown or lacks what it needs, or a window is no whole number of stacked frames.
    """

    model_type = "unique_speech_llm"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        audio_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        encoder_frame_seconds: float = 0.02,
        stack_factor: int = 4,
        projector_size: int = 1024,
        context_layers: int = 0,
        context_dropout: float = 0.1,
        ctc_vocabulary_size: int | None = None,
        merge: str = "ctc",
        listener: dict[str, Any] | None = None,
        merge_frames: int = 12,
        window_seconds: float = 30.0,
        margin_seconds: float = 0.96,
        audio_token_id: int | None = None,
        max_pass_seconds: float = 1200.0,
        **kwargs: Any,
    ) -> None:
        self.audio_config = _sub_config(audio_config, "whisper")
        self.text_config = _sub_config(text_config, "llama")
        self.encoder_frame_seconds = encoder_frame_seconds
        self.stack_factor = stack_factor
        self.projector_size = projector_size
        self.context_layers = context_layers
        self.context_dropout = context_dropout
        if merge not in ("ctc", "none", "decoder"):
            raise ValueError(f"merge must be 'ctc', 'none' or 'decoder', not {merge!r}")
        if merge == "decoder" and not (self.audio_config.model_type == "whisper" and listener):
            raise ValueError("merge='decoder' needs a Whisper model in audio_config, and `listener`")
        self.listener = listener
        self.ctc_vocabulary_size = ctc_vocabulary_size or self.text_config.vocab_size
        self.merge = merge
        self.merge_frames = merge_frames
        frames = window_seconds / (encoder_frame_seconds * stack_factor)
        if abs(frames - round(frames)) > 1e-6:
            raise ValueError(f"window_seconds={window_seconds} is not a whole number of stacked frames ({frames:.2f})")
        self.window_seconds = window_seconds
        self.margin_seconds = margin_seconds
        self.audio_token_id = self.text_config.vocab_size if audio_token_id is None else audio_token_id
        self.max_pass_seconds = max_pass_seconds
        super().__init__(**kwargs)

    @property
    def frame_seconds(self) -> float:
        """Seconds between two frames after stacking."""
        return self.encoder_frame_seconds * self.stack_factor

    @property
    def blank_id(self) -> int:
        """The CTC blank, one past the LLM's vocabulary."""
        return self.text_config.vocab_size


def _sub_config(config: PretrainedConfig | dict[str, Any] | None, default_type: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(config or {})
    return CONFIG_MAPPING[config.pop("model_type", default_type)](**config)


AutoConfig.register(SpeechLLMConfig.model_type, SpeechLLMConfig)
