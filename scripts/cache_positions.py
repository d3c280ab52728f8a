"""Cache what the LLM reads of training speech, so that the LLM can be trained without the encoder.

    python scripts/cache_positions.py --model outputs/finetune/hear --manifests train.jsonl --output positions.npz

Each pass cuts the recordings anew into spans of 8 to 28 s, augments them as training does, and keeps the merged
positions of each (see unique_asr/training/positions.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from unique_asr.models import load
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.batches import Batcher
from unique_asr.training.corpus import Item, Source, read_manifests
from unique_asr.training.positions import PositionBank, listen


def spans(source: Source, random: np.random.Generator) -> list[list[Item]]:
    """The utterances of each recording, joined to spans of 8 to 28 s in order."""
    recordings = []
    for utterances in source.recordings:
        items, pieces, limit = [], [], random.uniform(8, 28)
        for utterance in [*utterances, None]:
            seconds = sum(piece.seconds + gap for _, piece, gap in pieces)
            if pieces and (utterance is None or seconds + utterance.seconds + 0.8 > limit):
                items.append(Item(pieces, all(piece.cased for _, piece, _ in pieces)))
                pieces, limit = [], random.uniform(8, 28)
            if utterance is not None:
                pieces.append((source, utterance, float(random.uniform(0, 0.8)) if pieces else 0.0))
        recordings.append(items)
    return recordings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--manifests", nargs="+", required=True)
    parser.add_argument("--sources", nargs="*", help="only these sources of the manifests")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".npz" or not arguments.output.parent.is_dir():
        parser.error(f"--output {arguments.output}: name a .npz file in an existing folder")

    torch.manual_seed(arguments.seed)
    model, processor = load(arguments.model, device=arguments.device, dtype="float32")
    batcher = Batcher(model, processor, AugmentConfig(), arguments.seed)
    random = np.random.default_rng(arguments.seed)
    bank = PositionBank([])
    sources = read_manifests(arguments.manifests, {}, model.device)
    chosen = [source for source in sources if not arguments.sources or source.name in arguments.sources]
    if not chosen:
        parser.error(f"--sources: none of them is in the manifests, which have {[source.name for source in sources]}")
    for source in chosen:
        for _ in range(arguments.passes):
            for items in spans(source, random):
                recording = []
                for first in range(0, len(items), arguments.batch):
                    recording += listen(model, batcher, items[first : first + arguments.batch])
                bank.recordings.append(recording)
            bank.save(arguments.output)
        print(f"{source.name}: {source.hours:.2f} h, {len(bank.recordings)} recordings so far", flush=True)


if __name__ == "__main__":
    main()
