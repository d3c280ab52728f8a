"""Word error rates on a set of recordings: python scripts/evaluate.py data.manifest=eval.jsonl data.join_seconds=30"""

from unique_asr.evaluation.cli import main

if __name__ == "__main__":
    main()
