"""Recordings decoded side by side against the same ones decoded one by one: is the text the same, and how much faster?

    python benchmarks/tools/measure_batch.py --manifest tests/data/manifest.jsonl --batch 4
    python benchmarks/tools/measure_batch.py --manifest eval.jsonl --seconds 20 --limit 8 --batch 8 --budget 64

Each row of the manifest has `audio_filepath` (relative to it).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from unique_asr.attention import SparseAttentionConfig
from unique_asr.audio import AudioFile
from unique_asr.evaluation.scoring import word_errors
from unique_asr.transcribers.batch import transcribe_side_by_side
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber
from unique_asr.transcript import Transcript


def timed(transcriber: SpeechLLMTranscriber, clips: list[np.ndarray], batch: int) -> tuple[list[Transcript], float]:
    begin = time.perf_counter()
    transcripts = dict(transcribe_side_by_side(transcriber, clips, batch))
    return [transcripts[index] for index in range(len(clips))], time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--model", default="default", help="default, or a folder of the same kind")
    parser.add_argument("--seconds", type=float, help="of each recording; all of it by default")
    parser.add_argument("--limit", type=int, help="recordings, evenly over the manifest")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=512, help="tokens that a step reads; 0: dense")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    count = min(arguments.limit or len(rows), len(rows))
    paths = [arguments.manifest.parent / rows[len(rows) * i // count]["audio_filepath"] for i in range(count)]
    clips = [np.concatenate(list(AudioFile(path, end=arguments.seconds).blocks())) for path in paths]
    attention = SparseAttentionConfig(budget=arguments.budget or None)
    transcriber = SpeechLLMTranscriber(arguments.model, attention=attention, device=arguments.device)
    timed(transcriber, clips[:1], 1)  # warm
    alone, alone_seconds = timed(transcriber, clips, 1)
    beside, beside_seconds = timed(transcriber, clips, arguments.batch)
    same = sum(one.text == other.text for one, other in zip(alone, beside, strict=True))
    errors = [word_errors(one.text, other.text) for one, other in zip(alone, beside, strict=True)]
    words = sum(len(one.text.split()) for one in alone)
    audio = sum(one.info.duration for one in alone)
    decode = [sum(each.info.timings["decode"] for each in transcripts) for transcripts in (alone, beside)]
    print(f"{count} recordings of {audio:.0f} s in all, batch {arguments.batch}, {beside[0].info.device}")
    print(f"texts that are the same: {same} of {count}; words that differ: {sum(e.edits for e in errors)} of {words}")
    print(f"one by one: {alone_seconds:.1f} s, {decode[0]:.1f} s of them decoding")
    print(f"side by side: {beside_seconds:.1f} s, {decode[1]:.1f} s of them decoding")


if __name__ == "__main__":
    main()
