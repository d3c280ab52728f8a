"""Augmentation on the training device: tempo, level and noise of the waveform, masks on the spectrogram."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AugmentConfig:
    """Strengths; zero switches a part off."""

    speed: float = 0.12  # tempo and pitch together, up to this share faster or slower
    gain_db: float = 8.0
    noise_share: float = 0.5  # share of the items that get noise
    snr_db: tuple[float, float] = (8.0, 40.0)
    frequency_masks: int = 2
    frequency_mask_bins: int = 20
    time_masks: int = 10  # per window of the encoder
    time_mask_frames: int = 50  # of 10 ms


def augment_waveform(samples: Tensor, config: AugmentConfig, random: torch.Generator) -> Tensor:
    """samples [N] float32 -> [N'] float32."""
    speed, gain, share, snr, color = torch.rand(5, generator=random).tolist()
    factor = 1 + config.speed * (2 * speed - 1)
    if config.speed:
        length = int(len(samples) / factor)
        samples = torch.nn.functional.interpolate(samples[None, None], size=length, mode="linear")[0, 0]
    if share < config.noise_share:
        low, high = config.snr_db
        noise = torch.randn(len(samples), device=samples.device)
        if color < 0.5:  # noise with more power at low frequencies, as in rooms and streets
            noise = torch.nn.functional.avg_pool1d(noise[None, None], 8, 1, 4)[0, 0, : len(samples)]
        ratio = samples.square().mean() / noise.square().mean().clamp_min(1e-12)
        samples = samples + noise * (ratio * 10 ** (-(low + (high - low) * snr) / 10)).sqrt()
    return samples * 10 ** (config.gain_db * (2 * gain - 1) / 20)


def mask_spectrogram(features: Tensor, config: AugmentConfig) -> Tensor:
    """SpecAugment (arXiv 1904.08779) without warping; features [W, bins, frames], masked with each window's mean."""
    windows, bins, frames = features.shape
    fill = features.mean((1, 2), keepdim=True)
    for axis, size, count, longest in (
        (1, bins, config.frequency_masks, config.frequency_mask_bins),
        (2, frames, config.time_masks, config.time_mask_frames),
    ):
        index = torch.arange(size, device=features.device)
        for _ in range(count):
            start = torch.rand(windows, 1, device=features.device) * size
            width = torch.rand(windows, 1, device=features.device) * longest
            masked = (index >= start) & (index < start + width)
            features = torch.where(masked[:, :, None] if axis == 1 else masked[:, None, :], fill, features)
    return features


def log_mel(windows: Tensor, mel_filters: Tensor, n_fft: int = 400, hop: int = 160) -> Tensor:
    """Whisper's log-mel features of W padded windows on their device: [W, samples] -> [W, mels, samples / hop].

    mel_filters: [n_fft / 2 + 1, mels], the feature extractor's. WhisperFeatureExtractor gives the same on the CPU.
    """
    taper = torch.hann_window(n_fft, device=windows.device)
    spectrum = torch.stft(windows, n_fft, hop, window=taper, return_complex=True)
    power = spectrum[..., :-1].abs().square()
    log_power = (mel_filters.T @ power).clamp_min(1e-10).log10()
    floor = log_power.amax((1, 2), keepdim=True) - 8.0
    return (torch.maximum(log_power, floor) + 4.0) / 4.0
