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
    """What was drawn for each of B items, on the CPU."""

    speed: Tensor  # [B], factor on tempo and pitch
    gain: Tensor  # [B], factor on the amplitude
    noise: Tensor  # [B], amplitude of the noise relative to the signal's; 0 without noise
    low: Tensor  # [B] bool: noise with more power at low frequencies, as in rooms and streets

    @classmethod
    def draw(cls, items: int, config: AugmentConfig, random: torch.Generator) -> Perturbation:
        """Draw one for each of `items` items."""
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
    """Add noise to windows [W, N] and multiply by a gain.

    Args:
        lengths: int [W], samples that are in use; the rest stays zero.
        gain: [W], factors on signal and noise.
        noise: [W], amplitude of the noise relative to the window's own.
        low: bool [W], noise with more power at low frequencies.
    """
    inside = torch.arange(windows.shape[1], device=windows.device) < lengths[:, None]
    white = torch.randn_like(windows)
    rumble = torch.nn.functional.avg_pool1d(white, 8, 1, 4)[:, : windows.shape[1]] * 8**0.5  # of the same power
    added = torch.where(low[:, None], rumble, white) * inside
    power = windows.square().sum(1) / lengths.clamp_min(1)
    return (windows + added * (noise * power.sqrt())[:, None]) * gain[:, None]


def mask_spectrogram(features: Tensor, config: AugmentConfig) -> Tensor:
    """SpecAugment (arXiv 1904.08779) without warping: features [W, bins, frames] with bands and spans at the mean."""
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
    """Whisper's log-mel features of padded windows [W, samples], on their device: [W, mels, samples / hop].

    WhisperFeatureExtractor gives the same on the CPU.

    Args:
        mel_filters: [n_fft / 2 + 1, mels], the feature extractor's.
        n_fft, hop: in samples.
    """
    taper = torch.hann_window(n_fft, device=windows.device)
    spectrum = torch.stft(windows, n_fft, hop, window=taper, return_complex=True)
    power = spectrum[..., :-1].abs().square()
    log_power = (mel_filters.T @ power).clamp_min(1e-10).log10()
    floor = log_power.amax((1, 2), keepdim=True) - 8.0
    return (torch.maximum(log_power, floor) + 4.0) / 4.0
