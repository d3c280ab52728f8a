"""Text from a text LLM: `unique-asr-generate model=MODEL context=book.txt prompt=Why?`"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.display import SIGN_OF_LIFE, show_waiting
from unique_asr.application.overrides import FAILED, SUCCESS, USAGE, run
from unique_asr.application.standard_streams import is_output_lost
from unique_asr.attention import SparseAttentionConfig
from unique_asr.remote import expand_home

if TYPE_CHECKING:
    from unique_asr.generation import GenerationInfo

LITERAL_KEYS = ("model.name_or_path", "prompt", "context", "system")
LITERAL_GROUPS = {"model": "model.name_or_path"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the text that the arguments ask for, and exit."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries would break into ours
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(run(generate, "generate", arguments, LITERAL_KEYS, LITERAL_GROUPS))


def generate(config: DictConfig) -> int:
    """Write text to standard output as it is decoded, all else to standard error; return the exit code."""

    def note(text: str, end: str = "\n") -> None:
        if not config.quiet:
            print(text, end=end, file=sys.stderr, flush=True)

    told = time.monotonic()

    def show_progress(done: int, total: int) -> None:
        nonlocal told
        if sys.stderr is not None and sys.stderr.isatty():
            note(f"\rReading {done} of {total} tokens", end="\n" if done == total else "")
        elif time.monotonic() - told > SIGN_OF_LIFE:
            told = time.monotonic()
            note(f"Reading {done} of {total} tokens")

    if OmegaConf.is_missing(config.model, "name_or_path") or OmegaConf.is_missing(config, "prompt"):
        print("usage: python scripts/generate.py model=MODEL prompt=TEXT [context=FILE] ...", file=sys.stderr)
        return USAGE
    if config.prompt == "-" and sys.stdin is None:
        print("error: prompt=-: standard input is closed; pipe a text into it", file=sys.stderr)
        return FAILED
    try:
        prompt = sys.stdin.read() if config.prompt == "-" else str(config.prompt)
        context = None if config.context is None else expand_home(config.context).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        print(f"error: context={config.context}: {error}", file=sys.stderr)
        return FAILED
    try:
        attention = SparseAttentionConfig(**OmegaConf.to_container(config.attention))
        with nullcontext() if config.quiet else show_waiting(f"Loading {config.model.name_or_path}"):
            from unique_asr.generation import TextGenerator  # takes seconds

            generator = TextGenerator(
                config.model.name_or_path,
                attention=attention,
                device=config.device,
                dtype=config.dtype,
                prefill_chunk=config.prefill_chunk,
            )
        pieces, info = generator.generate(
            prompt,
            context=context,
            system=config.system,
            max_new_tokens=config.max_new_tokens,
            chat=config.chat,
            template_options=OmegaConf.to_container(config.template_options),
            progress=show_progress,
        )
        for warning in info.warnings:
            note(f"warning: {warning}")
        for piece in pieces:
            print(piece, end="", flush=True)
            if is_output_lost():
                break
        print()
    except (ValueError, ImportError) as error:
        if config.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    if not is_output_lost():
        note(summarize(info))
    return SUCCESS


def summarize(info: GenerationInfo) -> str:
    """Return one line: tokens and seconds, why the text ended, and what sparse attention saved."""
    from unique_asr.attention import SparsityCounters

    counts = {name: value for name, value in info.sparsity.items() if name != "share_of_pages_read"}
    return (
        f"{info.prompt_tokens} tokens read in {info.timings['prefill']:.1f} s, "
        f"{info.tokens} written in {info.timings.get('decode', 0.0):.1f} s"
        f" (stopped at the {'end' if info.stop_reason == 'end' else 'limit of max_new_tokens'});"
        f" {SparsityCounters(**counts)}"
    )
