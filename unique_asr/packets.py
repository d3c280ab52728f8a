"""Time that is lost in damaged packets of formats that have no clock of their own."""

from __future__ import annotations

import av

# FFmpeg counts the packets of these to tell the time, and one that swallows a damaged stretch counts as one.
COUNTED_FORMATS = ("mp3", "aac", "ac3", "eac3")
LARGEST_FRAME = 4096  # bytes; AC-3 has frames of up to 3840. A larger packet holds more than one


class PacketMeter:
    """Counts the seconds that damaged packets of a stream stand for, beyond those that FFmpeg gives them.

    They are the bytes of a packet over the bytes a second of the packets that decode: exact where the bit rate is
    constant, else an estimate. For formats with a clock of their own there is nothing to count.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.AudioStream) -> None:
        self._counts = container.format.name in COUNTED_FORMATS
        self._bytes, self._seconds, self._lost = 0, 0.0, 0.0
        self._announced = (stream.bit_rate or 0) / 8  # bytes a second
        self._tag = 0  # bytes that are left of a tag: a file that is joined of two has one in its middle

    def add(self, packet: av.Packet, fails: bool) -> None:
        """Add the next packet; fails: it did not decode."""
        if not (self._counts and packet.size and packet.duration):
            return
        seconds, size = float(packet.duration * packet.time_base), packet.size
        in_tag = min(self._tag, size)
        self._tag -= in_tag
        if not fails and size <= LARGEST_FRAME:
            self._bytes += size
            self._seconds += seconds
            return
        if not in_tag and (place := bytes(packet).find(b"ID3")) >= 0:
            length = measure_tag(bytes(packet)[place:])
            in_tag = min(length, size - place)
            self._tag = length - in_tag
        surplus = self.estimate_seconds(size - in_tag) - seconds
        self._lost += surplus if in_tag else max(surplus, 0.0)

    def estimate_seconds(self, size: int) -> float:
        """Return about how many seconds of sound so many bytes hold; 0 for a format with a clock of its own."""
        rate = self._bytes / self._seconds if self._seconds else self._announced
        return size / rate if self._counts and rate else 0.0

    def take_lost(self) -> float:
        """Return the seconds that were lost since the last call; negative where FFmpeg took a tag for sound."""
        lost, self._lost = self._lost, 0.0
        return lost


def measure_tag(data: bytes) -> int:
    """Return the bytes of the ID3v2 tag with which data begins; 0 if it does not (https://id3.org/id3v2.4.0-structure)."""
    if len(data) < 10 or data[3] not in (2, 3, 4) or max(data[6:10]) > 127:
        return 0
    return 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9])
