"""Recordings side by side: what each of them would get alone, whatever is decoded beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from simulated_speech import describe, noise

import unique_asr
from unique_asr.decoding.batch import BatchEngine
from unique_asr.longform.configuration import LongformConfig
from unique_asr.pipeline import transcribe_batch
from unique_asr.transcribers import speech_llm
from unique_asr.transcribers.base import Transcriber
from unique_asr.transcribers.batch import interleave, transcribe_side_by_side
from unique_asr.transcribers.speech_llm import SpeechLLMTranscriber

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("size", [2, 3, 8])
def test_transcripts_are_those_of_one_by_one(tiny, size):
    """Several passes a recording, of which some are tried again: every recording goes its own way."""
    config = LongformConfig(max_pass_seconds=3.0, retry_seconds=1.0, skip_seconds=1.0, min_progress_seconds=0.1)
    audios = [noise(seconds) for seconds in (7, 2, 5, 9, 3)]
    transcriber = SpeechLLMTranscriber(tiny, longform=config, parallel_passes=1)
    expected = dict(transcribe_side_by_side(transcriber, audios, 1))
    results = dict(transcribe_side_by_side(transcriber, audios, size))
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert max(transcript.info.passes for transcript in results.values()) > 3
    for index, transcript in results.items():
        assert describe(transcript) == describe(expected[index])
        assert transcript.info.timings["decode"] > 0
        assert transcript.info.sparsity["steps"] == expected[index].info.sparsity["steps"]


def test_a_recording_that_fails_does_not_stop_the_others(tiny):
    audios = ["no such file.wav", noise(2), np.zeros(0, np.float32), noise(3), DATA / "manifest.jsonl"]
    heard, stages = [], set()
    results = dict(
        transcribe_batch(
            audios,
            tiny,
            batch=2,
            on_segment=lambda index, segment: heard.append(index),
            progress=lambda index, stage, done, total: stages.add((index, stage)),
        )
    )
    assert sorted(results) == [0, 1, 2, 3, 4]
    for index, message in ((0, "no such file"), (2, "empty"), (4, "not audio or video")):
        assert results[index].info.stop_reason == "error"
        assert message in results[index].info.warnings[-1]
    for index in (1, 3):
        assert results[index].info.stop_reason not in ("", "error", "interrupted")
        assert heard.count(index) == len(results[index].segments)
        assert {(index, "prefill"), (index, "decode")} <= stages
    assert results[0].info.audio == "no such file.wav"


def test_sparse_attention_beside_others(tiny):
    results = dict(transcribe_side_by_side(SpeechLLMTranscriber(tiny, budget=32), [noise(6), noise(4)], 2))
    for transcript in results.values():
        assert 0 < transcript.info.sparsity["sparse_steps"] <= transcript.info.sparsity["steps"]
        assert transcript.info.sparsity["share_of_pages_read"] < 1


def test_a_transcriber_of_another_kind_goes_one_by_one(tiny, monkeypatch):
    """It makes no engine."""
    transcriber = SpeechLLMTranscriber(tiny)

    class Other(Transcriber):
        def __init__(self):
            pass

        def _prepare_decoding(self):
            pass

        def transcribe(self, audio, *, progress, **told):
            return transcriber.transcribe(audio, progress=progress, **told)

    monkeypatch.setattr("unique_asr.pipeline.make_transcriber", lambda *arguments, **options: Other())
    results = list(transcribe_batch([noise(2), noise(3)], batch=8))
    assert [index for index, _ in results] == [0, 1]
    assert results[1][1].segments == list(transcriber.transcribe(noise(3))[0])


def test_what_cannot_work(tiny, monkeypatch):
    with pytest.raises(ValueError, match="batch=0"):
        transcribe_batch([], tiny, batch=0)
    assert list(unique_asr.transcribe_batch([], tiny)) == []

    def fails(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(BatchEngine, "step", fails)
    for _, transcript in transcribe_batch([noise(2), noise(3), noise(2)], tiny, batch=2):
        assert transcript.info.stop_reason == "error"
        assert transcript.info.warnings[-1] == "out of memory on cpu; lower batch or max_pass_seconds"


def test_the_language_is_that_of_the_model(tiny):
    with pytest.raises(ValueError, match="language=French: model=default takes en; leave language out"):
        transcribe_batch([noise(2)], language="French")
    transcriber = SpeechLLMTranscriber(tiny)
    transcriber.languages = ("en",)
    for _, transcript in transcribe_side_by_side(transcriber, [noise(2), noise(3)], 2, language="English"):
        assert transcript.info.settings["language"] == "en"


def test_a_recording_that_does_not_fit_alone_is_refused_by_name(tiny, monkeypatch):
    monkeypatch.setattr(speech_llm, "measure_free_memory", lambda device: 1000)
    results = dict(transcribe_batch([DATA / "nomads.opus", noise(2)], tiny, batch=2))
    for transcript in results.values():
        assert transcript.info.stop_reason == "error"
        assert (
            "does not fit into the 0.0 GB that are free on cpu; lower max_pass_seconds" in transcript.info.warnings[-1]
        )
    assert results[0].info.warnings[-1].startswith(str(DATA / "nomads.opus"))


class Steps:
    """Tasks for `interleave`, and what was raised in them."""

    def __init__(self, *turns, fails=None):
        self.turns, self.fails, self.stepped, self.raised, self.begun = turns, fails, 0, {}, []

    def step(self):
        self.stepped += 1
        if self.stepped == self.fails:
            raise RuntimeError("no")

    def task(self, index, turns):
        self.begun.append(index)
        try:
            for _ in range(turns):
                yield
        except BaseException as error:
            self.raised[index] = type(error)
            if not isinstance(error, RuntimeError):
                raise
            return "failed"
        return "done"

    def tasks(self):
        return (self.task(index, turns) for index, turns in enumerate(self.turns))


def test_tasks_take_turns_and_the_next_begins_when_one_ends():
    steps = Steps(3, 1, 0, 2)
    ended = list(interleave(steps.tasks(), 2, steps.step))
    assert ended == [(1, "done"), (2, "done"), (0, "done"), (3, "done")]
    assert steps.begun == [0, 1, 2, 3]


def test_a_step_that_fails_ends_those_that_waited_for_it():
    steps = Steps(3, 3, 1, fails=2)
    assert list(interleave(steps.tasks(), 2, steps.step)) == [(0, "failed"), (1, "failed"), (2, "done")]
    assert steps.raised == {0: RuntimeError, 1: RuntimeError}


def test_whoever_stops_listening_ends_all():
    steps = Steps(3, 1, 3, 3)
    results = interleave(steps.tasks(), 3, steps.step)
    next(results)
    results.close()
    assert steps.raised == {0: GeneratorExit, 2: GeneratorExit}
    assert steps.begun == [0, 1, 2]


def test_an_interrupt_reaches_every_task():
    def interrupted():
        raise KeyboardInterrupt

    steps = Steps(3, 3, 3)
    with pytest.raises(KeyboardInterrupt):
        list(interleave(steps.tasks(), 2, interrupted))
    assert steps.raised == {0: KeyboardInterrupt, 1: KeyboardInterrupt}


def test_the_shipped_model_writes_the_same():
    transcriber = SpeechLLMTranscriber(device="cpu")
    clips = [DATA / f"{name}.opus" for name in ("nomads", "milner")]
    expected, results = (dict(transcribe_side_by_side(transcriber, clips, size)) for size in (1, 2))
    for index, transcript in results.items():
        assert len(transcript.text.split()) > 15
        assert describe(transcript) == describe(expected[index])
