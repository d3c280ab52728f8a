"""The command behind `unique-asr-app` and `python -m unique_asr.app`: configuration in, a running page."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.overrides import FAILED, SUCCESS, run, whole_number
from unique_asr.remote import expand_home

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from unique_asr.application.queue import JobQueue

LITERAL_KEYS = ("jobs", "folders", "examples", "models")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page until it is interrupted, and exit."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    sys.exit(run(serve, "app", sys.argv[1:] if arguments is None else arguments, LITERAL_KEYS))


def serve(config: DictConfig) -> int:
    """Serve the page and return the exit code; what the user can cure is one line."""
    try:
        launch(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return SUCCESS


def launch(config: DictConfig, load: Callable[..., Any] | None = None, block: bool = True) -> gr.Blocks:
    """Serve the page.

    Args:
        load: makes transcribers, by default `unique_asr.transcribers.make_transcriber`.
        block: return when the page ends; else the running blocks, whose address is `local_url`, and which `close` ends.

    Raises:
        ValueError: if an option does not fit, in one line.
    """
    values = OmegaConf.to_container(config, resolve=True)
    find_folders(values["folders"])
    whole_number(config, "parallel_passes", "passes")
    if block:
        print("Starting the page ...", flush=True)

    # These take seconds to import.
    from starlette.middleware import Middleware
    from unique_asr.app.visitors import BrowserCookie

    from unique_asr.application.queue import JobQueue
    from unique_asr.application.session import Session, load_transcriber

    blocks, served = make_page(values, JobQueue(Session(load or load_transcriber), values["max_waiting"]))
    try:
        blocks.launch(
            server_name=values["host"],
            server_port=values["port"],
            **served,
            app_kwargs={"middleware": [Middleware(BrowserCookie)]},
            quiet=True,  # no advice to share it with the world
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ValueError(f"port={values['port']}: cannot be used on {values['host']}; choose another") from error
    if block:
        # The first job needs it: its imports take seconds, and are done while somebody chooses a recording.
        threading.Thread(target=import_module, args=("unique_asr.transcribers",), daemon=True).start()
        wait(blocks)
    return blocks


def wait(blocks: gr.Blocks) -> None:
    """Say where the page is, and return when it is interrupted."""
    print(f"The page is on http://{blocks.server_name}:{blocks.server_port} (Ctrl-C ends it)", flush=True)
    try:
        while blocks.is_running:
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("The page has ended; jobs that were not done can be continued", flush=True)
    finally:
        blocks.close(verbose=False)


def mount_page(app: FastAPI, values: dict[str, Any], queue: JobQueue) -> FastAPI:
    """Serve the page on / of an application, below the paths that it has; see `make_page`."""
    import gradio as gr
    from unique_asr.app.visitors import BrowserCookie

    blocks, served = make_page(values, queue)
    app.add_middleware(BrowserCookie)
    return gr.mount_gradio_app(app, blocks, path="/", **served)


def make_page(values: dict[str, Any], queue: JobQueue) -> tuple[gr.Blocks, dict[str, Any]]:
    """Return the page, and how gradio has to serve it.

    Args:
        values: of conf/app.yaml, or conf/server.yaml.
        queue: runs the page's jobs.

    Raises:
        ValueError: if an option does not fit, in one line.
    """
    folders = find_folders(values["folders"])
    from unique_asr.app.limits import Limits
    from unique_asr.app.page import Page
    from unique_asr.app.store import Store
    from unique_asr.app.worker import Worker

    examples = [path.resolve() for path in map(Path, values["examples"]) if path.is_file()]
    limits = Limits(values["max_minutes"], values["max_megabytes"], folders)
    store = Store(Path(values["jobs"]))
    decoding = {name: value for name, value in values["decoding"].items() if name != "prompt"}
    transcriber = {name: values[name] for name in ("device", "dtype", "parallel_passes")}
    options = {"attention": values["attention"], "transcriber": {**transcriber, **decoding}}
    worker = Worker(store, queue, limits, options)
    blocks = Page(store, worker, limits, values["models"], examples, values["shared"]).build()
    blocks.queue(max_size=64)
    return blocks, {
        "allowed_paths": [str(path) for path in (store.folder, *folders, *examples)],
        "max_file_size": int(values["max_megabytes"] * 1e6),
        "footer_links": [],
        "ssr_mode": False,
    }


def find_folders(names: Sequence[str]) -> list[Path]:
    """Return the folders whose files may be named on the page. Raises ValueError if one is none."""
    folders = [expand_home(name).resolve() for name in names]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"folders: {folder} is not a folder")
    return folders
