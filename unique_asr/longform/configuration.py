"""Settings of passes: where they begin and end, and what each kind of model adds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannerConfig:
    """Where passes begin and end; see `unique_asr.longform.planner`. Times are seconds of audio."""

    max_pass_seconds: float | None = None  # None: what suits the model
    cut_seconds: float = 30.0  # a pass that is not the last one ends in a pause of its last seconds
    retry_seconds: float = 60.0  # a pass that made no progress is tried again on this much audio, then skipped
    skip_seconds: float | None = None  # audio that is skipped when that fails too; None: all of the pass
    min_progress_seconds: float = 2.0  # less than this is no progress


@dataclass(frozen=True)
class LongformConfig(PlannerConfig):
    """Passes of our speech LLM, whose text is placed on CTC spikes: about one token of speech each, three a second."""

    retry_seconds: float = 30.0
    skip_seconds: float | None = 10.0
    rest_seconds: float = 2.0  # speech after the end of the text that is worth another pass: seconds,
    rest_spikes: int = 6  # and spikes
    gap_spikes: int = 40  # speech that a text may leave out before the pass is broken off to go back
    lost_tokens: int = 120  # text that may fit nowhere nearby before the pass is broken off to go back
    returns: int = 2  # times that passes go back to the same place; the second time, on less audio
    tokens_a_second: float = 5.0  # most tokens that a pass may write: the larger of these two,
    tokens_a_spike: float = 2.0
    spare_tokens: int = 64  # and these on top
    min_align_tokens: int = 8  # sentences are aligned together until they have as many
    max_align_words: int = 40  # text without a sentence's end is aligned in pieces of as many words
    min_coverage: float = 0.95  # less is worth a warning
    search_spikes: int = 240  # how far ahead a text is looked for that does not fit nearby


@dataclass(frozen=True)
class TimestampedConfig(PlannerConfig):
    """Passes of a known speech LLM, whose text is checked against the loudness of the audio."""

    rest_seconds: float = 10.0  # speech after the end of the text that is worth another pass
    carried_characters: int = 400  # of the text before, for models that take it
    encode_windows: int = 8  # of the encoder at once
