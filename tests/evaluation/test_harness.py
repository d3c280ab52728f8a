"""The harness with a system whose answers are known."""

import pytest

from unique_asr.data import Recording, Utterance
from unique_asr.data import Span as FileSpan
from unique_asr.evaluation.decodings import Decodings
from unique_asr.evaluation.harness import evaluate
from unique_asr.evaluation.results import Hypothesis
from unique_asr.transcript import Segment, Word


class Parrot:
    """Repeats every text without its last word, the last recording first, and covers half of the audio."""

    name = "parrot"

    def transcribe(self, recordings):
        for index, recording in reversed(list(enumerate(recordings))):
            text = recording.text.rsplit(" ", 1)[0]
            sparsity = {"steps": 10, "sparse_steps": 4, "pages_read": 5, "pages_total": 20}
            yield index, Hypothesis(text, stop_reason="length", coverage=0.5, sparsity=sparsity, seconds=2.0)


class Span:
    def __init__(self, duration):
        self.duration = duration


@pytest.fixture
def recordings():
    return [
        Recording("x", (Span(10.0),), (Utterance(0.0, 10.0, "a house by the river"),)),
        Recording("y", (Span(30.0),), (Utterance(0.0, 30.0, "three old trees"),)),
    ]


def test_what_is_known_is_not_decoded(recordings):
    known = Hypothesis("a house by a river")
    result = evaluate(Parrot(), recordings, known={recordings[0]: known})
    assert [hypothesis.text for hypothesis in result.hypotheses] == [known.text, "three old"]
    assert [errors.edits for errors in result.errors] == [1, 1]


def test_decodings_keep_what_was_written_and_whose_times(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"sound")
    recording = Recording("a", (FileSpan(tmp_path / "a.wav", 0.0, 9.0),), (Utterance(0.0, 9.0, "a house"),))
    words = [Word("a", 0.5, 0.75, 0.5), Word("house", 0.75, 1.125)]
    hypothesis = Hypothesis("a house", longest=7, segments=[Segment(0, 0.5, 1.125, "a house", words, 0.5, "S1")])
    Decodings(tmp_path, {"system": "it"}).put(recording, hypothesis)
    assert Decodings(tmp_path, {"system": "it"}).get(recording) == hypothesis
    assert Decodings(tmp_path, {"system": "it"}, resume=False).get(recording) is None


def test_evaluate(recordings):
    seen = []
    result = evaluate(Parrot(), recordings, progress=lambda so_far: seen.append(len(so_far.hypotheses)))
    assert seen == [1, 2]
    summary = result.to_dict()
    assert summary["wer"] == summary["deletions"] == pytest.approx(2 / 8)
    assert summary["coverage"] == 0.5
    assert summary["rtfx"] == pytest.approx(40 / 4)
    assert (summary["sparse_steps"], summary["steps"], summary["share_of_pages_read"]) == (8, 20, 0.25)
    assert summary["stop_reasons"] == {"length": 2}
    first = result.make_row(0)
    assert (first["audio_filepath"], first["pred_text"], first["wer"]) == ("x", "a house by the", pytest.approx(0.2))
    line = str(result)
    assert "parrot" in line
    assert "WER 25.00%" in line
    assert "sparse steps 8/20, pages read 25.0%" in line
    assert "2 passes: length 2" in line
