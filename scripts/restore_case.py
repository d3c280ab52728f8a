"""Give lower-case training transcripts the case and punctuation that Whisper hears, and keep their words.

    python scripts/restore_case.py --manifest train.jsonl --model whisper-base-ct2 --output train_cased.jsonl

Whisper (a CTranslate2 folder, read by faster-whisper) transcribes the segments of a recording in windows of at most
28 s. Its words are aligned with the reference; a matching word lends its case and trailing punctuation. Every segment
gets `match`, the share of its words that Whisper heard too (a low share marks a misread prompt), and `cased`, the new
text, or null where fewer than `--min-match` of the words matched or Whisper wrote a long window without punctuation.
Rows are appended as they are finished, and a second run continues where the first stopped.
"""

import argparse
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path

WINDOW_SECONDS = 28.0
PROMPT = (
    "He looked up, smiled, and said: Good morning, Mary. How are you? I am glad that you came."  # asks for punctuation
)
LONG_WINDOW = 20  # words; Whisper's text of that many words without a mark says nothing about punctuation
TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint"}  # Whisper's spelling: LibriSpeech's
SIMILAR = (
    0.6  # from this difflib ratio on a word in the same place is the same word in another spelling ("Lind", "Lynde")
)


def normalise(word: str) -> str:
    return re.sub(r"[^a-z0-9']", "", word.lower()).strip("'")


def heard_words(text: str) -> list[tuple[str, str, str]]:
    """(normalised word, its surface without punctuation, trailing punctuation) of each word of Whisper's text."""
    words = []
    for token in re.split(r"[\s\-–—]+", text.replace("’", "'")):
        surface = re.sub(r"^[^\w']+|[^\w']+$", "", token)
        mark = re.search(r"[.,?!;:]", token[token.find(surface) + len(surface) :])
        word = normalise(surface)
        if word in TITLES:
            word, surface, mark = TITLES[word], TITLES[word].capitalize(), None
        if word:
            words.append((word, surface.strip("'"), mark.group() if mark else ""))
    return words


def same_case(word: str, like: str) -> str:
    return word.capitalize() if like[:1].isupper() and like != "I" else word


def restore(words: list[str], text: str) -> tuple[list[str], list[bool]]:
    """The reference words with the case and punctuation of Whisper's `text`, and which of them Whisper heard."""
    heard = heard_words(text)
    matcher = difflib.SequenceMatcher(None, [normalise(word) for word in words], [word for word, *_ in heard], False)
    restored, matched = list(words), [False] * len(words)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal":
            for k in range(i_end - i):
                _, surface, mark = heard[j + k]
                exact = surface.lower() == words[i + k].lower()
                restored[i + k] = (surface if exact else same_case(words[i + k], surface)) + mark
                matched[i + k] = True
        elif kind == "replace" and i_end - i == j_end - j:
            for k in range(i_end - i):
                word, surface, mark = heard[j + k]
                if difflib.SequenceMatcher(None, normalise(words[i + k]), word).ratio() >= SIMILAR:
                    restored[i + k] = same_case(words[i + k], surface) + mark
    for k, word in enumerate(restored):
        if re.match(r"i\b", word):
            restored[k] = "I" + word[1:]
        elif k == 0 or restored[k - 1][-1] in ".?!":
            restored[k] = word[:1].upper() + word[1:]
    return restored, matched


def windows(segments: list[dict]) -> Iterator[list[dict]]:
    """Consecutive segments in groups that span at most WINDOW_SECONDS (a longer segment stands alone)."""
    group: list[dict] = []
    for segment in segments:
        if group and segment["end"] - group[0]["start"] > WINDOW_SECONDS:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL with audio_filepath, source and segments")
    parser.add_argument("--model", required=True, help="Whisper as a CTranslate2 folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sources", nargs="+", default=["librispeech", "speechocean", "an4"],
                        help="beginnings of the `source` of the rows to do, in this order")  # fmt: skip
    parser.add_argument("--min-match", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    from faster_whisper import WhisperModel, decode_audio

    model = WhisperModel(arguments.model, device="cpu", compute_type="int8", cpu_threads=arguments.threads)
    rows = [json.loads(line) for line in arguments.manifest.open()]
    done = set()
    if arguments.output.exists():
        done = {json.loads(line)["audio_filepath"] for line in arguments.output.open()}
    with arguments.output.open("a") as output:
        for source in arguments.sources:
            for row in rows:
                if not row["source"].startswith(source) or row["audio_filepath"] in done:
                    continue
                audio = decode_audio(str(arguments.manifest.parent / row["audio_filepath"]), sampling_rate=16000)
                for group in windows(row["segments"]):
                    clip = audio[int(group[0]["start"] * 16000) : int(group[-1]["end"] * 16000)]
                    pieces, _ = model.transcribe(
                        clip,
                        language="en",
                        beam_size=1,
                        without_timestamps=True,
                        temperature=0.0,
                        initial_prompt=PROMPT,
                    )
                    text = " ".join(piece.text for piece in pieces)
                    words = [segment["text"].split() for segment in group]
                    counts = [len(segment_words) for segment_words in words]
                    punctuated = sum(counts) < LONG_WINDOW or re.search(r"[.,?!;:]", text)
                    restored, matched = restore([word for segment_words in words for word in segment_words], text)
                    position = 0
                    for segment, count in zip(group, counts, strict=True):
                        span = slice(position, position + count)
                        position += count
                        segment["match"] = round(sum(matched[span]) / max(count, 1), 3)
                        good = punctuated and segment["match"] >= arguments.min_match
                        segment["cased"] = " ".join(restored[span]) if good else None
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
                output.flush()


if __name__ == "__main__":
    main()
