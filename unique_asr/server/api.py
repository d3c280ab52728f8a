"""The paths of the server, and what is done for each."""

from __future__ import annotations

import hmac
import logging
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from unique_asr.application.display import format_speed
from unique_asr.application.limits import RecordingLimits
from unique_asr.application.queue import JobQueue, Stopped
from unique_asr.application.session import TranscriptionSettings
from unique_asr.attention import SparseAttentionConfig
from unique_asr.server.answers import make_answer, make_delta, make_done, make_event
from unique_asr.server.errors import RequestError, add_handlers, describe_failure
from unique_asr.server.job import RequestJob
from unique_asr.server.metrics import Metrics
from unique_asr.server.requests import TranscriptionRequest, check_model, read_request
from unique_asr.server.uploads import BodyLimit

log = logging.getLogger("unique_asr.server")
KEEP_ALIVE_SECONDS = 15.0  # between two signs of life in a stream without news; proxies close silent connections
CLIENT_GONE = 499  # the status of a request whose client did not wait; nobody sees it but metrics and log


@dataclass(frozen=True)
class ServerSettings:
    """What the server offers.

    Attributes:
        models: names for `unique_asr.transcribers.make_transcriber`.
        attention: how the models read their KV caches.
        options: further arguments of `make_transcriber`.
        keys: of which a client has to send one; none: everybody may ask.
        folder: for uploads while they are needed.
    """

    models: Sequence[str]
    attention: SparseAttentionConfig
    options: Mapping[str, Any]
    keys: Sequence[str]
    folder: Path


class TranscriptionAPI:
    """The handlers, and `build`, which makes an application of them."""

    def __init__(self, queue: JobQueue, limits: RecordingLimits, settings: ServerSettings) -> None:
        self.queue, self.limits, self.settings = queue, limits, settings
        self.metrics = Metrics(queue)
        self._uploading = 0  # requests whose files are on their way
        self._created = int(time.time())

    def build(self) -> FastAPI:
        """Return an application with all paths."""
        app = FastAPI(title="unique_asr", openapi_url=None)
        add_handlers(app)
        app.add_middleware(BodyLimit, path="/v1", max_megabytes=self.limits.max_megabytes)
        router = APIRouter(prefix="/v1", dependencies=[Depends(self.check_key)])
        router.add_api_route("/audio/transcriptions", self.transcribe, methods=["POST"], response_model=None)
        router.add_api_route("/models", self.list_models, methods=["GET"])
        router.add_api_route("/models/{model:path}", self.describe_model, methods=["GET"])
        app.include_router(router)
        app.add_api_route("/health", self.show_health, methods=["GET"], response_model=None)
        app.add_api_route("/metrics", self.metrics.to_response, methods=["GET"], response_model=None)
        return app

    async def check_key(self, request: Request) -> None:
        """Raise RequestError if the client has to send a key, and sends none that is right."""
        if not self.settings.keys:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        right = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in self.settings.keys]
        if kind.lower() != "bearer" or not any(right):
            message = "the key is wrong" if key else "a key is needed: send it as Authorization: Bearer KEY"
            raise RequestError(message, 401, code="invalid_api_key")

    async def transcribe(self, request: Request) -> Response:
        """Transcribe an upload, and answer with the transcript or with events as they come."""
        try:
            asked, job = await self._accept(request)
            if asked.stream:
                return self._stream(job, request)
            async for _ in job.follow(self.queue, request):
                pass
            response = await run_in_threadpool(make_answer, asked, job.transcript)
        except ClientDisconnect:
            self._count(CLIENT_GONE, "the client has gone")
            return Response(status_code=CLIENT_GONE)
        except (ValueError, HTTPException) as error:
            failure = describe_failure(error)
            self._count(failure.status, str(failure))
            return failure.to_response()
        self._count_done(job)
        return response

    def list_models(self) -> dict[str, Any]:
        """Return the models that may be asked for."""
        return {"object": "list", "data": [self.describe_model(name) for name in self.settings.models]}

    def describe_model(self, model: str) -> dict[str, Any]:
        """Return what there is to say of a model."""
        check_model(model, self.settings.models)
        return {"id": model, "object": "model", "created": self._created, "owned_by": "unique_asr"}

    def show_health(self) -> JSONResponse:
        """Return 200 while jobs are taken, 503 when the server is stopping."""
        state = {"running": int(self.queue.running is not None), "waiting": self.queue.waiting}
        if self.queue.closed:
            return JSONResponse({"status": "stopping", **state}, 503)
        return JSONResponse({"status": "ok", **state})

    async def _accept(self, request: Request) -> tuple[TranscriptionRequest, RequestJob]:
        """Receive the form, and put its recording into the queue.

        Raises:
            ValueError: if it is refused.
        """
        if self.queue.closed:
            raise describe_failure(Stopped())
        self.queue.check_room(self._uploading + 1)
        self._uploading += 1
        folder = None
        try:
            async with request.form(max_files=1, max_fields=100) as form:
                asked = await run_in_threadpool(read_request, form, self.settings.models)
                folder = Path(tempfile.mkdtemp(dir=self.settings.folder))
                recording = await run_in_threadpool(self._keep, asked, folder)
            settings = TranscriptionSettings(
                model=asked.model,
                attention=self.settings.attention,
                options=self.settings.options,
                prompt=asked.prompt,
                language=asked.language,
                hotwords=asked.hotwords,
            )
            job = RequestJob(recording, asked.name, settings, self.limits)
            self.queue.submit(job)
        except BaseException as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise RequestError(f"the recording cannot be kept here ({error.strerror})", 507) from error
            raise
        finally:
            self._uploading -= 1
        return asked, job

    def _keep(self, asked: TranscriptionRequest, folder: Path) -> Path:
        """Copy an upload into a folder, under a name of our own, and check it against the limits."""
        suffix = Path(asked.name).suffix.lower()
        recording = folder / f"recording{suffix if re.fullmatch(r'[.][a-z0-9]{1,8}', suffix) else ''}"
        with recording.open("wb") as file:
            shutil.copyfileobj(asked.file.file, file, 1 << 20)
        self.limits.check(recording, asked.name)
        return recording

    def _stream(self, job: RequestJob, request: Request) -> StreamingResponse:
        """Answer with the text as it is written; an error on the way is the last event."""

        async def events() -> AsyncIterator[str]:
            ended, quiet_since = False, time.monotonic()
            try:
                async for segment in job.follow(self.queue, request):
                    if segment is not None:
                        yield make_delta(segment)
                    elif time.monotonic() - quiet_since < KEEP_ALIVE_SECONDS:
                        continue
                    else:
                        yield ": still at work\n\n"
                    quiet_since = time.monotonic()
                ended = True
                self._count_done(job)
                yield make_done(job.transcript)
            except RequestError as failure:
                ended = True
                self._count(failure.status, str(failure))
                yield make_event(failure.to_dict())
            except ClientDisconnect:
                pass
            finally:
                if not ended:
                    self._count(CLIENT_GONE, "the client has gone")

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    def _count_done(self, job: RequestJob) -> None:
        """Count a transcription that has ended well, and log how fast it was; never what was said."""
        waited, worked = job.begun - job.created, job.ended - job.begun
        self.metrics.waiting.observe(waited)
        self.metrics.working.observe(worked)
        self.metrics.audio.inc(job.info.duration)
        self._count(200, f"{format_speed(job.info.duration, worked)}, after {waited:.1f} s of waiting")
        if job.info.warnings:  # which may quote the text
            log.warning("%d warnings about the transcript, which are in the answer", len(job.info.warnings))

    def _count(self, status: int, message: str) -> None:
        self.metrics.answers.labels(status).inc()
        log.info("%s %s", status, message)
