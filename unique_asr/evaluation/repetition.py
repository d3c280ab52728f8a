"""How long a transcript repeats itself in one place: the mark of a decoder that is caught in a loop."""

MAX_PERIOD = 30  # words of the phrase that is repeated


def measure_longest_repeat(text: str, max_period: int = MAX_PERIOD) -> int:
    """Count the words of the longest stretch that says one phrase again and again.

    Args:
        text: a transcript; case does not matter.
        max_period: words of the phrase, at most.

    Returns:
        0 if nothing is said twice in a row. A text with "no no no" in it has 3.
    """
    words, longest = text.lower().split(), 0
    for period in range(1, min(max_period, len(words) // 2) + 1):
        run = 0
        for word, before in zip(words[period:], words):
            run = run + 1 if word == before else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest
