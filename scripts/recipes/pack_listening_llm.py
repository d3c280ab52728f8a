"""The last step of a ListeningLLM's recipe: Whisper and the trained LLM in one folder, packed.

    python scripts/recipes/pack_listening_llm.py --whisper weights/whisper-base \\
        --language-model outputs/listening_llm/select --output models/listening --bits 8 language_model.model.layers=6
"""

import argparse
from pathlib import Path

from unique_asr.models.listening_llm.modeling import compose_listening_llm, save_listening_llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", type=Path, required=True)
    parser.add_argument("--language-model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bits", nargs="+", default=["8"], help="of all weights, or PREFIX=BITS of some; 4, 5, 6 or 8")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--alternatives", type=int, default=0)
    arguments = parser.parse_args()
    options = {"beams": arguments.beams, "alternatives": arguments.alternatives}
    model, processor = compose_listening_llm(arguments.whisper, arguments.language_model, **options)
    bits = {prefix: int(width) for prefix, _, width in (entry.rpartition("=") for entry in arguments.bits)}
    save_listening_llm(model, processor, arguments.output, bits)
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"{arguments.output}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
