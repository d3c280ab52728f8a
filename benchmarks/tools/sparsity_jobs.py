"""The jobs of benchmarks/sparsity.md: fine-tuning runs of three seeds, their word error rates, ablations, a text LLM.

    python benchmarks/tools/sparsity_jobs.py --train train.jsonl --eval eval.jsonl --listener whisper-base \\
        --texts librispeech.txt ljspeech.txt --language-model smollm2-135m \\
        | python benchmarks/tools/run_jobs.py --gpus 0,1
    python benchmarks/tools/compare_runs.py outputs/sparsity outputs/sparsity_text --into benchmarks/sparsity.md

The first job hears the recordings, for all: 86 s on an H100 for 4.2 hours, twice. --language-model is a folder or a
GGUF file; of the last of --texts it learns from nine lines in ten, and its perplexity is measured on the others.
"""

import argparse
import json
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
ABLATIONS = ({"tau": 0.05}, {"tau": 0.1}, {"tau": 0.25}, {"tau": 1.0}, {"queries": "all"}, {"hard_last": 0.2})
MINUTES = ("10", "0.5")  # of the recordings that are evaluated
TRAINING_ROOM, EVALUATION_ROOM = 22, 9  # GB of GPU memory


def print_job(name: str, command: list[str], after: list[str], gigabytes: float) -> None:
    """Print a job as `run_jobs.py` reads it."""
    print(json.dumps({"name": name, "command": [sys.executable, *command], "after": after, "gigabytes": gigabytes}))


def print_speech_jobs(arguments: argparse.Namespace) -> None:
    """Print the jobs of speech LLMs: training, and evaluation at each length."""
    given = [
        "scripts/finetune.py", "experiment=sparsity", f"init.model={arguments.model}",
        f"data.manifests=[{arguments.train}]", "data.heard=outputs/sparsity/heard.pt",
        f"data.texts=[{','.join(arguments.texts)}]", f"data.listener_tokenizer={arguments.listener}",
        "output.checkpoints=false",
    ]  # fmt: skip

    def evaluate(run: str, minutes: str, budgets: str, after: list[str]) -> None:
        command = [
            "scripts/evaluate.py", f"model.name_or_path=outputs/sparsity/{run}/adapt",
            f"output.dir=outputs/sparsity/{run}/wer{minutes}", f"data.manifest={arguments.eval}",
            f"data.join_minutes=[{minutes}]", f"attention.budget={budgets}", "batch=405", "threads=2",
            "decoding.max_pass_seconds=700", "encoded=outputs/sparsity/encoded",
        ]  # fmt: skip
        print_job(f"{run}@{minutes}", command, after, EVALUATION_ROOM)

    def train(mode: str, seed: int, **changes: object) -> str:
        settings = {"tau": 0.5, "queries": "decoded", "hard_last": 0.0} | changes
        run = f"{mode}-256-tau{settings['tau']}-{settings['queries']}-last{settings['hard_last']}-seed{seed}"
        options = [f"training={mode}", *(f"training.{name}={value}" for name, value in settings.items())]
        print_job(
            run, [*given, *options, f"seed={seed}", f"output.dir=outputs/sparsity/{run}"], ["start"], TRAINING_ROOM
        )
        return run

    start = ["recipe.steps=1", "recipe.rate=0.0", "cuda_graphs=false", "output.dir=outputs/sparsity/start"]
    print_job("start", [*given, *start], [], TRAINING_ROOM)
    for minutes in MINUTES:
        evaluate("start", minutes, "[null,512,256,128]", ["start"])  # encodes the recordings, for all
    runs = [train(mode, seed) for seed in SEEDS for mode in ("soft", "hard", "dense")]
    for minutes in MINUTES:
        for run in runs:
            evaluate(run, minutes, "[null,512,256,128]", [run, f"start@{minutes}"])
    for seed in SEEDS:
        for changes in ABLATIONS:
            run = train("soft", seed, **changes)
            evaluate(run, "10", "[null,256,128]", [run, "start@10"])


def print_text_jobs(model: str, text: Path) -> None:
    """Print the jobs of a text LLM; its training and test text are written below outputs/."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    folder = Path("outputs/sparsity_text")
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.txt", folder / "held_out.txt"
    train.write_text("".join(lines[: len(lines) * 9 // 10]), encoding="utf-8")
    held_out.write_text("".join(lines[len(lines) * 9 // 10 :]), encoding="utf-8")
    given = ["scripts/finetune.py", "experiment=sparsity_text", f"text.model={model}", f"text.files=[{train}]"]
    runs = {"start": ["recipe.steps=1", "recipe.rate=0.0", "cuda_graphs=false"]}
    runs |= {f"{mode}-128-tau0.5-seed0": [f"training={mode}", "training.tau=0.5"] for mode in ("soft", "hard", "dense")}
    for run, options in runs.items():
        print_job(f"text-{run}", [*given, *options, "output.checkpoints=false", f"output.dir={folder}/{run}"], [], 20)
    for budget in ("128", "null", "256"):
        for run in runs:
            command = [
                "scripts/evaluate.py", "task=perplexity", f"text.model={folder}/{run}/adapt", f"text.file={held_out}",
                "text.lengths=[8192]", "text.score_tokens=256", "text.samples=12", f"attention.budget={budget}",
                f"output.dir={folder}/{run}/perplexity-{budget}",
            ]  # fmt: skip
            print_job(f"text-{run}-{budget}", command, [f"text-{run}"], 4)


def main() -> None:
    """Print every job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="the start: a folder, or default")
    parser.add_argument("--train", required=True, help="manifest of recordings to learn from")
    parser.add_argument("--eval", required=True, help="manifest of recordings to evaluate on")
    parser.add_argument(
        "--listener", required=True, help="folder of the Whisper model that the default model listens with"
    )
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--language-model", help="for the runs of a text LLM")
    arguments = parser.parse_args()
    print_speech_jobs(arguments)
    if arguments.language_model:
        print_text_jobs(arguments.language_model, Path(arguments.texts[-1]))


if __name__ == "__main__":
    main()
