"""Bodies of requests: no larger than allowed, and read to their end where a client would otherwise miss the answer."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unique_asr.application.limits import TooLarge

DRAIN_SECONDS = 5.0  # that the rest of a refused upload is read for
FORM_BYTES = 1_000_000  # of a form besides its file


class BodyLimit:
    """Limits what a client may send below a path.

    Many clients see a broken connection instead of the answer if it comes before they have sent everything. So the
    rest of what was refused is read and dropped for some seconds, unless the client waits to be asked for it.

    Args:
        path: with which the paths of the requests begin.
        max_megabytes: of the file.
    """

    def __init__(self, app: ASGIApp, path: str, max_megabytes: float) -> None:
        self.app, self.path, self.max_megabytes = app, path, max_megabytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self.path):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        limit = self.max_megabytes * 1e6 + FORM_BYTES
        declared = headers.get(b"content-length", b"")
        too_large = declared.isdigit() and int(declared) > limit
        asked = headers.get(b"expect", b"").lower() != b"100-continue"
        read, ended = 0, False

        async def receive_limited() -> Message:
            nonlocal read, ended, asked
            if not too_large:
                asked = True
                message = await receive()
                read += len(message.get("body", b""))
                ended = not message.get("more_body", False)
            if too_large or read > limit:
                raise TooLarge(f"The upload is larger than {self.max_megabytes:g} MB, which is the limit.")
            return message

        async def drain() -> None:
            while not ended and (await receive()).get("more_body", False):
                pass

        async def send_drained(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400 and asked and not ended:
                with suppress(TimeoutError):
                    await asyncio.wait_for(drain(), DRAIN_SECONDS)
            await send(message)

        await self.app(scope, receive_limited, send_drained)
