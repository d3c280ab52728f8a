"""Speech and texts in memory, and the joined items that training draws from them.

All audio sits as int16 in one tensor per source on the training device (an hour is 115 MB), so that joining utterances
to any length, augmenting them and computing features costs no loading.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unique_asr.audio import load_audio
from unique_asr.evaluation.readers import HUB_NAME, read_hub
from unique_asr.models.speech_llm.ctc import normalize_ctc_text
from unique_asr.models.speech_llm.processing import SAMPLE_RATE

LOWER_CASE = "lower case"  # the prompt for transcripts without case and punctuation
MIN_SAMPLES = SAMPLE_RATE // 20  # of an utterance
MAX_UTTERANCE_SECONDS = 28.0  # a longer utterance is left out: slowed down it would not fit into the encoder's window


@dataclass(eq=False)
class Utterance:
    """Samples [start, end) of its source's audio. `cased`: the text with case and punctuation, None where unknown.

    heard: what a listener made of it: the most likely tokens of each position, [M, A], and their weights, [M, A].
    """

    start: int
    end: int
    text: str
    cased: str | None
    heard: tuple[Tensor, Tensor] | None = None

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / SAMPLE_RATE


@dataclass(eq=False)
class Source:
    """Recordings of one kind: each a list of consecutive utterances. `weight`: share of the items drawn from it."""

    name: str
    audio: Tensor  # [samples] int16
    recordings: list[list[Utterance]]
    weight: float
    cased_runs: list[list[Utterance]] = field(init=False)

    def __post_init__(self) -> None:
        self.cased_runs = [run for recording in self.recordings for run in _cased_runs(recording)]

    @property
    def hours(self) -> float:
        return sum(utterance.seconds for recording in self.recordings for utterance in recording) / 3600

    def has(self, cased: bool) -> bool:
        """Whether there is anything to draw, with known case if `cased`."""
        return bool(self.cased_runs if cased else self.recordings)

    def stretch(self, cased: bool, random: np.random.Generator) -> Iterable[Utterance]:
        """Consecutive utterances of one recording, from any of them on."""
        pool = self.cased_runs if cased else self.recordings
        run = pool[random.integers(len(pool))]
        return run[random.integers(len(run)) :]


@dataclass
class Item:
    """Utterances joined in this order. `pieces`: (source, utterance, seconds of silence before it)."""

    pieces: list[tuple[Source, Utterance, float]]
    cased: bool

    @property
    def text(self) -> str:
        if self.cased:
            return " ".join(utterance.cased or "" for _, utterance, _ in self.pieces)
        return normalize_ctc_text(" ".join(utterance.text for _, utterance, _ in self.pieces))

    @property
    def prompt(self) -> str | None:
        return None if self.cased else LOWER_CASE

    @property
    def seconds(self) -> float:
        return sum(utterance.seconds + gap for _, utterance, gap in self.pieces)


class Corpus:
    """Draws items of a wanted length from several sources.

    Args:
        max_gap_seconds: longest silence put between two utterances.
    """

    def __init__(self, sources: Sequence[Source], seed: int, max_gap_seconds: float = 0.8):
        self.sources = list(sources)
        self.random = np.random.default_rng(seed)
        self.max_gap_seconds = max_gap_seconds

    def item(self, seconds: float, cased_share: float) -> Item:
        """Consecutive utterances of at most `seconds`, or one longer; more recordings follow where one is too short.

        cased_share: probability of an item drawn from the utterances whose case and punctuation are known.
        Raises ValueError if there is nothing to draw from.
        """
        if not any(source.has(cased=False) for source in self.sources):
            raise ValueError("data: no utterance to train on; check data.manifests, data.synthetic and the filters")
        cased = self.random.random() < cased_share and any(source.has(cased=True) for source in self.sources)
        pieces: list[tuple[Source, Utterance, float]] = []
        total = 0.0
        while True:
            source = self._source(cased)
            for utterance in source.stretch(cased, self.random):
                gap = float(self.random.uniform(0, self.max_gap_seconds)) if pieces else 0.0
                if pieces and total + gap + utterance.seconds > seconds:
                    return Item(pieces, cased)
                pieces.append((source, utterance, gap))
                total += gap + utterance.seconds
            if total > 0.7 * seconds:
                return Item(pieces, cased)

    def _source(self, cased: bool) -> Source:
        weights = np.array([source.weight if source.has(cased) else 0.0 for source in self.sources])
        return self.sources[self.random.choice(len(weights), p=weights / weights.sum())]


def _cased_runs(recording: Iterable[Utterance]) -> Iterator[list[Utterance]]:
    run: list[Utterance] = []
    for utterance in recording:
        if utterance.cased:
            run.append(utterance)
        elif run:
            yield run
            run = []
    if run:
        yield run


def read_manifests(
    paths: Iterable[str | Path],
    weights: dict[str, float],
    device: torch.device,
    min_match: float = 0.8,
    workers: int = 8,
    missing: str = "error",
    log: Callable[[str], None] = print,
) -> list[Source]:
    """Sources from JSONL manifests with rows of `audio_filepath`, `source`, `segments` (`start`, `end`, `text`).

    A folder in place of a manifest stands for its audio files with a text beside them: x.wav and x.txt. OWNER/DATA,
    OWNER/DATA:CONFIG or OWNER/DATA:CONFIG:SPLIT is a data set of the Hugging Face hub, its split `train` unless named.

    A segment may carry `cased` (text with case and punctuation, or null) and `match` (share of its words that a
    recogniser heard: segments below `min_match` are dropped as misread). weights: by source name; others weigh 1.
    missing: what to do about audio that is not there: `error`, or `skip`.
    log: is told how many files were missing and the first of them, and how many segments were left out and why.
    Raises ValueError naming the file for a missing or empty manifest and for missing audio.
    """
    if missing not in ("error", "skip"):
        raise ValueError(f"data.missing is {missing!r}: choose one of error, skip")
    rows = []
    for path in map(Path, paths):
        if HUB_NAME.fullmatch(str(path)) and path.suffix not in (".jsonl", ".json") and not path.parent.is_dir():
            rows += _hub(str(path))
            continue
        if path.is_dir():
            rows += _folder(path)
            continue
        if not path.is_file():
            raise ValueError(f"{path}: no such manifest")
        try:
            found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path}: not JSON lines ({error})") from None
        if any("audio_filepath" not in row or not (row.get("segments") or row.get("text")) for row in found):
            raise ValueError(f"{path}: each row needs audio_filepath and text or segments")
        if not found:
            raise ValueError(f"{path}: the manifest is empty")
        rows += [(path.parent / row["audio_filepath"], row) for row in found]
    rows = [(path, row) for path, row in rows if weights.get(_source_name(row), 1.0) > 0]
    absent = [str(path) for path, _ in rows if not path.is_file()]
    if absent:
        message = f"{absent[0]}: missing audio ({len(absent)} of {len(rows)} files of the manifests)"
        if missing == "error" or len(absent) == len(rows):
            raise ValueError(f"{message}; data.missing=skip goes on without")
        log(f"{message}; skipped")
        rows = [(path, row) for path, row in rows if path.is_file()]
    with ThreadPoolExecutor(workers) as pool:
        audio = list(pool.map(_read_int16, [path for path, _ in rows]))
    by_source: dict[str, list[tuple[np.ndarray, dict]]] = {}
    for samples, (_, row) in zip(audio, rows, strict=True):
        by_source.setdefault(_source_name(row), []).append((samples, row))
    left_out: Counter[str] = Counter()
    sources = [
        _source(name, entries, weights.get(name, 1.0), device, min_match, left_out)
        for name, entries in by_source.items()
    ]
    if left_out:
        log("segments left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    return sources


def _source_name(row: dict) -> str:
    return row.get("source", "manifest")


def _hub(name: str) -> list[tuple[Path, dict]]:
    repository, config, split = (*name.split(":"), "", "")[:3]
    return [
        (recording.spans[0].path, {"text": recording.text, "source": name})
        for recording in read_hub(f"{repository}:{config}:{split or 'train'}")
    ]


def _folder(folder: Path) -> list[tuple[Path, dict]]:
    """Every audio file of a folder that has a text of the same name beside it."""
    texts = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    rows = [
        (path, {"text": " ".join(texts[path.stem].read_text().split()), "source": folder.name})
        for path in sorted(folder.iterdir())
        if path.stem in texts and path.suffix != ".txt"
    ]
    if not rows:
        raise ValueError(f"{folder}: no audio file with a text of the same name, such as x.wav and x.txt")
    return rows


def _read_int16(path: Path) -> np.ndarray:
    """Samples at 16 kHz; what has another rate or many channels, or is not for libsndfile, goes through FFmpeg."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate == SAMPLE_RATE and file.channels == 1:
                return file.read(dtype="int16")
    except soundfile.LibsndfileError:
        pass
    return (load_audio(path).clip(-1, 1) * 32767).astype(np.int16)


def _source(
    name: str,
    entries: list[tuple[np.ndarray, dict]],
    weight: float,
    device: torch.device,
    min_match: float,
    left_out: Counter[str],
) -> Source:
    recordings, offset = [], 0
    for samples, row in entries:
        segments = row.get("segments") or [_whole(row, len(samples) / SAMPLE_RATE)]
        recording = []
        for segment in segments:
            start, end = round(segment["start"] * SAMPLE_RATE), round(segment["end"] * SAMPLE_RATE)
            if end - start > MAX_UTTERANCE_SECONDS * SAMPLE_RATE:
                reason = f"longer than {MAX_UTTERANCE_SECONDS:g} s"
            elif end > len(samples) + SAMPLE_RATE // 10 or min(end, len(samples)) - start < MIN_SAMPLES:
                reason = "outside their audio"
            elif segment.get("match") is not None and segment["match"] < min_match:
                reason = "misread"
            else:
                reason = None
            if reason:
                left_out[reason] += 1
                continue
            cased = segment.get("cased") or (segment["text"] if has_case(segment["text"]) else None)
            recording.append(Utterance(offset + start, offset + min(end, len(samples)), segment["text"], cased))
        if recording:
            recordings.append(recording)
        offset += len(samples)
    audio = torch.from_numpy(np.concatenate([samples for samples, _ in entries])).to(device)
    return Source(name, audio, recordings, weight)


def _whole(row: dict, seconds: float) -> dict:
    """The one segment of a row without segments, as NeMo writes it."""
    start = float(row.get("offset") or 0.0)
    return {"start": start, "end": start + float(row.get("duration") or seconds - start), "text": row["text"]}


def has_case(text: str) -> bool:
    """Both cases occur: a text all in capitals says nothing about them."""
    return text != text.lower() and text != text.upper()


def log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))


def read_synthetic(folder: str | Path, weights: dict[str, float], device: torch.device) -> list[Source]:
    """Sources from shards of scripts/recipes/synthesize.py: the lines of one synthetic speaker are one recording."""
    folder = Path(folder)
    index = folder / "index.jsonl"
    if not index.is_file():
        raise ValueError(f"{index}: no such file; make it with scripts/recipes/synthesize.py speak")
    rows = [json.loads(line) for line in index.read_text().splitlines() if line.strip()]
    shards = sorted({row["shard"] for row in rows})
    audio = {shard: np.load(folder / shard, mmap_mode="r") for shard in shards}
    offsets = dict(zip(shards, np.cumsum([0, *(len(audio[shard]) for shard in shards)]).tolist(), strict=False))
    flat = torch.empty(sum(map(len, audio.values())), dtype=torch.int16, device=device)
    for shard in shards:
        flat[offsets[shard] : offsets[shard] + len(audio[shard])] = torch.from_numpy(np.array(audio[shard])).to(device)
    recordings: dict[str, dict[str, list[Utterance]]] = {}
    for row in rows:
        start = offsets[row["shard"]] + row["offset"]
        cased = row["text"] if has_case(row["text"]) else row.get("cased")
        utterance = Utterance(start, start + row["samples"], row["text"], cased)
        if utterance.seconds <= MAX_UTTERANCE_SECONDS:
            recordings.setdefault(row["source"], {}).setdefault(row["speaker"], []).append(utterance)
    return [
        Source(name, flat, list(speakers.values()), weights.get(name, 1.0))
        for name, speakers in recordings.items()
        if weights.get(name, 1.0) > 0
    ]
