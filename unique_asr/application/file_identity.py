"""What tells a recording from another: a file's size, modification time and content; a URI and what its server says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unique_asr.remote import RemoteCopy, read_facts, shown_name

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
    modified = known.get("modified")
    if same_name and isinstance(modified, int | float) and abs(status.st_mtime - modified) < CLOCK:
        return True
    return _compute_digest(path) == known.get("sha256")


def identify_remote(copy: RemoteCopy) -> dict[str, Any]:
    """Return what `has_changed` compares, for JSON: uri, without secrets, and what its server tells.

    That is size in bytes, etag and modified; sha256 is for `is_same_file`, which knows a copy by it.

    Raises:
        OSError: if the copy cannot be read.
    """
    content = identify_file(copy.path)
    facts = {name: copy.facts[name] for name in ("etag", "modified") if name in copy.facts}
    return {"uri": shown_name(copy.uri), "size": content["size"], **facts, "sha256": content["sha256"]}


def is_same_uri(known: Mapping[str, Any], uri: str) -> bool:
    """Return whether a URI is the one that `identify_remote` was called for."""
    return known.get("uri") == shown_name(uri)


def has_changed(known: Mapping[str, Any], uri: str) -> bool:
    """Return whether the server of a URI tells another ETag, or else another size or time, than it did then.

    What it tells is no proof: the content may be as before. A server that does not answer says nothing.
    """
    facts = read_facts(uri)
    names = [name for name in ("etag", "size", "modified") if name in known and name in facts]
    return any(known[name] != facts[name] for name in (names[:1] if "etag" in names else names))


def _compute_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
