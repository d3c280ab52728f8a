"""Reading the answers of speech LLMs while they are written, and writing such answers, to train on.

A parser gets the text of each token and returns an utterance as soon as it is complete, so that nothing that follows (a
cut, a loop, a malformed end) can undo it. What is not complete stays in `tail`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

CHARACTER_TOKENS = 8  # tokens after which an incomplete character is returned as it is


@dataclass
class ParsedUtterance:
    """A piece of a transcript. Times are seconds from the beginning of the pass, None where the model gives none."""

    text: str  # empty for sounds that are not speech
    start: float | None = None
    end: float | None = None
    speaker: str | None = None


class TextStream:
    """Decodes tokens one by one, each with those before it; a character of several tokens comes with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._read = 0  # ids[context:read] are returned, and context of the ids after them

    def push(self, token: int) -> str:
        """Add a token id and return the text that it completes."""
        self._ids.append(token)
        shown, text = self._decode(self._read), self._decode(len(self._ids))
        if text.endswith("\ufffd") and len(self._ids) - self._read < CHARACTER_TOKENS:
            return ""
        self._context, self._read = self._read, len(self._ids)
        return text[len(shown) :]

    def flush(self) -> str:
        """Return what is left of an incomplete character at the end."""
        shown, text = self._decode(self._read), self._decode(len(self._ids))
        self._context = self._read = len(self._ids)
        return text[len(shown) :]

    def _decode(self, end: int) -> str:
        ids = self._ids[self._context : end]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Parser(ABC):
    """A reader of one answer of a model."""

    timed = True  # whether utterances have times

    def __init__(self) -> None:
        self.tail = ""  # text of no complete utterance yet

    def push(self, text: str) -> list[ParsedUtterance]:
        """Add text and return the utterances that it completes."""
        self.tail += text
        return [utterance for utterance in self._read() if utterance is not None]

    def close(self) -> list[ParsedUtterance]:
        """Return the utterances that are left at the end of a whole answer. After a cut answer, do not call it."""
        return []

    @staticmethod
    @abstractmethod
    def write(utterances: Sequence[ParsedUtterance]) -> str:
        """Write the answer that is read as these utterances."""

    @abstractmethod
    def _read(self) -> Iterator[ParsedUtterance | None]:
        """Take complete utterances off the beginning of `tail`."""


class BracketParser(Parser):
    """`[0.00][S01]Hello there.[7.56][7.60][S02]...` of MOSS-Transcribe-Diarize.

    Brackets around anything but a time or a speaker are text. An utterance without a start begins where the one before
    it ends; one without an end keeps none.
    """

    _MARK = re.compile(r"\[\s*(?:(?P<time>\d+(?:[:.]\d+)*)|S(?P<speaker>\d+))\s*\]")

    @staticmethod
    def write(utterances: Sequence[ParsedUtterance]) -> str:
        return "".join(f"[{each.start:.2f}][{each.speaker or 'S01'}]{each.text}[{each.end:.2f}]" for each in utterances)

    def __init__(self) -> None:
        super().__init__()
        self._start: float | None = None
        self._speaker: str | None = None
        self._last_end = 0.0
        self._text = ""

    def _read(self) -> Iterator[ParsedUtterance | None]:
        while mark := self._MARK.search(self.tail):
            self._text += self.tail[: mark.start()]
            self.tail = self.tail[mark.end() :]
            if mark["time"] is not None:
                time = parse_time(mark["time"])
                if self._text.strip():
                    yield self._take(time)
                else:
                    self._start = time
            else:
                if self._text.strip():
                    yield self._take(None)
                self._speaker = f"S{int(mark['speaker']):02}"

    def close(self) -> list[ParsedUtterance]:
        self._text += self.tail
        self.tail = ""
        return [self._take(None)] if self._text.strip() else []

    def _take(self, end: float | None) -> ParsedUtterance:
        start = self._last_end if self._start is None else self._start
        utterance = ParsedUtterance(" ".join(self._text.split()), start, end if end is None else max(start, end))
        utterance.speaker = self._speaker
        self._last_end = start if utterance.end is None else utterance.end
        self._start, self._speaker, self._text = None, None, ""
        return utterance


class JsonParser(Parser):
    """`[{"Start":0.0,"End":7.56,"Speaker":0,"Content":"Hello there."}, ...` of VibeVoice-ASR.

    Each object is read by itself. In a malformed one, with quotes in its text for instance, the fields are searched; if
    that fails too it is left out, and reading goes on with the next one. `[Silence]` and the like are empty utterances.
    """

    _BEGIN = re.compile(r'\{\s*"(?:Start|End|Speaker|Content)"')
    _END = re.compile(r'["\d\]el]\s*\}')  # after a string, a number, true or null
    _CONTENT = re.compile(r'"Content"\s*:\s*"(.*)"\s*(?:\}|,\s*"(?:Start|End|Speaker)")', re.DOTALL)
    _SOUND = re.compile(r"\[[^\[\]]*\]")

    @staticmethod
    def write(utterances: Sequence[ParsedUtterance]) -> str:
        fields = [
            {
                "Start": round(each.start, 2),
                "End": round(each.end, 2),
                "Speaker": int((each.speaker or "S00")[1:]),
                "Content": each.text,
            }
            for each in utterances
        ]
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

    def _read(self) -> Iterator[ParsedUtterance | None]:
        while begin := self._BEGIN.search(self.tail):
            following = self._BEGIN.search(self.tail, begin.end())
            limit = following.start() if following else len(self.tail)
            for end in self._END.finditer(self.tail, begin.start(), limit):
                utterance = self._utterance(self.tail[begin.start() : end.end()])
                if utterance is not None:
                    self.tail = self.tail[end.end() :]
                    yield utterance
                    break
            else:
                if following is None:
                    return
                self.tail = self.tail[limit:]

    def _utterance(self, text: str) -> ParsedUtterance | None:
        try:
            fields = json.loads(text)
        except json.JSONDecodeError:
            content = self._CONTENT.search(text)
            if content is None:
                return None
            fields = {"Content": content[1].replace('\\"', '"').replace("\\n", " ")}
            rest = text[: content.start(1)] + text[content.end(1) :]
            for name in ("Start", "End", "Speaker"):
                if value := re.search(rf'"{name}"\s*:\s*"?([\d:.]+)', rest):
                    fields[name] = value[1]
        if not isinstance(fields.get("Content"), str):
            return None
        text = " ".join(fields["Content"].split())
        utterance = ParsedUtterance("" if self._SOUND.fullmatch(text) else text)
        try:
            times = [None if fields.get(name) is None else parse_time(fields[name]) for name in ("Start", "End")]
        except ValueError:
            times = [None, None]
        utterance.start, utterance.end = times
        if None not in times:
            utterance.end = max(times)
        if str(fields.get("Speaker", "")).isdigit():
            utterance.speaker = f"S{int(fields['Speaker']):02}"
        return utterance


class PlainParser(Parser):
    """Text without times, a sentence at a time; a frame (`language English<asr_text>`, quotes) is removed."""

    timed = False
    _SENTENCE = re.compile(r"[.?!…]+[\"'”’)]*\s+|[。？！]+")
    _FRAME = re.compile(
        r"\s*(?:language\s[^<]*<asr_text>"
        r"|The (?:spoken content|transcription|content) of the (?:input )?audio is[:\s]*)\s*",
        re.IGNORECASE,
    )
    _LONGEST_FRAME = 60  # characters

    @staticmethod
    def write(utterances: Sequence[ParsedUtterance]) -> str:
        return " ".join(each.text for each in utterances)

    def __init__(self) -> None:
        super().__init__()
        self._begun = False
        self._quote = ""  # the one that opens the whole answer

    def _read(self) -> Iterator[ParsedUtterance | None]:
        if not self._begun and not self._begin(final=False):
            return
        while sentence := self._SENTENCE.search(self.tail):
            yield self._take(sentence.end())

    def close(self) -> list[ParsedUtterance]:
        if not self._begun:
            self._begin(final=True)
        if self._quote:
            self.tail = re.sub(rf"{self._quote}\s*\.?\s*$", "", self.tail)
        utterances = [self._take(len(self.tail))] if self.tail.strip() else []
        self.tail = ""
        return utterances

    def _begin(self, final: bool) -> bool:
        """Remove the frame; False if more text is needed to tell."""
        frame = self._FRAME.match(self.tail)
        if frame is None:
            text = self.tail.lstrip().lower()
            may_follow = "the ".startswith(text[:4]) or "language ".startswith(text[:9])
            if may_follow and len(text) < self._LONGEST_FRAME and not final:
                return False
        elif not final and frame.end() == len(self.tail):
            return False
        else:
            self.tail = self.tail[frame.end() :]
            if self.tail[:1] in ("'", '"'):
                self._quote, self.tail = self.tail[0], self.tail[1:]
        self._begun = True
        return True

    def _take(self, end: int) -> ParsedUtterance:
        text, self.tail = self.tail[:end], self.tail[end:]
        return ParsedUtterance(" ".join(text.split()))


def parse_time(value: str | float) -> float:
    """Read seconds from 7.56, "7.56", "1:23" or "01:02:03". Raises ValueError for anything else."""
    return sum(float(part) * 60**power for power, part in enumerate(reversed(str(value).strip().split(":"))))
