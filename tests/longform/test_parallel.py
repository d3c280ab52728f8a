"""Passes over one recording side by side: their text is that of one after the other, and comes in its order."""

import json
import random

import numpy as np
import pytest
from simulated_speech import ScriptedDecoder, SimulatedRecording, describe, noise, said, sentences, timeline

from unique_asr.attention import SparseAttentionConfig
from unique_asr.decoding.engine import PENDING
from unique_asr.longform.configuration import LongformConfig
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.parallel import ParallelPassRunner
from unique_asr.longform.passes import PassRunner
from unique_asr.transcribers.base import PipelineError
from unique_asr.transcribers.batch import transcribe_side_by_side
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber
from unique_asr.transcript import Unfinished

CONFIG = LongformConfig(max_pass_seconds=3.0, retry_seconds=1.0, skip_seconds=1.0, min_progress_seconds=0.1)


class HesitantDecoder(ScriptedDecoder):
    """Has its tokens after some steps of an engine that is not there."""

    def __init__(self, processor, script, seed):
        super().__init__(processor, script)
        self.random = random.Random(seed)

    def tokens(self, max_new_tokens, stop_ids):
        for token in super().tokens(max_new_tokens, stop_ids):
            for _ in range(self.random.randrange(3)):
                yield PENDING
            yield token


def transcribe(recording, decoders, script=None, state=None, on_pass=None, progress=None):
    """Segments, report and decoders; `script` as for `SimulatedRecording.transcribe`."""

    def write(start, end):
        text = said(recording.words, start, end)
        return script(start, end, text) if script else text

    report = LongformReport()
    sequences = [HesitantDecoder(recording.processor, write, seed) for seed in range(decoders)]
    runner = ParallelPassRunner(recording.model, recording.processor)
    found = list(runner.run(recording.encoded, sequences, report, progress, state, on_pass))
    segments = [segment for segment in found if segment is not PENDING]
    times = [time for segment in segments for word in segment.words for time in (word.start, word.end)]
    assert times == sorted(times)
    first = state["report"]["segments"] if state else 0
    assert [segment.id for segment in segments] == list(range(first, first + len(segments)))
    return segments, report, sequences, len(found) - len(segments)


def text_of(segments):
    return " ".join(segment.text for segment in segments)


@pytest.fixture
def recording():
    return SimulatedRecording(timeline(sentences(60), pause=0.8), max_pass_seconds=40.0)


@pytest.mark.parametrize("decoders", [1, 3, 20])
def test_the_segments_are_those_of_one_pass_after_the_other(recording, decoders):
    assert recording.transcribe() == recording.text
    segments, report, sequences, waits = transcribe(recording, decoders)
    assert [(each.text, each.start, each.end) for each in segments] == [
        (each.text, each.start, each.end) for each in recording.segments
    ]
    assert waits > 0
    assert report.passes == recording.report.passes == sum(len(sequence.passes) for sequence in sequences) > 4
    assert sum(bool(sequence.passes) for sequence in sequences) == min(decoders, report.passes)
    assert (report.stop_reason, report.warnings, report.coverage) == ("end", [], recording.report.coverage)
    assert report.longest == recording.report.longest


def test_steps_are_shared(recording):
    """The batch makes far fewer steps than the passes have tokens."""
    alone = transcribe(recording, 1)[3]
    assert transcribe(recording, 20)[3] < alone / 3


class Astray:
    """The first pass over a section ends early, loops or leaves speech out; those after it are faithful."""

    def __init__(self):
        self.begun = set()

    def __call__(self, start, end, text):
        section = int(end)
        if section in self.begun or end - start < 15:
            return text
        self.begun.add(section)
        words = text.split()
        ways = [words[:30], words[:40] + ["Yes."] * 300, words[:16] + words[64:]]
        return " ".join(ways[len(self.begun) % 3])


def test_a_pass_that_breaks_is_made_up_for_within_its_section(recording):
    segments, report, sequences, _ = transcribe(recording, 4, Astray())
    assert text_of(segments) == recording.text
    assert report.broken == len(report.warnings) > 2
    assert report.coverage > 0.99
    seconds = [60 * int(warning.split(":")[0]) + int(warning.split(":")[1]) for warning in report.warnings]
    assert seconds == sorted(seconds)
    assert report.passes == sum(len(sequence.passes) for sequence in sequences)


def test_what_is_skipped_or_dropped_is_told_as_ever(recording):
    """The text of 50 to 70 s cannot be had, and the recording's last words were never said."""

    def useless(start, end, text):
        return "" if 50 < start < 70 else text + " Thank you so much for watching this video." * (end > 200)

    segments, report, _, _ = transcribe(recording, 4, useless)
    assert any("skipped" in warning for warning in report.warnings)
    assert any("Thank you" in warning or "after the last word" in warning for warning in report.warnings)
    assert 0.8 < report.coverage < 1
    assert set(text_of(segments).split()) <= set(recording.text.split())


def ends_early(start, end, text):
    return " ".join(text.split()[:30])


@pytest.mark.parametrize("script", [None, ends_early])
@pytest.mark.parametrize("decoders", [3, 20])
def test_every_state_can_be_gone_on_with(recording, script, decoders):
    states = []
    whole, report, _, _ = transcribe(
        recording, decoders, script, on_pass=lambda state: states.append(json.loads(json.dumps(state)))
    )
    assert (report.broken > 0) is (script is not None)
    starts = [state["start"] for state in states]
    assert starts == sorted(set(starts))
    assert len(states) > 4
    for state in states:
        rest, again = transcribe(recording, 2, script, state)[:2]
        assert whole[: state["report"]["segments"]] + rest == whole
        assert (again.passes, again.warnings, again.coverage) == (report.passes, report.warnings, report.coverage)


def test_either_way_goes_on_with_what_the_other_left(recording):
    whole, *_ = transcribe(recording, 3)
    states = []
    transcribe(recording, 3, on_pass=states.append)
    decoder = ScriptedDecoder(recording.processor, lambda start, end: said(recording.words, start, end))
    runner = PassRunner(recording.model, recording.processor)
    rest = runner.run(recording.encoded, decoder, LongformReport(), None, states[3])
    assert whole[: states[3]["report"]["segments"]] + list(rest) == whole

    states = []
    segments = runner.run(recording.encoded, decoder, LongformReport(), None, None, states.append)
    assert list(segments) == whole
    rest, *_ = transcribe(recording, 3, state=states[3])
    assert whole[: states[3]["report"]["segments"]] + rest == whole


def test_progress_never_goes_back(recording):
    seconds = []
    transcribe(recording, 4, progress=lambda stage, done, total: seconds.append(done) if stage == "decode" else None)
    assert seconds == sorted(seconds)
    assert seconds[-1] == recording.encoded.duration
    assert len(seconds) > 20


def test_silence_and_a_recording_with_speech_in_one_part_only():
    silent = SimulatedRecording([], duration=100.0, max_pass_seconds=40.0)
    segments, report, *_ = transcribe(silent, 4)
    assert (segments, report.stop_reason, report.passes) == ([], "silence", 0)
    late = SimulatedRecording(timeline(sentences(3), start=150.0), duration=300.0, max_pass_seconds=40.0)
    segments, report, *_ = transcribe(late, 4)
    assert text_of(segments) == late.text
    assert report.stop_reason == "end"


@pytest.mark.parametrize("attention", ["dense", "unique"])
def test_random_weights(tiny, attention):
    """However many run at a time. Sparse steps may write something else, as padding shifts pages."""

    def result(count):
        transcriber = SpeechLLMTranscriber(tiny, attention=attention, budget=32, longform=CONFIG, parallel_passes=count)
        ((_, transcript),) = transcribe_side_by_side(transcriber, [noise(20)], 1)
        assert transcript.info.sparsity["steps"] > 0
        assert (transcript.info.sparsity["sparse_steps"] > 0) is (attention == "unique")
        assert all(transcript.info.timings[stage] > 0 for stage in ("encode", "prefill", "decode"))
        assert transcript.info.passes > 5
        return describe(transcript)

    first, second = result(3), result(8)
    assert attention == "unique" or first == second


def test_a_recording_of_one_pass_and_recordings_transcribe_side_by_side_go_as_before(tiny, monkeypatch):
    monkeypatch.setattr(
        "unique_asr.transcribers.speech_llm.ParallelPassRunner", lambda *_: pytest.fail("passes side by side")
    )
    transcriber = SpeechLLMTranscriber(tiny, longform=CONFIG)
    segments, info = transcriber.transcribe(noise(2))
    list(segments)
    assert info.passes > 0
    assert len(list(transcribe_side_by_side(transcriber, [noise(8), noise(9)], 2))) == 2
    one = SpeechLLMTranscriber(tiny, longform=CONFIG, parallel_passes=1)
    list(one.transcribe(noise(8))[0])


def test_the_log_goes_on(tiny):
    transcriber = SpeechLLMTranscriber(
        tiny, attention=SparseAttentionConfig(budget=None), longform=CONFIG, parallel_passes=3
    )
    states = []
    segments, info = transcriber.transcribe(noise(20), on_pass=states.append)
    whole = list(segments)
    state = json.loads(json.dumps(states[3]))
    done = whole[: state["report"]["segments"]]
    rest, again = transcriber.transcribe(noise(20), unfinished=Unfinished(done, state))
    assert [(each.text, each.start, each.end) for each in [*done, *rest]] == [
        (each.text, each.start, each.end) for each in whole
    ]  # confidences differ by what other passes beside it round
    assert (again.coverage, again.passes, again.warnings) == (info.coverage, info.passes, info.warnings)
    assert again.sparsity["steps"] >= info.sparsity["steps"]  # what was decoded ahead is decoded again


def test_whoever_stops_listening_leaves_the_transcriber_usable(tiny):
    transcriber = SpeechLLMTranscriber(tiny, longform=CONFIG, parallel_passes=3)
    whole = list(transcriber.transcribe(noise(20))[0])
    segments, info = transcriber.transcribe(noise(20))
    first = next(segments)
    segments.close()
    assert info.stop_reason == "interrupted"
    assert transcriber._engine.sequences == []
    assert list(transcriber.transcribe(noise(20))[0]) == whole
    assert first == whole[0]


def test_what_cannot_work(tiny, monkeypatch):
    with pytest.raises(PipelineError, match="parallel_passes=0: give at least 1"):
        SpeechLLMTranscriber(tiny, parallel_passes=0)
    transcriber = SpeechLLMTranscriber(tiny, longform=CONFIG, parallel_passes=3)
    whole = list(transcriber.transcribe(noise(20))[0])

    def fails(self):
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr("unique_asr.decoding.batch.BatchEngine._decode", fails)
        with pytest.raises(RuntimeError, match="no more"):
            list(transcriber.transcribe(noise(20))[0])
    assert list(transcriber.transcribe(noise(20))[0]) == whole


def test_an_array_of_silence(tiny):
    segments, info = SpeechLLMTranscriber(tiny, longform=CONFIG, parallel_passes=3).transcribe(
        np.zeros(16000 * 8, np.float32)
    )
    list(segments)
    assert info.stop_reason
