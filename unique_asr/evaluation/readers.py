"""Reading recordings with their texts from files, folders and data sets: `read_recordings` goes by the name.

FILE.jsonl                        a manifest: NeMo rows, rows with segments (`unique_asr.data`)
FILE.nlp, FILE.stm                Rev's and TED-LIUM's references; audio of the same name beside them, or in `audio`
FOLDER                            all .nlp or .stm files in it, or audio files with a .txt beside each
OWNER/DATA[:CONFIG[:SPLIT]]       a data set of the Hugging Face hub (pip install datasets), such as
                                  hf-audio/asr-leaderboard-longform:earnings21:test
"""

from __future__ import annotations

import ast
import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unique_asr.data import ManifestError, Recording, Span, Utterance, read_manifest

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".opus", ".ogg", ".m4a", ".sph", ".mp4", ".webm")
AUDIO_FOLDERS = ("", "audio", "media", "sph", "wav", "../audio", "../media", "../sph", "../wav")  # beside a reference
NO_ENTITIES = ("CONTRACTION", "FALLBACK")  # tags in .nlp files of words that are no names or numbers
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
HUB_CACHE = Path("~/.cache/unique_asr/datasets").expanduser()  # where the audio of hub data sets is unpacked


def read_recordings(
    source: Path | str,
    audio: Path | str | None = None,
    keep: str | Sequence[str] | None = None,
    select: str | None = None,
) -> list[Recording]:
    """Read the recordings of a file, a folder or a data set of the hub.

    Args:
        source: its name, of one of the kinds above.
        audio: the folder with the audio of .nlp, .stm and .txt files, if it is not beside them.
        keep: keep the recordings of these sources; for manifests.
        select: keep the recordings whose id matches this glob.

    Raises:
        ManifestError: there is no such file or folder, it cannot be read, or audio is missing.
        ImportError: `source` is a data set of the hub, and the package `datasets` is missing.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        return read_manifest(path, keep, select)
    if path.is_dir() or path.suffix in READERS:
        recordings = _read_files(path, None if audio is None else Path(audio))
    elif HUB_NAME.fullmatch(str(source)) and not path.parent.is_dir():
        recordings = read_hub(str(source))
    else:
        return read_manifest(path, keep, select)  # manifests of any other name, and the message if there is nothing
    return [r for r in recordings if select is None or Path(r.id).match(select)]


def read_text_file(path: Path, audio: Path | None = None) -> list[Recording]:
    """Read the recording whose transcript is a .txt file. Raises ManifestError if its audio is missing."""
    sound = find_audio(path, audio)
    duration = measure_duration(sound)
    text = " ".join(path.read_text(encoding="utf-8-sig").split())
    return [Recording(path.stem, (Span(sound, 0.0, duration),), (Utterance(0.0, duration, text),))]


def read_nlp(path: Path, audio: Path | None = None) -> list[Recording]:
    """Read the recording of one of Rev's .nlp files: a token a row, punctuation and entities in columns of their own.

    Each turn of a speaker is an utterance if the first and the last token of every turn have times; else all of the
    recording is one.

    Raises:
        ManifestError: it is no .nlp file, or its audio is missing.
    """
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="|", quoting=csv.QUOTE_NONE))
    if not rows or "token" not in rows[0]:
        raise ManifestError(f"{path}: not an .nlp file; its first line names the columns token|speaker|ts|endTs|...")
    sound = find_audio(path, audio)
    duration = measure_duration(sound)
    entities: dict[str, list[str]] = defaultdict(list)
    turns: list[tuple[str, list[dict[str, str]]]] = []
    for row in rows:
        if not turns or turns[-1][0] != row["speaker"]:
            turns.append((row["speaker"], []))
        turns[-1][1].append(row)
        for tag in ast.literal_eval(row.get("tags") or "[]"):
            if tag.partition(":")[2] not in NO_ENTITIES:
                entities[tag].append(row["token"])
    timed = all(turn[0]["ts"] and turn[-1]["endTs"] for _, turn in turns)
    if not timed:
        turns = [("", rows)]
    utterances = []
    for _, turn in turns:
        start, end = (float(turn[0]["ts"]), float(turn[-1]["endTs"])) if timed else (0.0, duration)
        words = [(row.get("prepunctuation") or "") + row["token"] + (row.get("punctuation") or "") for row in turn]
        utterances.append(Utterance(start, end, " ".join(words)))
    listed = tuple(" ".join(words) for words in entities.values()) if "tags" in rows[0] else None
    return [Recording(path.stem, (Span(sound, 0.0, duration),), tuple(utterances), entities=listed or None)]


def read_stm(path: Path, audio: Path | None = None) -> list[Recording]:
    """Read the recordings of a .stm file: `name channel speaker start end [<label>] text` a line, each an utterance.

    Raises:
        ManifestError: a line has another form, or audio is missing.
    """
    utterances: dict[str, list[Utterance]] = defaultdict(list)
    speakers: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip() or line.startswith(";;"):
            continue
        try:
            name, _, speaker, start, end, *words = line.split()
            start, end = float(start), float(end)
        except ValueError:
            raise ManifestError(f"{path}, line {number}: not `name channel speaker start end text`") from None
        if words and re.fullmatch(r"<[^<>]*,[^<>]*>", words[0]):
            del words[0]
        if words == ["ignore_time_segment_in_scoring"]:
            continue
        # TED-LIUM writes "it 's", and <unk> for what nobody understood.
        text = re.sub(r"\s+'(?=\w)", "'", " ".join(word for word in words if word != "<unk>"))
        utterances[name].append(Utterance(start, end, text))
        speakers[name] = speaker
    recordings = []
    for name, spoken in utterances.items():
        sound = find_audio(path.with_name(f"{name}.stm"), audio)
        spoken.sort(key=lambda utterance: utterance.start)
        span = Span(sound, 0.0, measure_duration(sound))
        recordings.append(Recording(name, (span,), tuple(spoken), speaker=speakers[name]))
    return recordings


def read_hub(name: str, cache: Path = HUB_CACHE) -> list[Recording]:
    """Read the recordings of a Hugging Face data set.

    Args:
        name: `owner/data[:config[:split]]`; the split is `test` unless it is named. The data set needs a column `audio`
            and one of `text`, `transcription`, `transcript`, `normalized_text` and `sentence`.
        cache: the folder for its audio files.

    Raises:
        ManifestError: it lacks one of these columns.
        ImportError: the package `datasets` is missing.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{name}: data sets of the Hugging Face hub need a package: pip install datasets") from None
    repository, config, split = (*name.split(":"), "", "")[:3]
    rows = datasets.load_dataset(repository, config or None, split=split or "test")
    return read_dataset(rows, name, cache)


def read_dataset(rows: Any, name: str, cache: Path) -> list[Recording]:
    """Read the recordings of a loaded `datasets.Dataset`; see `read_hub`.

    Args:
        rows: the data set.
        name: the source of the recordings.
        cache: the folder in which audio is put into files, as it was uploaded.
    """
    import datasets

    columns = ("text", "transcription", "transcript", "normalized_text", "sentence")
    text = next((column for column in columns if column in rows.column_names), None)
    if text is None or "audio" not in rows.column_names:
        raise ManifestError(f"{name}: needs a column audio and one of {', '.join(columns)}; has {rows.column_names}")
    folder = cache / re.sub(r"[^\w.-]", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    recordings = []
    for number, row in enumerate(rows.cast_column("audio", datasets.Audio(decode=False))):
        original = Path(row["audio"].get("path") or "audio.wav")
        path = original
        if row["audio"].get("bytes"):
            path = folder / f"{number:05}{original.suffix or '.wav'}"
            if not path.is_file() or path.stat().st_size != len(row["audio"]["bytes"]):
                path.write_bytes(row["audio"]["bytes"])
        duration = measure_duration(path)
        spoken = Utterance(0.0, duration, " ".join(row[text].split()))
        identity = f"{number:05}-{original.stem}"
        recordings.append(Recording(identity, (Span(path, 0.0, duration),), (spoken,), source=name))
    return recordings


def find_audio(reference: Path, folder: Path | None = None) -> Path:
    """Find the audio file with the name of a reference, in `folder` or else in the usual places beside the reference.

    Raises:
        ManifestError: there is none.
    """
    folders = [folder] if folder is not None else [reference.parent / name for name in AUDIO_FOLDERS]
    for place in folders:
        for suffix in AUDIO_SUFFIXES:
            path = place / f"{reference.stem}{suffix}"
            if path.is_file():
                return path
    raise ManifestError(
        f"{reference}: no audio {reference.stem}.wav, .flac, .mp3 ... found; name its folder, data.audio=DIR"
    )


def measure_duration(path: Path) -> float:
    """Measure the seconds of an audio file: from its header if libsndfile reads it, else by decoding all of it."""
    import soundfile

    try:
        return soundfile.info(path).duration
    except soundfile.LibsndfileError:
        from unique_asr.audio import SAMPLE_RATE, load_audio

        return len(load_audio(path)) / SAMPLE_RATE


READERS: dict[str, Callable[[Path, Path | None], list[Recording]]] = {
    ".nlp": read_nlp,
    ".stm": read_stm,
    ".txt": read_text_file,
}


def _read_files(path: Path, audio: Path | None) -> list[Recording]:
    """Read one reference, or all of the first kind that a folder holds."""
    if not path.is_dir():
        if not path.is_file():
            raise ManifestError(f"{path}: no such file")
        return READERS[path.suffix](path, audio)
    for suffix, read in READERS.items():
        if files := sorted(path.glob(f"*{suffix}")):
            return [recording for file in files for recording in read(file, audio)]
    raise ManifestError(f"{path}: no .nlp, .stm or .txt files in it; a manifest is named with its file")
