"""Standard streams that cannot end a job: a closed pipe, a full disk behind `>`, a console that lacks a letter."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class EndlessFile(io.FileIO):
    """A standard stream's descriptor; what cannot be written to it any more goes nowhere.

    Attributes:
        error: why writing ended; None while it works.
    """

    error: OSError | None = None

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: bytes) -> int:
        """Write bytes, and return how many there were."""
        try:
            return super().write(data)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
            self.error = error
            _open_null(self.fileno())  # for writers below Python too, and for the flush at exit
            return len(data)


@contextmanager
def guard_standard_streams() -> Iterator[list[EndlessFile]]:
    """Replace sys.stdout and sys.stderr by streams that never fail, and open those that are closed.

    Characters that a console cannot show are escaped. Streams that are none of the process's own (a test's, a
    notebook's) stay as they are.

    Yields:
        The file of standard output, if it was replaced.
    """
    for descriptor in (0, 1, 2):  # else the next file that is opened would take the place of a closed one
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor)
    before = sys.stdout, sys.stderr
    outputs = [_guard(stream) for stream in before]
    sys.stdout, sys.stderr = (stream for stream, _ in outputs)
    try:
        yield [file for _, file in outputs[:1] if file is not None]
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def is_output_lost() -> bool:
    """Return whether standard output, guarded, can be written no more: what writes nothing else may end."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, EndlessFile) and raw.error is not None


def _guard(stream: TextIO | None) -> tuple[TextIO, EndlessFile | None]:
    """The stream in the place of one, and its file if it is a new one."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8"), None
    if stream not in (sys.__stdout__, sys.__stderr__):
        return stream, None
    try:
        stream.flush()
    except OSError:
        _open_null(stream.fileno())
    file = EndlessFile(stream.fileno())
    text = io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
    )
    return text, file


def _open_null(descriptor: int) -> None:
    """Let a descriptor lead nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
