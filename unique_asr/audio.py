"""Any file that FFmpeg reads, as 16 kHz mono float32, in blocks: memory does not grow with the recording's length."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import av
import numpy as np

SAMPLE_RATE = 16000  # Hz, after decoding
GAP_TOLERANCE = 0.2  # s; a longer hole between the timestamps of two frames is filled with silence
MAX_FILLED_GAP = 3600.0  # s; a longer hole is a broken timestamp, not a pause
TRUNCATION_TOLERANCE = 0.03  # share of the announced duration that may be missing: headers of MP3 files are estimates


class AudioError(ValueError):
    """A file that cannot be transcribed; the message is one line that names the file and says why."""


class AudioFile:
    """One audio or video file, opened and found to hold audio.

    `duration` is what the container announces, in seconds, or None; `warnings` fills while `blocks` decodes. Times are
    those of a player: audio that starts later than the video, or that has holes, is padded with silence.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.warnings: list[str] = []
        with self._open() as container:
            stream = self._audio_stream(container)
            self.duration = _duration(container, stream)

    def blocks(self, seconds: float = 30.0) -> Iterator[np.ndarray]:
        """Decode from the beginning; yields float32 arrays of `seconds` * SAMPLE_RATE samples, the last one shorter.

        Damaged parts are skipped and noted in `warnings`; AudioError is raised only if nothing at all decodes.
        """
        size = max(1, round(seconds * SAMPLE_RATE))
        self.warnings = []
        decoded = 0
        pending: list[np.ndarray] = []
        length = 0
        for samples in self._samples():
            decoded += len(samples)
            pending.append(samples)
            length += len(samples)
            if length < size:
                continue
            joined = np.concatenate(pending)
            full = len(joined) - len(joined) % size
            yield from joined[:full].reshape(-1, size)
            pending, length = [joined[full:]], len(joined) - full
        if length:
            yield np.concatenate(pending)
        if not decoded:
            raise AudioError(f"{self.path}: no audio could be decoded; the file is damaged or holds no sound")
        missing = (self.duration or 0.0) - decoded / SAMPLE_RATE
        if missing > max(1.0, TRUNCATION_TOLERANCE * (self.duration or 0.0)):
            self.warnings.append(
                f"{self.path}: {decoded / SAMPLE_RATE:.1f} s decoded of the {self.duration:.1f} s that it announces; "
                "the file is truncated or damaged"
            )

    def _open(self) -> av.container.InputContainer:
        path = self.path
        try:
            if path.is_dir():
                raise AudioError(f"{path}: is a folder; name a file in it")
            if not path.exists():
                raise AudioError(f"{path}: no such file")
            if not path.is_file():
                raise AudioError(f"{path}: is not a regular file; save it to one first")
            if path.stat().st_size == 0:
                raise AudioError(f"{path}: the file is empty")
            # The prefix keeps FFmpeg from reading a name such as "a:b.mp3" as a protocol.
            return av.open(f"file:{path}", metadata_errors="replace")
        except (av.error.FFmpegError, UnicodeError) as error:
            if isinstance(error, av.error.PermissionError):
                raise AudioError(f"{path}: permission denied") from error
            raise AudioError(
                f"{path}: not audio or video that FFmpeg can read, or damaged beyond recognition ({_reason(error)})"
            ) from error
        except OSError as error:
            raise AudioError(f"{path}: {error.strerror or error}") from error

    def _audio_stream(self, container: av.container.InputContainer) -> av.AudioStream:
        stream = container.streams.best("audio")
        if stream is None:
            kinds = sorted({stream.type for stream in container.streams})
            raise AudioError(f"{self.path}: has no audio stream" + (f" (only {', '.join(kinds)})" if kinds else ""))
        if stream.codec_context is None:
            raise AudioError(f"{self.path}: its audio codec is not supported by this FFmpeg")
        return stream

    def _samples(self) -> Iterator[np.ndarray]:
        """Arrays of any length, resampled and mixed, holes filled."""
        with self._open() as container:
            stream = self._audio_stream(container)
            origin = (container.start_time or 0) / av.time_base  # s; where a player's clock starts
            resampler, setup = None, None
            position = 0  # samples yielded so far, without what the resampler still holds
            filled = 0  # samples of silence in holes
            for frame in self._frames(container, stream):
                layout = (frame.format.name, frame.layout.name, frame.sample_rate)
                if layout != setup:  # the first frame, or a stream that changes its sampling rate on the way
                    if resampler is not None:
                        for samples in _resample(resampler, None):
                            position += len(samples)
                            yield samples
                    resampler, setup = av.AudioResampler(format="fltp", rate=SAMPLE_RATE), layout
                start = frame.time - origin if frame.time is not None else None
                frame.pts = None  # the resampler would measure its own delay against it
                if start is not None:
                    gap = start - position / SAMPLE_RATE
                    if GAP_TOLERANCE < gap < MAX_FILLED_GAP and self._fits(start):
                        for samples in _resample(resampler, None):
                            position += len(samples)
                            yield samples
                        resampler = av.AudioResampler(format="fltp", rate=SAMPLE_RATE)
                        if position:  # audio that starts late is no damage
                            filled += max(0, round(start * SAMPLE_RATE) - position)
                        while (silence := min(round(start * SAMPLE_RATE) - position, SAMPLE_RATE)) > 0:
                            position += silence
                            yield np.zeros(silence, dtype=np.float32)
                for samples in _resample(resampler, frame):
                    position += len(samples)
                    yield samples
            if resampler is not None:
                yield from _resample(resampler, None)
            if filled:
                self.warnings.append(
                    f"{self.path}: {filled / SAMPLE_RATE:.1f} s are missing on the way; silence stands for them"
                )

    def _fits(self, time: float) -> bool:
        """Whether a frame may start at `time`: a damaged timestamp usually lies beyond the end."""
        return self.duration is not None and time <= self.duration

    def _frames(self, container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
        """Decoded frames; a packet that does not decode is skipped, a container that breaks off ends the iteration."""
        damaged = 0
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.error.FFmpegError as error:
                self.warnings.append(f"{self.path}: reading stopped early ({_reason(error)}); the rest is missing")
                break
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                damaged += 1
        if damaged:
            self.warnings.append(f"{self.path}: {damaged} damaged packets skipped")


def load_audio(path: str | PathLike[str]) -> np.ndarray:
    """A whole file as one float32 array at SAMPLE_RATE: 3.8 MB a minute."""
    return np.concatenate(list(AudioFile(path).blocks()))


def _resample(resampler: av.AudioResampler, frame: av.AudioFrame | None) -> Iterator[np.ndarray]:
    """Resampled channels, averaged. FFmpeg's own mix to mono would raise the level of float audio by 3 dB."""
    for resampled in resampler.resample(frame):
        channels = resampled.to_ndarray()  # [channels, samples]
        if channels.shape[1]:
            yield np.nan_to_num(channels.mean(axis=0, dtype=np.float32), copy=False, posinf=0.0, neginf=0.0)


def _duration(container: av.container.InputContainer, stream: av.AudioStream) -> float | None:
    if stream.duration and stream.time_base:
        start = (stream.start_time or 0) * stream.time_base
        return float(start - (container.start_time or 0) / av.time_base + stream.duration * stream.time_base)
    if container.duration:
        return container.duration / av.time_base
    return None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
