"""The jobs of benchmarks/evaluation.md, the most important first.

    python benchmarks/tools/long_form_jobs.py eval.jsonl | python benchmarks/tools/run_jobs.py --gpus 0,1,2,3

Dense comes first at every length, with what is heard, which the others share. A job of several budgets decodes them in
threads beside each other. Six or seven jobs at a time keep an H100 busy; together they take hours of it. The table of
what is there, at any time:

    python scripts/evaluate.py study=long_form data.manifest=eval.jsonl decode=false
"""

import json
import sys

RIVALS = ["quest", "second_moment", "mean", "infllm", "h2o", "streaming_llm", "murmur", "sliding"]
LENGTHS = ["60", "20", "10", "2", "0.5"]  # minutes, the longest first, for they take longest


def print_job(manifest: str, methods: list[str], budgets: list[int], minutes: str, *more: str) -> None:
    """Print a job; minutes: one length, or several separated by commas, whose recordings then share batches."""
    name = "-".join([*methods, *map(str, budgets)]) + f"@{minutes}" + ("-default_passes" if more else "")
    chosen = ",".join(dict.fromkeys(["dense", *methods]))
    lengths = minutes.split(",")
    command = [
        sys.executable, "scripts/evaluate.py", "study=long_form", f"data.manifest={manifest}", f"methods=[{chosen}]",
        f"data.join_minutes=[{minutes}]", "threads=2", *more,
    ]  # fmt: skip
    if len(lengths) > 1:
        command.append("together=true")
    if budgets:
        command += [f"attention.budget={budgets}", f"concurrent={len(budgets)}"]
    after = [] if methods == ["dense"] else [f"dense@{each}" for each in lengths]
    room = 10 * max(1, len(budgets))
    print(json.dumps({"name": name, "command": command, "after": after, "gigabytes": room}))


def main(manifest: str) -> None:
    """Print every job."""
    for minutes in LENGTHS:
        print_job(manifest, ["dense"], [], minutes)
    for minutes in ["10", "60", "20", "2", "0.5"]:
        print_job(manifest, ["unique"], [512], minutes)
    for method in RIVALS:
        print_job(manifest, [method], [512], "10")
    for budget in (256, 1024, 128, 2048):
        print_job(manifest, ["unique"], [budget], "10")
    for minutes in ["20", "60"]:  # as users run it: passes of two minutes
        print_job(manifest, ["unique"], [512], minutes, "decoding.max_pass_seconds=null")
    for method in RIVALS:
        print_job(manifest, [method], [512], "60,20,2")
    for method in ["unique", *RIVALS[:-1]]:
        print_job(manifest, [method], [256, 128], "2")
    for method in ["unique", *RIVALS[:-1]]:
        print_job(manifest, [method], [256, 128, 1024, 2048], "60,20,10")
    for method in ["unique", *RIVALS[:-1]]:
        print_job(manifest, [method], [256, 128], "0.5")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} MANIFEST")
    main(sys.argv[1])
