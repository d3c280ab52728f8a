"""Step 3 of the default model's recipe: pairs of what Whisper heard and what was said, for `data.pairs` of finetune.py.

    python scripts/recipes/hear.py --whisper weights/whisper-base --manifest speech/train.jsonl --output real.jsonl.gz
    python scripts/recipes/hear.py --whisper weights/whisper-base --synthetic synthetic --output synthetic.jsonl.gz

`--share 0/8 ... --share 7/8` lets eight processes hear an eighth of the recordings each; each needs a file of its own.
unique_asr/training/hearing.py says what is kept.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from unique_asr.models.listening_llm import ListeningLLMConfig, WhisperListener
from unique_asr.models.loading import resolve_device
from unique_asr.training.heard_text import write_pairs
from unique_asr.training.hearing import hear_pairs
from unique_asr.training.manifests import read_manifests, read_synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", type=Path, required=True, help="folder of the Whisper model")
    parser.add_argument("--manifest", action="append", default=[], help="recordings, as for data.manifests")
    parser.add_argument("--synthetic", action="append", default=[], help="folder made by synthesize.py speak")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--alternatives", type=int, default=0, help="other hypotheses of the beam that are kept")
    parser.add_argument("--readings", type=int, default=1, help="times that each is heard; all but one with noise")
    parser.add_argument("--min-match", type=float, default=0.8, help="share of the words that has to be heard")
    parser.add_argument("--share", default="0/1", help="which part of the recordings, such as 2/8")
    parser.add_argument("--batch", type=int, default=16, help="windows at a time")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    model = WhisperForConditionalGeneration.from_pretrained(arguments.whisper, dtype=torch.float32).to(device).eval()
    config = ListeningLLMConfig(model.config, beams=arguments.beams, alternatives=arguments.alternatives)
    listener = WhisperListener(model, WhisperProcessor.from_pretrained(arguments.whisper), config)
    part, parts = map(int, arguments.share.split("/"))
    host = torch.device("cpu")
    sources = read_manifests(arguments.manifest, {}, host) if arguments.manifest else []
    sources += [source for folder in arguments.synthetic for source in read_synthetic(folder, {}, host)]
    own = [replace(source, recordings=source.recordings[part::parts]) for source in sources]
    pairs = list(
        hear_pairs(listener, own, arguments.readings, batch=arguments.batch, min_match=arguments.min_match, seed=part)
    )
    write_pairs(arguments.output, pairs)
    print(f"{arguments.output}: {sum(len(found) for _, found in pairs)} parts of {len(pairs)} stretches")


if __name__ == "__main__":
    main()
