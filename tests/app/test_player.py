"""What the page's player plays instead of a recording that a browser would play out of step."""

import av
import numpy as np
import pytest
from unique_asr.app.player import write_heard

from unique_asr.audio import AudioFile, load_audio


def write_late(path, seconds):
    """Write a Matroska file: a second of silence in track 1; a second of 0.3 in track 2, `seconds` later."""
    with av.open(str(path), "w") as output:
        other = output.add_stream("pcm_s16le", rate=16000, layout="mono")
        stream = output.add_stream("pcm_s16le", rate=16000, layout="mono")
        for track, level, begin in ((other, 0.0, 0.0), (stream, 0.3, seconds)):
            samples = np.full((1, 16000), round(level * 32767), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, round(begin * 16000)
            output.mux(track.encode(frame))
            output.mux(track.encode(None))
    return path


def test_a_late_track_is_played_as_it_was_heard(tmp_path):
    talk = write_late(tmp_path / "talk.mkv", 2.0)
    source = AudioFile(talk, track=2)
    heard = np.concatenate(list(source.blocks()))
    assert source.padded == pytest.approx(2.0, abs=0.05)
    assert abs(heard[:31000]).max() == 0
    write_heard(talk, 0.0, tmp_path / "heard.flac")  # two tracks: a browser may take the other one
    np.testing.assert_allclose(load_audio(tmp_path / "heard.flac"), load_audio(talk), atol=1e-4)
    assert not (tmp_path / "heard.part").exists()


@pytest.mark.parametrize(("padded", "written"), [(0.0, False), (1.0, True)])
def test_a_recording_without_holes_is_played_itself(tmp_path, padded, written):
    talk = tmp_path / "talk.wav"
    with av.open(str(talk), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 16000), 9000, np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    write_heard(talk, padded, tmp_path / "heard.flac")
    assert (tmp_path / "heard.flac").exists() is written


def test_what_cannot_be_read_is_not_written(tmp_path):
    write_heard(tmp_path / "gone.wav", 1.0, tmp_path / "heard.flac")
    assert not list(tmp_path.iterdir())
