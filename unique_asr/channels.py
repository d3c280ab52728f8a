"""Several channels become one: one that is chosen, their mean, or one of them where the mean is silence."""

from __future__ import annotations

import math

import numpy as np

RATE = 16000  # Hz
CANCELLED = 0.1  # share of the energy that the mean of unrelated channels would have, below which one is taken instead
RESTORED = 0.3  # and above which the mean is taken again
MEMORY = 0.2  # s over which energies are averaged
SILENCE = 1e-10  # energy of a sample, of 1, below which nothing is decided


class ChannelMixer:
    """Mixes the channels of a recording, piece by piece.

    FFmpeg's own mix to mono would raise the level of float audio by 3 dB. The mean of channels of opposite phase, as
    wrongly wired microphones and some phone recorders give, is silence: where it has far less energy than the
    channels, the loudest of them is taken.

    Args:
        channel: the one that is taken, 1 for the first; None for the mean.

    Attributes:
        replaced: how many samples one channel gave in the place of the mean.
        stand_in: this channel, the last one if there were several; None: the mean was never replaced.
    """

    def __init__(self, channel: int | None = None) -> None:
        self.channel = channel
        self.replaced = 0
        self.stand_in: int | None = None
        self._cancelled = False
        self._energies = np.zeros(0)  # of each channel, and of the mean

    def mix(self, channels: np.ndarray) -> np.ndarray:
        """Return one channel [N] of samples [C, N], float32; NaN and infinity become silence."""
        if not math.isfinite(channels.sum()):
            channels = np.nan_to_num(channels, posinf=0.0, neginf=0.0)
        if self.channel is not None or len(channels) == 1:
            # A stream may change to fewer channels on the way: its last one stands for those that are gone.
            return channels[: self.channel][-1].copy()
        mean = channels.mean(axis=0, dtype=np.float32)
        self._measure(np.concatenate([channels, mean[None]]))
        if not self._cancelled:
            return mean
        self.replaced += len(mean)
        return channels[self.stand_in - 1].copy()

    def _measure(self, signals: np.ndarray) -> None:
        """Follow the energies of channels and mean [C + 1, N], and decide whether the mean is to be replaced."""
        size = signals.shape[1]
        energies = np.einsum("cn,cn->c", signals, signals, dtype=np.float64)
        if len(energies) != len(self._energies):
            self._energies, self._cancelled = np.zeros(len(energies)), False
        forgotten = math.exp(-size / (MEMORY * RATE))
        self._energies = forgotten * self._energies + energies
        count = len(energies) - 1
        level = self._energies[:count].mean()
        if level < SILENCE * size:
            return
        share = count * self._energies[count] / level  # 1: unrelated, `count`: the same, 0: they cancel each other
        if not self._cancelled and share < CANCELLED:
            self._cancelled, self.stand_in = True, int(self._energies[:count].argmax()) + 1
        elif self._cancelled and share > RESTORED:
            self._cancelled = False
