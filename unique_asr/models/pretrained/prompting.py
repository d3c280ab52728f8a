"""The vectors that a model reads before its answer: its request, with the audio encoded a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from unique_asr.models.pretrained.catalogue import SAMPLE_RATE, KnownModel
from unique_asr.models.pretrained.encoding import encode, insert


def prompt_embeds(
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
    """[1, N, hidden] of samples [S] at 16 kHz; gradients reach what trains of the encoder and the projector.

    windows: about so many of the encoder's are encoded at once; progress: is told the pieces done and their number.
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
    return insert(known_model.encoding, model, torch.as_tensor(inputs["input_ids"]), features)
