"""The command behind `unique-asr-server` and `python -m unique_asr.server`: configuration in, a running server."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.overrides import FAILED, SUCCESS, USAGE, run, whole_number
from unique_asr.attention import SparseAttentionConfig

if TYPE_CHECKING:
    from unique_asr.server.serving import Server

API_KEY = "UNIQUE_ASR_API_KEY"  # environment variable: a key, or several separated by commas
LITERAL_KEYS = ("jobs", "folders", "examples", "models")


def main(arguments: Sequence[str] | None = None, load: Callable[..., Any] | None = None) -> None:
    """Serve until the process is told to stop, and exit.

    Args:
        arguments: by default those of the process.
        load: makes transcribers, by default `unique_asr.transcribers.make_transcriber`.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(run(lambda config: serve(config, load), "server", arguments, LITERAL_KEYS))


def serve(config: DictConfig, load: Callable[..., Any] | None = None) -> int:
    """Serve until SIGINT or SIGTERM, and return the exit code; what the user can cure is one line."""
    try:
        check_config(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    print("Starting the server ...", flush=True)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("unique_asr.server").setLevel(logging.INFO)
    with TemporaryDirectory(prefix="unique-asr-server-") as folder:
        try:
            server = make_server(config, Path(folder), load)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        if not server.has_keys and not _is_loopback(config.host):
            print(f"warning: whoever reaches {config.host} may use this server; {API_KEY} sets a key", file=sys.stderr)
        print(f"Serving on {server.url} (Ctrl-C stops it)", flush=True)
        # uvicorn raises the signal again that it was stopped by: that has been obeyed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run()
    return SUCCESS


def check_config(config: DictConfig) -> None:
    """Raise ValueError, in one line, if an option cannot be."""
    whole_number(config, "parallel_passes", "passes")
    whole_number(config, "max_waiting", "requests")
    SparseAttentionConfig(**OmegaConf.to_container(config.attention))
    if config.page:
        from unique_asr.app.cli import find_folders

        find_folders(config.folders)
    if not isinstance(config.port, int) or not 0 <= config.port < 65536:  # getaddrinfo would take it modulo 65536
        raise ValueError(f"port={config.port}: give a whole number from 0 to 65535; 0 takes any that is free")
    if not config.models:
        raise ValueError("models: name at least one, such as default")
    for name in ("max_minutes", "max_megabytes", "stop_seconds"):
        value = config[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value}: give a number, 0 or more")


def make_server(config: DictConfig, folder: Path, load: Callable[..., Any] | None = None) -> Server:
    """Return a server that has its port, and the first of its models in memory; its `run` serves.

    Args:
        folder: for uploads while they are needed.
        load: makes transcribers, by default `unique_asr.transcribers.make_transcriber`.

    Raises:
        ValueError: if the port cannot be used, or the model not be loaded.
    """
    values, keys = OmegaConf.to_container(config, resolve=True), read_keys()
    listening = _bind(values["host"], values["port"])
    # These take seconds to import.
    from unique_asr.application.display import Display
    from unique_asr.application.limits import RecordingLimits
    from unique_asr.application.queue import JobQueue
    from unique_asr.application.session import Session, TranscriptionSettings, load_transcriber
    from unique_asr.server.api import ServerSettings, TranscriptionAPI
    from unique_asr.server.serving import Server

    decoding = {name: value for name, value in values["decoding"].items() if name != "prompt"}
    passes = values["parallel_passes"]
    options = {"device": values["device"], "dtype": values["dtype"], "parallel_passes": passes, **decoding}
    attention = SparseAttentionConfig(**values["attention"])
    settings = ServerSettings(values["models"], attention, options, keys, folder)
    session = Session(load or load_transcriber)
    try:
        session.load(TranscriptionSettings(settings.models[0], attention, options), Display())
    except BaseException:
        listening.close()
        raise
    queue = JobQueue(session, values["max_waiting"])
    app = TranscriptionAPI(queue, RecordingLimits(values["max_minutes"], values["max_megabytes"]), settings).build()
    if values["page"]:
        from unique_asr.app.cli import mount_page

        app = mount_page(app, values, queue)
    return Server(app, listening, queue, values["stop_seconds"], bool(keys))


def read_keys() -> list[str]:
    """Return the keys of the environment. Raises ValueError if one could not be sent in a header."""
    keys = [key.strip() for key in os.environ.get(API_KEY, "").split(",") if key.strip()]
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ValueError(f"{API_KEY}: use letters, digits and signs of ASCII")
    return keys


def _bind(host: str, port: int) -> socket.socket:
    """A socket with this address: that somebody else has it is known before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ValueError(f"port={port}: cannot be used on {host}; choose another") from error
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
