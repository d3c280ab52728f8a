"""Step 3 of the default model's recipe: give lower-case transcripts the case and punctuation that Whisper hears.

    python scripts/recipes/restore_case.py --model whisper-base --manifest train.jsonl --output train_cased.jsonl
    python scripts/recipes/restore_case.py --model whisper-base --synthetic speech/ --hours 30

Whisper (a transformers folder or hub id) transcribes the segments of a recording in windows of at most 28 s, many
windows at a time. Its words are aligned with the reference, whose words stay; a matching word lends its case and the
punctuation after it.
Every segment gets `match`, the share of its words that Whisper heard too (a low share marks a misread prompt), and
`cased`, the new text, or null where fewer than `--min-match` of the words matched or Whisper wrote a long window
without punctuation. With --synthetic the lines of scripts/recipes/synthesize.py's index get `cased` in place.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from unique_asr.training.augment import compute_log_mel
from unique_asr.training.case_restoration import restore_case

SAMPLE_RATE = 16_000  # Hz

WINDOW_SECONDS = 28.0
PROMPT = (
    "He looked up, smiled, and said: Good morning, Mary. How are you? I am glad that you came."  # asks for punctuation
)
LONG_WINDOW = 20  # words; Whisper's text of that many words without a mark says nothing about punctuation


class WhisperTranscriber:
    """Whisper, greedy, on batches of clips."""

    def __init__(self, model: str, device: str, batch: int):
        self.device, self.batch = device, batch
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self.model = WhisperForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device).eval()
        self.processor = WhisperProcessor.from_pretrained(model)
        self.prompt = self.processor.get_prompt_ids(PROMPT, return_tensors="pt").to(device)
        self.filters = torch.as_tensor(self.processor.feature_extractor.mel_filters, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def transcribe(self, clips: Sequence[np.ndarray]) -> Iterator[str]:
        """Yield the text of each clip, int16 at 16 kHz, of at most 30 s."""
        for first in range(0, len(clips), self.batch):
            group = clips[first : first + self.batch]
            samples = torch.zeros(len(group), 30 * SAMPLE_RATE, device=self.device)
            for row, clip in zip(samples, group, strict=True):
                clip = torch.from_numpy(np.array(clip[: 30 * SAMPLE_RATE])).to(self.device)
                row[: len(clip)] = clip.float() / 32768
            features = compute_log_mel(samples, self.filters).to(self.model.dtype)
            tokens = self.model.generate(
                features, language="en", task="transcribe", prompt_ids=self.prompt, max_new_tokens=160, do_sample=False
            )
            yield from self.processor.batch_decode(tokens, skip_special_tokens=True)


def group_windows(segments: list[dict]) -> Iterator[list[dict]]:
    """Yield consecutive segments in groups that span at most WINDOW_SECONDS (a longer segment stands alone)."""
    group: list[dict] = []
    for segment in segments:
        if group and segment["end"] - group[0]["start"] > WINDOW_SECONDS:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def lend_case(group: list[dict], text: str, min_match: float) -> None:
    """Set `match` and `cased` of the segments of one window, from Whisper's text of it."""
    words = [segment["text"].split() for segment in group]
    counts = [len(segment_words) for segment_words in words]
    punctuated = sum(counts) < LONG_WINDOW or re.search(r"[.,?!;:]", text)
    restored, matched = restore_case([word for segment_words in words for word in segment_words], text)
    position = 0
    for segment, count in zip(group, counts, strict=True):
        span = slice(position, position + count)
        position += count
        segment["match"] = round(sum(matched[span]) / max(count, 1), 3)
        good = punctuated and segment["match"] >= min_match
        segment["cased"] = " ".join(restored[span]) if good else None


def restore_manifest(
    transcriber: WhisperTranscriber, manifest: Path, output: Path, sources: Sequence[str], min_match: float
) -> None:
    """Write the manifest anew, with `match` and `cased` where the source's name begins with one of `sources`."""
    rows = [json.loads(line) for line in manifest.open()]
    groups, clips = [], []
    for row in rows:
        if any(row["source"].startswith(source) for source in sources):
            audio, _ = soundfile.read(manifest.parent / row["audio_filepath"], dtype="int16")
            for group in group_windows(row["segments"]):
                groups.append(group)
                clips.append(audio[int(group[0]["start"] * SAMPLE_RATE) : int(group[-1]["end"] * SAMPLE_RATE)])
    for group, text in zip(groups, transcriber.transcribe(clips), strict=True):
        lend_case(group, text, min_match)
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def restore_synthetic(transcriber: WhisperTranscriber, folder: Path, hours: float, min_match: float) -> None:
    """Do the lower-case lines of the first `hours`, consecutive lines of a speaker in one window."""
    rows = [json.loads(line) for line in (folder / "index.jsonl").open()]
    groups: list[list[dict]] = []
    seconds, before = 0.0, None
    for row in rows:
        duration = row["samples"] / SAMPLE_RATE
        if row["text"] != row["text"].lower() or duration > WINDOW_SECONDS or seconds > hours * 3600:
            continue
        joined = sum(other["samples"] for other in groups[-1]) / SAMPLE_RATE + duration if groups else 0.0
        if before and before["speaker"] == row["speaker"] and joined <= WINDOW_SECONDS:
            groups[-1].append(row)
        else:
            groups.append([row])
        seconds, before = seconds + duration, row
    shards = {row["shard"]: np.load(folder / row["shard"], mmap_mode="r") for row in rows}
    clips = [
        np.concatenate([shards[row["shard"]][row["offset"] : row["offset"] + row["samples"]] for row in group])
        for group in groups
    ]
    for group, text in zip(groups, transcriber.transcribe(clips), strict=True):
        lend_case(group, text, min_match)
    replacement = folder / "index.jsonl.new"
    replacement.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    replacement.replace(folder / "index.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Whisper: a transformers folder or a hub id")
    parser.add_argument("--manifest", type=Path, help="JSONL with audio_filepath, source and segments")
    parser.add_argument("--output", type=Path, help="the manifest to write")
    parser.add_argument("--sources", nargs="+", default=["librispeech", "speechocean", "an4"],
                        help="beginnings of the `source` of the manifest's rows to do")  # fmt: skip
    parser.add_argument("--synthetic", type=Path, help="folder made by scripts/recipes/synthesize.py speak")
    parser.add_argument("--hours", type=float, default=30.0, help="synthetic speech to listen to")
    parser.add_argument("--min-match", type=float, default=0.8)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if bool(arguments.manifest) != bool(arguments.output) or not (arguments.manifest or arguments.synthetic):
        parser.error("give --manifest and --output, or --synthetic")
    transcriber = WhisperTranscriber(arguments.model, arguments.device, arguments.batch)
    if arguments.manifest:
        restore_manifest(transcriber, arguments.manifest, arguments.output, arguments.sources, arguments.min_match)
    if arguments.synthetic:
        restore_synthetic(transcriber, arguments.synthetic, arguments.hours, arguments.min_match)


if __name__ == "__main__":
    main()
