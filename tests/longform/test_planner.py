"""Where passes begin and end, with the spikes of a CTC head and with the loudness of samples."""

import pytest
from simulated_speech import Model, Processor, encode, sentences, speech, timeline

from unique_asr.longform.alignment import SpeechFrames
from unique_asr.longform.configuration import LongformConfig, PlannerConfig
from unique_asr.longform.planner import Continuation, PassPlanner
from unique_asr.longform.speech_activity import SpeechActivity


def spikes(words, duration):
    model, processor = Model(), Processor()
    return SpeechFrames(encode(model, processor, words, duration), model.config.blank_id)


def plan_all(planner):
    spans = []
    while span := planner.plan():
        spans.append(span)
        planner.complete()
    return spans


@pytest.mark.parametrize("kind", ["spikes", "loudness"])
def test_passes_are_even_shares_that_end_in_pauses(kind):
    pauses = [(38.0, 38.8), (76.0, 76.8)]
    if kind == "loudness":
        evidence = SpeechActivity(speech(114, pauses=pauses))
    else:
        words = timeline(sentences(40), start=0.0, pause=0.08)
        evidence = spikes([each for each in words if not any(a - 0.3 < each[1] < b for a, b in pauses)], 114.0)
    planner = PassPlanner(evidence, PlannerConfig(cut_seconds=10.0), 45.0, 0.0, 114.0)
    spans = plan_all(planner)
    assert len(spans) == 3
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    for (_, end), (quiet, loud) in zip(spans, pauses, strict=False):
        assert quiet - 0.2 < end < loud + 0.2
    assert spans[-1][1] == 114.0
    sections = PassPlanner(evidence, PlannerConfig(cut_seconds=10.0), 45.0, 0.0, 114.0).split()
    assert [(each.start, each.stop) for each in sections] == spans


def test_silence_is_passed_over_where_it_is_certain():
    loud, quiet = speech(90, pauses=[(20, 70)]), timeline("Yes.", start=80.0)
    assert len(plan_all(PassPlanner(SpeechActivity(loud), PlannerConfig(), 30.0, 0.0, 90.0))) == 4
    (span,) = plan_all(PassPlanner(spikes(quiet, 90.0), PlannerConfig(), 30.0, 0.0, 90.0))
    assert span[0] < 80 < span[1]


def test_a_pass_goes_on_where_its_text_ended_then_is_retried_then_skipped():
    evidence = SpeechActivity(speech(400))
    planner = PassPlanner(evidence, LongformConfig(), 400.0, 0.0, 400.0)
    assert planner.plan() == (0.0, 400.0)
    assert planner.continue_from(20.0) is Continuation.CONTINUED
    assert (planner.start, planner.limit) == (20.0, 80.0)
    start, end = planner.plan()
    assert 60 < end - start <= 80
    assert planner.continue_from(20.5) is Continuation.RETRIED
    assert (planner.start, planner.limit) == (20.0, 30.0)
    planner.plan()
    assert planner.continue_from(21.0) is Continuation.SKIPPED
    assert 30 <= planner.start <= 40
    assert planner.limit == 30
    planner.plan()
    planner.complete()
    assert planner.limit == 400


def test_without_a_length_all_of_the_pass_is_skipped():
    planner = PassPlanner(SpeechActivity(speech(50)), PlannerConfig(), 40.0, 0.0, 50.0)
    _, end = planner.plan()
    assert planner.retry(end / 2) is Continuation.SKIPPED
    assert (planner.start, planner.limit) == (end, 40.0)


def test_a_pass_begins_in_the_pause_after_the_text():
    words = timeline("One two. Three four.", pause=2.0)
    planner = PassPlanner(spikes(words, 6.0), LongformConfig(min_progress_seconds=0.5), 60.0, 0.0, 6.0)
    planner.plan()
    planner.continue_from(words[1][2])
    assert words[1][2] + 0.5 < planner.start < words[2][1] - 0.5
