"""How far word times are from the truth, on recordings that were joined from utterances.

    python benchmarks/tools/measure_word_times.py --manifest tests/data/manifest.jsonl
    python benchmarks/tools/measure_word_times.py --manifest eval.jsonl --seconds 40 --limit 12 --output word_times.json

Each row of the manifest has `audio_filepath` (relative to it) and `segments`: start, end (s) and text of utterances
that were joined in order. So it is known when the first word of an utterance begins, and when its last one ends: where
the utterance gets loud (10-ms frames above 5 % of the loudness that a twentieth of them exceed, and above three times
its quietest twentieth), and where it falls quiet; an edge on the joint itself is noise or cut speech, and left out.
Of the words between there is no truth. Two sets of words are held against it: those of the transcript that are the
utterance's first or last in the reference too, and all of them when the reference itself is aligned, in pieces of at
most 20 s.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from unique_asr.audio import SAMPLE_RATE, AudioFile
from unique_asr.longform.alignment import align_text
from unique_asr.models import load
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber
from unique_asr.transcript import Word

FRAME = SAMPLE_RATE // 100  # samples
LOUD = 0.05  # of the loudness that 5 % of an utterance's frames exceed
NOISE = 3.0  # times the loudness that 5 % of them do not reach
ALIGN_SECONDS = 20.0  # of reference text at once
TARGET = 0.3  # s


@dataclass
class Utterance:
    """Seconds from the recording's beginning; `onset` and `offset` are where its sound begins and ends."""

    start: float
    end: float
    onset: float
    offset: float
    words: list[str]


def normalise(word: str) -> str:
    return re.sub(r"[^a-z0-9']", "", word.lower().replace("’", "'")).strip("'")


def split(text: str) -> list[str]:
    return [word for token in re.split(r"[\s\-–—]+", text) if (word := normalise(token))]


def sounding(samples: np.ndarray) -> tuple[float, float]:
    """Seconds at which an utterance gets loud and falls quiet."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    loudness = np.sqrt((frames.astype(np.float64) ** 2).mean(1))
    quiet, peak = np.quantile(loudness, [0.05, 0.95])
    loud = np.flatnonzero(loudness >= min(max(LOUD * peak, NOISE * quiet), peak))
    return loud[0] * FRAME / SAMPLE_RATE, (loud[-1] + 1) * FRAME / SAMPLE_RATE


def utterances(segments: Sequence[dict[str, Any]], samples: np.ndarray) -> list[Utterance]:
    """Of the segments that lie in the samples as a whole and have words."""
    found = []
    for segment in segments:
        start, end = segment["start"], segment["end"]
        part = samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        words = split(segment["text"])
        if end <= len(samples) / SAMPLE_RATE + 0.02 and len(part) >= FRAME and words:
            onset, offset = sounding(part)
            found.append(Utterance(start, end, start + onset, start + offset, words))
    return found


def errors(truth: Sequence[Utterance], words: Sequence[Word]) -> Iterator[tuple[str, float]]:
    """("start" or "end", seconds that a word is late) of words that are first or last in an utterance.

    A word counts if it and its neighbour inside the utterance are in the reference: a match by chance says nothing.
    """
    reference = [word for utterance in truth for word in utterance.words]
    spoken = [(part, word) for word in words for part in split(word.text)]
    matcher = SequenceMatcher(None, reference, [part for part, _ in spoken], autojunk=False)
    match = {
        block.a + place: spoken[block.b + place][1]
        for block in matcher.get_matching_blocks()
        for place in range(block.size)
    }
    first = 0
    for utterance in truth:
        last = first + len(utterance.words) - 1
        if first in match and min(first + 1, last) in match and utterance.onset > utterance.start:
            yield "start", match[first].start - utterance.onset
        if last in match and max(last - 1, first) in match and utterance.offset < utterance.end - 0.01:
            yield "end", match[last].end - utterance.offset
        first = last + 1


def align_reference(model: Any, processor: Any, truth: Sequence[Utterance], samples: np.ndarray) -> list[Word]:
    """The words of the reference, aligned in pieces."""
    words: list[Word] = []
    place = 0
    while place < len(truth):
        end = place + 1
        while end < len(truth) and truth[end].end - truth[place].start <= ALIGN_SECONDS:
            end += 1
        piece = truth[place:end]
        start = piece[0].start
        part = samples[round(start * SAMPLE_RATE) : round(piece[-1].end * SAMPLE_RATE)]
        text = " ".join(word for utterance in piece for word in utterance.words)
        found, _ = align_text(model, processor, model.encode([part], processor), text)
        words += [Word(word.text, word.start + start, word.end + start, word.confidence) for word in found]
        place = end
    return words


def summary(late: Sequence[float]) -> dict[str, float]:
    """Of seconds that words are late; distances are without their sign."""
    values = np.asarray(late)
    distance = np.abs(values)
    return {
        "words": len(values),
        "median": round(float(np.median(distance)), 3),
        "mean": round(float(distance.mean()), 3),
        "90 %": round(float(np.quantile(distance, 0.9)), 3),
        "late": round(float(np.median(values)), 3),
        f"within {TARGET} s": round(float((distance <= TARGET).mean()), 3),
    }


def measure(
    rows: Sequence[tuple[Path, Sequence[dict[str, Any]]]],
    model: Any,
    processor: Any,
    seconds: float | None = None,
    transcribe: bool = True,
) -> dict[str, dict[str, float]]:
    """Statistics of starts and ends for (file, segments) pairs, of which the first `seconds` are taken."""
    late: dict[str, list[float]] = {}
    transcriber = SpeechLLMTranscriber((model, processor)) if transcribe else None
    for path, segments in rows:
        samples = np.concatenate(list(AudioFile(path, end=seconds).blocks()))
        truth = utterances(segments, samples)
        if not truth:
            continue
        sets = {"reference": align_reference(model, processor, truth, samples)}
        if transcriber is not None:
            decoded, _ = transcriber.transcribe(samples[: round(truth[-1].end * SAMPLE_RATE)])
            sets["transcript"] = [word for segment in decoded for word in segment.words]
        for name, words in sets.items():
            for edge, error in errors(truth, words):
                late.setdefault(f"{name}, {edge}", []).append(error)
    return {name: summary(values) for name, values in sorted(late.items())}


def read_rows(manifest: Path, limit: int | None = None) -> list[tuple[Path, list[dict[str, Any]]]]:
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [row for row in rows if row.get("segments")]
    if not rows:
        raise SystemExit(f"error: --manifest {manifest}: no row has segments; give recordings joined from utterances")
    if limit:  # evenly over the manifest, which goes by speaker
        rows = [rows[len(rows) * number // limit] for number in range(min(limit, len(rows)))]
    return [(manifest.parent / row["audio_filepath"], row["segments"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--model", default="default", help="default, or a folder of the same kind")
    parser.add_argument("--seconds", type=float, help="of each recording; all of it by default")
    parser.add_argument("--limit", type=int, help="recordings")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-transcript", action="store_true", help="only align the reference, which takes seconds")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    rows = read_rows(arguments.manifest, arguments.limit)
    model, processor = load(arguments.model, arguments.device)
    results = measure(rows, model, processor, arguments.seconds, not arguments.no_transcript)
    columns = list(next(iter(results.values())))
    print(f"| words | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, values in results.items():
        print(f"| {name} | {' | '.join(str(value) for value in values.values())} |")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
