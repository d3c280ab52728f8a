"""When each word was said: Viterbi alignment of a text on the CTC log-probabilities of a recording.

    t = 0 ... T                      gap0  token1  (blank)  token2  gap2  token3 ...  gapL
    gap0   speech before the text    skip_cost a speech frame
    gapL   speech after the text     tail_cost
    gaps   between two words         gap_cost (speech that the text leaves out)
    tokens                           at most token_cost (text that was not said)

Every cost is best_log_prob[t] - log_prob[t] of what the frame is taken for, in nats, so silence and a right token cost
nothing and the ends of the text need not be known: a text is looked for in a window that begins where the text before
it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from unique_asr.longform.viterbi import cheapest_path
from unique_asr.transcript import Word


@dataclass(frozen=True)
class AlignmentConfig:
    """Costs in nats, times in seconds."""

    token_cost: float = 8.0  # the most that one token can cost: a text with unspoken words keeps its place
    gap_cost: float = 2.0  # a speech frame between two words of the text
    skip_cost: float = 0.5  # a speech frame before the text: a later place has to fit clearly better
    tail_cost: float = 0.1  # a speech frame after the text
    min_log_prob: float = -4.6  # a likelier token was heard (1 %: a head that knows nothing hears nothing)
    min_fit: float = 0.4  # share of heard tokens below which a text does not belong to the audio
    onset_seconds: float = 0.08  # a CTC spike comes this long after its word begins
    join_seconds: float = 0.4  # a word lasts until the next one if that follows within this time
    release_seconds: float = 0.24  # a word before a pause lasts this long after its last spike


@dataclass
class SpokenText:
    """What the CTC head would write for W words: L tokens, and for each the index of its word."""

    words: list[str]
    ids: np.ndarray  # [L]
    word_index: np.ndarray  # [L]

    @classmethod
    def from_words(cls, words: Sequence[str], processor: Any) -> SpokenText:
        """words: without whitespace; numbers and signs get no token."""
        ids, word_index = processor.ctc_ids(" ".join(words))
        return cls(list(words), np.asarray(ids, np.int64), np.asarray(word_index, np.int64))


class SpeechFrames:
    """The text-independent evidence of a recording, a `planner.SpeechEvidence`: T frames, on the CPU.

    A spike is the first frame of a run of frames whose best CTC symbol is the same token: about one token of speech.
    """

    is_certain = True  # a CTC head that hears nothing is right

    def __init__(self, encoded: Any, blank_id: int) -> None:
        best = encoded.best.cpu().numpy()
        self.best_log_prob = encoded.best_log_prob.float().cpu().numpy()  # [T]
        self.blank_log_prob = encoded.blank_log_prob.float().cpu().numpy()  # [T]
        self.frame_seconds = float(encoded.frame_seconds)
        self.duration = float(encoded.duration)
        self.speech = best != blank_id  # [T]
        self.spikes = np.flatnonzero(self.speech & (best != np.concatenate([[blank_id], best[:-1]])))
        self._counts = np.concatenate([[0], np.cumsum(np.isin(np.arange(len(best)), self.spikes))])

    def __len__(self) -> int:
        return len(self.speech)

    def count(self, start: int, end: int) -> int:
        """Spikes in the frames [start, end)."""
        start, end = (min(max(frame, 0), len(self)) for frame in (start, end))
        return max(int(self._counts[end] - self._counts[start]), 0)

    def next_spike(self, frame: int) -> int:
        """The first spike at or after a frame; T if there is none."""
        index = int(np.searchsorted(self.spikes, frame))
        return int(self.spikes[index]) if index < len(self.spikes) else len(self)

    def spike_after(self, frame: int, count: int) -> int:
        """The frame after the next `count` spikes from a frame on; T if there are fewer."""
        index = int(np.searchsorted(self.spikes, frame)) + count - 1
        return int(self.spikes[index]) + 1 if index < len(self.spikes) else len(self)

    @property
    def end(self) -> float:
        """Seconds at which the last frame ends; a little after the recording does."""
        return len(self) * self.frame_seconds

    def next_speech(self, time: float) -> float:
        """When the first spike at or after a time is; the end if there is none."""
        return self.next_spike(self.frame_at(time)) * self.frame_seconds

    def find_pause(self, start: float, end: float) -> float:
        """The middle of the longest run of frames without speech between two times."""
        first, last = self.frame_at(start), self.frame_at(end)
        edges = np.concatenate([[first - 1], first + np.flatnonzero(self.speech[first:last]), [last]])
        longest = int(np.argmax(np.diff(edges)))
        return int(edges[longest] + edges[longest + 1] + 1) // 2 * self.frame_seconds

    def seconds(self, frame: float) -> float:
        """When a frame begins, within the recording."""
        return min(frame * self.frame_seconds, self.duration)

    def frame_at(self, time: float) -> int:
        """The frame in which a time lies."""
        return int(time / self.frame_seconds + 1e-6)  # a frame's own beginning must not be rounded down


@dataclass
class Alignment:
    """L tokens on frames: token i is said in the frames first[i] .. last[i], with log_prob[i] in its best one."""

    first: np.ndarray  # [L]
    last: np.ndarray  # [L]
    log_prob: np.ndarray  # [L]
    config: AlignmentConfig = field(default_factory=AlignmentConfig)

    @property
    def heard(self) -> np.ndarray:
        """[L] whether the audio supports a token."""
        return self.log_prob > self.config.min_log_prob

    @property
    def fit(self) -> float:
        """Share of the tokens that were heard."""
        return float(self.heard.mean())

    @property
    def fits(self) -> bool:
        return self.fit >= self.config.min_fit


def viterbi(
    token_log_probs: np.ndarray,
    blank_log_prob: np.ndarray,
    best_log_prob: np.ndarray,
    ids: np.ndarray,
    word_index: np.ndarray,
    config: AlignmentConfig | None = None,
) -> Alignment | None:
    """The cheapest path of L tokens through T frames; None if there are too few frames.

    Args:
        token_log_probs: [T, L], of each token at each frame.
        blank_log_prob, best_log_prob: [T], of the blank and of the likeliest symbol.
        ids, word_index: [L], token ids and the index of each token's word. Words without tokens leave gaps in the
            index: between their neighbours, speech is as cheap as after the text.
    """
    config = config or AlignmentConfig()
    frames, tokens = token_log_probs.shape
    if tokens == 0 or frames < tokens:
        return None
    states = 2 * tokens + 1  # even: gaps, odd: tokens
    blank_cost = np.maximum(best_log_prob - blank_log_prob, 0)
    token_costs = np.clip(best_log_prob[:, None] - token_log_probs, 0, config.token_cost)
    step = np.diff(word_index)
    inner = np.select([step == 0, step == 1], [config.token_cost, config.gap_cost], config.tail_cost)
    ceilings = np.concatenate([[config.skip_cost], inner, [config.tail_cost]])  # [L + 1]
    costs = np.empty((frames, states), np.float32)
    costs[:, 0::2] = np.minimum(blank_cost[:, None], ceilings)
    costs[:, 1::2] = token_costs

    jump = np.full(states, np.inf, np.float32)  # from one token to the next without a gap: not between equal tokens
    jump[3::2] = np.where(ids[1:] == ids[:-1], np.inf, 0)
    path = cheapest_path(costs, jump)
    if not len(path):
        return None
    token_states = np.arange(1, states, 2)
    first = np.searchsorted(path, token_states, "left")
    last = np.searchsorted(path, token_states, "right") - 1
    said = np.where(path % 2 == 1, token_log_probs[np.arange(frames), np.minimum(path // 2, tokens - 1)], -np.inf)
    return Alignment(first, last, np.maximum.reduceat(said, first), config)


def align(
    model: Any, encoded: Any, frames: SpeechFrames, text: SpokenText, start: int, end: int, config: AlignmentConfig
) -> Alignment | None:
    """Find a text in the frames [start, end) of a recording; None if it has no tokens or cannot be there.

    Frames deep inside a silence, which any gap takes for nothing, are left out of the search.
    """
    quiet = (frames.blank_log_prob[start:end] > np.log(0.99)) & ~frames.speech[start:end]
    near = np.convolve(~quiet, np.ones(5), "same") > 0 if len(quiet) >= 5 else ~quiet
    kept = np.flatnonzero(near)
    if len(text.ids) == 0 or len(kept) < len(text.ids):
        return None
    with torch.no_grad():
        log_probs = model.ctc_log_probs(encoded, torch.from_numpy(text.ids), start, end).float().cpu().numpy()
    kept_frames = start + kept
    blank, best = frames.blank_log_prob[kept_frames], frames.best_log_prob[kept_frames]
    alignment = viterbi(log_probs[kept], blank, best, text.ids, text.word_index, config)
    if alignment:
        alignment.first, alignment.last = kept_frames[alignment.first], kept_frames[alignment.last]
    return alignment


def word_frames(
    text: SpokenText, first: np.ndarray, last: np.ndarray, frames: SpeechFrames, start: int, end: int
) -> np.ndarray:
    """First and last frame of each of W words, [W, 2]; words without tokens share the speech between their neighbours.

    first, last: [L], frames of the tokens; start, end: frames between which the words lie.
    """
    spans = np.full((len(text.words), 2), -1, np.int64)
    for token, word in enumerate(text.word_index):
        if spans[word, 0] < 0:
            spans[word, 0] = first[token]
        spans[word, 1] = last[token]
    word = 0
    while word < len(spans):
        if spans[word, 0] >= 0:
            word += 1
            continue
        after = next((i for i in range(word, len(spans)) if spans[i, 0] >= 0), len(spans))
        low = spans[word - 1, 1] + 1 if word else start
        high = spans[after, 0] if after < len(spans) else end
        spans[word:after] = spread(after - word, frames, low, high, spikes_a_word=4, from_end=word == 0)
        word = after
    return spans


def spread(
    count: int, frames: SpeechFrames, start: int, end: int, spikes_a_word: int = 2, from_end: bool = False
) -> np.ndarray:
    """First and last frame of `count` words without an alignment, [count, 2]: in order over the speech of [start, end).

    Speech beyond `spikes_a_word` belongs to words that are missing: these keep to the start of the span, or to its end.
    """
    spikes = frames.spikes[(frames.spikes >= start) & (frames.spikes < end)]
    spikes = spikes[-count * spikes_a_word :] if from_end else spikes[: count * spikes_a_word]
    if len(spikes) == 0:
        return np.full((count, 2), max(min(start, end - 1), 0), np.int64)
    begins = spikes[np.arange(count) * len(spikes) // count]
    ends = np.maximum(np.append(begins[1:] - 1, spikes[-1]), begins)
    return np.stack([begins, ends], 1)


def word_times(
    spans: np.ndarray, frames: SpeechFrames, config: AlignmentConfig, previous_end: float = 0.0
) -> np.ndarray:
    """Start and end of W words in seconds, [W, 2], from their frames [W, 2]; monotone, not before previous_end.

    A spike marks the middle of a token, not its edges: a word begins a little before its first spike, and lasts until
    the next speech if that follows at once, else until shortly after its last spike: it does not reach into a pause.
    """
    if len(spans) == 0:
        return np.empty((0, 2))
    firsts = np.append(spans[:, 0], frames.next_spike(int(spans[-1, 1]) + 1))
    begins = np.clip(firsts * frames.frame_seconds - config.onset_seconds, 0, frames.duration)
    times = np.empty((len(spans), 2))
    for index, (begin, following) in enumerate(pairwise(begins)):
        start = max(begin, previous_end)
        spoken = frames.seconds(spans[index, 1] + 1)
        end = following if following - spoken <= config.join_seconds else spoken + config.release_seconds
        previous_end = max(end, start)
        times[index] = start, previous_end
    return np.minimum(times.round(3), frames.duration)


def word_confidence(text: SpokenText, log_prob: np.ndarray) -> np.ndarray:
    """[W] geometric mean of the probabilities of a word's tokens; NaN for words without any."""
    sums = np.bincount(text.word_index, weights=log_prob, minlength=len(text.words))
    counts = np.bincount(text.word_index, minlength=len(text.words))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.exp(sums / counts)


def align_text(
    model: Any, processor: Any, encoded: Any, text: str, config: AlignmentConfig | None = None
) -> tuple[list[Word], float]:
    """Align the whole text of a short recording: its words with times, and the share of its tokens that were heard."""
    config = config or AlignmentConfig()
    frames = SpeechFrames(encoded, model.config.blank_id)
    spoken = SpokenText.from_words(text.split(), processor)
    found = align(model, encoded, frames, spoken, 0, len(frames), config)
    if found is None:
        spans, fit = spread(len(spoken.words), frames, 0, len(frames)), 0.0
        confidence = np.zeros(len(spoken.words))
    else:
        spans, fit = word_frames(spoken, found.first, found.last, frames, 0, len(frames)), found.fit
        confidence = np.nan_to_num(word_confidence(spoken, found.log_prob), nan=0.5)
    times = word_times(spans, frames, config)
    words = [
        Word(word, float(start), float(end), float(sure))
        for word, (start, end), sure in zip(spoken.words, times, confidence, strict=True)
    ]
    return words, fit
