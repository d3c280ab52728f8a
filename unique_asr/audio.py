"""Any file that FFmpeg reads, as 16 kHz mono float32, in blocks: memory does not grow with the recording's length."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from unique_asr.channels import ChannelMixer
from unique_asr.duration import announced_duration, known_duration, measure_duration
from unique_asr.packets import PacketMeter
from unique_asr.remote import FetchLimits, RemoteCopy, RemoteError, fetch, is_uri, shown_name, to_path

SAMPLE_RATE = 16000  # Hz, after decoding
GAP_TOLERANCE = 0.2  # s; a longer hole between the timestamps of two frames is filled with silence
MAX_FILLED_GAP = 3600.0  # s; a longer hole is a broken timestamp, not a pause
TRUNCATION_TOLERANCE = 0.03  # share of the announced duration that may be missing: headers round and count silence

UNREAD_TOLERANCE = 0.05  # share of a file that may follow its last packet: tags
# These have tables beside the packets, of any size, and a header that announces the whole duration.
INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "asf")
MIN_REPLACED = 0.5  # s of one channel in the place of the mean of all that are worth a warning


class AudioError(ValueError):
    """A file that cannot be transcribed; the message is one line that names the file and says why."""


class AudioFile:
    """One audio or video file, opened and found to hold audio.

    Times are those of a player: audio that starts later than the video, or that has holes, is padded with silence.

    Args:
        path: a file, or a URI (https://..., s3://...), which is copied to a temporary file first.
        start, end: seconds between which the file is read.
        channel: 1 for the first (left) one; None for the mean of all, or one of them where they cancel each other out.
        track: 1 for the first audio track; None for the one that a player takes.
        name: what messages and transcripts call the file, if not its path.
        vad: put silence in the place of what is not speech, see `vad.py`.
        limits: how much is fetched of a URI, and how long that may take.
        progress: see `fetch`.

    Attributes:
        copy: of a URI; else None.
        warnings: one line each about what is damaged or missing; they come while `blocks` decodes.
        dropped: seconds that voice activity detection took for anything but speech.
        tracks: how many audio tracks there are.
        padded: seconds of silence that stand for what the file lacks, or for the time before its sound begins.

    Raises:
        AudioError: if it cannot be opened or holds no audio, or start, end, channel and track do not fit.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        start: float = 0.0,
        end: float | None = None,
        channel: int | None = None,
        name: str | None = None,
        vad: bool = False,
        limits: FetchLimits | None = None,
        progress: Callable[[str, float, float], None] | None = None,
        track: int | None = None,
    ) -> None:
        self.copy = _fetch(path, limits, progress) if is_uri(path) else None
        self.path = self.copy.path if self.copy else to_path(path)
        self.name = name or (shown_name(path) if self.copy else str(self.path))
        self.start, self.end, self.channel, self.vad, self.track = start, end, channel, vad, track
        self.dropped = self.padded = 0.0
        self.warnings: list[str] = []
        if vad:
            check_vad()
        check_part(start, end)
        for option, value in (("channel", channel), ("track", track)):
            if value is not None and (not isinstance(value, int | np.integer) or isinstance(value, bool)):
                raise AudioError(f"{option}={value}: give None, or a whole number from 1")
        measured = None
        with self._open() as container:
            stream = self._audio_stream(container)
            self._announced = announced_duration(container, stream)  # of the whole file, perhaps an estimate
            self._known = known_duration(self.path, container, stream)
            if start and (self._known is None or start >= self._known):
                measured = measure_duration(container, stream)
            channels = stream.codec_context.layout.nb_channels
            self.tracks = len(container.streams.audio)
            chosen = track is not None or self.tracks == 1
            self._notes = [] if chosen else [self._describe_choice(container.streams.audio, stream)]
        if channel is not None and not 1 <= channel <= (channels or channel):
            raise AudioError(f"{self.name}: has no channel={channel}, only 1 to {channels}; channel=mix takes all")
        if measured is not None:
            if start >= measured:
                raise AudioError(f"{self.name}: start={start:g}, but it ends after {measured:.1f} s")
            self._known = None  # it was wrong

    @property
    def duration(self) -> float | None:
        """Seconds between start and end; None if the container does not tell, or estimates, where the audio ends."""
        if self._known is None:
            return None
        return (self._known if self.end is None else min(self._known, self.end)) - self.start

    def blocks(self, seconds: float = 30.0) -> Iterator[np.ndarray]:
        """Decode from the start: yield float32 arrays [seconds * SAMPLE_RATE], the last one shorter.

        Damaged parts are skipped and noted in `warnings`.

        Raises:
            AudioError: if nothing at all decodes.
        """
        self.warnings, self.dropped, self.padded = list(self._notes), 0.0, 0.0
        yield from filter_speech(self._part(), seconds, self)

    def _part(self) -> Iterator[np.ndarray]:
        """Arrays of any length, between start and end."""
        decoded = 0
        first = round(self.start * SAMPLE_RATE)
        last = None if self.end is None else round(self.end * SAMPLE_RATE)
        for samples in self._samples():
            wanted = samples[max(first - decoded, 0) : None if last is None else max(last - decoded, 0)]
            decoded += len(samples)
            if len(wanted):
                yield wanted
            if last is not None and decoded >= last:
                break
        if not decoded:
            raise AudioError(f"{self.name}: no audio could be decoded; the file is damaged or holds no sound")
        if decoded <= first:
            raise AudioError(f"{self.name}: start={self.start:g}, but it ends after {decoded / SAMPLE_RATE:.1f} s")
        announced = self._known or 0.0
        missing = min(announced, self.end or announced) - decoded / SAMPLE_RATE
        if missing > max(1.0, TRUNCATION_TOLERANCE * announced):
            self.warnings.append(
                f"{self.name}: {decoded / SAMPLE_RATE:.1f} s decoded of the {announced:.1f} s that it announces; "
                "the file is truncated or damaged"
            )

    def _open(self) -> av.container.InputContainer:
        path, name = self.path, self.name
        try:
            if path.is_dir():
                raise AudioError(f"{name}: is a folder; name a file in it")
            if not path.exists():
                raise AudioError(f"{name}: no such file")
            if not path.is_file():
                raise AudioError(f"{name}: is not a regular file; save it to one first")
            if path.stat().st_size == 0:
                raise AudioError(f"{name}: the file is empty")
            # The prefix keeps FFmpeg from reading a name such as "a:b.mp3" as a protocol.
            return av.open(f"file:{path}", metadata_errors="replace")
        except (av.error.FFmpegError, UnicodeError) as error:
            if isinstance(error, av.error.PermissionError):
                raise AudioError(f"{name}: permission denied") from error
            raise AudioError(
                f"{name}: not audio or video that FFmpeg can read, or damaged beyond recognition ({_reason(error)})"
            ) from error
        except OSError as error:
            raise AudioError(f"{name}: {error.strerror or error}") from error

    def _audio_stream(self, container: av.container.InputContainer) -> av.AudioStream:
        tracks = container.streams.audio
        if tracks and self.track is not None and not 1 <= self.track <= len(tracks):
            raise AudioError(f"{self.name}: has no track={self.track}, only {list_tracks(tracks)}")
        stream = container.streams.best("audio") if self.track is None or not tracks else tracks[self.track - 1]
        if stream is None:
            kinds = sorted({stream.type for stream in container.streams})
            raise AudioError(f"{self.name}: has no audio stream" + (f" (only {', '.join(kinds)})" if kinds else ""))
        if stream.codec_context is None:
            raise AudioError(f"{self.name}: its audio codec is not supported by this FFmpeg")
        return stream

    def _describe_choice(self, tracks: Sequence[av.AudioStream], stream: av.AudioStream) -> str:
        """One line about which of several tracks is taken."""
        taken = 1 + [track.index for track in tracks].index(stream.index)
        return f"{self.name}: took audio track={taken} of {list_tracks(tracks)}"

    def _samples(self) -> Iterator[np.ndarray]:
        """Arrays of any length, resampled and mixed, holes filled."""
        with self._open() as container:
            stream = self._audio_stream(container)
            origin = (container.start_time or 0) / av.time_base  # s; where a player's clock starts
            resampler, setup, mixer = None, None, ChannelMixer(self.channel)
            position = 0  # samples yielded so far, without what the resampler still holds
            filled = 0  # samples of silence in holes
            lost = 0.0  # s that the clock of the frames does not know of
            for frame, skipped in self._frames(container, stream):
                lost += skipped
                layout = (frame.format.name, frame.layout.name, frame.sample_rate)
                if layout != setup:  # the first frame, or a stream that changes its sampling rate on the way
                    if resampler is not None:
                        for samples in _resample(resampler, None, mixer):
                            position += len(samples)
                            yield samples
                    resampler, setup = av.AudioResampler(format="fltp", rate=SAMPLE_RATE), layout
                start = frame.time - origin + lost if frame.time is not None else None
                frame.pts = None  # the resampler would measure its own delay against it
                if start is not None:
                    gap = start - position / SAMPLE_RATE
                    if GAP_TOLERANCE < gap < MAX_FILLED_GAP and (skipped > 0 or self._fits(start)):
                        for samples in _resample(resampler, None, mixer):
                            position += len(samples)
                            yield samples
                        resampler = av.AudioResampler(format="fltp", rate=SAMPLE_RATE)
                        silence = max(0, round(start * SAMPLE_RATE) - position)
                        self.padded += silence / SAMPLE_RATE
                        if position:  # audio that starts late is no damage
                            filled += silence
                        while (silence := min(round(start * SAMPLE_RATE) - position, SAMPLE_RATE)) > 0:
                            position += silence
                            yield np.zeros(silence, dtype=np.float32)
                for samples in _resample(resampler, frame, mixer):
                    position += len(samples)
                    yield samples
            if resampler is not None:
                yield from _resample(resampler, None, mixer)
            if filled:
                self.warnings.append(
                    f"{self.name}: {filled / SAMPLE_RATE:.1f} s are missing on the way; silence stands for them"
                )
            if mixer.replaced > MIN_REPLACED * SAMPLE_RATE:
                self.warnings.append(
                    f"{self.name}: its channels cancel each other out; took channel={mixer.stand_in} in place of their "
                    f"mean for {mixer.replaced / SAMPLE_RATE:.1f} s"
                )

    def _fits(self, time: float) -> bool:
        """Whether a frame may start at `time`: a damaged timestamp usually lies beyond the end."""
        return self._announced is not None and time <= self._announced

    def _frames(
        self, container: av.container.InputContainer, stream: av.AudioStream
    ) -> Iterator[tuple[av.AudioFrame, float]]:
        """Decoded frames, and the seconds before each that were lost and that its time does not count.

        A packet that does not decode is skipped, a container that breaks off ends the iteration.
        """
        damaged = read = place = length = 0
        meter = PacketMeter(container, stream)
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.error.FFmpegError as error:
                self.warnings.append(f"{self.name}: reading stopped early ({_reason(error)}); the rest is missing")
                break
            if packet.pos is not None:  # packets of an Ogg page are all said to begin where the page does
                length = packet.size + (length if packet.pos == place else 0)
                place = packet.pos
                read = max(read, place + length)
            try:
                frames, fails = packet.decode(), False
            except av.error.FFmpegError:
                frames, fails = [], True
            damaged += fails
            meter.add(packet, fails)
            for frame in frames:
                yield frame, meter.take_lost()
        unread = self.path.stat().st_size - read
        alone = len(container.streams) == 1 and container.format.name not in INDEXED_FORMATS
        if damaged and (early := meter.estimate_seconds(unread)) > GAP_TOLERANCE:
            self.warnings.append(
                f"{self.name}: about {early:.1f} s are missing at damaged places; later times are as much too early"
            )
        elif alone and read and unread > UNREAD_TOLERANCE * (read + unread):
            # Some containers announce a duration only as far as they can be read.
            self.warnings.append(
                f"{self.name}: the last {100 * unread / (read + unread):.0f} % of the file could not be read; "
                "it is truncated or damaged"
            )
        if damaged:
            self.warnings.append(f"{self.name}: {damaged} damaged packets skipped")


def _fetch(uri: str, limits: FetchLimits | None, progress: Callable[[str, float, float], None] | None) -> RemoteCopy:
    try:
        return fetch(uri, limits, progress)
    except RemoteError as error:
        raise AudioError(str(error)) from error


def filter_speech(stream: Iterable[np.ndarray], seconds: float, source: Any) -> Iterator[np.ndarray]:
    """Yield blocks of `seconds` from arrays of any length, through voice activity detection if `source.vad` is true.

    Args:
        source: of the samples; the seconds that detection drops are added to its `dropped`, a line to its `warnings`.
    """
    if not source.vad:
        yield from reblock(stream, seconds)
        return
    from unique_asr.vad import SpeechFilter

    speech, total = SpeechFilter(), 0
    for block in reblock(speech(stream), seconds):
        total += len(block)
        yield block
    source.dropped = speech.dropped / SAMPLE_RATE
    source.warnings.append(
        f"{source.name}: vad=true dropped {source.dropped:.1f} s of {total / SAMPLE_RATE:.1f} s as not speech"
    )


def reblock(stream: Iterable[np.ndarray], seconds: float) -> Iterator[np.ndarray]:
    """Yield arrays [seconds * SAMPLE_RATE] from arrays of any length; the last one is shorter."""
    size = max(1, round(seconds * SAMPLE_RATE))
    pending: list[np.ndarray] = []
    length = 0
    for samples in stream:
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


def spool_samples(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Return all samples [N], float32, mapped from a temporary file: they do not fill the memory.

    Raises:
        AudioError: if the disk of temporary files is full.
    """
    with explain_temporary_errors():
        file = tempfile.TemporaryFile()  # noqa: SIM115
    with file:
        for block in blocks:
            with explain_temporary_errors():
                file.write(block.astype(np.float32, copy=False).tobytes())
        with explain_temporary_errors():
            file.flush()
        size = file.tell() // np.dtype(np.float32).itemsize
        return np.memmap(file, np.float32, "c", shape=(size,)) if size else np.zeros(0, np.float32)


@contextmanager
def explain_temporary_errors() -> Iterator[None]:
    """Raise AudioError for an OSError of a temporary file: it names the folder, which is not that of transcripts."""
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or os.environ.get("TMPDIR", "the folder of temporary files")
        raise AudioError(
            f"{folder}: temporary files cannot be written there ({error.strerror or error}); free some space, or set "
            "TMPDIR=FOLDER"
        ) from error


def check_vad() -> None:
    """Raise AudioError if voice activity detection is not installed."""
    from unique_asr.vad import is_installed

    if not is_installed():
        raise AudioError("vad=true: needs the package silero-vad (pip install silero-vad); vad=false goes without")


def check_part(start: float, end: float | None) -> None:
    """Raise AudioError if start and end are no seconds, or there is nothing between them."""
    for name, value in (("start", start), ("end", end)):
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not (value is None and name == "end") and not (number and np.isfinite(value)):
            raise AudioError(f"{name}={value}: give seconds, a finite number")
    if start < 0 or (end is not None and end <= start):
        until = "null" if end is None else f"{end:g}"
        raise AudioError(f"start={start:g} end={until}: end has to lie after start, and start not below 0")


def parse_time(value: str | float | None) -> float | None:
    """Return the seconds that 83.5, "83.5", "1:23.5" or "0:01:23.5" mean; raise ValueError for what is not a time."""
    if value is None:
        return None
    parts = str(value).strip().split(":")
    if any(part.strip().startswith("-") for part in parts):  # -0 is not below 0
        parts = []
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or any(not 0 <= number < float("inf") for number in numbers):
        raise ValueError(f"{value} is not a time: give seconds, M:SS or H:MM:SS")
    return sum(number * 60**power for power, number in enumerate(reversed(numbers)))


def load_audio(path: str | PathLike[str]) -> np.ndarray:
    """Return a whole file as float32 samples [N] at SAMPLE_RATE: 3.8 MB a minute. Raises AudioError."""
    return np.concatenate(list(AudioFile(path).blocks()))


def list_tracks(tracks: Sequence[av.AudioStream]) -> str:
    """List the audio tracks of a file as `1 (ger, mono), 2 (eng, stereo, default)`."""
    listed = []
    for number, track in enumerate(tracks, start=1):
        about = [track.metadata.get("language"), track.metadata.get("title")]
        count = track.codec_context.layout.nb_channels if track.codec_context else None
        about.append({1: "mono", 2: "stereo", None: "codec not supported"}.get(count, f"{count} channels"))
        about.append("default" if track.disposition & Disposition.default else None)
        listed.append(f"{number} ({', '.join(each for each in about if each)})")
    return ", ".join(listed)


def _resample(resampler: av.AudioResampler, frame: av.AudioFrame | None, mixer: ChannelMixer) -> Iterator[np.ndarray]:
    """Resampled and mixed to one channel."""
    for resampled in resampler.resample(frame):
        channels = resampled.to_ndarray()  # [channels, samples]
        if channels.shape[1]:
            yield mixer.mix(channels)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
