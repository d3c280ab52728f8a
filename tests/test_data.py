"""Manifests and joins, on small audio files whose every sample is known."""

import itertools
import json

import numpy as np
import pytest
import soundfile

from unique_asr.data import SAMPLE_RATE, ManifestError, Span, join, read_audio, read_manifest, take_evenly


def write_manifest(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def chapters(tmp_path):
    """Two chapters of speaker a around one of speaker b; utterance n of a chapter lasts n + 1 seconds."""
    (tmp_path / "audio").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for name, speaker, count in (("a1", "a", 3), ("b1", "b", 2), ("a2", "a", 2)):
        edges = np.cumsum([0, *range(1, count + 1)]).tolist()
        samples = rng.uniform(-0.5, 0.5, edges[-1] * SAMPLE_RATE).astype(np.float32)
        soundfile.write(tmp_path / "audio" / f"{name}.wav", samples, SAMPLE_RATE, subtype="FLOAT")
        segments = [
            {"start": start, "end": end, "text": f"{name} number {n}"}
            for n, (start, end) in enumerate(itertools.pairwise(edges))
        ]
        rows.append(
            {
                "audio_filepath": f"audio/{name}.wav",
                "duration": edges[-1],
                "speaker": speaker,
                "source": "odd" if speaker == "b" else "even",
                "text": " ".join(segment["text"] for segment in segments),
                "segments": segments,
            }
        )
    return write_manifest(tmp_path / "chapters.jsonl", rows)


def test_rows_with_segments(chapters):
    first, second, third = read_manifest(chapters)
    assert (first.id, first.speaker, first.source, first.duration) == ("a1", "a", "even", 6.0)
    assert first.text == "a1 number 0 a1 number 1 a1 number 2"
    assert [(u.start, u.end) for u in first.utterances] == [(0, 1), (1, 3), (3, 6)]
    assert [second.id, third.id] == ["b1", "a2"]
    samples, _ = soundfile.read(chapters.parent / "audio" / "a1.wav", dtype="float32")
    np.testing.assert_array_equal(first.audio(), samples)
    assert first.audio().dtype == np.float32


def test_nemo_rows_share_a_file(chapters):
    rows = [
        {"audio_filepath": "audio/a1.wav", "offset": 1, "duration": 2, "text": "one"},
        {"audio_filepath": "audio/a1.wav", "offset": 4.5, "duration": 1.5, "text": "two"},
    ]
    recordings = read_manifest(write_manifest(chapters.parent / "nemo.jsonl", rows))
    samples, _ = soundfile.read(chapters.parent / "audio" / "a1.wav", dtype="float32")
    assert [r.id for r in recordings] == ["a1@1.00", "a1@4.50"]
    np.testing.assert_array_equal(recordings[1].audio(), samples[int(4.5 * SAMPLE_RATE) :])
    (joined,) = join(recordings, seconds=10)
    assert joined.duration == 3.5, "what lies between two rows has no transcript and stays out"
    assert [(u.start, u.end, u.text) for u in joined.utterances] == [(0, 2, "one"), (2, 3.5, "two")]


def test_entities_stay_with_their_recordings(chapters):
    rows = [json.loads(line) for line in chapters.read_text().splitlines()]
    for row, entities in zip(rows, (["a1"], ["b1", "number 1"], ["a2", "a1"])):
        row["entities"] = entities
    recordings = read_manifest(write_manifest(chapters, rows))
    assert [r.entities for r in recordings] == [("a1",), ("b1", "number 1"), ("a2", "a1")]
    assert [r.entities for r in join(recordings, 9, within="speaker")] == [("a1", "a2"), ("b1", "number 1")]
    del rows[0]["entities"]
    joined = join(read_manifest(write_manifest(chapters, rows)), 9, within="speaker")
    assert [r.entities for r in joined] == [None, ("b1", "number 1")], "a list that lacks a recording is no list"


def test_select_rows(chapters):
    assert [r.id for r in read_manifest(chapters, source="odd")] == ["b1"]
    assert [r.id for r in read_manifest(chapters, source=["odd", "even"], select="a*")] == ["a1", "a2"]
    with pytest.raises(ManifestError, match="sources are even, odd"):
        read_manifest(chapters, source="none")


@pytest.mark.parametrize("line", ["{", "[]", '{"duration": 1}', '{"audio_filepath": "x.wav"}'])
def test_a_broken_row_is_named(tmp_path, line):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"audio_filepath": "x.wav", "duration": 1, "text": ""}\n' + line + "\n")
    with pytest.raises(ManifestError, match=r"broken.jsonl, line 2"):
        read_manifest(path)


def test_missing_files(tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none.wav: no such audio file"):
        read_audio(tmp_path / "none.wav")


def test_join_within_recordings(chapters):
    joined = join(read_manifest(chapters), seconds=3)
    assert [(r.speaker, r.duration, r.text) for r in joined] == [
        ("a", 3, "a1 number 0 a1 number 1"),
        ("a", 3, "a1 number 2"),
        ("a", 3, "a2 number 0 a2 number 1"),
        ("b", 3, "b1 number 0 b1 number 1"),
    ]
    assert all(len(r.spans) == 1 for r in joined), "utterances that follow each other are read as one span"


def test_join_goes_on_with_the_speaker_then_with_the_next(chapters):
    recordings = read_manifest(chapters)
    assert [(r.speaker, r.duration) for r in join(recordings, 9, within="speaker")] == [("a", 9), ("b", 3)]
    assert [(r.speaker, r.duration) for r in join(recordings, 12, within="all")] == [("a,b", 12)]
    assert [r.source for r in join(recordings, 12, within="source")] == ["even", "odd"]
    with pytest.raises(ValueError, match="choose one of recording, speaker, source, all"):
        join(recordings, 12, within="chapter")


@pytest.mark.parametrize("seconds", [2, 4, 7, 100])
def test_joined_audio_times_and_texts_are_exact(chapters, seconds):
    recordings = {r.id: r for r in read_manifest(chapters)}
    source = {
        u.text: r.audio()[int(u.start * SAMPLE_RATE) : int(u.end * SAMPLE_RATE)]
        for r in recordings.values()
        for u in r.utterances
    }
    joined = join(list(recordings.values()), seconds, within="all")
    assert sum(r.duration for r in joined) == sum(r.duration for r in recordings.values())
    seen = []
    for recording in joined:
        samples = recording.audio()
        assert len(samples) == recording.duration * SAMPLE_RATE
        assert recording.duration <= seconds or len(recording.utterances) == 1
        for utterance in recording.utterances:
            start, end = (round(time * SAMPLE_RATE) for time in (utterance.start, utterance.end))
            np.testing.assert_array_equal(samples[start:end], source[utterance.text])
        seen += [u.text for u in recording.utterances]
    assert sorted(seen) == sorted(source)
    assert [r.id for r in joined] == [r.id for r in join(list(recordings.values()), seconds, within="all")]


def test_a_pause_between_utterances_stays(tmp_path):
    samples = np.arange(4 * SAMPLE_RATE, dtype=np.float32) / (4 * SAMPLE_RATE)
    soundfile.write(tmp_path / "x.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    segments = [{"start": 0.5, "end": 1, "text": "one"}, {"start": 3, "end": 3.5, "text": "two"}]
    row = {"audio_filepath": "x.wav", "duration": 4, "segments": segments}
    recordings = read_manifest(write_manifest(tmp_path / "x.jsonl", [row]))
    (joined,) = join(recordings, seconds=3)
    assert [(u.start, u.end) for u in joined.utterances] == [(0, 0.5), (2.5, 3)]
    np.testing.assert_array_equal(joined.audio(), samples[SAMPLE_RATE // 2 : int(3.5 * SAMPLE_RATE)])
    assert len(join(recordings, seconds=2.9)) == 2, "the pause counts"


def test_blocks_are_the_audio_in_parts(chapters):
    (recording,) = join(read_manifest(chapters), 12, within="all")
    blocks = list(recording.blocks(seconds=2.5))
    assert max(len(block) for block in blocks) == 2.5 * SAMPLE_RATE
    np.testing.assert_array_equal(np.concatenate(blocks), recording.audio())


def test_a_span_of_opus_lies_where_the_whole_file_has_it(tmp_path):
    time = np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE
    chirp = (0.5 * np.sin(2 * np.pi * (200 + 60 * time) * time)).astype(np.float32)
    soundfile.write(tmp_path / "x.opus", chirp, SAMPLE_RATE, format="OGG", subtype="OPUS")
    whole, part = read_audio(tmp_path / "x.opus"), Span(tmp_path / "x.opus", 11.3, 14.0).audio()
    np.testing.assert_allclose(part, whole[round(11.3 * SAMPLE_RATE) : 14 * SAMPLE_RATE], atol=0.02)


def test_stereo_becomes_mono(tmp_path):
    stereo = np.stack([np.full(800, 0.5), np.full(800, -0.25)], axis=1)
    soundfile.write(tmp_path / "x.wav", stereo, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "x.wav"), np.full(800, 0.125, dtype=np.float32))


def test_items_taken_evenly():
    assert take_evenly(range(10), 4) == [0, 2, 5, 7]
    assert take_evenly([1, 2], None) == take_evenly([1, 2], 5) == [1, 2]
