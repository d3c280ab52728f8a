"""Step 6 of the default model's recipe: keep what the listener hears in recordings, for `data.heard` of finetune.py.

    python scripts/recipes/listen.py --model outputs/first/read --manifest speech/train.jsonl --output heard.pt

unique_asr/training/listening.py says what is kept. Recordings of which less than 70 % of the words were heard are left
out: the prompt was misread.
"""

import argparse
from pathlib import Path

from unique_asr.models import load
from unique_asr.models.speech_llm.fingerprint import compute_hearing_fingerprint
from unique_asr.training.listening import listen, save_heard
from unique_asr.training.manifests import read_manifests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=128, help="windows at a time")
    arguments = parser.parse_args()
    model, processor = load(arguments.model)
    sources = read_manifests([arguments.manifest], {}, model.device)
    found = listen(model, processor, sources, windows=arguments.batch)
    save_heard(arguments.output, {"listener": compute_hearing_fingerprint(model), "sources": found})
    recordings = [recording for each in found.values() for recording in each]
    count = sum(len(source.recordings) for source in sources)
    print(f"{arguments.output}: {len(recordings)} of {count} recordings, {sum(map(len, recordings))} parts")


if __name__ == "__main__":
    main()
