"""The jobs of benchmarks/text.md: RULER, counting and perplexity, the most important first.

    python benchmarks/tools/text_jobs.py smollm2-135m ljspeech.txt | python benchmarks/tools/run_jobs.py --gpus 0
    python benchmarks/tools/text_jobs.py gemma-3-270m ljspeech.txt long | python benchmarks/tools/run_jobs.py --gpus 0

The tables of what is there: `python scripts/evaluate.py study=ruler text.model=... text.file=... decode=false`, and so
for study=counting and study=perplexity.
"""

import json
import sys
from collections.abc import Iterator

NEEDLES = ["multiquery", "multivalue", "multikey", "tracking", "essay", "single"]
WORDS = ["common_words", "frequent_words"]
BUDGET, OTHER_BUDGETS = "attention.budget=[512]", "attention.budget=[256,1024,128,2048]"
LONG = {16384: 64, 32768: 32}  # samples by length in tokens
UNIQUE = ["methods=null", "attention=unique"]  # with settings that conf/attention does not have


def list_short_jobs() -> Iterator[list[str]]:
    """List the options of each job at 4,096 and 8,192 tokens."""
    for length in ("text.lengths=[8192]", "text.lengths=[4096]"):
        for task in NEEDLES:
            yield ["study=ruler", length, f"text.tasks=[{task}]", BUDGET]
        for task in WORDS:
            yield ["study=counting", length, f"text.tasks=[{task}]"]
        yield ["study=perplexity", length, BUDGET]
    for length in ("text.lengths=[8192]", "text.lengths=[4096]"):
        for task in [*NEEDLES, *WORDS]:
            yield ["study=ruler", length, f"text.tasks=[{task}]", OTHER_BUDGETS]
        yield ["study=perplexity", length, OTHER_BUDGETS]
        yield ["study=ruler", length, f"text.tasks=[{','.join(WORDS)}]", BUDGET]
    for task in NEEDLES:
        yield [
            "study=ruler",
            "text.lengths=[4096]",
            f"text.tasks=[{task}]",
            *UNIQUE,
            BUDGET,
            "attention.combine=[max,share]",
        ]


def list_long_jobs() -> Iterator[list[str]]:
    """List the options of each job beyond, for a model with few layers of full attention, which has room for them."""
    for length, samples in LONG.items():
        for task in ("essay", "multikey", "single", "multiquery"):
            ruler = ["study=ruler", f"text.lengths=[{length}]", f"text.samples={samples}", f"text.tasks=[{task}]"]
            yield [*ruler, BUDGET]
            yield [*ruler, *UNIQUE, "attention.combine=[max,share]", "attention.budget=[512,1024,2048]"]
            yield [*ruler, *UNIQUE, "attention.combine=max", BUDGET, "attention.scale=[0.5,0.25,0.1]"]


def main(model: str, text: str, length: str = "short") -> None:
    """Print every job."""
    for overrides in list_short_jobs() if length == "short" else list_long_jobs():
        room = 30 if length == "long" else 64 if "text.lengths=[8192]" in overrides else 36
        command = [sys.executable, "scripts/evaluate.py", f"text.model={model}", f"text.file={text}", *overrides]
        name = "-".join(override.split("=")[-1].strip("[]") for override in overrides)
        print(json.dumps({"name": name, "command": [*command, "threads=2"], "gigabytes": room}))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["long"]):
        sys.exit(f"usage: python {sys.argv[0]} MODEL TEXT [long]")
    main(*sys.argv[1:])
