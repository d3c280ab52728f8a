"""Measure UNIQUE attention: python scripts/benchmark.py task=kernel, decode, models or selection"""

from unique_asr.benchmark.cli import main

if __name__ == "__main__":
    main()
