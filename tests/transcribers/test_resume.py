"""What breaks off is gone on with, to the same text; what is damaged is transcribed as far as it goes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated_speech import ScriptedDecoder, SimulatedRecording, noise, said, sentences, timeline

from unique_asr.longform.configuration import LongformConfig
from unique_asr.longform.coverage import LongformReport
from unique_asr.longform.passes import PassRunner
from unique_asr.transcribers.base import PipelineError
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber
from unique_asr.transcript import Unfinished
from unique_asr.writers import SegmentLog

DATA = Path(__file__).parents[1] / "data"


def test_half_of_a_file_is_corrupt(tiny, tmp_path):
    whole = (DATA / "sample.opus").read_bytes()
    half = len(whole) // 2
    noisy = np.random.default_rng(0).integers(0, 256, half, dtype=np.uint8).tobytes()
    path = tmp_path / "corrupt.opus"
    path.write_bytes(whole[:-half] + noisy)
    segments, info = SpeechLLMTranscriber(tiny, budget=64).transcribe(path)
    for segment in segments:
        assert 0 <= segment.start <= segment.end <= info.duration
    assert info.duration > 10  # what came before the damage
    assert info.stop_reason
    assert any("could not be read" in warning for warning in info.warnings)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_every_pass_can_be_resumed(offset):
    """A decoder that ends early, loops and leaves speech out: text, times, warnings and counts are the same."""
    recording = SimulatedRecording(timeline(sentences(40)), max_pass_seconds=60.0)

    def write(start, end):
        text = said(recording.words, start, end)
        if 10 < start < 60:
            return " ".join(text.split()[:40]) + " Yes." * 300
        return text if start > 100 else " ".join(text.split()[:30] + text.split()[90:])

    def transcribe(state=None, on_pass=None):
        report, decoder = LongformReport(), ScriptedDecoder(recording.processor, write)
        runner = PassRunner(recording.model, recording.processor, offset=offset)
        return runner.run(recording.encoded, decoder, report, None, state, on_pass), report

    states = []
    segments, whole_report = transcribe(on_pass=lambda state: states.append(json.loads(json.dumps(state))))
    whole = list(segments)
    assert len(states) == whole_report.passes > 4
    assert len(whole_report.warnings) > 2
    assert whole[0].start >= offset
    for state in states:
        rest, report = transcribe(state)
        assert whole[: state["report"]["segments"]] + list(rest) == whole
        assert replace(report, timings={}) == replace(whole_report, timings={})


def test_through_the_log_a_real_decoder_gives_the_same(tiny, tmp_path):
    """With sparse attention; the log is cut off in the middle of a line."""
    config = LongformConfig(max_pass_seconds=3.0, retry_seconds=1.0, skip_seconds=1.0, min_progress_seconds=0.1)

    def transcribe(**options):
        return SpeechLLMTranscriber(tiny, budget=32, longform=config, parallel_passes=1).transcribe(noise(9), **options)

    log = SegmentLog(tmp_path / "log.jsonl")
    segments, log.info = transcribe(on_pass=log.pass_begins)
    whole = []
    for segment in segments:
        whole.append(segment)
        log.append(segment)
    log.close(keep=True)
    text = log.path.read_text()
    assert text.count('{"pass"') > 1
    assert log.info.sparsity["sparse_steps"] > 0
    log.path.write_text(text[:-20])
    made_with, unfinished, keep = SegmentLog.read_unfinished(log.path)
    assert made_with.attention == log.info.attention
    assert text.encode()[keep:].startswith(b'{"pass"')
    rest, info = transcribe(unfinished=unfinished)
    assert unfinished.segments + list(rest) == whole
    for name in ("coverage", "passes", "stop_reason", "warnings", "sparsity"):
        assert getattr(info, name) == getattr(log.info, name)


def test_another_recording_does_not_go_on(tiny):
    transcriber = SpeechLLMTranscriber(tiny, budget=64)
    states = []
    list(transcriber.transcribe(noise(6), on_pass=states.append)[0])
    segments, _ = transcriber.transcribe(noise(5), unfinished=Unfinished([], states[0]))
    with pytest.raises(ValueError, match="not the one"):
        next(segments)


def test_a_model_that_raises_leaves_the_transcriber_usable(tiny, monkeypatch):
    transcriber = SpeechLLMTranscriber(tiny, budget=64)
    expected = list(transcriber.transcribe(noise(5))[0])
    step = transcriber._decoder.step.choose
    calls = iter(range(1000))

    def fails(logits):
        if next(calls) == 20:
            raise PipelineError("the device is gone")
        return step(logits)

    monkeypatch.setattr(transcriber._decoder.step, "choose", fails)
    segments, info = transcriber.transcribe(noise(5))
    with pytest.raises(PipelineError, match="device is gone"):
        list(segments)
    assert info.stop_reason == "interrupted"
    monkeypatch.undo()
    assert list(transcriber.transcribe(noise(5))[0]) == expected
