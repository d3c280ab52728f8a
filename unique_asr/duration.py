"""How long an audio stream is, where its container knows: many announce an estimate, or another stream's length."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import av

# Headers of these give the length of each stream, or the time stamps at the file's end do.
EXACT_FORMATS = {
    *("mov,mp4,m4a,3gp,3g2,mj2", "avi", "wav", "w64", "aiff", "au", "caf", "flac", "wv", "ape", "tta"),
    *("mpegts", "mpeg"),
}
LONGEST_STREAM_FORMATS = {"matroska,webm", "asf", "flv"}  # these give that of their longest stream
VBR_HEADER_BYTES = 16384  # of an MP3 file without its tags, in which its VBR header lies
SAME_DURATION = 1.0  # s; two readings of one header differ by the encoder's delay


def announced_duration(container: av.container.InputContainer, stream: av.AudioStream) -> float | None:
    """Return the seconds that FFmpeg gives, from where a player's clock starts; they may be wrong. None: none."""
    if stream.duration and stream.time_base:
        start = (stream.start_time or 0) * stream.time_base
        return float(start - (container.start_time or 0) / av.time_base + stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def known_duration(path: Path, container: av.container.InputContainer, stream: av.AudioStream) -> float | None:
    """Return the seconds of an audio stream, from where a player's clock starts; None where FFmpeg only estimates them.

    An MP3 file without a VBR header, AAC and AMR without a container are estimates from the first bit rate. A chained
    Ogg file announces one of its links.
    """
    announced, kind = announced_duration(container, stream), container.format.name
    if announced is None or kind in EXACT_FORMATS:
        return announced
    if kind == "mp3":
        written = _read_vbr_header(path, stream.codec_context.sample_rate)
        return announced if written is not None and abs(written - announced) < SAME_DURATION else None
    if kind == "ogg":
        return None if _is_chained(path) else announced
    if kind in LONGEST_STREAM_FORMATS and container.duration:
        longest = container.duration / av.time_base
        tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
        if tag is not None:  # one that was copied from a longer file is no longer true
            return min(sum(float(part) * 60**power for power, part in enumerate(reversed(tag.groups()))), longest)
        return longest if len(container.streams) == 1 else None
    return None


def measure_duration(container: av.container.InputContainer, stream: av.AudioStream) -> float:
    """Return the seconds that the packets of an audio stream last: they are all read, none is decoded."""
    origin, last, total = (container.start_time or 0) / av.time_base, 0.0, 0.0
    try:
        for packet in container.demux(stream):
            length = float((packet.duration or 0) * packet.time_base)
            total += length  # in chained and joined files time begins anew
            if packet.pts is not None:
                last = max(last, float(packet.pts * packet.time_base) - origin + length)
    except av.error.FFmpegError:
        pass  # what cannot be read cannot be heard
    return max(last, total)


def _read_vbr_header(path: Path, rate: int) -> float | None:
    """The seconds that the header of an MP3 file (Xing, Info, VBRI) counts in frames; None without one."""
    with path.open("rb") as file:
        begin = 0
        while (tag := file.read(10))[:3] == b"ID3":
            size = sum(byte << shift for byte, shift in zip(tag[6:10], (21, 14, 7, 0), strict=True))
            begin += 10 + size + (10 if tag[5] & 0x10 else 0)
            file.seek(begin)
        file.seek(begin)
        head = file.read(VBR_HEADER_BYTES)
    for name, offset in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        place = head.find(name)
        if place < 0 or (name != b"VBRI" and not head[place + 7] & 1):
            continue
        frames = int.from_bytes(head[place + offset : place + offset + 4], "big")
        return frames * (1152 if rate >= 32000 else 576) / rate
    return None


def _is_chained(path: Path) -> bool:
    """Whether an Ogg file is several, one after the other: streams begin after others have gone on."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        goes_on = content.find(b"OggS\0\0")
        return goes_on >= 0 and content.find(b"OggS\0\x02", goes_on) >= 0
