"""Telling which models hear the same: those that differ only in the layers of the LLM."""

from __future__ import annotations

import hashlib

import torch

from unique_asr.models.speech_llm.modeling import SpeechLLMForConditionalGeneration

WEIGHTS = ("encoder.", "projector.", "listener.", "ctc_tokens")  # prefixes of the names of weights that hear
SETTINGS = ("merge", "listener", "stack_factor", "merge_frames", "window_seconds", "margin_seconds")


def compute_hearing_fingerprint(model: SpeechLLMForConditionalGeneration) -> str:
    """Hash all that turns audio into positions, in its precision; the LLM's embeddings are part of it."""
    settings = [getattr(model.config, name) for name in SETTINGS]
    found, table = hashlib.sha256(repr(settings).encode()), model.get_input_embeddings().weight
    for name, value in model.state_dict().items():
        if name.startswith(WEIGHTS) or value.data_ptr() == table.data_ptr():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().flatten().view(torch.uint8).cpu().numpy())
    return found.hexdigest()[:16]
