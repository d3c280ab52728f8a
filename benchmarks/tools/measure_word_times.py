"""How far word times are from the truth, on recordings that were joined from utterances.

    python benchmarks/tools/measure_word_times.py --manifest tests/data/manifest.jsonl
    python benchmarks/tools/measure_word_times.py --manifest eval.jsonl --seconds 40 --limit 12 --output word_times.json

Each row of the manifest has `audio_filepath` (relative to it) and `segments`: start, end (s) and text of utterances
that were joined in order. So it is known when the first word of an utterance begins, and when its last one ends: where
the utterance gets loud (10-ms frames above 5 % of the loudness that a twentieth of them exceed, and above three times
its quietest twentieth), and where it falls quiet; an edge on the joint itself is noise or cut speech, and left out.
Nothing is known of the words between. Two sets of words are compared with these edges: the words of the transcript
that are first or last in their utterance, and those of the reference itself, aligned in pieces of at most 20 s.
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
from unique_asr.models.speech_llm import load
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber
from unique_asr.transcript import Word

FRAME = SAMPLE_RATE // 100  # samples, 10 ms
LOUD = 0.05  # threshold as a share of the loudness that 5 % of an utterance's frames exceed
NOISE = 3.0  # threshold as a multiple of the loudness that 5 % of them do not reach
ALIGN_SECONDS = 20.0  # of audio that is aligned at once
TARGET = 0.3  # s that a word may be away from the truth


@dataclass
class UtteranceEdges:
    """Where an utterance lies and where its sound begins (`onset`) and ends (`offset`), in seconds of its recording."""

    start: float
    end: float
    onset: float
    offset: float
    words: list[str]


def normalise(word: str) -> str:
    """Write a word in lower case, without punctuation."""
    return re.sub(r"[^a-z0-9']", "", word.lower().replace("’", "'")).strip("'")


def split_words(text: str) -> list[str]:
    """Cut a text into normalised words, at hyphens too."""
    return [word for token in re.split(r"[\s\-–—]+", text) if (word := normalise(token))]


def find_sound(samples: np.ndarray) -> tuple[float, float]:
    """Find the seconds at which an utterance gets loud and falls quiet; samples [n] at 16 kHz."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    loudness = np.sqrt((frames.astype(np.float64) ** 2).mean(1))
    quiet, peak = np.quantile(loudness, [0.05, 0.95])
    loud = np.flatnonzero(loudness >= min(max(LOUD * peak, NOISE * quiet), peak))
    return loud[0] * FRAME / SAMPLE_RATE, (loud[-1] + 1) * FRAME / SAMPLE_RATE


def find_edges(segments: Sequence[dict[str, Any]], samples: np.ndarray) -> list[UtteranceEdges]:
    """Find the edges of the segments that have words and lie wholly within the samples.

    Args:
        segments: with `start` and `end` in seconds, and `text`.
        samples: of the recording [n], at 16 kHz.
    """
    found = []
    for segment in segments:
        start, end = segment["start"], segment["end"]
        part = samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        words = split_words(segment["text"])
        if end <= len(samples) / SAMPLE_RATE + 0.02 and len(part) >= FRAME and words:
            onset, offset = find_sound(part)
            found.append(UtteranceEdges(start, end, start + onset, start + offset, words))
    return found


def compare_times(truth: Sequence[UtteranceEdges], words: Sequence[Word]) -> Iterator[tuple[str, float]]:
    """Compare the times of the words that are first or last in an utterance with the edges of its sound.

    A word counts if its neighbour inside the utterance matches too, so that no match is by chance.

    Yields:
        `start` or `end`, and the seconds that the word is late.
    """
    reference = [word for utterance in truth for word in utterance.words]
    spoken = [(part, word) for word in words for part in split_words(word.text)]
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


def align_reference(model: Any, processor: Any, truth: Sequence[UtteranceEdges], samples: np.ndarray) -> list[Word]:
    """Align the words of the reference in pieces of at most `ALIGN_SECONDS`; samples [n] at 16 kHz."""
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


def summarize(late: Sequence[float]) -> dict[str, float]:
    """Summarize the seconds that words are late; all but `late` are of distances, without sign."""
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
    """Measure the times of words on recordings.

    Args:
        rows: audio files with their segments.
        model, processor: a speech LLM of our architecture.
        seconds: of each recording; None: all of it.
        transcribe: measure the transcript too, not only the aligned reference.

    Returns:
        What `summarize` gives, for starts and ends of each set of words.
    """
    late: dict[str, list[float]] = {}
    transcriber = SpeechLLMTranscriber((model, processor)) if transcribe else None
    for path, segments in rows:
        samples = np.concatenate(list(AudioFile(path, end=seconds).blocks()))
        truth = find_edges(segments, samples)
        if not truth:
            continue
        sets = {"reference": align_reference(model, processor, truth, samples)}
        if transcriber is not None:
            decoded, _ = transcriber.transcribe(samples[: round(truth[-1].end * SAMPLE_RATE)])
            sets["transcript"] = [word for segment in decoded for word in segment.words]
        for name, words in sets.items():
            for edge, error in compare_times(truth, words):
                late.setdefault(f"{name}, {edge}", []).append(error)
    return {name: summarize(values) for name, values in sorted(late.items())}


def read_rows(manifest: Path, limit: int | None = None) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Read audio files and their segments, `limit` of them evenly over the manifest; exits if there are none."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [row for row in rows if row.get("segments")]
    if not rows:
        raise SystemExit(f"error: --manifest {manifest}: no row has segments; give recordings joined from utterances")
    if limit:  # evenly over the manifest, which goes by speaker
        rows = [rows[len(rows) * number // limit] for number in range(min(limit, len(rows)))]
    return [(manifest.parent / row["audio_filepath"], row["segments"]) for row in rows]


def main() -> None:
    """Run the command."""
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
