"""From the form of a request to what is wanted; whatever does not fit is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile

from unique_asr.server.errors import RequestError
from unique_asr.transcribers import check_hotwords, check_language, check_prompt

RESPONSE_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
STREAMED_FORMATS = ("json", "text")
GRANULARITIES = ("segment", "word")
FIELDS = (
    *("file", "model", "language", "prompt", "keywords", "response_format", "timestamp_granularities", "stream"),
    *("temperature", "chunking_strategy"),
)


@dataclass(frozen=True)
class TranscriptionRequest:
    """What a client wants.

    Attributes:
        file: the recording.
        model: one of those that the server offers.
        language: code of the language that is spoken, for models that can be told; None: it finds out.
        prompt: an instruction in place of the model's own.
        hotwords: words to expect, separated by commas.
        response_format: one of RESPONSE_FORMATS.
        granularities: of GRANULARITIES, what `verbose_json` lists.
        stream: send the text as it is written.
    """

    file: UploadFile
    model: str
    language: str | None = None
    prompt: str | None = None
    hotwords: str | None = None
    response_format: str = "json"
    granularities: Sequence[str] = ("segment",)
    stream: bool = False

    @property
    def name(self) -> str:
        """What messages call the recording: the name of its file, without a path, on one line."""
        name = "".join(filter(str.isprintable, (self.file.filename or "").replace("\\", "/").rpartition("/")[2]))
        return name.strip()[:200] or "recording"


def read_request(form: FormData, models: Sequence[str]) -> TranscriptionRequest:
    """Return what a form asks for.

    Args:
        models: those that may be asked for.

    Raises:
        RequestError: if a field is missing, unknown, or has a value that cannot be, for this model or at all.
    """
    values: dict[str, list[str | UploadFile]] = {}
    for name, value in form.multi_items():
        name = name.removesuffix("[]")  # how OpenAI's client writes lists
        if name not in FIELDS:
            raise RequestError(
                f"{name}: is not known here; leave it out (there are {', '.join(FIELDS)})",
                400,
                name,
                "unknown_parameter",
            )
        if name == "file" and not isinstance(value, UploadFile):
            raise RequestError("file: is no file; give one", 400, name)
        if name != "file" and isinstance(value, UploadFile):
            raise RequestError(f"{name}: is a file; give a value", 400, name)
        values.setdefault(name, []).append(value)

    def take(name: str) -> str:
        given = values.get(name, [])
        if len(given) > 1:
            raise RequestError(f"{name}: is given {len(given)} times; give it once", 400, name)
        return str(given[0]).strip() if given else ""

    if len(files := values.get("file", [])) != 1:
        raise RequestError(f"file: give one recording, as multipart/form-data; {len(files)} were given", 400, "file")
    model = take("model")
    check_model(model, models)
    response_format = _choose(take("response_format") or "json", RESPONSE_FORMATS, "response_format")
    granularities = [
        _choose(str(value), GRANULARITIES, "timestamp_granularities")
        for value in values.get("timestamp_granularities", [])
    ]
    if granularities and response_format != "verbose_json":
        raise RequestError(
            "timestamp_granularities: needs response_format=verbose_json", 400, "timestamp_granularities"
        )
    stream = _choose(take("stream").lower() or "false", ("true", "false"), "stream") == "true"
    if stream and response_format not in STREAMED_FORMATS:
        raise RequestError(
            f"stream=true: is possible with response_format={' or '.join(STREAMED_FORMATS)} alone", 400, "stream"
        )
    _choose(take("chunking_strategy") or "auto", ("auto",), "chunking_strategy")  # long recordings are always cut
    try:
        greedy = float(take("temperature") or 0) == 0
    except ValueError:
        greedy = False
    if not greedy:
        raise RequestError(
            "temperature: only 0 is possible, for the likeliest word is taken; leave it out", 400, "temperature"
        )
    prompt = take("prompt")
    try:
        language = check_language(take("language"), model)
        prompt = check_prompt(prompt, model)
        hotwords = check_hotwords(", ".join(map(str, values.get("keywords", []))), model)
    except ValueError as error:
        option = str(error).partition("=")[0]
        param = {"hotwords": "keywords"}.get(option, option)
        raise RequestError(str(error), 400, param) from error
    return TranscriptionRequest(
        file=files[0],
        model=model,
        language=language,
        prompt=prompt,
        hotwords=hotwords,
        response_format=response_format,
        granularities=granularities or ["segment"],
        stream=stream,
    )


def check_model(model: str, models: Sequence[str]) -> None:
    """Raise RequestError if a model is not offered."""
    if not model:
        raise RequestError(f"model: name one; this server offers {', '.join(models)}", 400, "model")
    if model not in models:
        raise RequestError(f"model={model}: this server offers {', '.join(models)}", 404, "model", "model_not_found")


def _choose(value: str, choices: Sequence[str], name: str) -> str:
    if value not in choices:
        raise RequestError(f"{name}={value}: choose from {', '.join(choices)}", 400, name)
    return value
