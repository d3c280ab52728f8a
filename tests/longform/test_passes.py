"""Whole recordings with decoders that end early, loop, ramble and leave speech out."""

import random

import pytest
from simulated_speech import VOCABULARY, ScriptedDecoder, SimulatedRecording, said, sentences, timeline

from unique_asr.longform.configuration import LongformConfig
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.passes import PassRunner
from unique_asr.longform.segmentation import SegmentationConfig


def test_one_pass_of_a_faithful_decoder():
    recording = SimulatedRecording(timeline(sentences(12)))
    assert recording.transcribe() == recording.text
    assert recording.report.stop_reason == "end"
    assert recording.report.passes == 1
    assert recording.report.coverage > 0.99
    assert recording.report.warnings == []
    assert [segment.text[-1] for segment in recording.segments] == ["."] * 12
    for segment, index in zip(recording.segments, range(0, 96, 8), strict=True):
        assert segment.start == pytest.approx(recording.words[index][1], abs=0.2)
        assert segment.end == pytest.approx(recording.words[index + 7][2], abs=0.3)
        assert segment.confidence > 0.9


def test_segments_come_while_the_text_is_written():
    recording = SimulatedRecording(timeline(sentences(12)))
    decoder = ScriptedDecoder(recording.processor, lambda start, end: recording.text)
    runner = PassRunner(recording.model, recording.processor)
    segments = runner.run(recording.encoded, decoder, LongformReport())
    next(segments)
    assert len(decoder.log_probs) < 30


def test_unpunctuated_text_is_cut_at_pauses_and_before_it_is_too_long():
    words = timeline(sentences(10).lower().replace(".", ""), long={30: 2.0})
    recording = SimulatedRecording(words)
    assert recording.transcribe(segmentation=SegmentationConfig(max_segment_seconds=6.0)) == recording.text
    assert all(segment.end - segment.start <= 6 for segment in recording.segments)
    assert any(segment.words[-1].end == pytest.approx(words[30][2], abs=0.3) for segment in recording.segments)


def test_silence_gives_an_empty_transcript():
    recording = SimulatedRecording([], duration=20.0)
    assert recording.transcribe() == ""
    assert recording.report.stop_reason == "silence"
    assert recording.report.passes == 0


def test_one_word():
    recording = SimulatedRecording(timeline("Yes.", start=4.0), duration=10.0)
    assert recording.transcribe() == "Yes."
    assert recording.segments[0].start == pytest.approx(4.0, abs=0.2)
    assert recording.segments[0].end < 5


def test_long_recordings_are_cut_at_pauses():
    recording = SimulatedRecording(timeline(sentences(40), pause=0.8), max_pass_seconds=40.0)
    assert recording.transcribe() == recording.text
    assert recording.report.passes <= 5
    assert all(end - start <= 40.5 for start, end in recording.decoder.passes)
    assert recording.report.warnings == []


def test_decoding_goes_on_after_an_early_stop():
    recording = SimulatedRecording(timeline(sentences(30)))

    def stops_early(start, end, text):
        return " ".join(text.split()[: 12 * 8])

    assert recording.transcribe(stops_early) == recording.text
    assert recording.report.passes == 3
    assert recording.report.stop_reason == "end"
    assert recording.report.coverage > 0.99
    assert len(recording.report.warnings) == 2
    assert "ended before the speech" in recording.report.warnings[0]


def test_a_loop_is_stopped_and_decoding_goes_on():
    recording = SimulatedRecording(timeline(sentences(30)))

    def loops_once(start, end, text):
        if start > 5:
            return text
        return " ".join(text.split()[: 10 * 8]) + " Yes." * 300

    assert recording.transcribe(loops_once) == recording.text
    assert recording.report.passes == 2
    assert "repeat" in recording.report.warnings[0]
    assert len(recording.decoder.log_probs) < 400


def test_a_looped_sentence_is_kept_once():
    recording = SimulatedRecording(timeline(sentences(20)))

    def loops_once(start, end, text):
        kept = text.split()[: 10 * 8]
        return " ".join(kept + kept[-8:] * 50) if start < 5 else text

    assert recording.transcribe(loops_once) == recording.text


def test_a_loop_at_the_end_of_the_speech():
    recording = SimulatedRecording(timeline(sentences(6)), duration=60.0)
    assert recording.transcribe(lambda start, end, text: text + " Bye." * 300) == recording.text
    assert recording.report.stop_reason == "loop"
    assert len(recording.report.warnings) == 1


@pytest.mark.parametrize("said_again", ["No, no. " * 40, "la " * 60, "We will rock you now. " * 12])
def test_repetition_that_was_said_is_no_loop(said_again):
    recording = SimulatedRecording(timeline(sentences(4) + " " + said_again + sentences(4, seed=1)))
    assert recording.transcribe() == recording.text
    assert recording.report.passes == 1
    assert recording.report.stop_reason == "end"


def test_left_out_speech_is_gone_back_to():
    recording = SimulatedRecording(timeline(sentences(30)))

    def leaves_out(start, end, text):
        words = text.split()
        return " ".join(words[: 8 * 8] + words[18 * 8 :]) if start < 5 else text

    assert recording.transcribe(leaves_out) == recording.text
    assert recording.report.passes == 2
    assert "left out" in recording.report.warnings[0]


def test_speech_that_no_pass_writes_down_is_accepted_as_a_gap():
    recording = SimulatedRecording(timeline(sentences(30)))
    kept = recording.words[: 8 * 8] + recording.words[18 * 8 :]
    assert recording.transcribe(lambda start, end, text: said(kept, start, end)) == " ".join(word for word, *_ in kept)
    assert recording.report.coverage == pytest.approx(2 / 3, abs=0.03)
    assert any("coverage" in warning for warning in recording.report.warnings)


def test_a_text_that_was_not_said_here_is_broken_off():
    recording = SimulatedRecording(timeline(sentences(60)))
    unsaid = [f"Unsaid{index}." for index in range(100)]

    def goes_astray(start, end, text):
        words = text.split()
        return " ".join(words[: 30 * 8] + unsaid + words[50 * 8 :]) if start < 5 else text

    assert recording.transcribe(goes_astray) == recording.text
    assert recording.report.passes == 2
    assert "not what was said" in recording.report.warnings[0]


def test_a_place_is_gone_back_to_twice_the_second_time_with_less_audio():
    recording = SimulatedRecording(timeline(sentences(60)))
    recording.transcribe(lambda start, end, text: " ".join(text.split()[: 8 * 8] + text.split()[18 * 8 :]))
    lengths = [end - start for start, end in recording.decoder.passes]
    assert lengths[0] > 100
    assert any(length < 31 for length in lengths)
    assert recording.report.coverage > 0.8


def test_a_hallucinated_sentence_after_the_speech_is_dropped():
    recording = SimulatedRecording(timeline(sentences(6)), duration=40.0)
    assert recording.transcribe(lambda *span: span[2] + " Thank you so much for watching this video.") == recording.text
    assert "Thank you" in recording.report.warnings[0]


def test_words_that_the_ctc_head_misheard_keep_their_place():
    recording = SimulatedRecording(timeline(sentences(3)))
    words = recording.text.split()
    changed = words[:8] + ["Misheard", *(word[::-1] for word in words[9:15]), "too."] + words[16:]
    assert recording.transcribe(lambda *span: " ".join(changed)) == " ".join(changed)
    assert recording.segments[1].start == pytest.approx(recording.words[8][1], abs=0.3)
    assert recording.segments[1].confidence < 0.7
    assert recording.segments[2].start == pytest.approx(recording.words[16][1], abs=0.2)


@pytest.mark.parametrize("miss", [0.15, 0.35])
def test_a_poor_ctc_head(miss):
    recording = SimulatedRecording(timeline(sentences(30)), miss=miss)
    assert recording.transcribe() == recording.text
    assert recording.report.passes == 1
    assert recording.report.coverage > 0.95


@pytest.mark.parametrize("text", ["", "Nothing of this was ever said by anybody. " * 40, "Yes. " * 500, "!" * 900])
def test_a_useless_decoder_comes_to_an_end(text):
    recording = SimulatedRecording(timeline(sentences(30)))
    recording.transcribe(lambda start, end, said: text)
    assert recording.report.passes < 40
    assert len(recording.decoder.log_probs) < 350
    assert any("skipped" in warning for warning in recording.report.warnings)


def test_a_stuck_spot_is_skipped_and_the_rest_transcribed():
    recording = SimulatedRecording(timeline(sentences(30)))

    def stuck(start, end, text):
        return " ".join(text.split()[:40]) if start < 1 else "" if start < 20 else text

    text = recording.transcribe(stuck)
    assert text.startswith(" ".join(recording.text.split()[:40]))
    assert text.endswith(" ".join(recording.text.split()[80:]))
    assert any("skipped" in warning for warning in recording.report.warnings)


def test_the_token_budget_bounds_a_pass():
    recording = SimulatedRecording(timeline(sentences(10)))
    rambling = " ".join(random.Random(1).choices(VOCABULARY, k=5000))
    recording.transcribe(
        lambda start, end, text: text + " " + rambling, LongformConfig(tokens_a_second=4, spare_tokens=10)
    )
    assert recording.report.stop_reason == "length"
    assert len(recording.decoder.log_probs) < 400
    assert any("token budget" in warning for warning in recording.report.warnings)
