"""The command `unique-asr` with every runner; in a checkout `python scripts/transcribe.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from unique_asr.application import cli
from unique_asr.application.session import load_transcriber
from unique_asr.distributed.ray_runner import transcribe_with_ray

if TYPE_CHECKING:
    from unique_asr.transcribers.base import Transcriber


def main(arguments: Sequence[str] | None = None, load: Callable[..., Transcriber] = load_transcriber) -> None:
    """Transcribe what the arguments name, here or with a runner, and exit; see `application.cli.main`."""
    cli.main(arguments, load, {"ray": transcribe_with_ray})
