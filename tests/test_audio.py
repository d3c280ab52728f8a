"""Decoding: every container gives the same tone at 16 kHz; every file that cannot be used says so in one line."""

import shutil
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from audio_files import CHANGING_LENGTHS, TONE, encode, encode_wav, make_vbr_mp3, tone
from av.stream import Disposition

from unique_asr.audio import SAMPLE_RATE, AudioError, AudioFile, load_audio, parse_time, spool_samples

DATA = Path(__file__).parent / "data"


def pitch(samples):
    """Hz of the strongest frequency."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * SAMPLE_RATE / len(samples)


@pytest.mark.parametrize(
    ("name", "codec", "rate", "channels"),
    [
        ("talk.wav", "pcm_s16le", 8000, 1),
        ("talk.wav", "pcm_s16le", 16000, 1),
        ("talk.wav", "pcm_s16le", 44100, 2),
        ("talk.wav", "pcm_s24le", 48000, 2),
        ("talk.flac", "flac", 44100, 2),
        ("talk.mp3", "libmp3lame", 44100, 2),
        ("talk.m4a", "aac", 44100, 2),
        ("talk.ogg", "vorbis", 48000, 2),
        ("talk.opus", "libopus", 48000, 1),
        ("talk.webm", "libopus", 48000, 2),
    ],
)
def test_formats(tmp_path, name, codec, rate, channels):
    path = encode(tmp_path / name, tone(2.0, rate, channels), rate, codec)
    audio = AudioFile(path)
    samples = load_audio(path)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) / SAMPLE_RATE == pytest.approx(2.0, abs=0.1)
    assert audio.duration == pytest.approx(2.0, abs=0.1)
    assert list(audio.blocks())
    assert audio.warnings == []
    assert pitch(samples[4000:-4000]) == pytest.approx(TONE, abs=2)
    assert np.abs(samples[4000:-4000]).max() == pytest.approx(0.4, abs=0.03)  # no channel count changes the level


def test_video(tmp_path):
    path = encode(tmp_path / "talk.mp4", tone(2.0, 44100, 2), 44100, "aac", video_seconds=2.0)
    samples = load_audio(path)
    assert len(samples) / SAMPLE_RATE == pytest.approx(2.0, abs=0.1)
    assert pitch(samples[4000:-4000]) == pytest.approx(TONE, abs=2)


def test_audio_that_starts_after_the_video_keeps_its_time(tmp_path):
    path = encode(tmp_path / "late.mkv", tone(1.0, 48000), 48000, "pcm_s16le", video_seconds=2.5, audio_offset=1.5)
    samples = load_audio(path)
    assert len(samples) / SAMPLE_RATE == pytest.approx(2.5, abs=0.1)
    assert not samples[: round(1.4 * SAMPLE_RATE)].any()
    assert pitch(samples[round(1.6 * SAMPLE_RATE) : round(2.4 * SAMPLE_RATE)]) == pytest.approx(TONE, abs=2)


def test_rate_that_changes_on_the_way(tmp_path):
    """Two MP3 files one after the other are one MP3 file."""
    first = encode(tmp_path / "first.mp3", tone(1.0, 44100, 2), 44100, "libmp3lame")
    second = encode(tmp_path / "second.mp3", tone(1.0, 22050), 22050, "libmp3lame")
    path = tmp_path / "both.mp3"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    samples = load_audio(path)
    assert len(samples) / SAMPLE_RATE == pytest.approx(2.0, abs=0.2)
    assert pitch(samples[-12000:-2000]) == pytest.approx(TONE, abs=3)


def test_blocks_are_equal_and_lose_nothing():
    path = DATA / "nomads.opus"
    blocks = list(AudioFile(path).blocks(seconds=2.0))
    assert [len(block) for block in blocks[:-1]] == [2 * SAMPLE_RATE] * (len(blocks) - 1)
    assert 0 < len(blocks[-1]) <= 2 * SAMPLE_RATE
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(path))


def test_blocks_can_be_read_twice():
    audio = AudioFile(DATA / "nomads.opus")
    np.testing.assert_array_equal(np.concatenate(list(audio.blocks())), np.concatenate(list(audio.blocks(1.0))))


def test_memory_is_bounded(tmp_path):
    """Ten minutes, 38 MB, never are more than a few blocks of 2 MB at a time."""
    path = encode_wav(tmp_path / "long.wav", np.zeros((1, 8000), np.float32), 8000)
    header, second = path.read_bytes()[:-16000], path.read_bytes()[-16000:]
    with path.open("wb") as file:  # a WAV file that is longer than its header says is read to its end
        file.write(header[:4] + (0xFFFFFFFF).to_bytes(4, "little") + header[8:-4] + (0xFFFFFFFF).to_bytes(4, "little"))
        for _ in range(600):
            file.write(second)
    tracemalloc.start()
    seconds = sum(len(block) for block in AudioFile(path).blocks()) / SAMPLE_RATE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds == pytest.approx(600, abs=1)
    assert peak < 12e6


@pytest.mark.parametrize("name", ["été (live), №1.wav", "a=b.wav", "a:b.wav", "50%d.wav", "it's.wav", "file:x.wav"])
def test_names_that_mean_something_to_ffmpeg(tmp_path, name):
    path = encode_wav(tmp_path / "plain.wav", tone(0.5, 16000), 16000).rename(tmp_path / name)
    assert len(load_audio(path)) == pytest.approx(8000, abs=100)


def test_relative_name_with_a_colon(tmp_path, monkeypatch):
    encode_wav(tmp_path / "plain.wav", tone(0.5, 16000), 16000).rename(tmp_path / "a:b.wav")
    monkeypatch.chdir(tmp_path)
    assert len(load_audio("a:b.wav")) == 8000


def test_silence_is_audio(tmp_path):
    samples = load_audio(encode_wav(tmp_path / "silence.wav", np.zeros((1, 16000), np.float32), 16000))
    assert len(samples) == 16000
    assert not samples.any()


@pytest.mark.parametrize(
    ("name", "codec"), [("talk.wav", "pcm_s16le"), ("talk.mp3", "libmp3lame"), ("talk.flac", "flac")]
)
def test_truncated_file_gives_what_is_there_and_a_warning(tmp_path, name, codec):
    path = encode(tmp_path / name, tone(20.0, 16000), 16000, codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    audio = AudioFile(path)
    seconds = sum(len(block) for block in audio.blocks()) / SAMPLE_RATE
    assert 5.0 < seconds < 15.0
    # The length of a headerless or plain PCM file is that of the file, so half a WAV file is a shorter WAV file.
    if audio.duration > 15.0:
        assert any("truncated" in warning for warning in audio.warnings)


@pytest.mark.parametrize(("name", "codec", "level"), [("talk.m4a", "aac", 0.0), ("talk.opus", "libopus", 0.1)])
def test_tables_and_big_pages_are_no_damage(tmp_path, name, codec, level):
    """An index larger than the sound of silence itself, and an Ogg page that holds the last tenth of a file."""
    samples = level * np.random.default_rng(0).standard_normal((1, 130_000), np.float32)
    audio = AudioFile(encode(tmp_path / name, samples, 48000, codec))
    assert sum(map(len, audio.blocks())) / SAMPLE_RATE == pytest.approx(2.7, abs=0.1)
    assert audio.warnings == []


def test_damaged_middle_is_skipped_with_a_warning(tmp_path):
    path = encode(
        tmp_path / "talk.flac", 0.1 * np.random.default_rng(0).standard_normal((1, 160000), np.float32), 16000, "flac"
    )
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20000] = bytes(20000)
    path.write_bytes(content)
    audio = AudioFile(path)
    seconds = sum(len(block) for block in audio.blocks()) / SAMPLE_RATE
    assert seconds > 4.0
    assert audio.warnings


def bad_missing(folder):
    return folder / "none.mp3", "no such file"


def bad_folder(folder):
    return folder, "is a folder"


def bad_empty(folder):
    (folder / "empty.wav").touch()
    return folder / "empty.wav", "is empty"


def bad_text(folder):
    (folder / "notes.mp3").write_text("not a recording at all\n" * 50)
    return folder / "notes.mp3", "not audio or video"


def bad_noise(folder):
    (folder / "noise.m4a").write_bytes(np.random.default_rng(0).bytes(50000))
    return folder / "noise.m4a", "noise.m4a: "


def bad_truncated_header(folder):
    """The index of an MP4 file lies at its end: half a download holds nothing that can be read."""
    path = encode(folder / "half.m4a", tone(2.0, 16000), 16000, "aac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path, "damaged"


def bad_header_only(folder):
    path = encode_wav(folder / "header.wav", tone(1.0, 16000), 16000)
    path.write_bytes(path.read_bytes()[:-32000])
    return path, "no audio could be decoded"


def bad_video_only(folder):
    path = folder / "silent.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(5):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    return path, "no audio stream (only video)"


@pytest.mark.parametrize(
    "make",
    [
        bad_missing,
        bad_folder,
        bad_empty,
        bad_text,
        bad_noise,
        bad_truncated_header,
        bad_header_only,
        bad_video_only,
    ],
)
def test_errors_are_one_line_that_names_the_file(tmp_path, make):
    path, reason = make(tmp_path)
    with pytest.raises(AudioError) as raised:
        load_audio(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("part", [{"start": float("nan")}, {"end": float("inf")}, {"start": "0:01"}])
def test_a_part_that_is_no_seconds(part):
    with pytest.raises(AudioError, match="give seconds, a finite number"):
        AudioFile(DATA / "nomads.opus", **part)


@pytest.mark.parametrize("option", ["channel", "track"])
def test_a_channel_or_track_that_is_no_number(option):
    with pytest.raises(AudioError, match=f"{option}=left: give None, or a whole number"):
        AudioFile(DATA / "nomads.opus", **{option: "left"})


def test_names_that_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "nomads.opus", "~tilde.opus")
    assert AudioFile("~tilde.opus").duration == pytest.approx(9.06, abs=0.02)
    with pytest.raises(AudioError, match="no such file"):
        AudioFile("~none.opus")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(DATA / "nomads.opus", tmp_path / "talk.opus")
    assert AudioFile("~/talk.opus").duration == pytest.approx(9.06, abs=0.02)


@pytest.mark.parametrize(("start", "end"), [(0.0, None), (1.5, None), (0.0, 2.25), (1.25, 3.5), (3.0, 60.0)])
def test_part_of_a_file(tmp_path, start, end):
    ramp = np.arange(5 * 16000, dtype=np.float32)[None] / 80000
    file = AudioFile(encode_wav(tmp_path / "a.wav", ramp, 16000), start, end)
    part = np.concatenate(list(file.blocks(1.0)))
    last = min(end or 5.0, 5.0)
    assert file.duration == pytest.approx(last - start)
    assert len(part) == round((last - start) * 16000)
    assert part == pytest.approx(ramp[0, round(start * 16000) : round(last * 16000)], abs=1e-4)
    assert file.warnings == []


@pytest.mark.parametrize(("channel", "level"), [(None, 0.3), (1, 0.4), (2, 0.2)])
def test_one_channel_or_the_mean(tmp_path, channel, level):
    samples = np.repeat(np.float32([[0.4], [0.2]]), 16000, axis=1)
    file = AudioFile(encode_wav(tmp_path / "a.wav", samples, 16000), channel=channel)
    assert np.concatenate(list(file.blocks())) == pytest.approx(level, abs=1e-3)


def encode_tracks(path, tracks):
    """Write a Matroska file of (language, samples [1, N] at 16 kHz, whether it is the default) tracks."""
    with av.open(str(path), "w") as output:
        streams = []
        for language, _, default in tracks:
            stream = output.add_stream("pcm_s16le", rate=16000, layout="mono")
            stream.metadata["language"] = language
            stream.disposition = Disposition.default if default else Disposition(0)
            streams.append(stream)
        for stream, (_, samples, _) in zip(streams, tracks, strict=True):
            frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    return path


@pytest.fixture
def two_tracks(tmp_path):
    low = np.full((1, 16000), 0.1, np.float32)
    return encode_tracks(tmp_path / "talk.mkv", [("ger", low, False), ("eng", 3 * low, True)])


@pytest.mark.parametrize(("track", "level"), [(None, 0.3), (1, 0.1), (2, 0.3)])
def test_one_of_several_tracks(two_tracks, track, level):
    file = AudioFile(two_tracks, track=track)
    assert np.concatenate(list(file.blocks())) == pytest.approx(level, abs=1e-3)
    listed = "1 (ger, mono), 2 (eng, mono, default)"
    said = [] if track else [f"{two_tracks}: took audio track=2 of {listed}"]
    assert [warning for warning in file.warnings if "track" in warning] == said
    assert file.tracks == 2


def test_a_wrong_track_lists_them(two_tracks):
    with pytest.raises(AudioError, match=r"has no track=3, only 1 \(ger, mono\), 2 \(eng, mono, default\)"):
        AudioFile(two_tracks, track=3)


@pytest.mark.parametrize("opposite", [-1.0, -0.8])
def test_channels_that_cancel_each_other_out_are_not_lost(tmp_path, opposite):
    left = tone(2.0, 16000)[0]
    file = AudioFile(encode_wav(tmp_path / "a.wav", np.stack([left, opposite * left]), 16000))
    assert np.concatenate(list(file.blocks())) == pytest.approx(left, abs=1e-3)
    assert file.warnings == [
        f"{tmp_path / 'a.wav'}: its channels cancel each other out; took channel=1 in place of their mean for 2.0 s"
    ]


def test_channels_with_other_sounds_are_mixed(tmp_path):
    """Two speakers with a channel each, one of whom is silent at first; and noise that is not the same in both."""
    samples = 0.1 * np.random.default_rng(0).standard_normal((2, 32000)).astype(np.float32)
    samples[1, :16000] = 0
    file = AudioFile(encode_wav(tmp_path / "a.wav", samples, 16000))
    assert np.concatenate(list(file.blocks())) == pytest.approx(samples.mean(0), abs=1e-3)
    assert file.warnings == []


def beeps(seconds, rate=48000):
    """Noise [1, N] with a beep of 1 kHz every two seconds."""
    samples = 0.05 * np.random.default_rng(0).standard_normal((1, seconds * rate)).astype(np.float32)
    beep = 0.6 * np.sin(2 * np.pi * 1000 * np.arange(rate // 10) / rate)
    for second in range(2, seconds, 2):
        samples[0, second * rate : second * rate + len(beep)] += beep
    return samples


def find_beeps(samples):
    wave = np.exp(-2j * np.pi * 1000 * np.arange(800) / SAMPLE_RATE)
    heard = [abs((samples[first : first + 800] * wave).mean()) > 0.12 for first in range(0, len(samples) - 800, 80)]
    return [index * 80 / SAMPLE_RATE for index in range(1, len(heard)) if heard[index] and not heard[index - 1]]


@pytest.mark.parametrize(("name", "codec"), [("a.mp3", "libmp3lame"), ("a.ac3", "ac3"), ("a.flac", "flac")])
def test_what_follows_a_damaged_place_keeps_its_time(tmp_path, name, codec):
    """Second 9 to 11 is damaged, and silence stands for it, also where the format has no clock."""
    path = encode(tmp_path / name, beeps(20), 48000, codec)
    content = bytearray(path.read_bytes())
    begin, length = int(0.45 * len(content)), len(content) // 10
    content[begin : begin + length] = bytes(length)
    path.write_bytes(content)
    file = AudioFile(path)
    samples = np.concatenate(list(file.blocks()))
    assert find_beeps(samples) == pytest.approx([2, 4, 6, 8, 12, 14, 16, 18], abs=0.1)
    assert file.padded == pytest.approx(2.0, abs=0.2)
    assert any("are missing on the way; silence stands for them" in warning for warning in file.warnings)


def test_where_lost_time_cannot_be_placed_the_warning_names_it(tmp_path):
    path = encode(tmp_path / "a.aac", beeps(20), 48000, "aac")
    content = bytearray(path.read_bytes())
    begin, length = int(0.45 * len(content)), len(content) // 10
    content[begin : begin + length] = bytes(length)
    path.write_bytes(content)
    file = AudioFile(path)
    assert len(np.concatenate(list(file.blocks()))) / SAMPLE_RATE == pytest.approx(18.0, abs=0.3)
    assert any(
        "about 2.0 s are missing at damaged places; later times are as much too early" in warning
        for warning in file.warnings
    )


def test_a_tag_in_the_middle_is_no_lost_time(tmp_path):
    """Two MP3 files of which the second one begins with a picture, one after the other."""
    part = encode(tmp_path / "part.mp3", beeps(8), 48000, "libmp3lame").read_bytes()
    size = 300_000
    tag = b"ID3\3\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    path = tmp_path / "both.mp3"
    path.write_bytes(part + tag + np.random.default_rng(0).bytes(size) + part)
    samples = load_audio(path)
    assert find_beeps(samples) == pytest.approx([2, 4, 6, 10, 12, 14], abs=0.1)


@pytest.mark.parametrize(
    ("value", "seconds"), [(None, None), (3, 3.0), ("83.5", 83.5), ("1:23.5", 83.5), ("1:00:03", 3603.0)]
)
def test_times(value, seconds):
    assert parse_time(value) == seconds


@pytest.mark.parametrize("value", ["", "soon", "1:2:3:4", "-5", "-0:05", "inf", "nan"])
def test_no_times(value):
    with pytest.raises(ValueError, match="not a time"):
        parse_time(value)


@pytest.mark.parametrize("make", CHANGING_LENGTHS, ids=lambda make: make.__name__)
def test_an_announced_length_that_is_not_that_of_the_audio(tmp_path, make):
    """An estimate is no duration: nothing is said to be missing, and any part can be asked for."""
    path = make(tmp_path)
    audio = AudioFile(path)
    seconds = sum(map(len, audio.blocks())) / SAMPLE_RATE
    assert seconds == pytest.approx(14.0, abs=0.2)
    assert audio.warnings == []
    assert audio.duration in (None, pytest.approx(seconds, abs=0.1))
    part = AudioFile(path, start=9.0)
    assert sum(map(len, part.blocks())) / SAMPLE_RATE == pytest.approx(5.0, abs=0.2)
    assert part.warnings == []
    with pytest.raises(AudioError, match=r"start=20, but it ends after 1[34]"):
        AudioFile(path, start=20.0)


@pytest.mark.parametrize(
    ("name", "codec", "known"),
    [
        ("talk.mp3", "libmp3lame", True),
        ("talk.ogg", "vorbis", True),
        ("talk.flv", "libmp3lame", True),
        ("talk.mka", "aac", True),
        ("talk.ts", "aac", True),
        ("talk.mp2", "mp2", False),
        ("talk.aac", "aac", False),
    ],
)
def test_which_containers_know_the_duration(tmp_path, name, codec, known):
    container = "adts" if name.endswith("aac") else None
    audio = AudioFile(encode(tmp_path / name, tone(3.0, 44100, 2), 44100, codec, container))
    assert audio.duration == (pytest.approx(3.0, abs=0.1) if known else None)


@pytest.mark.parametrize(("name", "codec"), [("talk.avi", "libmp3lame"), ("talk.mkv", "aac"), ("talk.mp4", "aac")])
@pytest.mark.parametrize("video_seconds", [2.0, 8.0])
def test_the_duration_is_that_of_the_audio_stream(tmp_path, name, codec, video_seconds):
    path = encode(tmp_path / name, tone(4.0, 48000), 48000, codec, video_seconds=video_seconds)
    audio = AudioFile(path)
    assert audio.duration == pytest.approx(4.0, abs=0.1)
    assert list(audio.blocks())
    assert audio.warnings == []


def test_a_truncated_file_of_known_duration_is_found_after_tags_too(tmp_path):
    path = encode(tmp_path / "talk.mp3", tone(20.0, 44100), 44100, "libmp3lame")
    content = path.read_bytes()
    tag = b"ID3\x04\0\0" + bytes([0, 0, 0x40, 0]) + bytes(0x2000)
    path.write_bytes(tag + content[: len(content) // 2])
    audio = AudioFile(path)
    assert audio.duration == pytest.approx(20.0, abs=0.2)
    list(audio.blocks())
    assert any("truncated" in warning for warning in audio.warnings)
    assert AudioFile(make_vbr_mp3(tmp_path)).duration is None


def test_a_full_disk_of_temporary_files(mount, monkeypatch):
    disk = mount("small", "size=16k")
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with pytest.raises(AudioError, match=rf"{disk}: temporary files cannot be written there .*TMPDIR=FOLDER"):
        spool_samples([np.zeros(SAMPLE_RATE, np.float32)] * 3)
    monkeypatch.setattr("tempfile.tempdir", str(disk / "none"))
    with pytest.raises(AudioError, match="temporary files cannot be written"):
        spool_samples([np.zeros(SAMPLE_RATE, np.float32)])
