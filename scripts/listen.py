"""Write down what the listener hears in recordings, for scripts/teach_reading.py.

    python scripts/listen.py --model outputs/reader --manifest speech/train.jsonl --output heard.pt

The recordings are cut where the listener and the reference agree on the words at either side of an utterance's end.
Every part has its positions' tokens [M, 8] with weights [M, 8], and the reference in the case and punctuation that was
heard. Recordings of which less than `--min-match` was heard are left out: a prompt that was misread.
"""

import argparse
import difflib
import json
from pathlib import Path

import soundfile
import torch
from restore_case import normalise, restore
from transformers import AutoTokenizer

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, load
from unique_asr.models.compose import listener_tokens
from unique_asr.training.augment import log_mel
from unique_asr.training.corpus import has_case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--whisper", required=True, help="the folder that its listener came from, for the tokenizer")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=128, help="windows at a time")
    parser.add_argument("--min-match", type=float, default=0.7, help="share of the words that has to be heard")
    arguments = parser.parse_args()
    model, processor = load(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.whisper)
    kept = listener_tokens(tokenizer, ascii_only=True)
    rows = [json.loads(line) for line in arguments.manifest.open()]
    heard = listen(
        model, processor, [arguments.manifest.parent / row["audio_filepath"] for row in rows], arguments.batch
    )
    recordings, words, right = [], 0, 0
    for row, (tokens, weights, candidates) in zip(rows, heard, strict=True):
        surfaces = tokenizer.convert_ids_to_tokens([kept[token] for token in tokens.tolist()])
        texts = [tokenizer.convert_tokens_to_string([surface]) for surface in surfaces]
        parts, matched, count = cut(row["segments"], texts)
        words, right = words + count, right + matched
        if parts and matched >= arguments.min_match * count:
            found = [
                {"candidates": candidates[start:end].int(), "weights": weights[start:end].half(), "text": text}
                for start, end, text in parts
            ]
            recordings.append({"name": row["audio_filepath"], "parts": found})
    torch.save(recordings, arguments.output)
    parts = sum(len(recording["parts"]) for recording in recordings)
    print(f"{arguments.output}: {len(recordings)} of {len(rows)} recordings, {parts} parts; {right / words:.1%} of the "
          "reference's words were heard")  # fmt: skip


@torch.no_grad()
def listen(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor, paths: list[Path], batch: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens [M], weights [M, 8] and candidates [M, 8] of each recording, in order."""
    filters = torch.tensor(processor.feature_extractor.mel_filters, dtype=torch.float32, device=model.device)
    found = [([], [], []) for _ in paths]
    waiting: list[tuple[int, torch.Tensor, tuple[int, int]]] = []  # recording, samples, frames to keep

    def flush() -> None:
        samples = torch.zeros(len(waiting), round(processor.window_seconds * 16000), device=model.device)
        for row, (_, window, _) in zip(samples, waiting, strict=True):
            row[: len(window)] = window
        spans = torch.tensor([span for *_, span in waiting])
        frames = model.encode_windows({"input_features": log_mel(samples, filters)})
        heard, _, keep = model.listener.hear(frames, spans, model.config.stack_factor)
        for index, (recording, *_) in enumerate(waiting):
            for kept, values in zip(found[recording], (heard.tokens, heard.weights, heard.candidates), strict=True):
                kept.append(values[index][keep[index]].cpu())
        waiting.clear()

    for recording, path in enumerate(paths):
        samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0]).to(model.device)
        for first, last, start, end in processor.window_spans(len(samples)):
            waiting.append((recording, samples[first:last], (start, end)))
            if len(waiting) == batch:
                flush()
    if waiting:
        flush()
    return [tuple(torch.cat(each) for each in parts) for parts in found]


def cut(segments: list[dict], texts: list[str]) -> tuple[list[tuple[int, int, str]], int, int]:
    """(first position, last position + 1, text) of stretches of a recording; its words that were heard, and its words.

    texts: of each position.
    """
    starts = [place for place, text in enumerate(texts) if text.startswith(" ") or place == 0]
    words = ["".join(texts[start:end]) for start, end in zip(starts, [*starts[1:], len(texts)])]
    reference = [(word, index) for index, segment in enumerate(segments) for word in segment["text"].split()]
    blocks = difflib.SequenceMatcher(
        None, [normalise(word) for word, _ in reference], [normalise(word) for word in words], False
    ).get_matching_blocks()
    text = [word for word, _ in reference]
    if not has_case(" ".join(text)):
        text, _ = restore(text, "".join(words))
    place = {block.a + k: block.b + k for block in blocks for k in range(block.size)}
    firsts = [0] + [
        index
        for index in range(1, len(reference))
        if reference[index][1] != reference[index - 1][1] and place.get(index, -1) == place.get(index - 1, -3) + 1
    ]
    parts = []
    for first, last in zip(firsts, [*firsts[1:], len(reference)]):
        begin = 0 if first == 0 else place[first]
        end = len(words) if last == len(reference) else place[last]
        inside = sum(index in place for index in range(first, last))
        if end > begin and inside >= 0.6 * (last - first):
            stop = starts[end] if end < len(starts) else len(texts)
            parts.append((starts[begin], stop, " ".join(text[first:last])))
    return parts, len(place), len(reference)


if __name__ == "__main__":
    main()
