"""Peak memory of a stretch of work: of the device on CUDA, of the process elsewhere."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Begins to measure when it is made; `bytes()` is the peak since then, or None where the system does not tell."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set begins anew

    def bytes(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        peak = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        return peak[0] if peak else None
