"""Embedding the request that a model reads before its answer, with the audio encoded a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from unique_asr.models.pretrained.catalogue import SAMPLE_RATE, KnownModel
from unique_asr.models.pretrained.encoding import encode, insert_audio


def embed_prompt(
    known_model: KnownModel,
    model: Any,
    processor: Any,
    samples: np.ndarray,
    prompt: str | None = None,
    language: str | None = None,
    keywords: Sequence[str] = (),
    windows: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Embed the request for the transcript of a pass. Gradients reach the encoder and the projector where they train.

    Args:
        known_model: entry of the model in the catalogue.
        model, processor: of transformers.
        samples: float32 [n] at 16 kHz.
        prompt: an instruction, or text as context.
        language: code of the spoken language, if the model can be told.
        keywords: words to expect, for models that take keywords.
        windows: encoder windows that are encoded at once, about.
        progress: called with the number of pieces that are done and of all.

    Returns:
        Embeddings [1, N, hidden].

    Raises:
        ValueError: the processor cut audio that is longer than it knows.
    """
    if known_model.sample_rate != SAMPLE_RATE:
        samples = resample(torch.from_numpy(samples), SAMPLE_RATE, known_model.sample_rate).numpy()
    told = {"keywords": keywords} if keywords else {}
    inputs = known_model.request(processor, samples, prompt, language, **told)
    features = []
    for piece, done, total in encode(known_model.encoding, model, inputs, windows):
        features.append(piece)
        if progress:
            progress(done, total)
    return insert_audio(known_model.encoding, model, torch.as_tensor(inputs["input_ids"]), features)
