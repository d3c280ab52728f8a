"""Passes over words heard with scripted text: nothing that was heard is missing, whatever the LLM writes."""

from types import SimpleNamespace

import pytest
import torch

from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.heard_passes import HeardPassConfig, HeardPassRunner
from unique_asr.models.listening_llm import HeardPrompt, HeardSpeech, HeardWord

NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
SENTENCES = [f"This is the sentence of number {number} in a row." for number in NUMBERS.split()]
TEXT = " ".join(SENTENCES)


def hear(text, seconds=0.5):
    words = [
        HeardWord(f" {word}", index * seconds, (index + 0.9) * seconds, 0.9) for index, word in enumerate(text.split())
    ]
    return HeardSpeech(words, cuts=[len(words) * seconds / 2, len(words) * seconds])


class Script:
    """A sequence that writes what `answer` makes of the prompt's words."""

    def __init__(self, prompt, answer):
        self.prompt, self.answer, self.prompts = prompt, answer, []

    def reset(self):
        pass

    def prefill(self, embeds, progress=None):
        ids = embeds[0, :, 0].long().tolist()
        text = self.prompt.tokenizer.decode(ids).removeprefix("<|im_start|>").removesuffix("<reponame>")
        self.prompts.append(text.strip())

    def tokens(self, limit, stop_ids):
        self.log_probs = []
        for token in self.prompt.tokenize_answer(self.answer(len(self.prompts), self.prompts[-1]))[:limit]:
            self.log_probs.append(-0.1)
            yield token


@pytest.fixture
def transcribe(marked_tokenizer):
    prompt = HeardPrompt(marked_tokenizer())
    size = len(prompt.tokenizer)
    table = torch.nn.Embedding(size, 1)
    table.weight.data = torch.arange(size, dtype=torch.float32)[:, None]
    model = SimpleNamespace(config=SimpleNamespace(max_pass_seconds=3600.0), get_input_embeddings=lambda: table)
    processor = SimpleNamespace(prompt=prompt, tokenizer=prompt.tokenizer)

    def run(answer, heard=None, state=None, on_pass=None, **options):
        report, script = LongformReport(), Script(prompt, answer)
        runner = HeardPassRunner(model, processor, HeardPassConfig(**options))
        segments = list(runner.run(heard or hear(TEXT), script, report, state=state, on_pass=on_pass))
        return " ".join(segment.text for segment in segments), segments, report, script

    return run


def test_what_is_heard_is_one_pass_with_the_times_of_the_words_heard(transcribe):
    text, segments, report, script = transcribe(lambda number, heard: heard)
    assert text == TEXT
    assert [segment.text for segment in segments] == SENTENCES
    assert script.prompts == [TEXT]
    assert (report.passes, report.broken, report.stop_reason, report.coverage) == (1, 0, "end", 1.0)
    words = [word for segment in segments for word in segment.words]
    assert [word.start for word in words] == [word.start for word in hear(TEXT).words]


def test_a_long_recording_is_several_passes(transcribe):
    text, _, report, script = transcribe(lambda number, heard: heard, max_pass_seconds=32.0)
    assert (text, report.passes) == (TEXT, 2)
    assert " ".join(script.prompts) == TEXT


def test_a_loop_is_broken_off_and_the_next_pass_goes_on(transcribe):
    def answer(number, heard):
        return " ".join(SENTENCES[:3]) + " again and" * 60 if number == 1 else heard

    text, _, report, script = transcribe(answer)
    assert text == TEXT
    assert script.prompts[1] == " ".join(SENTENCES[3:])
    assert report.broken == 1
    assert "went on from there" in report.warnings[0]


def test_text_that_was_not_heard_is_dropped(transcribe):
    strange = " ".join(f"nobody{index}" for index in range(200))
    text, _, report, _ = transcribe(lambda number, heard: strange if number == 1 else heard)
    assert (text, report.passes, report.coverage) == (TEXT, 2, 1.0)


def test_where_the_llm_writes_nothing_the_words_are_those_heard(transcribe):
    text, _, report, _ = transcribe(lambda number, heard: "")
    assert text == TEXT
    assert report.coverage == 1.0
    assert any("as they were heard" in warning for warning in report.warnings)


def test_an_end_that_comes_too_early_is_mended(transcribe):
    text, _, report, _ = transcribe(lambda number, heard: heard[:200] if number == 1 else heard)
    assert text.count("sentence") == len(SENTENCES)
    assert report.passes == 2


def test_silence_is_an_empty_transcript(transcribe):
    text, _, report, script = transcribe(lambda number, heard: heard, HeardSpeech([], [10.0]))
    assert (text, report.stop_reason, report.coverage, script.prompts) == ("", "silence", 1.0, [])


def test_a_state_goes_on_where_it_was_made(transcribe):
    states = []
    text, *_ = transcribe(lambda number, heard: heard, max_pass_seconds=32.0, on_pass=states.append)
    rest, *_ = transcribe(lambda number, heard: heard, max_pass_seconds=32.0, state=states[1])
    assert text.endswith(rest)
    assert 0 < len(rest) < len(text)
    with pytest.raises(ValueError, match="not the one"):
        transcribe(lambda number, heard: heard, hear("another"), state=states[1])


def test_coverage_is_known_on_the_way(transcribe):
    """Of a transcription that is interrupted, too."""
    states = []
    transcribe(lambda number, heard: heard, max_pass_seconds=32.0, on_pass=states.append)
    assert [round(state["report"]["coverage"], 1) for state in states] == [0.0, 0.5]
