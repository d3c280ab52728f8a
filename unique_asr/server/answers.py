"""Transcripts as OpenAI's interface gives them: JSON in two sizes, plain text, subtitles, and events as they come."""

from __future__ import annotations

import io
import json
import math
import zlib
from typing import Any

from starlette.responses import JSONResponse, Response

from unique_asr.models import identify_model
from unique_asr.models.languages import LANGUAGES
from unique_asr.server.requests import TranscriptionRequest
from unique_asr.transcript import Segment, Transcript
from unique_asr.writers import WRITERS

SUBTITLES = {"srt": "text/plain", "vtt": "text/vtt"}  # response format -> media type


def make_answer(request: TranscriptionRequest, transcript: Transcript) -> Response:
    """Return a whole transcript in the format that was asked for."""
    if request.response_format == "text":
        return Response(f"{transcript.text}\n", media_type="text/plain")
    if request.response_format in SUBTITLES:
        file = io.StringIO()
        WRITERS[request.response_format].write(transcript, file)
        return Response(file.getvalue(), media_type=SUBTITLES[request.response_format])
    answer = {"text": transcript.text, "usage": {"type": "duration", "seconds": round(transcript.info.duration, 2)}}
    if request.response_format == "verbose_json":
        answer |= _describe(request, transcript)
    if transcript.info.warnings:
        answer["warnings"] = transcript.info.warnings
    return JSONResponse(answer)


def make_delta(segment: Segment) -> str:
    """Return the event of a segment; the deltas together are the text."""
    text = segment.text.strip()
    return make_event({"type": "transcript.text.delta", "delta": f" {text}" if segment.id else text})


def make_done(transcript: Transcript) -> str:
    """Return the last event, which has the whole text."""
    event: dict[str, Any] = {"type": "transcript.text.done", "text": transcript.text}
    if transcript.info.warnings:
        event["warnings"] = transcript.info.warnings
    return make_event(event)


def make_event(values: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def _describe(request: TranscriptionRequest, transcript: Transcript) -> dict[str, Any]:
    """What `verbose_json` has besides the text."""
    answer: dict[str, Any] = {
        "task": "transcribe",
        "language": _name_language(request),
        "duration": transcript.info.duration,
    }
    if "segment" in request.granularities:
        answer["segments"] = [_describe_segment(segment) for segment in transcript.segments]
    if "word" in request.granularities:
        words = [word for segment in transcript.segments for word in segment.words]
        answer["words"] = [{"word": word.text.strip(), "start": word.start, "end": word.end} for word in words]
    return answer


def _describe_segment(segment: Segment) -> dict[str, Any]:
    """A segment with all fields of OpenAI's, which strict clients expect; those that we do not have are 0 or empty."""
    text = segment.text.encode()
    described = {
        "id": segment.id,
        "seek": 0,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": math.log(max(segment.confidence, 1e-9)) if segment.confidence is not None else 0.0,
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": 0.0,
    }
    return described | ({"speaker": segment.speaker} if segment.speaker else {})


def _name_language(request: TranscriptionRequest) -> str:
    """English name of the language: the one that was told, or the only one that the model knows."""
    known = identify_model(request.model).languages
    code = request.language or (known[0] if len(known) == 1 else None)
    return LANGUAGES.get(code, code or "unknown").lower()
