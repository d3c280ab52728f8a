"""What the LLM reads, cached: training it costs no encoder, and texts alone give further examples.

A bank holds, for spans of speech, the merged positions (the weights of the likeliest CTC units of each) and the texts.
From its recordings it also learns how a unit is usually heard: `simulate` draws for each unit of a text one of the
positions in which the head heard (or misheard) that unit, and so turns any text into positions with realistic errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unique_asr.models import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from unique_asr.models.ctc import ctc_text

from .batches import Batch, Batcher
from .corpus import LOWER_CASE, Item, has_case

UNITS = 8  # likeliest units kept of a position


@dataclass
class Heard:
    """M positions of one span of speech and its text: units [M, 8] indices into `ctc_tokens`, weights [M, 8]."""

    units: np.ndarray
    weights: np.ndarray
    text: str
    cased: str | None


@dataclass
class PositionBank:
    """Recordings as lists of consecutive spans. `heard` maps a unit to the positions in which it was heard."""

    recordings: list[list[Heard]]
    heard: dict[int, list[tuple[np.ndarray, np.ndarray] | None]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        spans = [span for recording in self.recordings for span in recording]
        np.savez_compressed(
            path,
            units=np.concatenate([span.units for span in spans]).astype(np.int32),
            weights=np.concatenate([span.weights for span in spans]).astype(np.float16),
            lengths=np.array([len(span.units) for span in spans]),
            spans=np.array([len(recording) for recording in self.recordings]),
            texts=np.array([span.text for span in spans]),
            cased=np.array([span.cased or "" for span in spans]),
        )

    @classmethod
    def load(cls, paths: Iterable[Path]) -> PositionBank:
        recordings: list[list[Heard]] = []
        for path in paths:
            with np.load(path) as stored:
                ends = stored["lengths"].cumsum()
                units, weights = np.split(stored["units"], ends[:-1]), np.split(stored["weights"], ends[:-1])
                texts, cased = stored["texts"].tolist(), stored["cased"].tolist()
                spans = [
                    Heard(*parts[:3], parts[3] or None) for parts in zip(units, weights, texts, cased, strict=True)
                ]
                ends = stored["spans"].cumsum().tolist()
                recordings += [spans[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return cls(recordings)

    def learn(self, ctc_units: dict[str, list[int]]) -> None:
        """Fill `heard`; ctc_units: text -> indices of its units. A unit that left no position of its own is None."""
        for span in (span for recording in self.recordings for span in recording):
            best = np.where(span.weights[:, 0] > 0.2, span.units[:, 0], -1).tolist()
            places = [place for place, unit in enumerate(best) if unit >= 0]
            reference = ctc_units[span.text]
            matcher = difflib.SequenceMatcher(None, reference, [best[place] for place in places], autojunk=False)
            for kind, i, i_end, j, j_end in matcher.get_opcodes():
                if kind == "insert":
                    continue
                for offset, unit in enumerate(reference[i:i_end]):
                    place = places[j + offset] if j + offset < j_end else None
                    event = None if place is None else (span.units[place], span.weights[place])
                    self.heard.setdefault(unit, []).append(event)

    def simulate(
        self, units: Sequence[int], random: np.random.Generator, clean: float = 0.85, noise: float = 0.06
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions ([M, 8], [M, 8]) for the units of a text.

        A unit never heard gets weight `clean`, alone. noise: share of the units lost or replaced by any other, since
        the head errs more on new speech than on what it was trained on.
        """
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        known = list(self.heard)
        for unit in units:
            chance = random.random()
            if chance < noise / 3:
                continue
            if chance < noise and known:
                unit = known[random.integers(len(known))]
            events = self.heard.get(unit)
            event = events[random.integers(len(events))] if events else _alone(unit, clean)
            if event is not None:
                rows.append(event)
            if random.random() < 0.12:  # a pause or a long sound has positions without a unit
                rows.append((np.zeros(UNITS, np.int32), np.zeros(UNITS, np.float16)))
        rows = rows or [_alone(0, 0.0)]
        return np.stack([units for units, _ in rows]), np.stack([weights for _, weights in rows])


def _alone(unit: int, weight: float) -> tuple[np.ndarray, np.ndarray]:
    units, weights = np.zeros(UNITS, np.int32), np.zeros(UNITS, np.float16)
    units[0], weights[0] = unit, weight
    return units, weights


@torch.no_grad()
def listen(model: SpeechLLMForConditionalGeneration, batcher: Batcher, items: Sequence[Item]) -> list[Heard]:
    """The positions of items of one window each, with the batcher's augmentation."""
    batch = batcher.batch(items)
    positions = model.window_positions(model.encode_windows(batch.features), batch.spans)
    weights, units = positions.posterior.float().topk(min(UNITS, positions.posterior.shape[-1]), dim=-1)
    recording = torch.repeat_interleave(batch.windows)  # an item slowed down beyond a window has two
    counts = torch.zeros_like(batch.windows).index_add_(0, recording, positions.counts.cpu()).tolist()
    return [
        Heard(
            row_units.cpu().numpy().astype(np.int32),
            row_weights.cpu().numpy().astype(np.float16),
            ctc_text(" ".join(utterance.text for _, utterance, _ in item.pieces)),
            item.text if item.cased else None,
        )
        for item, row_units, row_weights in zip(items, units.split(counts), weights.split(counts), strict=True)
    ]


class PositionBatcher:
    """Draws batches of joined spans for the LLM from a bank and from texts.

    simulated: share of the rows made from `texts` (runs of consecutive lines) instead of recordings; workers: processes
    that draw ahead, 0 for none.
    """

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        bank: PositionBank,
        texts: Sequence[list[str]],
        seed: int,
        simulated: float = 0.6,
        workers: int = 0,
    ) -> None:
        self.processor, self.bank, self.texts, self.workers = processor, bank, texts, workers
        self.simulated = simulated if texts else 0.0
        self.cased_heard = any(span.cased for recording in bank.recordings for span in recording)
        self.cased_texts = any(has_case(lines[0]) for lines in texts)
        self.random = np.random.default_rng(seed)
        self.index = {token: place for place, token in enumerate(model.ctc_tokens.tolist())}
        self.embeddings = model.ctc_embeddings()[0].detach()
        bank.learn({span.text: self._units(span.text) for recording in bank.recordings for span in recording})

    def batches(self, sizes: Callable[[np.random.Generator], tuple[int, int]], cased_share: float) -> Iterator[Batch]:
        """Endless batches with the positions as `features`; sizes: draws the positions of a row and the rows."""
        stream = _Stream(self, sizes, cased_share)
        ahead = {"num_workers": self.workers, "prefetch_factor": 4} if self.workers else {}
        return iter(torch.utils.data.DataLoader(stream, batch_size=None, **ahead))

    def embed(self, batch: Batch) -> list[Tensor]:
        """The LLM's inputs [M, text hidden] of each row, on the model's device."""
        device = self.embeddings.device
        units, weights = (batch.features[name].to(device) for name in ("units", "weights"))
        expected = torch.einsum("mk,mkd->md", weights.float(), self.embeddings[units.long()].float())
        return list(expected.split(batch.windows.tolist()))

    def draw(self, random: np.random.Generator, positions: int, rows: int, cased_share: float) -> Batch:
        """`rows` rows of about so many positions each; `windows` are the positions of each row."""
        heard: list[list[Heard]] = []
        before, after, labels = [], [], []
        for _ in range(rows):
            simulated = random.random() < self.simulated
            cased = random.random() < cased_share and (self.cased_texts if simulated else self.cased_heard)
            run = self._simulated_run if simulated else self._heard_run
            spans = run(random, cased, positions)
            text = " ".join(span.cased or "" if cased else ctc_text(span.text) for span in spans)
            ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            head, tail = self.processor.prompt(None if cased else LOWER_CASE)
            heard.append(spans)
            before.append(head)
            after.append([*tail, *ids, self.processor.end_token_id])
            labels.append(len(ids) + 1)
        spans = [span for row in heard for span in row]
        features = {
            "units": torch.from_numpy(np.concatenate([span.units for span in spans]).astype(np.int32)),
            "weights": torch.from_numpy(np.concatenate([span.weights for span in spans]).astype(np.float16)),
        }
        counts = torch.tensor([sum(len(span.units) for span in row) for row in heard])
        return Batch(features, torch.empty(0, 2), counts, [], before, after, labels, 0.0)

    def _units(self, text: str) -> list[int]:
        return [self.index[token] for token in self.processor.ctc_ids(text)[0]]

    def _simulated_run(self, random: np.random.Generator, cased: bool, positions: int) -> list[Heard]:
        pools = [lines for lines in self.texts if has_case(lines[0]) == cased] or self.texts
        pool = pools[random.integers(len(pools))]
        spans: list[Heard] = []
        line, total = random.integers(len(pool)), 0
        while total < positions:
            text = pool[line % len(pool)]
            spans.append(Heard(*self.bank.simulate(self._units(text), random), text, text))
            total += len(spans[-1].units)
            line += 1
        return spans

    def _heard_run(self, random: np.random.Generator, cased: bool, positions: int) -> list[Heard]:
        spans: list[Heard] = []
        total = 0
        while total < positions:
            recording = self.bank.recordings[random.integers(len(self.bank.recordings))]
            for span in recording[random.integers(len(recording)) :]:
                if total >= positions or (cased and not span.cased):
                    break
                spans.append(span)
                total += len(span.units)
        return spans


class _Stream(torch.utils.data.IterableDataset):
    def __init__(
        self,
        batcher: PositionBatcher,
        sizes: Callable[[np.random.Generator], tuple[int, int]],
        cased_share: float,
    ) -> None:
        self.batcher, self.sizes, self.cased_share = batcher, sizes, cased_share

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        random = self.batcher.random if worker is None else np.random.default_rng(worker.seed)
        while True:
            positions, rows = self.sizes(random)
            yield self.batcher.draw(random, positions, rows, self.cased_share)
