"""Recordings that lie elsewhere: what a URI such as https://... or s3://... names is copied to a temporary file.

fsspec opens it, so that every protocol works that fsspec has or that a package adds (s3fs, gcsfs, adlfs ...).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import unquote, urlsplit

STALL_SECONDS = 60.0  # without a byte, after which a server is given up
BLOCK_BYTES = 1 << 20
POLL_SECONDS = 0.2  # between two looks at the clock
FACTS_SECONDS = 10.0  # that a server may take to say what it has
WEB = ("http", "https")
FACTS = {  # by what headers and entries of fsspec's file systems call them, in lower case and without - and _
    "size": ("size", "contentlength"),
    "etag": ("etag",),
    "modified": ("lastmodified", "mtime", "modified", "updated", "modify", "created"),
}

Value = TypeVar("Value")


class RemoteError(ValueError):
    """A URI that cannot be fetched; the message is one line that names it, without user, password and query."""


@dataclass(frozen=True)
class FetchLimits:
    """How much is fetched of one URI, and how long that may take."""

    max_megabytes: float = 4000.0
    max_seconds: float = 3600.0


@dataclass(frozen=True)
class RemoteFile:
    """A recording elsewhere.

    Attributes:
        uri: what fsspec opens.
        place: where its transcripts go, below their folder: the name of the recording there.
    """

    uri: str
    place: PurePosixPath

    @property
    def name(self) -> str:
        """What messages and transcripts call it."""
        return shown_name(self.uri)


class RemoteCopy:
    """A temporary file with what a URI names; it is gone when it is closed or forgotten.

    Attributes:
        uri: what it is a copy of.
        path: opens it.
        facts: see `read_facts`.
    """

    def __init__(self, uri: str, file: IO[bytes], facts: dict[str, Any]) -> None:
        named = Path(str(file.name))  # elsewhere than on Linux: a file without a name can be opened once
        self.path = named if named.is_absolute() else Path(f"/proc/self/fd/{file.fileno()}")
        self.uri, self.facts, self._file = uri, facts, file

    def close(self) -> None:
        """Remove it."""
        self._file.close()

    def __enter__(self) -> RemoteCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_uri(name: object) -> bool:
    """Whether a name is a URI of something elsewhere: `scheme://...`, but for `file://...`."""
    return isinstance(name, str) and bool(re.match(r"(?!file:)[a-z][a-z0-9+.-]*(::[a-z0-9+.:-]*)?://", name, re.I))


def to_path(name: str | Path) -> Path:
    """Return the path that a name or a file://... means; ~ is the home folder."""
    if isinstance(name, str) and name.lower().startswith("file://"):
        return Path(unquote(urlsplit(name).path))
    return expand_home(name)


def expand_home(name: str | Path) -> Path:
    """Return a path whose ~ is the home folder, unless there is such a file, or no such user."""
    path = Path(name)
    if os.path.lexists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def check_address(uri: str) -> None:
    """Raise RemoteError if a URI of the web names no host."""
    try:
        parts = urlsplit(uri)
        complete = parts.scheme not in WEB or bool(parts.hostname)
    except ValueError:  # of an IPv6 address, which may stand behind a password: it is not shown
        complete = False
    if not complete:
        raise RemoteError("audio: a URI has no host, or a wrong one; give https://HOST/FILE")


def shown_name(uri: str) -> str:
    """Return a URI without what may be secret: user, password, and the query of a web address.

    Any other name stays as it is. A query that chooses the file (https://host/download?id=7) leaves a digest, as two
    files may not have one name.
    """
    if not is_uri(uri):
        return uri
    name = re.sub(r"//[^/@]*@", "//", uri)
    if urlsplit(uri).scheme not in WEB:
        return name
    bare = re.split(r"[?#]", name)[0]
    return f"{bare}?{digest}" if (digest := _query_digest(uri)) else bare


def full_place(uri: str) -> PurePosixPath:
    """Return host and path of a URI as a relative path: what no other URI has, for transcripts of many."""
    name = re.sub(r"^.*://([^/@]*@)?", "", uri)
    if urlsplit(uri).scheme in WEB:
        name = unquote(re.split(r"[?#]", name)[0])
        if digest := _query_digest(uri):
            name = f"{name}-{digest}"
    return _safe_place(name)


def short_place(uri: str) -> PurePosixPath:
    """Return the last part of a URI: what a person would call the file."""
    return PurePosixPath(full_place(uri).name)


def list_remote(uri: str, is_recording: Callable[[str], bool], limits: FetchLimits | None = None) -> list[RemoteFile]:
    """Return what a URI names: a glob, a folder (without its subfolders), or else the URI itself.

    Web addresses are taken as they are. Transcripts of a glob or folder lie like the recordings below it.

    Args:
        is_recording: whether a file of this name is one.

    Raises:
        RemoteError: if it cannot be listed, or holds no recording.
    """
    check_address(uri)
    limits = limits or FetchLimits()
    folder = uri.endswith("/") or not PurePosixPath(uri).suffix
    if urlsplit(uri).scheme in WEB or not (has_magic(uri) or folder):
        return [RemoteFile(uri, short_place(uri))]

    def find(_: _Watch) -> list[str] | None:
        system, path = _open_system(uri)
        if has_magic(uri):
            files = [name for name, entry in system.glob(path, detail=True).items() if entry["type"] == "file"]
        elif system.isdir(path):
            files = [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]
        else:
            return None
        return [system.unstrip_protocol(name) for name in sorted(files)]

    found = _run(find, uri, limits)
    if found is None:
        return [RemoteFile(uri, short_place(uri))]
    found = [name for name in found if is_recording(name)]
    if not found:
        kind = "no file matches" if has_magic(uri) else "no audio or video files in this folder"
        raise RemoteError(f"{shown_name(uri)}: {kind}")
    fixed = list(_until_magic(full_place(uri).parts))
    return [RemoteFile(name, _below(full_place(name), fixed)) for name in found]


def fetch(
    uri: str, limits: FetchLimits | None = None, progress: Callable[[str, float, float], None] | None = None
) -> RemoteCopy:
    """Copy what a URI names to a temporary file, which on Linux has no name: nothing is left whatever happens.

    Args:
        progress: called as progress("fetch", megabytes, all of them or 0).

    Raises:
        RemoteError: if it cannot be opened, breaks off, or is more than the limits allow.
    """
    check_address(uri)
    limits = limits or FetchLimits()
    name = shown_name(uri)
    make = tempfile.TemporaryFile if Path("/proc/self/fd").is_dir() else tempfile.NamedTemporaryFile
    file = make(prefix="unique-asr-")

    def copy(watch: _Watch) -> dict[str, Any]:
        system, path = _open_system(uri)
        options: dict[str, Any] = {}
        if urlsplit(uri).scheme in WEB:
            # A web server is asked once, from the beginning, and without compression, as it is asked for facts; fsspec
            # would ask for the size first, then block by block.
            headers = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
            options = {"block_size": 0, "size": -1, "headers": headers}
        with system.open(path, "rb", **options) as source:
            answer = getattr(source, "r", None)  # of a web server
            entry = (getattr(source, "details", None) or system.info(path)) if answer is None else answer.headers
            facts = _choose_facts(entry)
            watch.total = facts.get("size", 0)
            watch.note(0)
            while not watch.stopped and max(watch.count, watch.total) <= 1e6 * limits.max_megabytes:
                block = source.read(BLOCK_BYTES)
                if not block:
                    return facts
                file.write(block)
                watch.note(len(block))
            if not watch.stopped:
                raise RemoteError(
                    f"{name}: is larger than {limits.max_megabytes:g} MB; fetch.max_megabytes=N allows more"
                )
            return facts

    try:
        facts = _run(copy, uri, limits, progress)
        file.flush()
    except BaseException:
        file.close()
        raise
    return RemoteCopy(uri, file, facts)


def read_facts(uri: str) -> dict[str, Any]:
    """Return `size` in bytes, `etag` and `modified` of what a URI names, those that its server tells.

    An ETag and a time are text as the server writes them. Nothing is fetched; there are no facts if nobody answers.
    """

    def ask(_: _Watch) -> dict[str, Any]:
        system, path = _open_system(uri)
        return _choose_facts(system.info(path))

    try:
        return _run(ask, uri, FetchLimits(max_seconds=FACTS_SECONDS))
    except RemoteError:
        return {}


class _Watch:
    """What a thread has done, and whether anybody still waits for it."""

    def __init__(self) -> None:
        self.count = self.total = 0  # bytes
        self.last = time.monotonic()
        self.stopped = False

    def note(self, count: int) -> None:
        self.count += count
        self.last = time.monotonic()


def _run(
    task: Callable[[_Watch], Value],
    uri: str,
    limits: FetchLimits,
    progress: Callable[[str, float, float], None] | None = None,
) -> Value:
    """Return what a task returns; in a thread, as what opens URIs may wait for a network without end."""
    watch, name = _Watch(), shown_name(uri)
    done: Future[Value] = Future()

    def work() -> None:
        try:
            done.set_result(task(watch))
        except BaseException as error:
            done.set_exception(error)

    begin = time.monotonic()
    threading.Thread(target=work, name="fetch", daemon=True).start()
    try:
        while True:
            try:
                return done.result(POLL_SECONDS)
            except NotYet as error:
                if done.done() and done.exception() is error:  # one of the task's own
                    raise
            if progress is not None:
                progress("fetch", watch.count / 1e6, watch.total / 1e6)
            now = time.monotonic()
            if now - begin > limits.max_seconds:
                raise RemoteError(
                    f"{name}: not fetched within {limits.max_seconds:g} s; fetch.max_seconds=N allows more"
                )
            if now - watch.last > STALL_SECONDS:
                raise RemoteError(f"{name}: nothing came for {STALL_SECONDS:g} s; try again later")
    except RemoteError:
        raise
    except FileNotFoundError as error:
        raise RemoteError(f"{name}: no such file") from error
    except PermissionError as error:
        raise RemoteError(f"{name}: permission denied") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RemoteError(
                f"{name}: the disk of {tempfile.gettempdir()} is full; TMPDIR=FOLDER names another place for copies"
            ) from error
        raise RemoteError(f"{name}: cannot be fetched ({_describe(error, uri)})") from error
    finally:
        watch.stopped = True


def _open_system(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and its path there. Environment and fsspec's configuration hold keys and the like."""
    from fsspec.core import url_to_fs

    if urlsplit(uri).scheme not in WEB:
        return url_to_fs(uri)
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
    return url_to_fs(uri, client_kwargs={"timeout": timeout, "trust_env": True})


def _choose_facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The facts among a web server's headers, or what a file system of fsspec says of a file."""
    values = {re.sub("[-_]", "", str(name)).lower(): value for name, value in entry.items()}
    found = {fact: next((values[name] for name in names if values.get(name)), None) for fact, names in FACTS.items()}
    facts = {fact: str(value).removeprefix("W/") for fact, value in found.items() if value}
    return {**facts, "size": int(facts["size"])} if "size" in facts else facts


def _describe(error: Exception, uri: str) -> str:
    """One line without the URI, of which only a part may be shown."""
    if status := getattr(error, "status", None):
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text = " ".join(str(error).replace(uri, shown_name(uri)).replace(" ssl:default", "").split())
    return text or type(error).__name__


def _query_digest(uri: str) -> str:
    """Of a query that may choose the file, as the path ends without a suffix; else empty."""
    parts = urlsplit(uri)
    if not parts.query or PurePosixPath(parts.path).suffix:
        return ""
    return hashlib.sha256(parts.query.encode()).hexdigest()[:8]


def _safe_place(name: str) -> PurePosixPath:
    parts = [part.replace("\0", "_") for part in name.split("/") if part not in ("", ".", "..")]
    return PurePosixPath(*parts) if parts else PurePosixPath("recording")


def _until_magic(parts: Iterable[str]) -> Iterable[str]:
    for part in parts:
        if has_magic(part):
            return
        yield part


def _below(place: PurePosixPath, fixed: list[str]) -> PurePosixPath:
    return PurePosixPath(*place.parts[len(fixed) :]) if list(place.parts[: len(fixed)]) == fixed else place
