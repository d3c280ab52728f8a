"""Alignment of texts on simulated CTC posteriors whose word times are known."""

import itertools
import time

import numpy as np
import pytest
from simulated_speech import FRAME_SECONDS, Model, Processor, encode, timeline

from unique_asr.longform.alignment import AlignmentConfig, SpeechFrames, SpokenText, align, align_text, viterbi

TEXT = (
    "The morning was cold, and nobody had opened the shutters. A boy came up the road with a basket of bread. "
    "He knocked at every door and waited politely! Nothing answered him except a dog."
)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def processor():
    return Processor()


def found(model, processor, encoded, text, start=0, end=None):
    frames = SpeechFrames(encoded, model.config.blank_id)
    spoken = SpokenText.from_words(text.split(), processor)
    return align(model, encoded, frames, spoken, start, end or len(frames), AlignmentConfig())


def brute_force(token_log_probs, blank, best, ids, word_index, config):
    """The least cost over every assignment of frames to the states of the module's docstring."""
    frames, tokens = token_log_probs.shape
    states = 2 * tokens + 1
    lowest = np.inf
    for path in itertools.combinations_with_replacement(range(states), frames):
        if path[0] > 1 or path[-1] < states - 2:
            continue
        total, valid = 0.0, True
        for frame, state in enumerate(path):
            if frame and state - path[frame - 1] > 1:
                skipped_gap = state - path[frame - 1] == 2 and state % 2 == 1
                token = state // 2
                valid &= skipped_gap and ids[token] != ids[token - 1]
            if state % 2:
                total += min(best[frame] - token_log_probs[frame, state // 2], config.token_cost)
            else:
                step = word_index[state // 2] - word_index[state // 2 - 1] if 0 < state < states - 1 else None
                ceiling = {None: config.skip_cost if state == 0 else config.tail_cost, 0: config.token_cost}.get(
                    step, config.gap_cost if step == 1 else config.tail_cost
                )
                total += min(best[frame] - blank[frame], ceiling)
        if valid:
            lowest = min(lowest, total)
    return lowest


@pytest.mark.parametrize("seed", range(6))
def test_viterbi_finds_the_cheapest_path(seed):
    rng = np.random.default_rng(seed)
    config = AlignmentConfig()
    ids, word_index = np.array([5, 5, 7]), np.array([0, 1, rng.integers(1, 4)])
    logits = rng.normal(0, 3, (7, 4))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    tokens, blank, best = log_probs[:, [0, 0, 1]], log_probs[:, 2], log_probs.max(1)
    alignment = viterbi(tokens, blank, best, ids, word_index, config)
    assert (alignment.first <= alignment.last).all()
    assert (alignment.first[1:] > alignment.last[:-1]).all()
    # The path is not returned: rebuild its cost from the frames of the tokens.
    cost = 0.0
    for frame in range(7):
        said = np.flatnonzero((alignment.first <= frame) & (frame <= alignment.last))
        if len(said):
            cost += min(best[frame] - tokens[frame, said[0]], config.token_cost)
            continue
        after = int((alignment.last < frame).sum())
        step = None if after in (0, 3) else word_index[after] - word_index[after - 1]
        ceiling = {0: config.token_cost, 1: config.gap_cost}.get(step, config.tail_cost)
        cost += min(best[frame] - blank[frame], config.skip_cost if after == 0 else ceiling)
    assert cost == pytest.approx(brute_force(tokens, blank, best, ids, word_index, config), abs=1e-4)


def test_words_get_their_times(model, processor):
    words = timeline(TEXT)
    aligned, fit = align_text(model, processor, encode(model, processor, words), TEXT)
    assert fit == 1.0
    assert [word.text for word in aligned] == TEXT.split()
    for word, (_, start, end) in zip(aligned, words, strict=True):
        assert word.start == pytest.approx(start, abs=0.17)
        assert word.end == pytest.approx(end, abs=0.25)
        assert word.confidence > 0.9


def test_times_are_monotone_and_inside_the_audio(model, processor):
    words = timeline(TEXT, word=0.15, gap=0.0, pause=0.0)
    encoded = encode(model, processor, words, duration=words[-1][2] - 0.05)
    aligned, _ = align_text(model, processor, encoded, TEXT)
    times = [time for word in aligned for time in (word.start, word.end)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= encoded.duration


def test_a_word_does_not_reach_into_a_silence(model, processor):
    words = timeline("It was very late. Nobody came", pause=3.0)
    aligned, _ = align_text(model, processor, encode(model, processor, words), "It was very late. Nobody came")
    assert aligned[3].end < words[3][2] + 0.4
    assert aligned[4].start > words[4][1] - 0.2


def test_text_is_found_after_skipped_speech(model, processor):
    words = timeline(TEXT)
    encoded = encode(model, processor, words)
    alignment = found(model, processor, encoded, "He knocked at every door and waited politely!")
    start = next(begin for word, begin, _ in words if word == "He")
    assert alignment.fit == 1.0
    assert alignment.first[0] * FRAME_SECONDS == pytest.approx(start, abs=0.2)


def test_the_first_of_two_equal_places_is_taken(model, processor):
    words = timeline("we went home again. " * 3)
    alignment = found(model, processor, encode(model, processor, words), "we went home again.")
    assert alignment.last[-1] * FRAME_SECONDS < words[4][1]


@pytest.mark.parametrize("miss", [0.1, 0.3])
def test_a_poor_ctc_head_still_places_the_text(model, processor, miss):
    words = timeline(TEXT)
    aligned, fit = align_text(model, processor, encode(model, processor, words, miss=miss), TEXT)
    assert 0.5 < fit < 1
    errors = [abs(word.start - start) for word, (_, start, _) in zip(aligned, words, strict=True)]
    assert np.median(errors) < 0.2
    assert np.mean(errors) < 0.5


def test_words_that_were_not_said_do_not_fit(model, processor):
    encoded = encode(model, processor, timeline(TEXT))
    alignment = found(model, processor, encoded, "Thank you for watching this video, please subscribe to our channel.")
    assert not alignment.fits


def test_left_out_and_added_words_do_not_move_the_others(model, processor):
    words = timeline(TEXT)
    encoded = encode(model, processor, words)
    changed = TEXT.replace("cold, and", "cold, very cold, and then").replace("with a basket of bread", "bread")
    aligned, fit = align_text(model, processor, encoded, changed)
    starts = {word.text: word.start for word in aligned}
    for text in ("nobody", "road", "knocked", "politely!"):
        assert starts[text] == pytest.approx(next(start for word, start, _ in words if word == text), abs=0.2)
    assert fit > 0.8


def test_numbers_take_the_speech_between_their_neighbours(model, processor):
    words = timeline("they sold nineteen hundred and four of them that year.")
    encoded = encode(model, processor, words)
    aligned, fit = align_text(model, processor, encoded, "they sold 1904 of them that year.")
    assert fit == 1.0
    assert words[1][2] - 0.2 < aligned[2].start < words[3][1]
    assert aligned[3].start == pytest.approx(words[6][1], abs=0.2)


def test_more_text_than_frames_cannot_be_aligned(model, processor):
    encoded = encode(model, processor, timeline("short"))
    assert found(model, processor, encoded, "a " * 60) is None
    words, fit = align_text(model, processor, encoded, "a " * 60)
    assert len(words) == 60
    assert fit == 0.0


def test_a_long_window_takes_milliseconds(model, processor):
    text = " ".join(TEXT for _ in range(6))
    words = timeline(text)
    encoded = encode(model, processor, words)
    found(model, processor, encoded, TEXT)
    begin = time.perf_counter()
    alignment = found(model, processor, encoded, TEXT)
    assert time.perf_counter() - begin < 0.5
    assert alignment.fit == 1.0


def test_a_head_that_knows_nothing_hears_nothing(model, processor):
    encoded = encode(model, processor, timeline(TEXT))
    encoded.ctc = encoded.ctc / 100 - 8  # nearly uniform
    encoded.best_log_prob = encoded.ctc.max(-1).values
    encoded.blank_log_prob = encoded.ctc[:, model.config.blank_id]
    assert not found(model, processor, encoded, TEXT).fits
