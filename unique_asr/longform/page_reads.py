"""Which part of a recording each token was read from: the pages that sparse steps select, with time on both axes.

A row is when text was said, a column is what the LLM read while it wrote that text. Where the two are on the diagonal,
attention follows the speech. What is kept is a picture of a fixed size, however long the recording.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from unique_asr.attention import PagedCache


class PageReads:
    """What the decode steps of a recording read; give it to `transcribe` as `reads`.

    `shares` is complete once the segments are exhausted. Forced pages count too: the newest text is read always, and so
    is the first page, which holds the prompt.

    Args:
        bins: time steps that the recording is divided into, on both axes.
    """

    def __init__(self, bins: int = 240) -> None:
        self.bins, self.duration, self.offset = bins, 0.0, 0.0
        self._sums = np.zeros((bins, bins))
        self._tokens = np.zeros(bins)  # tokens in each row, a token that takes several rows in parts
        self._open: dict[int, np.ndarray] = {}  # of tokens that have no time yet: their rows

    @property
    def shares(self) -> np.ndarray:
        """[bins, bins]: of the audio in a column, the share that layers and KV heads read for the text of a row.

        NaN in rows without text.
        """
        with np.errstate(invalid="ignore"):
            return self._sums / self._tokens[:, None]

    def begin_pass(
        self, before: int, seconds: np.ndarray, duration: float, cache: PagedCache, offset: float = 0.0
    ) -> None:
        """Begin a pass whose prompt, `before` tokens of text and M audio positions, is in the cache.

        Args:
            seconds: [M + 1], where each audio position begins and the last one ends.
            duration: of the recording, in seconds.
            offset: the second of the file at which the recording begins.
        """
        self.duration, self.offset = duration, offset
        self._open.clear()
        self._cache, self._before, self._seconds = cache, before, seconds
        self._covered = self._columns(np.ones(len(seconds) - 1))  # seconds of audio in each column
        for layer in cache.paged_layers:
            if layer.selected is not None:
                layer.selected.fill_(-1)  # of the pass before

    def step(self, token: int) -> None:
        """Note what the step read that wrote a token, given by its index in the pass; waits for the device."""
        import torch  # late: the command line shows its usage without it

        selected = [layer.selected for layer in self._cache.paged_layers if layer.selected is not None]
        pages = torch.stack(selected)[:, 0].cpu().numpy() if selected else np.full((1, 1, 1), -1)  # [layers, K, k - 1]
        layers, heads, _ = pages.shape
        if pages.max() < 0:  # a dense step
            self._open[token] = (self._covered > 0).astype(float)
            return
        size = self._cache.attention.page_size
        read = (pages[pages >= 0][:, None] * size + np.arange(size)).ravel() - self._before
        audio = len(self._seconds) - 1
        counts = np.bincount(read[(read >= 0) & (read < audio)], minlength=audio)
        columns = self._columns(counts / (layers * heads))
        self._open[token] = np.divide(columns, self._covered, out=np.zeros(self.bins), where=self._covered > 0)

    def _columns(self, values: np.ndarray) -> np.ndarray:
        """[bins]: values [M] of the audio positions, times the seconds that each has in a column."""
        integral = np.concatenate([[0.0], np.cumsum(values * np.diff(self._seconds))])
        return np.diff(np.interp(np.linspace(0, self.duration, self.bins + 1), self._seconds, integral))

    def place(self, first: int, last: int, start: float, end: float) -> None:
        """Add what the tokens first .. last read: a word that was said from `start` to `end`, in seconds."""
        rows = [row for token in range(first, last + 1) if (row := self._open.pop(token, None)) is not None]
        if rows:
            low, high = (min(int(time / max(self.duration, 1e-9) * self.bins), self.bins - 1) for time in (start, end))
            span = high - low + 1
            self._sums[low : high + 1] += np.sum(rows, axis=0) / span
            self._tokens[low : high + 1] += len(rows) / span

    def svg(self, size: int = 480) -> str:
        """Draw the shares as an SVG picture of `size` pixels, with the recording's time on both axes."""
        from PIL import Image

        shares = np.nan_to_num(self.shares)
        levels = 255 - np.round(255 * np.sqrt(np.clip(shares / max(shares.max(), 1e-9), 0, 1)))  # dark: much was read
        picture = io.BytesIO()
        Image.fromarray(levels.astype(np.uint8)[::-1]).save(picture, "PNG")  # later text higher up
        link = base64.b64encode(picture.getvalue()).decode()
        left, bottom = 56, size + 8
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + size + 24} {size + 52}" '
            'font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<image x="{left}" y="8" width="{size}" height="{size}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{link}"/>',
            f'<rect x="{left}" y="8" width="{size}" height="{size}" fill="none" stroke="black"/>',
            f'<text x="{left + size / 2}" y="{size + 42}" text-anchor="middle">audio that was read</text>',
            f'<text transform="translate(12 {8 + size / 2}) rotate(-90)" text-anchor="middle">text, when said</text>',
        ]
        for tick in choose_ticks(self.duration):
            place = tick / max(self.duration, 1e-9) * size
            second = int(tick + self.offset)
            label = f"{second // 60}:{second % 60:02}"
            parts.append(f'<text x="{left + place:.0f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
            parts.append(f'<text x="{left - 6}" y="{bottom - place + 4:.0f}" text-anchor="end">{label}</text>')
        return "\n".join([*parts, "</svg>"]) + "\n"


def choose_ticks(duration: float) -> list[float]:
    """Return round times in seconds for an axis, from 0 on, at most seven."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)
    step = next((step for step in steps if duration / step <= 6), 4 * 3600)
    return [float(tick) for tick in np.arange(0, duration + 1e-9, step)]
