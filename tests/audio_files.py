"""Recordings that tests make: tones in any container, and containers that lie about their length."""

import av
import numpy as np

TONE = 440.0  # Hz


def tone(seconds, rate, channels=1):
    """[channels, N] float32"""
    wave = 0.4 * np.sin(2 * np.pi * TONE * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[None], channels, axis=0).astype(np.float32)


def encode(
    path, samples, rate, codec, container=None, video_seconds=0.0, audio_offset=0.0, options=None, bit_rate=None
):
    """Write [channels, N] samples, with black video if asked for; audio_offset moves the audio's timestamps."""
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        layout = "stereo" if len(samples) == 2 else "mono"
        video = None
        if video_seconds:
            video = output.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        stream = output.add_stream(codec, rate=rate, layout=layout)
        stream.codec_context.options = {"strict": "experimental"}  # FFmpeg's own Vorbis
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        if video is not None:
            for _ in range(round(10 * video_seconds)):
                frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
                output.mux(video.encode(frame))
            output.mux(video.encode(None))
        size = rate // 10
        for first in range(0, samples.shape[1], size):
            piece = np.ascontiguousarray(samples[:, first : first + size])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
            frame.sample_rate = rate
            frame.pts = first + round(audio_offset * rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def encode_wav(path, samples, rate):
    return encode(path, samples, rate, "pcm_s16le")


def make_vbr_mp3(folder):
    """14 s of MP3 without a header that counts frames, first many bits a second, then few."""
    options = {"options": {"write_xing": "0", "id3v2_version": "0"}}
    parts = [
        encode(folder / f"{bits}.mp3", tone(7.0, 44100), 44100, "libmp3lame", bit_rate=bits, **options).read_bytes()
        for bits in (128_000, 32_000)
    ]
    path = folder / "vbr" / "talk.mp3"
    return write(path, b"".join(parts))


def make_chained_ogg(folder):
    """10 s and 4 s, one after the other in one file: the first link announces itself, or the last one."""
    parts = [encode(folder / f"{s}.ogg", tone(s, 48000, 2), 48000, "vorbis").read_bytes() for s in (10.0, 4.0)]
    return write(folder / "chained" / "talk.ogg", b"".join(parts))


def make_chained_opus(folder):
    parts = [encode(folder / f"{s}.opus", tone(s, 48000), 48000, "libopus").read_bytes() for s in (4.0, 10.0)]
    return write(folder / "chained" / "talk.opus", b"".join(parts))


def make_amr(folder):
    """14 s of frames of no speech, the first second at another bit rate: twice the real length is announced."""
    sizes = {0: 12, 7: 31}  # bytes of a frame of 20 ms, by mode
    frames = b"".join(bytes([mode << 3 | 4]) + bytes(sizes[mode]) for mode in [0] * 50 + [7] * 650)
    return write(folder / "talk.amr", b"#!AMR\n" + frames)


def make_amr_that_announces_less(folder):
    sizes = {0: 12, 7: 31}
    frames = b"".join(bytes([mode << 3 | 4]) + bytes(sizes[mode]) for mode in [7] * 350 + [0] * 350)
    return write(folder / "talk.amr", b"#!AMR\n" + frames)


def make_video_that_lasts_longer(folder):
    return encode(folder / "talk.mkv", tone(14.0, 48000), 48000, "aac", video_seconds=20.0)


def make_adts(folder):
    return encode(folder / "talk.aac", tone(14.0, 48000), 48000, "aac", container="adts")


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


CHANGING_LENGTHS = [  # each makes a recording of 14 s in a folder, whose container says something else, or may
    make_vbr_mp3,
    make_chained_ogg,
    make_chained_opus,
    make_amr,
    make_amr_that_announces_less,
    make_video_that_lasts_longer,
    make_adts,
]
