"""The peak of memory while something runs: of the GPU with CUDA, of the process elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch


class PeakMemory:
    """A measurement that begins when the object is made. With CUDA it covers the current GPU, for all threads."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.begun = _reset_resident_peak()

    def read(self) -> int | None:
        """Read the peak since the object was made.

        Returns:
            Bytes, or None where the system does not tell the peak or does not let it begin anew (some containers):
            the peak of what ran before would be told as this one's.
        """
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return _read_status("VmHWM") if self.begun else None


def _reset_resident_peak() -> bool:
    """Let the kernel count the peak of this process's resident set anew (proc_pid_clear_refs(5), value 5)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    peak, now = _read_status("VmHWM"), _read_status("VmRSS")
    return peak is not None and now is not None and peak <= now + (64 << 20)  # other threads allocate meanwhile


def _read_status(field: str) -> int | None:
    """Read a field of /proc/self/status in bytes, None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
