"""uvicorn with a queue behind it: told to stop, it lets the running job end or stops it, and answers everybody."""

from __future__ import annotations

import asyncio
import socket
import threading

import uvicorn
from starlette.types import ASGIApp

from unique_asr.application.queue import JobQueue

ANSWER_SECONDS = 30.0  # that a job which is stopped may take to notice, and its answer to be sent
LOOK_SECONDS = 0.05


class Server(uvicorn.Server):
    """Serves an application on a socket.

    Args:
        listening: is bound, not yet listening.
        queue: is closed when the server stops.
        stop_seconds: that the running job may take to its end then.
        has_keys: whether clients have to send a key.
    """

    def __init__(
        self, app: ASGIApp, listening: socket.socket, queue: JobQueue, stop_seconds: float, has_keys: bool = False
    ) -> None:
        seconds = round(stop_seconds + ANSWER_SECONDS)
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=seconds))
        self.listening, self.queue, self.stop_seconds, self.has_keys = listening, queue, stop_seconds, has_keys

    @property
    def url(self) -> str:
        """Where it is reached, without a path."""
        host, port = self.listening.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, or until `should_exit` is set."""
        super().run(sockets or [self.listening])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and end those that there are."""
        closing = threading.Thread(target=self.queue.close, args=(self.stop_seconds,), daemon=True)
        closing.start()
        await super().shutdown(sockets)
        for _ in range(round(ANSWER_SECONDS / LOOK_SECONDS)):  # a job whose client has gone
            if not closing.is_alive():
                break
            await asyncio.sleep(LOOK_SECONDS)
