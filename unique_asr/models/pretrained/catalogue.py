"""The known speech LLMs, one entry each: how to ask, how to encode, how to read the answer, and its limits.

Licences, limits and numbers of parameters are those of the model cards; shapes, audio positions a second and contexts
those of the configurations and processors in transformers. A comment says where a limit comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from unique_asr.decoding.memory import DecoderShape
from unique_asr.models.languages import LANGUAGES
from unique_asr.models.pretrained import encoding
from unique_asr.models.pretrained.encoding import AudioEncoding
from unique_asr.models.pretrained.formats import BracketParser, JsonParser, Parser, PlainParser

SAMPLE_RATE = 16000  # Hz
TRANSCRIBE = "Transcribe the input speech."  # for models that are asked in words

# Prefixes of the names of the weights of each part that can be fine-tuned.
Parts = dict[str, tuple[str, ...]]
PARTS: Parts = {
    "encoder": ("model.audio_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.",),
}

# Builds the request: (processor, samples, prompt, code of the language) -> tensors of one recording. It also takes
# `keywords` where hotwords="keywords".
Request = Callable[..., Any]


@dataclass(frozen=True)
class KnownModel:
    """One family of speech LLMs in transformers, found by `model_type` in a configuration."""

    model_type: str
    model_class: str  # name of the class in transformers
    licence: str
    tokens_a_second: float  # audio positions of the LLM for a second of audio
    pass_seconds: float  # audio in one pass, at most
    request: Request
    encoding: AudioEncoding
    parser: type[Parser]  # reads the answer
    checkpoints: tuple[DecoderShape, ...]
    context: int  # tokens of a pass, prompt and answer, at most
    sample_rate: int = SAMPLE_RATE  # Hz, of the audio that the processor takes
    carries_text: bool = False  # the text of the pass before may be part of the prompt
    static: bool = True  # a decode step can be captured in a CUDA graph
    chunked: bool = True  # a prefill in chunks gives the same as a whole one
    lora: str | None = None  # folder of LoRA weights for speech, below that of the model
    marker_tokens_a_second: float = 0.0  # tokens of times among the audio positions, for a second of audio
    text_tokens_a_second: float = 10.0  # tokens of the answer for a second of audio, at most
    languages: tuple[str, ...] = ()  # codes of the languages that the request can name; the model finds others itself
    hotwords: Literal["keywords", "prompt"] | None = None  # where words to expect go in the request; None: nowhere
    opening: str = ""  # the beginning of an answer, before its transcript
    parts: Parts = field(default_factory=lambda: PARTS)  # that can be fine-tuned


def request_transcription(
    processor: Any,
    samples: np.ndarray,
    prompt: str | None,
    language: str | None = None,
    keywords: Sequence[str] = (),
) -> Any:
    """Build the request with the processor's own method."""
    # Not every processor takes both.
    told = ({"language": language} if language else {}) | ({"keywords": list(keywords)} if keywords else {})
    return processor.apply_transcription_request(
        audio=[samples], prompt=prompt, processor_kwargs={"return_tensors": "pt"}, **told
    )


def request_vibevoice(processor: Any, samples: np.ndarray, prompt: str | None, language: str | None = None) -> Any:
    """Build the request with the hop length spelled out, which a tokenizer that was saved in use would overwrite."""
    hop = {"pad_to_multiple_of": processor.feature_extractor.pad_to_multiple_of}
    return processor.apply_transcription_request(audio=[samples], prompt=prompt, processor_kwargs={"audio_kwargs": hop})


def request_voxtral(processor: Any, samples: np.ndarray, prompt: str | None, language: str | None = None) -> Any:
    """Build the request, which takes the name of the model and no prompt."""
    name = getattr(processor.tokenizer, "name_or_path", "") or "voxtral"
    return processor.apply_transcription_request(
        audio=[samples], model_id=name, language=language, sampling_rate=SAMPLE_RATE, format=["wav"]
    )


def request_granite(processor: Any, samples: np.ndarray, prompt: str | None, language: str | None = None) -> Any:
    """Ask for a transcript in words."""
    question = f"{processor.audio_token}{prompt or 'can you transcribe the speech into a written format?'}"
    chat = [{"role": "user", "content": question}]
    text = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], audio=[samples], return_tensors="pt")


def request_qwen2_audio(processor: Any, samples: np.ndarray, prompt: str | None, language: str | None = None) -> Any:
    """Ask for a transcript in words."""
    content = [{"type": "audio"}, {"type": "text", "text": prompt or TRANSCRIBE}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    rate = processor.feature_extractor.sampling_rate
    return processor(text=[text], audio=[samples], sampling_rate=rate, return_tensors="pt")


def request_phi4(processor: Any, samples: np.ndarray, prompt: str | None, language: str | None = None) -> Any:
    """Ask for a transcript in words."""
    question = prompt or "Transcribe the audio clip into text."
    text = f"<|user|>{processor.audio_token}{question}<|end|><|assistant|>"
    return processor(text=[text], audio=[samples], return_tensors="pt")


KNOWN_MODELS = {
    known_model.model_type: known_model
    for known_model in (
        # The card: 90 minutes in one pass, 128 K tokens.
        KnownModel(
            "moss_transcribe_diarize", "MossTranscribeDiarizeForConditionalGeneration",
            "Apache-2.0", 12.5, 5400, request_transcription, encoding.MossRows(), BracketParser,
            (DecoderShape("hf-audio/MOSS-Transcribe-Diarize-HF", 0.91, 28, 16, 8, 128, 1024, 3072),), 131072,
            marker_tokens_a_second=2.0,  # the seconds every two seconds, a token a digit
            hotwords="keywords",
        ),
        # The card: 60 minutes within 64 K tokens.
        KnownModel(
            "vibevoice_asr", "VibeVoiceAsrForConditionalGeneration",
            "MIT", 7.5, 3600, request_vibevoice, encoding.VibeVoicePiece(), JsonParser,
            (DecoderShape("microsoft/VibeVoice-ASR-HF", 8.3, 28, 28, 4, 128, 3584, 18944),), 65536,
            sample_rate=24000, carries_text=True, hotwords="prompt",
            parts={part: PARTS[part] for part in ("projector", "language_model")},  # its encoders give no gradients
        ),
        # The card: 30 minutes for transcription, 32 K tokens. Audio is padded to whole windows of 30 s.
        KnownModel(
            "voxtral", "VoxtralForConditionalGeneration",
            "Apache-2.0", 12.5, 1800, request_voxtral, encoding.WindowRows(), PlainParser,
            (
                DecoderShape("mistralai/Voxtral-Mini-3B-2507", 4.7, 30, 32, 8, 128, 3072, 8192),
                DecoderShape("mistralai/Voxtral-Small-24B-2507", 24.3, 40, 32, 8, 128, 5120, 32768),
            ),
            32768, languages=("de", "en", "es", "fr", "hi", "it", "nl", "pt"),
        ),
        # MAX_ASR_INPUT_SECONDS of the package qwen_asr. 104 positions for a window of 8 s.
        KnownModel(
            "qwen3_asr", "Qwen3ASRForConditionalGeneration",
            "Apache-2.0", 13.0, 1200, request_transcription, encoding.Qwen3Windows(), PlainParser,
            (
                DecoderShape("Qwen/Qwen3-ASR-0.6B-hf", 0.78, 28, 16, 8, 128, 1024, 3072),
                DecoderShape("Qwen/Qwen3-ASR-1.7B-hf", 2.0, 28, 16, 8, 128, 2048, 6144),
            ),
            65536, carries_text=True, languages=tuple(LANGUAGES), hotwords="prompt",
            opening="language None<asr_text>",  # its authors' for a transcript in a language that is not told
        ),
        # Its processor cuts at 655 s, which leave no room for the text in 8 K tokens.
        KnownModel(
            "glmasr", "GlmAsrForConditionalGeneration",
            "MIT", 12.5, 480, request_transcription, encoding.WindowRows(), PlainParser,
            (DecoderShape("zai-org/GLM-ASR-Nano-2512", 2.1, 28, 16, 4, 128, 2048, 6144),), 8192,
        ),
        # Its processor cuts at 600 s.
        KnownModel(
            "audioflamingo3", "AudioFlamingo3ForConditionalGeneration",
            "NVIDIA OneWay Noncommercial", 25.0, 600, request_transcription, encoding.WindowRows(), PlainParser,
            (DecoderShape("nvidia/audio-flamingo-3-hf", 8.3, 28, 28, 4, 128, 3584, 18944),), 32768,
        ),
        # The card gives no limit; this one is a guess.
        KnownModel(
            "granite_speech", "GraniteSpeechForConditionalGeneration",
            "Apache-2.0", 10.0, 120, request_granite, encoding.GranitePiece(), PlainParser,
            (DecoderShape("ibm-granite/granite-speech-3.3-2b", 2.9, 40, 32, 8, 64, 2048, 8192),), 131072,
            parts=PARTS | {"encoder": ("model.encoder.",), "projector": ("model.projector.",)},
        ),
        # The card gives no limit, and its authors cut at 30 s by voice activity; this one is a guess.
        KnownModel(
            "fun_asr_nano", "FunAsrNanoForConditionalGeneration",
            "Apache-2.0", 16.7, 120, request_transcription, AudioEncoding(), PlainParser,
            (DecoderShape("FunAudioLLM/Fun-ASR-Nano-2512-hf", 0.83, 28, 16, 8, 128, 1024, 3072),), 40960,
            carries_text=True, languages=("en", "ja", "zh"), hotwords="keywords",
        ),
        # One window of its encoder.
        KnownModel(
            "qwen2_audio", "Qwen2AudioForConditionalGeneration",
            "Apache-2.0", 25.0, 30, request_qwen2_audio, encoding.Qwen2AudioRows(), PlainParser,
            (DecoderShape("Qwen/Qwen2-Audio-7B-Instruct", 8.4, 32, 32, 32, 128, 4096, 11008),), 8192,
        ),
        # What its technical report (arXiv 2503.01743) summarises; how well it transcribes as much is not known here.
        KnownModel(
            "phi4_multimodal", "Phi4MultimodalForCausalLM",
            "MIT", 12.5, 1800, request_phi4, encoding.Phi4Piece(), PlainParser,
            (DecoderShape("microsoft/Phi-4-multimodal-instruct", 5.6, 32, 24, 8, 128, 3072, 8192),), 131072,
            # LongRoPE chooses its frequencies by the length of what it is given at once.
            lora="speech-lora", static=False, chunked=False,
            parts={
                "encoder": ("model.embed_tokens_extend.audio_embed.encoder.",),
                "projector": tuple(
                    f"model.embed_tokens_extend.audio_embed.{layer}_proj_for_speech." for layer in ("up", "down")
                ),
                "language_model": ("model.layers.", "model.norm."),
            },
        ),
    )
}  # fmt: skip
