"""The recipes that make training data and weights: what they compute, without the packages that they read."""

import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "recipes"))

import import_weights
import restore_case
import synthesize
import synthesize_kokoro


def test_case_and_punctuation_come_from_what_was_heard_and_words_never_do() -> None:
    words = ["mister", "lynde's", "brook", "ran", "past", "and", "i", "saw", "twenty", "of", "them", "he", "said", "so"]
    restored, matched = restore_case.restore_case(words, "Mr. Lind's brook ran past, and I saw 20 of them. He said so!")
    assert " ".join(restored) == "Mister Lynde's brook ran past, and I saw twenty of them. He said so!"
    assert [word for word, match in zip(words, matched, strict=True) if not match] == ["lynde's", "twenty"]


def test_a_misread_segment_matches_little() -> None:
    _, matched = restore_case.restore_case(["the", "cat", "sat", "on", "the", "mat"], "A dog stood by a door.")
    assert sum(matched) == 0


def test_windows_keep_every_segment_and_their_limit() -> None:
    segments = [{"start": 9.0 * i, "end": 9.0 * (i + 1)} for i in range(7)]
    groups = list(restore_case.group_windows(segments))
    assert [segment for group in groups for segment in group] == segments
    assert all(group[-1]["end"] - group[0]["start"] <= restore_case.WINDOW_SECONDS for group in groups)


def test_ctranslate2_variables_are_read_back() -> None:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    blob = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, 2)
    blob += string("encoder/num_heads") + struct.pack("<BBI", 0, 2, 2) + np.int16(8).tobytes()
    blob += string("encoder/conv1/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, 12) + values.tobytes()
    variables = import_weights.read_ctranslate2(blob)
    assert int(variables["encoder/num_heads"]) == 8
    assert np.array_equal(variables["encoder/conv1/weight"], values)


def test_a_source_without_the_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"\.gguf: found 0 times"):
        import_weights.collect_file([tmp_path], "*.gguf", tmp_path)


def test_pauses_change_no_word() -> None:
    text = "she knew that he would come when the rain had stopped and the road was dry because he said so"
    spoken = synthesize.add_pauses(text, random.Random(0))
    assert "," in spoken
    assert spoken.replace(",", "").removesuffix(".") == text


def test_pitch_is_paid_back_by_the_durations() -> None:
    manner = synthesize.Manner.draw(random.Random(0))
    assert manner.length_scale / manner.pitch == pytest.approx(1 / manner.tempo)


def test_kokoro_reads_diphthongs_as_one_symbol() -> None:
    assert synthesize_kokoro.convert_phonemes("aɪ nˈoʊ dʒˈɔɪ ˈɜːli") == "I nˈO ʤˈY ˈɜɹli"


def test_recordings_alternate_between_sources_and_keep_lines_together() -> None:
    rows = [{"source": source, "line": i} for source in ("a", "b") for i in range(6)]
    made = list(synthesize_kokoro.group_recordings(rows, 3, seed=0))
    assert [lines[0]["source"] for _, lines in made] == ["a", "b", "a", "b"]
    assert all(lines[-1]["line"] - lines[0]["line"] == 2 for _, lines in made)
