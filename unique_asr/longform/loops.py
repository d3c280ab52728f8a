"""Text that repeats itself without end."""

from __future__ import annotations


class LoopDetector:
    """Finds repetition at the end of a token sequence, of any period up to max_period, at a small cost a token.

    Args:
        max_period: tokens.
        min_copies, min_tokens: a repetition counts once it has so many copies, and so many tokens.
    """

    def __init__(self, max_period: int = 30, min_copies: int = 4, min_tokens: int = 24) -> None:
        self.max_period = max_period
        self._needed = [max(min_tokens, (min_copies - 1) * period) for period in range(1, max_period + 1)]
        self.reset()

    def reset(self) -> None:
        """Drop the tokens so far."""
        self._history: list[int] = []  # the last token first
        self._matches: dict[int, int] = {}  # by period less 1: the last tokens that equal the one a period before

    def push(self, token: int) -> int:
        """Add a token; return the number of tokens in the repetition, 0 if there is none or it is still short."""
        equal = [index for index, before in enumerate(self._history) if before == token]
        self._matches = {index: self._matches.get(index, 0) + 1 for index in equal}
        self._history = [token, *self._history[: self.max_period - 1]]
        return next((n + index + 1 for index, n in self._matches.items() if n >= self._needed[index]), 0)
