"""Measure UNIQUE attention: python scripts/benchmark.py task=kernel, task=decode or task=selection"""

from unique_asr.benchmark.cli import main

if __name__ == "__main__":
    main()
