"""The recipes that make training data and weights: what they compute, without the packages that they read."""

import difflib
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unique_asr.models import SHIPPED_MODELS, SpeechLLMProcessor
from unique_asr.training.texts import Texts

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "recipes"))

import import_weights
import restore_case
import synthesize
import synthesize_kokoro
import teach_reading


def test_case_and_punctuation_come_from_what_was_heard_and_words_never_do() -> None:
    words = ["mister", "lynde's", "brook", "ran", "past", "and", "i", "saw", "twenty", "of", "them", "he", "said", "so"]
    restored, matched = restore_case.restore(words, "Mr. Lind's brook ran past, and I saw 20 of them. He said so!")
    assert " ".join(restored) == "Mister Lynde's brook ran past, and I saw twenty of them. He said so!"
    assert [word for word, match in zip(words, matched, strict=True) if not match] == ["lynde's", "twenty"]


def test_a_misread_segment_matches_little() -> None:
    _, matched = restore_case.restore(["the", "cat", "sat", "on", "the", "mat"], "A dog stood by a door.")
    assert sum(matched) == 0


def test_windows_keep_every_segment_and_their_limit() -> None:
    segments = [{"start": 9.0 * i, "end": 9.0 * (i + 1)} for i in range(7)]
    groups = list(restore_case.windows(segments))
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
        import_weights.collect_one([tmp_path], "*.gguf", tmp_path)


def test_pauses_change_no_word() -> None:
    text = "she knew that he would come when the rain had stopped and the road was dry because he said so"
    spoken = synthesize.with_pauses(text, random.Random(0))
    assert "," in spoken
    assert spoken.replace(",", "").removesuffix(".") == text


def test_pitch_is_paid_back_by_the_durations() -> None:
    manner = synthesize.Manner.draw(random.Random(0))
    assert manner.length_scale / manner.pitch == pytest.approx(1 / manner.tempo)


def test_kokoro_reads_diphthongs_as_one_symbol() -> None:
    assert synthesize_kokoro.kokoro_symbols("aɪ nˈoʊ dʒˈɔɪ ˈɜːli") == "I nˈO ʤˈY ˈɜɹli"


def test_recordings_alternate_between_sources_and_keep_lines_together() -> None:
    rows = [{"source": source, "line": i} for source in ("a", "b") for i in range(6)]
    made = list(synthesize_kokoro.recordings(rows, 3, seed=0))
    assert [lines[0]["source"] for _, lines in made] == ["a", "b", "a", "b"]
    assert all(lines[-1]["line"] - lines[0]["line"] == 2 for _, lines in made)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of a file of ten lines; the listener's tokens are those of the LLM."""
    processor = SpeechLLMProcessor.from_pretrained(SHIPPED_MODELS["default"].folder)
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("".join(f"line {word} of the text is read aloud\n" for word in "abcdefghij"))

    def tokens(text: str) -> list[int]:
        return processor.tokenizer(" " + text, add_special_tokens=False)["input_ids"]

    tokens.stop = len(processor.tokenizer)
    return teach_reading.Rows([Texts(file, tokens, weight=1.0)], [], processor, seed=0)


def test_rows_are_texts_that_were_heard_nearly_as_they_are(rows) -> None:
    decode, same, count = rows.processor.tokenizer.decode, 0, 0
    for _ in range(40):
        row = rows.row(400)
        answer = decode(row.answer[:-1]).split()
        heard = decode(row.candidates[torch.arange(len(row.weights)), row.weights.argmax(1)]).split()
        matcher = difflib.SequenceMatcher(None, [w.lower().strip(".") for w in answer],
                                          [w.lower().strip(".") for w in heard], False)  # fmt: skip
        same, count = same + sum(block.size for block in matcher.get_matching_blocks()), count + len(answer)
        assert row.answer[-1] == rows.processor.end_token_id
        assert row.weights.sum(1).allclose(torch.ones(len(row.weights)))
    assert same / count > 0.85


def test_a_batch_holds_positions_and_targets_in_their_places(rows) -> None:
    made = [rows.row(300), rows.row(300)]
    batch = teach_reading.collate(made, 400)
    for index, row in enumerate(made):
        ids = batch.ids[index, : len(row)].tolist()
        first, last = len(row.before), len(row.before) + len(row.candidates)
        assert ids[:first] + ids[last:] == row.before + row.after + row.written
        assert batch.decoded[index].nonzero().flatten().tolist() == list(range(len(row) - len(row.answer), len(row)))
        places = batch.heard[(batch.heard // 400) == index] - 400 * index
        assert places.tolist() == list(range(first, last))
    assert batch.targets.tolist() == made[0].answer + made[1].answer
    assert batch.ids.flatten()[batch.read + 1].tolist() == made[0].written + made[1].written


def test_the_llm_reads_slips_of_its_own_and_is_taught_what_is_right(rows) -> None:
    made = [rows.row(400) for _ in range(40)]
    slips = [sum(a != b for a, b in zip(row.written, row.answer, strict=True)) for row in made]
    assert slips.count(0) >= 10
    assert 0 < sum(slips) < 0.03 * sum(len(row.answer) for row in made)
