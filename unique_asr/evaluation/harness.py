"""Scoring a system on recordings: what it wrote, how far it got, how fast, and how sparse it was.

    result = evaluate(SpeechLLM(model, processor, attention="unique"), recordings)
    print(result)

A system is anything with a `name` and `transcribe(recordings)`; those of this project are in `systems.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from unique_asr.data import Recording
from unique_asr.evaluation.decodings import Decodings
from unique_asr.evaluation.peak_memory import PeakMemory
from unique_asr.evaluation.results import Hypothesis, SystemResult


class System(Protocol):
    """What is evaluated."""

    name: str

    def transcribe(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Hypothesis]]:
        """Transcribe recordings, any number of them side by side.

        Yields:
            The index of a recording and its hypothesis, each as soon as it is complete, in any order.
        """


def evaluate(
    system: System,
    recordings: Sequence[Recording],
    progress: Callable[[SystemResult], None] | None = None,
    decodings: Decodings | None = None,
    known: Mapping[Recording, Hypothesis] | None = None,
) -> SystemResult:
    """Transcribe recordings and score them.

    Args:
        system: what transcribes.
        recordings: what is transcribed, with its text.
        progress: called with the result so far after each recording.
        decodings: hypotheses of an earlier run, which are not decoded again; new ones are added.
        known: more hypotheses that are not decoded again.

    Returns:
        The result, in the order of `recordings`.
    """
    result, known = SystemResult(system.name), dict(known or {})
    if decodings is not None:
        known |= {r: found for r in recordings if r not in known and (found := decodings.get(r)) is not None}

    def add(recording: Recording, hypothesis: Hypothesis) -> None:
        result.add(recording, hypothesis)
        if progress is not None:
            progress(result)

    for recording in recordings:
        if recording in known:
            add(recording, known[recording])
    pending = [recording for recording in recordings if recording not in known]
    decoded = system.transcribe(pending)
    for _ in pending:
        started, memory = time.perf_counter(), PeakMemory()
        index, hypothesis = next(decoded)
        hypothesis.seconds = hypothesis.seconds or time.perf_counter() - started
        hypothesis.peak_memory = memory.read()
        if decodings is not None:
            decodings.put(pending[index], hypothesis)
        add(pending[index], hypothesis)
    return result.reorder(recordings)
