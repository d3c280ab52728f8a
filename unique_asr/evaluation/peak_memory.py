"""The peak of memory while something runs: of the GPU with CUDA, of the process elsewhere."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """A measurement that begins when the object is made. With CUDA it covers the current GPU, for all threads."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set

    def read(self) -> int | None:
        """Read the peak in bytes since the object was made; None where the system does not tell."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        peak = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        return peak[0] if peak else None
