"""The jobs of benchmarks/text.md: RULER, counting and perplexity, the most important first.

    python benchmarks/jobs/text.py smollm2-135m ljspeech.txt | python scripts/run_jobs.py --gpus 0

The tables of what is there: `python scripts/evaluate.py study=ruler text.model=... text.file=... decode=false`, and so
for study=counting and study=perplexity.
"""

import json
import sys

NEEDLES = ["multiquery", "multivalue", "multikey", "tracking", "essay", "single"]
WORDS = ["common_words", "frequent_words"]
OTHER_BUDGETS = [256, 1024, 128, 2048]


def main(model: str, text: str) -> None:
    def job(study: str, tasks: list[str], length: int, budgets: list[int]) -> None:
        name = "-".join([study, *tasks, str(length), *map(str, budgets)])
        command = [
            sys.executable, "scripts/evaluate.py", f"study={study}", f"text.model={model}", f"text.file={text}",
            f"text.lengths=[{length}]", "threads=2",
        ]  # fmt: skip
        command += [f"text.tasks=[{','.join(tasks)}]"] if tasks else []
        command += [f"attention.budget={budgets}"] if budgets else []
        print(json.dumps({"name": name, "command": command, "gigabytes": 64 if length > 4096 else 36}))

    for length in (8192, 4096):
        for task in NEEDLES:
            job("ruler", [task], length, [512])
        for task in WORDS:
            job("counting", [task], length, [])
        job("perplexity", [], length, [512])
    for length in (8192, 4096):
        for task in [*NEEDLES, *WORDS]:
            job("ruler", [task], length, OTHER_BUDGETS)
        job("perplexity", [], length, OTHER_BUDGETS)
        job("ruler", WORDS, length, [512])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} MODEL TEXT")
    main(*sys.argv[1:])
