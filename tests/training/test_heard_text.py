"""Rows for a ListeningLLM: copies, pairs, hotwords; files of pairs."""

import numpy as np
import pytest

from unique_asr.models.listening_llm import HeardPrompt, HeardWord
from unique_asr.training.heard_text import (
    HeardPart,
    HeardTextRowMaker,
    list_names,
    misspell,
    read_pairs,
    read_texts,
    write_pairs,
)
from unique_asr.training.stages import StageConfig

LINES = [f"He met {name} near the old mill." for name in ("Alexandra", "Bergson", "Ivar", "Signa", "Marie", "Oscar")]


def stage(**options):
    return StageConfig(name="s", steps=1, train={}, tokens=400, lengths=[400], **options)


def part(heard, said):
    return HeardPart(tuple(HeardWord(f" {word}", 0.0, 0.0) for word in heard.split()), said, 2.0)


@pytest.fixture
def prompt(marked_tokenizer):
    return HeardPrompt(marked_tokenizer())


def read(prompt, row):
    return prompt.tokenizer.decode(row.before), prompt.tokenizer.decode(row.answer)


def test_copies_are_what_is_heard_but_for_alternatives(prompt):
    maker = HeardTextRowMaker([LINES], [], prompt)
    for seed in range(20):
        row = maker.make_row(600, stage(), np.random.default_rng(seed))
        before, answer = read(prompt, row)
        assert len(row) <= 600
        if "<file_sep>" not in before:
            assert before.removeprefix("<|im_start|>").removesuffix("<reponame>") == answer.removesuffix("<|im_end|>")


def test_pairs_have_what_was_heard_before_and_what_was_said_after(prompt):
    recording = [part("He met Burgson", "He met Bergson"), part("near the mill.", "near the mill.")]
    maker = HeardTextRowMaker([], [recording], prompt)
    before, answer = read(prompt, maker.make_row(120, stage(), np.random.default_rng(3)))
    assert "<reponame>" in before
    assert "Burgson" not in answer
    assert answer.endswith("<|im_end|>")


def test_the_same_number_gives_the_same_row(prompt):
    maker = HeardTextRowMaker([LINES], [[part("a b", "a b")]], prompt)
    rows = [maker.make_row(300, stage(hotwords_share=0.5), np.random.default_rng(5)) for _ in range(2)]
    assert rows[0].before == rows[1].before
    assert rows[0].answer == rows[1].answer


def test_hotwords_are_spelled_rightly_in_the_answer_whatever_was_heard(prompt):
    maker = HeardTextRowMaker([LINES], [], prompt)
    misheard = 0
    for seed in range(30):
        before, answer = read(prompt, maker.make_row(600, stage(hotwords_share=1.0), np.random.default_rng(seed)))
        if "<repo_name>" not in before:
            continue
        names, heard = before.removeprefix("<|im_start|>").split("<repo_name>")
        for name in names.strip().split(", "):
            if name in answer and name not in heard:
                misheard += 1
    assert misheard > 5


def test_names_are_found_and_misspelled():
    assert list_names("The boy saw Alexandra. Then Carl's dog barked at Ivar") == ["Alexandra", "Carl", "Ivar"]
    words = {misspell("Bergson", np.random.default_rng(seed)) for seed in range(20)}
    assert len(words) > 3
    assert all(word[0] == "B" for word in words)


def test_pairs_are_read_as_they_were_written(tmp_path):
    recording = [HeardPart((HeardWord(" a", 0.0, 0.0, 0.5, " b", 1), HeardWord(" c", 0.0, 0.0, 1.0)), "A c.", 1.5)]
    write_pairs(tmp_path / "p.jsonl.gz", [("news", recording), ("noise", recording)])
    assert read_pairs([tmp_path / "p.jsonl.gz"], {"noise": 0, "news": 2}) == [recording, recording]


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone.jsonl.gz: no such pairs"):
        read_pairs([tmp_path / "gone.jsonl.gz"], {})
    (tmp_path / "text.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"text.txt: not a file of pairs"):
        read_pairs([tmp_path / "text.txt"], {})
    with pytest.raises(ValueError, match=r"text.txt: no text"):
        read_texts([tmp_path / "text.txt"])
    with pytest.raises(ValueError, match=r"no such text"):
        read_texts([tmp_path / "gone.txt"])
