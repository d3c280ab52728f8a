"""Browsers are told apart by a cookie, so that each one sees its own jobs."""

from __future__ import annotations

import re
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

COOKIE = "unique_asr_browser"
TOKEN = re.compile(r"[0-9a-f]{32}")
SECONDS = 365 * 24 * 3600  # that a browser is remembered


def find_browser(cookies: str) -> str:
    """Return who sent the header `cookies`: a token that this page has given out, or "" if it holds none."""
    try:
        morsel = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel and TOKEN.fullmatch(morsel.value) else ""


def identify(request: gr.Request) -> str:
    """Return the token of the browser that sent a request; "" for a program that has none."""
    return find_browser(dict(request.headers).get("cookie", ""))


class BrowserCookie:
    """ASGI middleware that gives a token to each browser that opens the page without one."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, with a new token in the answer where a browser has none."""
        opens = scope["type"] == "http" and scope["method"] == "GET"
        cookies = "; ".join(
            value.decode("latin-1") for name, value in scope.get("headers", ()) if name.lower() == b"cookie"
        )
        if not opens or find_browser(cookies):
            await self.app(scope, receive, send)
            return

        async def send_cookie(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if any(name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in headers):
                    cookie = f"{COOKIE}={secrets.token_hex(16)}; Max-Age={SECONDS}; Path=/; HttpOnly; SameSite=Lax"
                    message = {**message, "headers": [*headers, (b"set-cookie", cookie.encode())]}
            await send(message)

        await self.app(scope, receive, send_cookie)
