"""Entity error rate: 1 - the share of the entities of the reference that were transcribed verbatim.

An entity counts only if every one of its words is there, in order, after Whisper's normaliser (arXiv 2605.27740, its
measure for long recordings). Without a list, the entities are what a text itself shows: numbers, and names by their
capitals within a sentence, so that references in lower case have numbers only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from unique_asr.evaluation.scoring import load_english_normalizer

SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
LONGEST_NAME = 6  # words


@dataclass(frozen=True)
class EntityErrors:
    """Entities of a reference and how many of them were missed; `+` adds those of another recording."""

    entities: int = 0  # occurrences in the reference
    missed: int = 0  # of these

    def __add__(self, other: EntityErrors) -> EntityErrors:
        return EntityErrors(self.entities + other.entities, self.missed + other.missed)

    @property
    def rate(self) -> float | None:
        """Share of the entities that were missed; None without entities."""
        return self.missed / self.entities if self.entities else None


def count_entity_errors(reference: str, hypothesis: str, entities: Sequence[str] | None = None) -> EntityErrors:
    """Compare how often each entity occurs in the reference and in the hypothesis.

    Args:
        reference, hypothesis: texts.
        entities: as they are written in the reference; None: the numbers and names that the reference shows.
    """
    normalize = load_english_normalizer()
    said, heard = normalize(reference).split(), normalize(hypothesis).split()
    if entities is None:
        names, numbers = find_names(reference), [word for word in said if any(letter.isdigit() for letter in word)]
    else:
        names, numbers = entities, []
    wanted = {words for name in [*names, *numbers] if (words := tuple(normalize(name).split()))}
    expected, found = (_count_occurrences(words, wanted) for words in (said, heard))
    missed = sum(max(0, count - found[entity]) for entity, count in expected.items())
    return EntityErrors(sum(expected.values()), missed)


def find_names(text: str) -> list[str]:
    """Find runs of capitalised words within sentences; none in a text that is all capitals or all lower case."""
    names, run, first = [], [], True
    words = text.split()
    if not any(word.islower() for word in words):
        return []
    for word in [*words, "end"]:
        bare = word.strip("\"'()[],;:.!?-")
        capital = bare[:1].isupper() and bare not in ("I", "I'm", "I'll", "I've", "I'd")
        if run and (not capital or len(run) == LONGEST_NAME):
            names.append(" ".join(run))
            run = []
        if capital and not first:
            run.append(bare.removesuffix("'s"))
        if run and word[-1] in ",;:.!?":
            names.append(" ".join(run))
            run = []
        first = bool(SENTENCE_END.search(word)) and not re.fullmatch(r"(Mr|Mrs|Ms|Dr|St)\.|[A-Z]\.", word)
    return names


def _count_occurrences(words: Sequence[str], wanted: set[tuple[str, ...]]) -> Counter:
    """Count how often each of the wanted runs of words occurs."""
    found = Counter()
    for length in {len(entity) for entity in wanted}:
        runs = zip(*(words[start:] for start in range(length)))
        found.update(run for run in runs if run in wanted)
    return found
