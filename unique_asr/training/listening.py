"""Listening to the training recordings once, before the first step; what was heard is kept in a file.

Whisper's decoder (`merge: decoder`) writes token by token, too slowly for a training step, and it does not train.
So the recordings are heard before, in windows as at inference. They are cut where listener and reference agree on the
words at both sides of an utterance's end. Each part has its positions, and the reference in the case that was heard.
Parts are joined to items of any length later, as utterances of audio are.

Speed, noise and masks on the spectrogram change what is heard. With several `readings` the first hears the recordings
as they are, and each other one hears them augmented.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from unique_asr.models.speech_llm.fingerprint import compute_hearing_fingerprint
from unique_asr.models.speech_llm.processing import SAMPLE_RATE
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.case_restoration import normalise, restore_case
from unique_asr.training.corpus import Source, TrainingItem, TrainingUtterance, check_utterances
from unique_asr.training.distributed import Processes
from unique_asr.training.speech_batches import SpeechBatcher
from unique_asr.training.stages import StageConfig

WINDOWS = 128  # that the listener hears at once
MAX_PAUSE = 1.0  # seconds between two utterances; what lies in a longer pause may be speech that has no text
MIN_MATCH = 0.7  # share of the words of a stretch that has to be heard; of less, the text may be another
MIN_PART = 0.6  # the same of each part
TRIAL_UTTERANCES = 200  # that are heard first, from everywhere: if none of them is kept, no more are heard
TRIAL_STRETCHES = 20  # at least, for one long stretch may be the only wrong one
CLEAN = AugmentConfig(speed=0, gain_db=0, noise_share=0, frequency_masks=0, time_masks=0)

Stretch = list[TrainingUtterance]  # consecutive utterances of a recording


@dataclass
class Part:
    """Utterances [first, end) of a stretch: their text, cased as heard, and their positions [start, stop)."""

    first: int
    end: int
    text: str
    start: int
    stop: int


@dataclass
class Tally:
    """What became of the utterances that were heard so far.

    Attributes:
        kept: stretches.
        left_out: utterances, by why they were.
        example: the text of the first stretch that was left out, and what was heard.
    """

    utterances: int = 0
    stretches: int = 0
    kept: int = 0
    words: int = 0
    words_heard: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    example: tuple[str, str] | None = None

    def judge(self, stretch: Stretch, texts: Sequence[str], parts: Sequence[Part], matched: int, count: int) -> bool:
        """Note a stretch, the texts of its positions and what `cut_stretch` found; return whether it is kept."""
        self.utterances, self.stretches = self.utterances + len(stretch), self.stretches + 1
        self.words, self.words_heard = self.words + count, self.words_heard + matched
        if parts and matched >= MIN_MATCH * count:
            self.kept += 1
            return True
        reason = f"lie where fewer than {MIN_MATCH:.0%} of the words were heard" if count else "have no words"
        self.left_out[reason] += len(stretch)
        if count and self.example is None:
            self.example = " ".join(utterance.text for utterance in stretch), "".join(texts).strip()
        return False

    def add(self, other: Tally) -> None:
        """Note what another process heard."""
        for name in ("utterances", "stretches", "kept", "words", "words_heard"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.left_out.update(other.left_out)
        self.example = self.example or other.example

    @property
    def share(self) -> float:
        """Share of the words that were heard."""
        return self.words_heard / max(self.words, 1)

    def explain(self, total: int) -> str:
        """Return, in one line, why nothing is kept of `total` utterances."""
        some = f"{total} utterances"
        if self.utterances < total:
            some = f"{self.utterances} utterances, drawn from all {total},"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        example = ""
        if self.example:
            text, heard = (line if len(line) <= 60 else f"{line[:57]}..." for line in self.example)
            example = f'; where the text is "{text}", "{heard}" was heard'
        return (
            f"data: no utterance to train on: of {some} none is kept, {reasons} ({self.share:.0%} of all words were)"
            f"{example}; are the texts those of the audio, in words that the listener knows?"
        )


def can_listen_once(model: SpeechLLMForConditionalGeneration, stages: Sequence[StageConfig]) -> bool:
    """Whether no step changes the LLM's positions: all are the listener's tokens, and the LLM alone trains."""
    residual = model.projector.residual
    silent = model.config.merge == "decoder" and not any(weight.any() for weight in residual.parameters())
    return silent and not any(stage.trains_frames or "residual" in stage.train for stage in stages)


def load_or_listen(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    read: Callable[[], Sequence[Source]],
    about: dict,
    path: Path,
    augment: AugmentConfig,
    readings: int = 1,
    processes: Processes | None = None,
    log: Callable[[str], None] = print,
) -> list[Source]:
    """Sources of what was heard, each of weight 1, from `path` or, if that was made of something else, by listening.

    Args:
        read: reads the sources of audio; is called only to listen.
        about: what those sources depend on, as JSON values; a change makes the model listen again.
        path: the file to read or to write.
        readings: times that each recording is heard; all but the first are augmented.

    Raises:
        ValueError: `path` is not such a file, or nothing that was heard fits its text.
    """
    processes = processes or Processes()
    about = {"data": about, "augment": asdict(augment) if readings > 1 else None, "readings": readings}
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    wanted = {"listener": compute_hearing_fingerprint(model), "made_of": key}
    kept = _load(path) if path.is_file() else {}
    if {name: kept.get(name) for name in wanted} == wanted:
        return make_sources(kept["sources"])
    sources = read()
    check_utterances(sources)
    hours = sum(source.hours for source in sources)
    log(f"listening to {hours * readings:.1f} h of speech once, for {path}")
    found = listen(model, processor, sources, augment, readings, processes, log)
    if processes.first:
        save_heard(path, wanted | {"sources": found})
    processes.wait()
    return make_sources(found)


def save_heard(path: Path, values: dict) -> None:
    """Write what was heard to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def read_heard(path: Path) -> list[Source]:
    """The sources in a file of `load_or_listen` or scripts/recipes/listen.py; raises ValueError for any other."""
    return make_sources(_load(path)["sources"])


def _load(path: Path) -> dict:
    try:
        return torch.load(path)
    except Exception as error:
        raise ValueError(f"{path}: not a file of what was heard ({str(error).splitlines()[0]}); remove it") from None


def make_sources(found: dict[str, list[list[tuple[str, float, Tensor, Tensor]]]]) -> list[Source]:
    """Sources, each of weight 1, from what `listen` returns."""
    silence = torch.zeros(0, dtype=torch.int16)
    return [
        Source(
            name,
            silence,
            [
                [
                    TrainingUtterance(0, round(seconds * SAMPLE_RATE), text, text, (candidates, weights))
                    for text, seconds, candidates, weights in recording
                ]
                for recording in recordings
            ],
            1.0,
        )
        for name, recordings in found.items()
    ]


@torch.no_grad()
def listen(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    sources: Sequence[Source],
    augment: AugmentConfig = CLEAN,
    readings: int = 1,
    processes: Processes | None = None,
    log: Callable[[str], None] = print,
    windows: int = WINDOWS,
) -> dict[str, list]:
    """Hear all recordings, and keep the parts in which listener and reference agree.

    Args:
        augment: what is done to the audio in all readings but the first.
        processes: they share the work, and all get the result.
        windows: of audio, heard at once.

    Returns:
        By name of the source, recordings of parts: (text, seconds, candidates [M, A], weights [M, A]).

    Raises:
        ValueError: nothing that was heard fits its text.
    """
    processes = processes or Processes()
    texts = decode_position_texts(model, processor)
    stretches = [(source, stretch) for source in sources for each in source.recordings for stretch in _stretches(each)]
    total = sum(len(stretch) for _, stretch in stretches)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # words that are nearly as likely
    tally, heard = Tally(), []
    began = logged = time.monotonic()
    own = range(processes.rank, len(stretches), processes.count)
    trial, rest = _split_trial(own, [len(stretch) for _, stretch in stretches], processes.count)
    done = 0
    for reading, places in [(0, trial), (0, rest), *((reading, own) for reading in range(1, readings))]:
        batcher = SpeechBatcher(model, processor, augment if reading else CLEAN, seed=1000 * processes.rank + reading)
        for group in _groups(places, stretches, windows * (processor.window_seconds - 2 * processor.margin_seconds)):
            items = [TrainingItem([(stretches[i][0], _whole(stretches[i][1]), 0.0)], cased=False) for i in group]
            for place, (tokens, candidates, weights) in zip(group, hear(model, batcher, items, windows), strict=True):
                source, stretch = stretches[place]
                written = [texts[token] for token in tokens.tolist()]
                parts, matched, count = cut_stretch(stretch, written)
                if tally.judge(stretch, written, parts, matched, count):
                    recording = [_kept(part, stretch, candidates, weights) for part in parts]
                    heard.append((reading, place, source.name, recording))
            done += len(group)
            seconds, share = time.monotonic() - began, done / (len(own) * readings)
            if time.monotonic() - logged > 10 or share == 1:
                logged = time.monotonic()
                left = seconds * (1 - share) / share
                log(
                    f"listened to {share:.0%}, {tally.share:.1%} of the words heard, {tally.kept} of "
                    f"{tally.stretches} stretches kept, {seconds:.0f} s, {left:.0f} s left"
                )
        if places is trial:
            _check_trial(processes.gather(tally), total)
    torch.set_float32_matmul_precision(precision)
    by_source: dict[str, list] = {}
    found = sorted((each for own in processes.gather(heard) for each in own), key=lambda each: each[:2])
    for _, _, name, recording in found:
        by_source.setdefault(name, []).append(recording)
    return by_source


def hear(
    model: SpeechLLMForConditionalGeneration,
    batcher: SpeechBatcher,
    items: Sequence[TrainingItem],
    windows: int = WINDOWS,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each item's M positions, on the CPU: tokens [M], candidates int32 [M, A], weights float16 [M, A]."""
    batch = batcher.make_batch(items, transcripts=False)
    found: list[tuple[Tensor, ...]] = []
    for features, spans in zip(_chunks(batch.features, windows), batch.spans.split(windows), strict=True):
        frames = model.encode_windows(features)
        heard, _, keep = model.listener.hear(frames, spans, model.config.stack_factor)
        rows = (heard.tokens, heard.candidates.int(), heard.weights.half())
        found += zip(*([row[kept].cpu() for row, kept in zip(each, keep)] for each in rows), strict=True)
    first = 0
    for count in batch.windows.tolist():
        yield tuple(torch.cat(parts) for parts in zip(*found[first : first + count], strict=True))
        first += count


def decode_position_texts(model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor) -> list[str]:
    """The text of each of the listener's tokens, as the LLM's tokenizer writes it."""
    return [
        processor.tokenizer.decode([piece for piece in pieces if piece >= 0])
        for pieces in model.listener.pieces.long().tolist()
    ]


def cut_stretch(stretch: Sequence[TrainingUtterance], texts: Sequence[str]) -> tuple[list[Part], int, int]:
    """Cut a stretch where both words around an utterance's end were heard.

    Args:
        texts: of each position.

    Returns:
        The parts of which enough was heard; the number of words that were heard; the number of all words.
    """
    starts = [place for place, text in enumerate(texts) if text.startswith(" ") or place == 0]
    heard = ["".join(texts[start:end]) for start, end in pairwise([*starts, len(texts)])]
    cased = all(utterance.cased for utterance in stretch)
    words, owner = [], []
    for index, utterance in enumerate(stretch):
        own = (utterance.cased if cased else utterance.text).split()
        words, owner = words + own, owner + [index] * len(own)
    if not words:
        return [], 0, 0
    blocks = difflib.SequenceMatcher(
        None, [normalise(word) for word in words], [normalise(word) for word in heard], False
    ).get_matching_blocks()
    if not cased:
        words, _ = restore_case(words, "".join(heard))
    place = {block.a + k: block.b + k for block in blocks for k in range(block.size)}
    firsts = [0] + [
        index
        for index in range(1, len(words))
        if owner[index] != owner[index - 1] and place.get(index, -1) == place.get(index - 1, -3) + 1
    ]
    parts = []
    for first, last in pairwise([*firsts, len(words)]):
        begin = 0 if first == 0 else place[first]
        end = len(heard) if last == len(words) else place[last]
        inside = sum(index in place for index in range(first, last))
        if end > begin and inside >= MIN_PART * (last - first):
            stop = starts[end] if end < len(starts) else len(texts)
            text = " ".join(words[first:last])
            parts.append(Part(owner[first], owner[last - 1] + 1, text, starts[begin], stop))
    return parts, len(place), len(words)


def _stretches(recording: Sequence[TrainingUtterance]) -> Iterator[Stretch]:
    """Yield runs of utterances without a long pause between them."""
    found: Stretch = []
    for utterance in recording:
        if found and utterance.start - found[-1].end > MAX_PAUSE * SAMPLE_RATE:
            yield found
            found = []
        found.append(utterance)
    yield found


def _split_trial(places: Sequence[int], utterances: Sequence[int], processes: int) -> tuple[list[int], list[int]]:
    """Split the places of stretches into those that are heard first, drawn from everywhere, and the rest.

    Args:
        utterances: of the stretch at each place.
        processes: that share the work.
    """
    order = np.random.default_rng(0).permutation(places).tolist()
    counts = np.cumsum([utterances[place] for place in order])
    enough = int(np.searchsorted(counts, TRIAL_UTTERANCES / processes)) + 1
    size = max(enough, -(-TRIAL_STRETCHES // processes))
    return order[:size], sorted(order[size:])


def _check_trial(tallies: Sequence[Tally], total: int) -> None:
    """Raise ValueError if no process has kept anything."""
    tally = Tally()
    for each in tallies:
        tally.add(each)
    if not tally.kept:
        raise ValueError(tally.explain(total))


def _groups(places: Sequence[int], stretches: Sequence[tuple[Source, Stretch]], seconds: float) -> Iterator[list[int]]:
    """Yield groups of places, of about `seconds` of speech together, one stretch at least."""
    group: list[int] = []
    total = 0.0
    for place in places:
        length = _whole(stretches[place][1]).seconds
        if group and total + length > seconds:
            yield group
            group, total = [], 0.0
        group.append(place)
        total += length
    if group:
        yield group


def _whole(stretch: Stretch) -> TrainingUtterance:
    return TrainingUtterance(stretch[0].start, stretch[-1].end, "", None)


def _kept(part: Part, stretch: Stretch, candidates: Tensor, weights: Tensor) -> tuple[str, float, Tensor, Tensor]:
    seconds = (stretch[part.end - 1].end - stretch[part.first].start) / SAMPLE_RATE
    span = slice(part.start, part.stop)
    return part.text, seconds, candidates[span].clone(), weights[span].clone()


def _chunks(features: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    for parts in zip(*(value.split(size) for value in features.values()), strict=True):
        yield dict(zip(features, parts, strict=True))
