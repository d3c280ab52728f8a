"""What tells a recording's file from another: its size, its modification time and a digest of its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLOCK = 0.002  # s; modification times are kept in milliseconds


def identify_file(path: Path) -> dict[str, Any]:
    """Return what `is_same_file` compares, for JSON: size in bytes, modified in seconds since 1970, sha256.

    Raises:
        OSError: if the file cannot be read.
    """
    status = os.stat(path)
    return {"size": status.st_size, "modified": round(status.st_mtime, 3), "sha256": _compute_digest(path)}


def is_same_file(known: Mapping[str, Any], path: Path, same_name: bool) -> bool:
    """Return whether a file is the one that `identify_file` was called for, or a copy of it.

    Args:
        known: what `identify_file` returned then.
        same_name: it is called the same: then its size and modification time are enough; else its content, which takes
            longer to read, decides.

    Raises:
        OSError: if the file cannot be read.
    """
    status = os.stat(path)
    if status.st_size != known.get("size"):
        return False
    if same_name and abs(status.st_mtime - known.get("modified", 0.0)) < CLOCK:
        return True
    return _compute_digest(path) == known.get("sha256")


def _compute_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
