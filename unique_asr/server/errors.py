"""What is answered when a request is not carried out: OpenAI's JSON, with one line that says why."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from unique_asr.application.limits import Refusal, TooLarge
from unique_asr.application.queue import QueueFull, Stopped
from unique_asr.audio import AudioError

RETRY_SECONDS = 10  # what a client is told to wait before it asks again


class RequestError(ValueError):
    """A request that is not carried out.

    Args:
        message: one line.
        status: of HTTP.
        param: the field of the request that is wrong.
        code: what programs look at.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the answer, as OpenAI's clients expect it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def to_response(self) -> JSONResponse:
        """Return the answer."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_SECONDS)
        if self.status in (500, 507):  # OpenAI's client would try twice more, and fail in the same way
            headers["X-Should-Retry"] = "false"
        return JSONResponse(self.to_dict(), self.status, headers)


def describe_failure(error: BaseException) -> RequestError:
    """Return what is answered to an error of any kind: 4xx where the request is to blame, 5xx where the server is."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(error.detail, error.status_code)
    if isinstance(error, Stopped):
        return RequestError("the server is stopping; try again later", 503, code="server_stopping")
    if isinstance(error.__cause__, (Refusal, AudioError)):  # transcribers put the name of the recording before it
        error = error.__cause__
    message = " ".join(str(error).split())
    if isinstance(error, QueueFull):
        return RequestError(message, 429, code="rate_limit_exceeded")
    if isinstance(error, TooLarge):
        return RequestError(message, 413, "file", "file_too_large")
    if isinstance(error, (Refusal, AudioError)):
        return RequestError(message, 400, "file")
    if isinstance(error, ValueError):  # a line of ours: the model, the device or memory are not what they should be
        return RequestError(message, 500)
    return RequestError(f"{message or 'failed'} ({type(error).__name__})", 500)


def add_handlers(app: FastAPI) -> None:
    """Make an application answer errors of all kinds in OpenAI's form, those of unknown paths and methods too."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        return describe_failure(error).to_response()

    def answer_path(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return RequestError(message, error.status_code).to_response()

    app.add_exception_handler(ValueError, answer)
    app.add_exception_handler(Exception, answer)
    app.add_exception_handler(HTTPException, answer_path)
