"""How much of a transcript repeats itself at one place: the mark of a decoder caught in a loop."""

MAX_PERIOD = 30  # words


def longest_repeated_run(text: str, max_period: int = MAX_PERIOD) -> int:
    """Words of the longest stretch that is one phrase, of at most `max_period` words, said again and again.

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
