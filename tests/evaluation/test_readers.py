"""Every reader with a small file of its kind."""

import io
import sys

import numpy as np
import pytest
import soundfile

from unique_asr.data import SAMPLE_RATE, ManifestError, join
from unique_asr.evaluation.readers import read_recordings


def tone(path, seconds, rate=SAMPLE_RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.sin(np.arange(int(seconds * rate)) / 20).astype(np.float32) / 2
    soundfile.write(path, samples, rate, **options)
    return samples


def test_a_folder_of_audio_and_text(tmp_path):
    samples = tone(tmp_path / "b.wav", 2.0, subtype="FLOAT")
    tone(tmp_path / "a.opus", 3.0, format="OGG", subtype="OPUS")
    (tmp_path / "b.txt").write_text("\ufeffTwo  lines,\nof text.\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first")
    first, second = read_recordings(tmp_path)
    assert (first.id, first.text, first.duration) == ("a", "first", pytest.approx(3.0, abs=0.01))
    assert (second.id, second.text, second.duration) == ("b", "Two lines, of text.", 2.0)
    np.testing.assert_array_equal(second.audio(), samples)
    assert [r.id for r in read_recordings(tmp_path, select="b*")] == ["b"]
    assert [r.id for r in read_recordings(tmp_path / "a.txt")] == ["a"]


NLP = """token|speaker|ts|endTs|punctuation|case|tags|wer_tags
Good|0||||UC|[]|[]
morning|0||||LC|['5:TIME']|['5']
we’ll|1|||,|LC|['9:CONTRACTION']|['9']
see|1||||LC|[]|[]
the|1||||LC|['6:DATE']|['6']
first|1||||LC|['6:DATE']|['6']
quarter|1||||LC|['6:DATE']|['6']
2020|1|||.|CA|['0:YEAR']|['0', '1', '6']
"""


def test_nlp(tmp_path):
    tone(tmp_path / "media" / "4320211.mp3", 4.0, format="MP3")
    path = tmp_path / "nlp_references" / "4320211.nlp"
    path.parent.mkdir()
    path.write_text(NLP, encoding="utf-8")
    (recording,) = read_recordings(path)
    assert recording.text == "Good morning we’ll, see the first quarter 2020."
    assert recording.entities == ("morning", "the first quarter", "2020")
    assert [(u.start, u.end) for u in recording.utterances] == [(0.0, recording.duration)]
    assert [r.text for r in read_recordings(path.parent, audio=tmp_path / "media")] == [recording.text]


def test_nlp_with_times_has_a_turn_an_utterance(tmp_path):
    tone(tmp_path / "x.wav", 4.0)
    rows = ["token|speaker|ts|endTs|punctuation|case", "Hello|1|0.50|0.75|.|UC", "So|2|1.0|1.2||UC", "be|2|1.2|1.3||LC"]
    rows += ["it|2|1.3|1.5|.|LC"]
    (tmp_path / "x.nlp").write_text("\n".join(rows))
    (recording,) = read_recordings(tmp_path)
    assert [(u.start, u.end, u.text) for u in recording.utterances] == [(0.5, 0.75, "Hello."), (1.0, 1.5, "So be it.")]
    assert recording.entities is None


STM = """;; CATEGORY "0" "" ""
AimeeMullins_2009P AimeeMullins_2009P inter_segment_gap 0 1.5 <o,,unknown> ignore_time_segment_in_scoring
AimeeMullins_2009P 1 AimeeMullins 1.5 3.25 <o,f0,female> i 'd like to share <unk> with you
AimeeMullins_2009P 1 AimeeMullins 3.5 5 <o,f0,female> it 's a discovery
"""


def test_stm(tmp_path):
    tone(tmp_path / "sph" / "AimeeMullins_2009P.sph", 6.0, format="NIST", subtype="PCM_16")
    (tmp_path / "stm").mkdir()
    (tmp_path / "stm" / "AimeeMullins_2009P.stm").write_text(STM)
    (recording,) = read_recordings(tmp_path / "stm")
    assert recording.duration == 6.0
    assert recording.text == "i'd like to share with you it's a discovery"
    assert [(u.start, u.end) for u in recording.utterances] == [(1.5, 3.25), (3.5, 5.0)]
    assert recording.speaker == "AimeeMullins"
    (first, second) = join([recording], seconds=2)
    assert (first.duration, second.text) == (1.75, "it's a discovery")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.nlp", "a|b\n1|2\n", "not an .nlp file"),
        ("x.stm", "x 1 speaker zero 1 text\n", "line 1: not"),
        ("x.txt", "no audio", "data.audio=DIR"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message) as error:
        read_recordings(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    for source in (tmp_path, tmp_path / "none.stm", tmp_path / "none.jsonl", tmp_path / "none"):
        with pytest.raises(ManifestError, match=r"no \.nlp|no such"):
            read_recordings(source)


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_recordings("hf-audio/asr-leaderboard-longform:earnings21:test")


def test_a_data_set_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    from unique_asr.evaluation.readers import read_dataset

    sound = io.BytesIO()
    samples = np.sin(np.arange(SAMPLE_RATE) / 20).astype(np.float32) / 2
    soundfile.write(sound, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    stored = {"audio": [{"bytes": sound.getvalue(), "path": "call.wav"}], "text": ["Good  morning."], "other": [1]}
    parquet.write_table(pyarrow.table(stored), tmp_path / "test.parquet")
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "test.parquet"), split="train", cache_dir=tmp_path
    )
    (recording,) = read_dataset(rows, "owner/data", tmp_path)
    assert (recording.id, recording.text, recording.duration) == ("00000-call", "Good morning.", 1.0)
    np.testing.assert_array_equal(recording.audio(), samples)
    with pytest.raises(ManifestError, match="needs a column audio"):
        read_dataset(rows.remove_columns("audio"), "owner/data", tmp_path)
