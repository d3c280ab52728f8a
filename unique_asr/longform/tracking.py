"""Where in the audio the text is: the words of a pass get their places and times as they are decoded."""

from __future__ import annotations

from copy import copy
from math import exp, isnan
from statistics import fmean
from typing import Any

import numpy as np

from unique_asr.longform.alignment import (
    Alignment,
    AlignmentConfig,
    SpeechFrames,
    SpokenText,
    align,
    spread,
    word_confidence,
    word_frames,
    word_times,
)
from unique_asr.longform.configuration import LongformConfig
from unique_asr.longform.segmentation import DraftWord
from unique_asr.transcript import Word


class TextTracker:
    """Follows the text of a pass through the audio: words go in as drafts and come out with times.

    Text that does not fit waits until text after it does, and then gets the speech between the two; if there is none,
    it was never said, and is dropped.
    """

    def __init__(self, model: Any, processor: Any, encoded: Any, alignment: AlignmentConfig, config: LongformConfig):
        self.model, self.processor, self.encoded = model, processor, encoded
        self.alignment, self.config = alignment, config
        self.frames = SpeechFrames(encoded, model.config.blank_id)
        self.cursor = self.end = 0  # frames: where the placed text ends, and where the pass does
        self.gap = 0  # spikes that the last text left out, if they were too many to place it
        self.waiting: list[DraftWord] = []
        self.dropped: list[tuple[float, str]] = []  # second, text
        self._returns: list[int] = []  # frames that passes were sent back to
        self._previous_end = 0.0  # seconds

    def branch(self, start: int) -> TextTracker:
        """Return another tracker over the same recording, for text from the frame `start` on."""
        other = copy(self)
        other.dropped, other.waiting, other._returns = [], [], []
        other._previous_end = self.frames.seconds(start)
        return other

    def continue_from(self, earlier: TextTracker) -> None:
        """Take over the dropped text and the end time of the tracker of an earlier section."""
        self.dropped += earlier.dropped
        self._previous_end = earlier._previous_end

    def begin(self, start: int, end: int) -> None:
        """Start a pass over the frames [start, end)."""
        self.cursor, self.end, self.gap = start, end, 0
        self.waiting = []

    def make_state(self) -> dict[str, Any]:
        """Return what one pass leaves to the next; for JSON."""
        return {
            "dropped": list(self.dropped),
            "returns": [int(frame) for frame in self._returns],
            "previous_end": float(self._previous_end),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `make_state` returned."""
        self.dropped, self._returns = list(state["dropped"]), list(state.get("returns", []))
        self._previous_end = state["previous_end"]

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the text that has no place yet."""
        return sum(max(len(word.log_probs), 1) for word in self.waiting)

    def place(self, drafts: list[DraftWord]) -> list[tuple[DraftWord, Word]]:
        """Return the words that have their place now, earlier calls' first; set `gap` if they leave speech out."""
        text = SpokenText.from_words([word.text for word in drafts], self.processor)
        found = self._find(text)
        if found is None:
            self.waiting += drafts
            return []
        if self._leaves_gap(int(found.first[0])):
            return []
        # Only the last heard word ends the text surely: what follows it waits for the next text.
        last = int(np.flatnonzero(found.heard)[-1])
        words = int(text.word_index[last]) + 1
        tokens = int(np.searchsorted(text.word_index, words))
        head = SpokenText(text.words[:words], text.ids[:tokens], text.word_index[:tokens])
        placed = self._place_waiting(int(found.first[0]))
        end = int(found.last[tokens - 1]) + 1
        spans = word_frames(head, found.first[:tokens], found.last[:tokens], self.frames, self.cursor, end)
        placed += self._timed(drafts[:words], spans, word_confidence(head, found.log_prob[:tokens]))
        self.cursor = end
        self.waiting = drafts[words:]
        return placed

    def finish(self) -> list[tuple[DraftWord, Word]]:
        """Place the text that still waits in the speech that is left."""
        return self._place_waiting(self.end)

    def measure_rest(self) -> tuple[int, float]:
        """Return the speech of the pass after the placed text: spikes, and seconds from the first to the last."""
        spikes = self.frames.spikes
        left = spikes[(spikes >= self.cursor) & (spikes < self.end)]
        return len(left), float(left[-1] - left[0] + 1) * self.frames.frame_seconds if len(left) else 0.0

    def _find(self, text: SpokenText) -> Alignment | None:
        ahead = 2 * len(text.ids) + 2 * self.waiting_tokens + 24
        for spikes in (ahead, self.config.search_spikes):
            end = min(self.frames.spike_after(self.cursor, spikes) + 4, self.end)
            found = align(self.model, self.encoded, self.frames, text, self.cursor, end, self.alignment)
            if found and found.fits:
                return found
            if spikes >= self.config.search_spikes or end == self.end:
                return None
        return None

    def is_lost(self) -> bool:
        """Return whether so much text waits that it was hardly said here: a later pass should write this place anew."""
        return self.waiting_tokens >= self.config.lost_tokens and self._go_back()

    def _leaves_gap(self, first: int) -> bool:
        left_out = self.frames.count(self.cursor, first) - 2 * self.waiting_tokens
        if left_out < self.config.gap_spikes or not self._go_back():
            return False
        self.gap = left_out
        return True

    def _go_back(self) -> bool:
        """Whether a pass may be sent back to the cursor; after some, what they write has to do."""
        before = sum(abs(self.cursor - frame) * self.frames.frame_seconds < 1 for frame in self._returns)
        if before >= self.config.returns:
            return False
        self._returns.append(self.cursor)
        return True

    def _place_waiting(self, end: int) -> list[tuple[DraftWord, Word]]:
        drafts, self.waiting = self.waiting, []
        if not drafts:
            return []
        room = self.frames.count(self.cursor, end)
        if len(drafts) > 3 and room < 0.3 * sum(max(len(word.log_probs), 1) for word in drafts):
            self.dropped.append((self.frames.seconds(self.cursor), " ".join(word.text for word in drafts)))
            return []
        spans = spread(len(drafts), self.frames, self.cursor, end)
        placed = self._timed(drafts, spans, np.zeros(len(drafts)))
        self.cursor = max(self.cursor, min(int(spans[-1, 1]) + 1, end))
        return placed

    def _timed(self, drafts: list[DraftWord], spans: np.ndarray, heard: np.ndarray) -> list[tuple[DraftWord, Word]]:
        """Confidence is the mean of two witnesses: the probability that the LLM gave a word, and the CTC head's."""
        times = word_times(spans, self.frames, self.alignment, self._previous_end)
        placed = []
        for draft, (start, end), sure in zip(drafts, times, heard, strict=True):
            written = [exp(fmean(draft.log_probs))] if draft.log_probs else []
            witnesses = written + [float(sure)] * (not isnan(sure))
            confidence = fmean(witnesses) if witnesses else 0.0
            placed.append((draft, Word(draft.text, float(start), float(end), confidence)))
        self._previous_end = placed[-1][1].end
        return placed
