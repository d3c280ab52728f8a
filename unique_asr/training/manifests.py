"""Reading training speech: manifests, folders and hub data sets of recordings, and shards of synthetic speech."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from unique_asr.audio import load_audio
from unique_asr.evaluation.readers import HUB_NAME, read_hub
from unique_asr.models.speech_llm.processing import SAMPLE_RATE
from unique_asr.training.corpus import (
    MAX_UTTERANCE_SECONDS,
    MIN_SAMPLES,
    Source,
    TrainingUtterance,
    describe_left_out,
    has_case,
)

TOO_LONG = f"longer than {MAX_UTTERANCE_SECONDS:g} s"  # why utterances are left out
OUTSIDE = "outside their audio"
MISREAD = "misread"


def read_manifests(
    paths: Iterable[str | Path],
    weights: dict[str, float],
    device: torch.device,
    min_match: float = 0.8,
    workers: int = 8,
    missing: str = "error",
    log: Callable[[str], None] = print,
) -> list[Source]:
    """Read JSONL manifests with rows of `audio_filepath`, `source` and `text` or `segments` (`start`, `end`, `text`).

    A segment may have `cased`, its text with case and punctuation or null, and `match`, the share of its words that a
    recogniser heard.

    Args:
        paths: manifests. A folder stands for its audio files with a text beside them (x.wav and x.txt). OWNER/DATA,
            OWNER/DATA:CONFIG and OWNER/DATA:CONFIG:SPLIT are data sets of the Hugging Face hub; split: `train`.
        weights: by source name; others weigh 1, and a source of weight 0 is not read.
        device: holds the audio.
        min_match: segments of a lower `match` are left out as misread.
        workers: threads that decode files.
        missing: what to do about audio that is not there: `error` or `skip`.
        log: is told how many files are missing and the first of them, and how many segments were left out and why.

    Raises:
        ValueError: a manifest is missing, empty or malformed, or audio is missing; names the file.
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
    sources = [_source(name, entries, weights.get(name, 1.0), device, min_match) for name, entries in by_source.items()]
    if left_out := sum((source.left_out for source in sources), Counter()):
        log(f"segments left out: {describe_left_out(left_out)}")
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
) -> Source:
    recordings, offset = [], 0
    left_out: Counter[str] = Counter()
    for samples, row in entries:
        segments = row.get("segments") or [_whole(row, len(samples) / SAMPLE_RATE)]
        recording = []
        for segment in segments:
            start, end = round(segment["start"] * SAMPLE_RATE), round(segment["end"] * SAMPLE_RATE)
            if end - start > MAX_UTTERANCE_SECONDS * SAMPLE_RATE:
                reason = TOO_LONG
            elif end > len(samples) + SAMPLE_RATE // 10 or min(end, len(samples)) - start < MIN_SAMPLES:
                reason = OUTSIDE
            elif segment.get("match") is not None and segment["match"] < min_match:
                reason = MISREAD
            else:
                reason = None
            if reason:
                left_out[reason] += 1
                continue
            cased = segment.get("cased") or (segment["text"] if has_case(segment["text"]) else None)
            recording.append(TrainingUtterance(offset + start, offset + min(end, len(samples)), segment["text"], cased))
        if recording:
            recordings.append(recording)
        offset += len(samples)
    audio = torch.from_numpy(np.concatenate([samples for samples, _ in entries])).to(device)
    return Source(name, audio, recordings, weight, left_out)


def _whole(row: dict, seconds: float) -> dict:
    """The one segment of a row without segments, as NeMo writes it."""
    start = float(row.get("offset") or 0.0)
    return {"start": start, "end": start + float(row.get("duration") or seconds - start), "text": row["text"]}


def read_synthetic(folder: str | Path, weights: dict[str, float], device: torch.device) -> list[Source]:
    """Read shards of scripts/recipes/synthesize.py; the lines of one synthetic speaker are one recording.

    Args:
        weights: by source name; others weigh 1, and a source of weight 0 is left out.
        device: holds the audio.

    Raises:
        ValueError: the folder has no index.jsonl.
    """
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
    recordings: dict[str, dict[str, list[TrainingUtterance]]] = {}
    left_out: dict[str, Counter[str]] = {}
    for row in rows:
        start = offsets[row["shard"]] + row["offset"]
        cased = row["text"] if has_case(row["text"]) else row.get("cased")
        utterance = TrainingUtterance(start, start + row["samples"], row["text"], cased)
        speakers = recordings.setdefault(row["source"], {})
        if utterance.seconds <= MAX_UTTERANCE_SECONDS:
            speakers.setdefault(row["speaker"], []).append(utterance)
        else:
            left_out.setdefault(row["source"], Counter())[TOO_LONG] += 1
    return [
        Source(name, flat, list(speakers.values()), weights.get(name, 1.0), left_out.get(name, Counter()))
        for name, speakers in recordings.items()
        if weights.get(name, 1.0) > 0
    ]
