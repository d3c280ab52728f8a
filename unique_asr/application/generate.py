"""Text from a text LLM, after a long context: python scripts/generate.py model=MODEL context=book.txt prompt=Why?"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.overrides import run

SUCCESS, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes
LITERAL_KEYS = ("model.name_or_path", "prompt", "context", "system")
LITERAL_GROUPS = {"model": "model.name_or_path"}


def main(arguments: Sequence[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    code = SUCCESS

    def task(config: DictConfig) -> None:
        nonlocal code
        code = write(config)

    try:
        run(task, "generate", sys.argv[1:] if arguments is None else arguments, LITERAL_KEYS, LITERAL_GROUPS)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def write(config: DictConfig) -> int:
    """The text goes to standard output as it is written, everything else to standard error."""

    def note(text: str, end: str = "\n") -> None:
        if not config.quiet:
            print(text, end=end, file=sys.stderr, flush=True)

    if OmegaConf.is_missing(config.model, "name_or_path") or OmegaConf.is_missing(config, "prompt"):
        print("usage: python scripts/generate.py model=MODEL prompt=TEXT [context=FILE] ...", file=sys.stderr)
        return USAGE
    try:
        prompt = sys.stdin.read() if config.prompt == "-" else str(config.prompt)
        context = None if config.context is None else Path(config.context).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        print(f"error: context={config.context}: {error}", file=sys.stderr)
        return FAILED

    from unique_asr.attention import SparseAttentionConfig, SparsityCounters
    from unique_asr.generation import TextGenerator

    def read(done: int, total: int) -> None:
        if sys.stderr.isatty():
            note(f"\rReading {done} of {total} tokens", end="\n" if done == total else "")

    try:
        attention = SparseAttentionConfig(**OmegaConf.to_container(config.attention))
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
            progress=read,
        )
        for warning in info.warnings:
            note(f"warning: {warning}")
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except (ValueError, ImportError) as error:
        if config.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    seconds = info.timings.get("decode", 0.0)
    sparsity = {name: value for name, value in info.sparsity.items() if name != "share_of_pages_read"}
    note(
        f"{info.prompt_tokens} tokens read in {info.timings['prefill']:.1f} s, {info.tokens} written in {seconds:.1f} s"
        f" (stopped at the {'end' if info.stop_reason == 'end' else 'limit of max_new_tokens'});"
        f" {SparsityCounters(**sparsity)}"
    )
    return SUCCESS


if __name__ == "__main__":
    main()
