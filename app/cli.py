"""The command behind `unique-asr-app` and `python -m unique_asr.app`: configuration in, a running page."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.cli import load_transcriber
from unique_asr.application.overrides import run, whole_number

LITERAL_KEYS = ("jobs", "folders", "examples", "models")


def main(arguments: Sequence[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    run(launch, "app", sys.argv[1:] if arguments is None else arguments, LITERAL_KEYS)


def launch(config: DictConfig, load: Callable[..., Any] = load_transcriber, block: bool = True) -> Any:
    """Serve the page; with block=False, the running blocks, whose `local_url` it has and which `close` ends."""
    from unique_asr.app.limits import Limits
    from unique_asr.app.page import Page
    from unique_asr.app.store import Store
    from unique_asr.app.worker import Worker

    values = OmegaConf.to_container(config, resolve=True)
    folders = [Path(folder).expanduser().resolve() for folder in values["folders"]]
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"error: folders: {folder} is not a folder")
    examples = [path.resolve() for path in map(Path, values["examples"]) if path.is_file()]
    try:
        passes = whole_number(config, "parallel_passes", "passes")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    limits = Limits(folders, values["max_minutes"], values["max_megabytes"])
    store = Store(Path(values["jobs"]))
    decoding = {name: value for name, value in values["decoding"].items() if name != "prompt"}
    options = {
        "attention": values["attention"],
        "transcriber": {"device": values["device"], "dtype": values["dtype"], "parallel_passes": passes, **decoding},
    }
    worker = Worker(store, load, limits, options, values["max_waiting"])
    blocks = Page(store, worker, limits, values["models"], examples).blocks()
    blocks.queue(max_size=64)
    try:
        blocks.launch(
            server_name=values["host"],
            server_port=values["port"],
            allowed_paths=[str(path) for path in (store.folder, *folders, *examples)],
            max_file_size=int(values["max_megabytes"] * 1e6),
            footer_links=[],
            ssr_mode=False,
            quiet=not block,
            prevent_thread_lock=not block,
        )
    except OSError as error:
        raise SystemExit(f"error: port={values['port']}: cannot be used on {values['host']}; choose another") from error
    return blocks
