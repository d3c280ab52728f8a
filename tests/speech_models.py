"""Every known speech LLM: tiny, of random weights, but of transformers' real classes and processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from unique_asr.models.pretrained import KNOWN_MODELS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio|>", "<|audio_start|>", "<|audio_end|>", "<|image|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'audio' %}<|audio|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
WINDOW = 2  # seconds of a Whisper-like encoder


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    inner = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        additional_special_tokens=SPECIAL, chat_template=TEMPLATE,
        extra_special_tokens=MARKS | {"image_token": "<|image|>"},
    )  # fmt: skip


VOCABULARY = 256 + len(SPECIAL)
AUDIO = 256 + SPECIAL.index("<|audio|>")
MARKS = {"audio_token": "<|audio|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}


def text(kind: str, **options: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
        "pad_token_id": 256, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 4096,
    } | options  # fmt: skip


def whisper_like(**options: Any) -> dict[str, Any]:
    return {
        "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 8,
        "max_source_positions": 50 * WINDOW,
    } | options  # fmt: skip


def mel(**options: Any) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=8, chunk_length=WINDOW, **options)


def moss() -> Any:
    config = transformers.MossTranscribeDiarizeConfig(
        audio_config=whisper_like(), text_config=text("qwen3"), audio_token_id=AUDIO
    )
    extractor = transformers.MossTranscribeDiarizeFeatureExtractor(feature_size=8, chunk_length=WINDOW)
    return config, transformers.MossTranscribeDiarizeProcessor(extractor, tokenizer(), TEMPLATE, **MARKS)


def vibevoice() -> Any:
    audio = {"model_type": "vibevoice_acoustic_tokenizer_encoder", "num_filters": 2, "depths": [1] * 7}
    config = transformers.VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config=audio | {"hidden_size": 8},
        semantic_tokenizer_encoder_config=audio | {"hidden_size": 12},
        text_config=text("qwen2"), audio_token_id=AUDIO, acoustic_tokenizer_chunk_size=3200 * 4,
    )  # fmt: skip
    extractor = transformers.VibeVoiceAcousticTokenizerFeatureExtractor()
    return config, transformers.VibeVoiceAsrProcessor(extractor, tokenizer(), TEMPLATE, **MARKS)


def qwen3_asr() -> Any:
    audio = {
        "model_type": "qwen3_asr_encoder", "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "d_model": 16, "output_dim": 32, "downsample_hidden_size": 4, "n_window_infer": 200,
    }  # fmt: skip
    config = transformers.Qwen3ASRConfig(
        audio_config=audio, text_config=text("qwen3"), audio_token_id=AUDIO, eos_token_id=VOCABULARY, pad_token_id=256
    )
    extractor = transformers.Qwen3ASRFeatureExtractor(feature_size=8)
    return config, transformers.Qwen3ASRProcessor(extractor, tokenizer(), TEMPLATE)


def glm() -> Any:
    audio = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GlmAsrConfig(
        audio_config=audio | {"model_type": "glmasr_encoder", "num_mel_bins": 8},
        text_config=text("llama"), audio_token_id=AUDIO,
    )  # fmt: skip
    return config, transformers.GlmAsrProcessor(mel(), tokenizer(), TEMPLATE, audio_token="<|audio|>")


def audio_flamingo() -> Any:
    config = transformers.AudioFlamingo3Config(
        audio_config=whisper_like(model_type="audioflamingo3_encoder"), text_config=text("qwen2"), audio_token_id=AUDIO
    )
    return config, transformers.AudioFlamingo3Processor(mel(), tokenizer(), TEMPLATE, audio_token="<|audio|>")


def granite() -> Any:
    encoder = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "output_dim": 6, "context_size": 20, "dropout": 0.0}
    projector = {
        "model_type": "blip_2_qformer", "hidden_size": 16, "encoder_hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 10,
    }  # fmt: skip
    config = transformers.GraniteSpeechConfig(
        text_config=text("granite"), encoder_config=encoder, projector_config=projector, audio_token_index=AUDIO,
        has_lora_adapter=False,
    )  # fmt: skip
    extractor = transformers.GraniteSpeechFeatureExtractor()
    return config, transformers.GraniteSpeechProcessor(extractor, tokenizer(), chat_template=TEMPLATE)


def fun_asr() -> Any:
    audio = {
        "model_type": "fun_asr_nano_encoder", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_timestamp_prediction_layers": 1,
    }  # fmt: skip
    adaptor = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 8, "projector_hidden_size": 32}
    config = transformers.FunAsrNanoConfig(
        audio_config=audio, adaptor_config=adaptor, text_config=text("qwen3"), audio_token_id=AUDIO
    )
    extractor = transformers.FunAsrNanoFeatureExtractor()
    return config, transformers.FunAsrNanoProcessor(extractor, tokenizer(), TEMPLATE, audio_token="<|audio|>")


def qwen2_audio() -> Any:
    config = transformers.Qwen2AudioConfig(
        audio_config=whisper_like(), text_config=text("qwen2"), audio_token_index=AUDIO
    )
    return config, transformers.Qwen2AudioProcessor(mel(), tokenizer(), TEMPLATE, **MARKS)


def phi4() -> Any:
    audio = {
        "hidden_size": 16, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2, "audio_token_id": AUDIO,
        "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "crop_size": 28, "image_token_id": AUDIO + 3,
    }  # fmt: skip
    options = text("phi4_multimodal")
    del options["model_type"], options["head_dim"]
    config = transformers.Phi4MultimodalConfig(
        audio_config=audio, vision_config=vision, **options | {"eos_token_id": [VOCABULARY]}
    )
    return config, Phi4Requests()


class Phi4Requests:
    """Stands in for Phi4MultimodalProcessor, which needs Pillow and torchvision for its images."""

    audio_token = "<|audio|>"

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.extractor = transformers.Phi4MultimodalFeatureExtractor()

    def __call__(self, text: list[str], audio: list[np.ndarray], return_tensors: str) -> dict[str, torch.Tensor]:
        features = self.extractor(audio, sampling_rate=16000, return_tensors=return_tensors)
        sizes = features["audio_embed_sizes"].tolist()
        filled = [each.replace(self.audio_token, self.audio_token * size) for each, size in zip(text, sizes)]
        return {**self.tokenizer(filled, padding=True, return_tensors=return_tensors), **features}


def voxtral() -> Any:
    """Without its processor, which needs Mistral's tokenizer files: `VoxtralRequests` stands in for it."""
    config = transformers.VoxtralConfig(audio_config=whisper_like(), text_config=text("llama"), audio_token_id=AUDIO)
    return config, VoxtralRequests()


class VoxtralRequests:
    """The tensors of VoxtralProcessor.apply_transcription_request: whole windows, and a token for each four frames."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.extractor = mel()

    def apply_transcription_request(
        self, audio: list[np.ndarray], model_id: str, language: str | None, **_: Any
    ) -> dict[str, torch.Tensor]:
        self.language = language
        size = WINDOW * 16000
        windows = [np.pad(each, (0, -len(each) % size)).reshape(-1, size) for each in audio]
        features = self.extractor(list(np.concatenate(windows)), sampling_rate=16000, return_tensors="pt")
        prompt = self.tokenizer("transcribe")["input_ids"]
        rows = [[1, *[AUDIO] * (len(each) * 25 * WINDOW // 2), *prompt] for each in windows]
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[256] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            "input_features": features["input_features"],
        }


MAKERS: dict[str, Callable[[], Any]] = {
    "moss_transcribe_diarize": moss, "vibevoice_asr": vibevoice, "voxtral": voxtral, "qwen3_asr": qwen3_asr,
    "glmasr": glm, "audioflamingo3": audio_flamingo, "granite_speech": granite, "fun_asr_nano": fun_asr,
    "qwen2_audio": qwen2_audio, "phi4_multimodal": phi4,
}  # fmt: skip
assert set(MAKERS) == set(KNOWN_MODELS)


def make(name: str) -> tuple[Any, Any]:
    """A model that never ends its answer, and its processor."""
    torch.manual_seed(0)
    config, processor = MAKERS[name]()
    config.tie_word_embeddings = False  # tied random embeddings make it repeat itself
    model = getattr(transformers, KNOWN_MODELS[name].model_class)._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[256:] = 0  # it writes bytes only
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 256
    return model, processor
