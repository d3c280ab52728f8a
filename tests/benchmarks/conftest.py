"""Makes the tools of benchmarks/tools importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "tools"))
