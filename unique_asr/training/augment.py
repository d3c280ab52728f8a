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


@dataclass
class Perturbation:
    """What was drawn for each of B items, on the CPU: factors on tempo, on amplitude, on noise by signal amplitude."""

    speed: Tensor  # [B]
    gain: Tensor  # [B]
    noise: Tensor  # [B], 0 without noise
    low: Tensor  # [B] bool: noise with more power at low frequencies, as in rooms and streets

    @classmethod
    def draw(cls, items: int, config: AugmentConfig, random: torch.Generator) -> Perturbation:
        speed, gain, share, snr, color = torch.rand(5, items, generator=random)
        quietest, loudest = config.snr_db
        level = 10 ** (-(quietest + (loudest - quietest) * snr) / 20)
        return cls(
            speed=1 + config.speed * (2 * speed - 1),
            gain=10 ** (config.gain_db * (2 * gain - 1) / 20),
            noise=level * (share < config.noise_share),
            low=color < 0.5,
        )


def add_noise(windows: Tensor, lengths: Tensor, gain: Tensor, noise: Tensor, low: Tensor) -> Tensor:
    """Noise relative to the power of each window and a gain; windows [W, N] of which `lengths` [W] are in use."""
    inside = torch.arange(windows.shape[1], device=windows.device) < lengths[:, None]
    white = torch.randn_like(windows)
    rumble = torch.nn.functional.avg_pool1d(white, 8, 1, 4)[:, : windows.shape[1]] * 8**0.5  # of the same power
    added = torch.where(low[:, None], rumble, white) * inside
    power = windows.square().sum(1) / lengths.clamp_min(1)
    return (windows + added * (noise * power.sqrt())[:, None]) * gain[:, None]


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


def compute_log_mel(windows: Tensor, mel_filters: Tensor, n_fft: int = 400, hop: int = 160) -> Tensor:
    """Whisper's log-mel features of W padded windows on their device: [W, samples] -> [W, mels, samples / hop].

    mel_filters: [n_fft / 2 + 1, mels], the feature extractor's. WhisperFeatureExtractor gives the same on the CPU.
    """
    taper = torch.hann_window(n_fft, device=windows.device)
    spectrum = torch.stft(windows, n_fft, hop, window=taper, return_complex=True)
    power = spectrum[..., :-1].abs().square()
    log_power = (mel_filters.T @ power).clamp_min(1e-10).log10()
    floor = log_power.amax((1, 2), keepdim=True) - 8.0
    return (torch.maximum(log_power, floor) + 4.0) / 4.0
