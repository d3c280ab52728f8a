"""Whisper's decoder as a listener: against transformers' own generate, in windows and in a speech LLM."""

import itertools

import numpy as np
import pytest
import torch
from small_whisper import PROMPT, SETTINGS, STOP, whisper_config
from transformers import GenerationConfig, GenerationMixin, WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from unique_asr.models import SpeechLLMForConditionalGeneration, load
from unique_asr.models.speech_llm.listener import LOOKAHEAD_SPIKES, Listener, count_spikes_after
from unique_asr.models.speech_llm.reading import (
    ALTERNATIVES,
    MAX_PERIOD,
    MAX_UNHEARD_SPIKES,
    MIN_REPETITION,
    ForwardPath,
    Heard,
    Reading,
    find_repeating,
)


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    config = whisper_config()
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        table = model.model.decoder.embed_tokens.weight
        table[STOP] = 1.1 * table[38]  # which one of the windows would write after seven others
    return model


@pytest.fixture(scope="module")
def listener(whisper):
    found = Listener(whisper.config, **SETTINGS)
    found.decoder.load_state_dict(whisper.model.decoder.state_dict())
    return found.eval()


@pytest.fixture(scope="module")
def states(whisper):
    """Encoder states of windows whose texts differ, in length as well."""
    features = torch.randn(6, 80, 600, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = whisper.model.encoder(features).last_hidden_state
    return states + torch.randn(6, 1, 32, generator=torch.Generator().manual_seed(2))


def test_it_writes_what_whisper_writes(whisper, listener, states):
    heard = listener(states, limit=30)
    config = GenerationConfig(
        max_new_tokens=30, do_sample=False, num_beams=1, eos_token_id=STOP, pad_token_id=STOP, bos_token_id=STOP,
        decoder_start_token_id=PROMPT[0], suppress_tokens=[3, *range(STOP + 1, 60)],
    )  # fmt: skip
    prompt = torch.tensor([PROMPT]).expand(len(states), -1)
    expected = GenerationMixin.generate(  # the plain loop, without what Whisper's own adds for long audio
        whisper, encoder_outputs=BaseModelOutput(states), decoder_input_ids=prompt, generation_config=config
    )
    lengths = set()
    for row, count, tokens in zip(expected[:, len(PROMPT) :].tolist(), heard.counts.tolist(), heard.tokens.tolist()):
        text = row[: row.index(STOP)] if STOP in row else row
        assert tokens[:count] == text
        assert set(tokens[count:]) <= {STOP}
        lengths.add(count)
    assert len(lengths) > 1


def test_states_and_alternatives_are_those_of_one_pass(whisper, listener, states):
    heard = listener(states, limit=12)
    tokens = heard.tokens[:, :-1]
    with torch.no_grad():
        output = whisper.model.decoder(
            input_ids=torch.cat([torch.tensor([PROMPT]).expand(len(states), -1), tokens], 1),
            encoder_hidden_states=states,
        ).last_hidden_state[:, len(PROMPT) - 1 :]
        logits = whisper.proj_out(output)
    torch.testing.assert_close(heard.hidden, output, atol=1e-4, rtol=1e-4)
    logits[..., STOP + 1 :] = -torch.inf
    logits[..., 3] = -torch.inf
    torch.testing.assert_close(heard.weights, logits.softmax(-1).topk(ALTERNATIVES).values, atol=1e-4, rtol=1e-3)
    assert (heard.frames.diff(dim=1) >= 0).all()


def test_windows_do_not_change_one_another(listener, states):
    together = listener(states, limit=30)
    for row in range(len(states)):
        alone = listener(states[row : row + 1], limit=30)
        count = int(alone.counts[0])
        assert int(together.counts[row]) == count
        assert torch.equal(together.tokens[row, :count], alone.tokens[0, :count])
        assert torch.equal(together.frames[row, :count], alone.frames[0, :count])


def test_a_reading_that_is_used_again_hears_the_same(listener, states, monkeypatch):
    """As on CUDA, but for the graph: of fewer windows than it has room for, with what the last ones left in it."""
    unheard = torch.randint(0, 30, states.shape[:2], generator=torch.Generator().manual_seed(3)).sort(
        1, descending=True
    )
    groups = [(states[rows], unheard.values[rows]) for rows in (slice(0, 6), slice(2, 5), slice(5, 6))]
    expected = [listener(group, unheard=left) for group, left in groups]
    held = Reading(listener, 8, states.shape[1], 20, spikes=True, capture=True)
    monkeypatch.setattr(held, "next", held._step)
    monkeypatch.setattr(listener, "_prepare_reading", lambda states, limit, spikes: held)
    for (group, left), one in zip(groups, expected):
        again = listener(group, unheard=left)
        assert torch.equal(again.tokens, one.tokens)
        assert torch.equal(again.counts, one.counts)
        for row, count in enumerate(one.counts.tolist()):
            assert torch.equal(again.frames[row, :count], one.frames[row, :count])
            torch.testing.assert_close(again.hidden[row, :count], one.hidden[row, :count])


def test_the_audio_that_a_head_attends_to_is_the_time(listener):
    """Queries and keys that match at one frame: that is where the token was read."""
    layer = listener.decoder.layers[1].encoder_attn
    saved = {name: value.clone() for name, value in layer.state_dict().items()}
    frames = torch.zeros(1, 300, 32)
    frames[0, 137] = 8.0
    with torch.no_grad():
        layer.k_proj.weight.fill_(0.1)
        layer.q_proj.weight.zero_()
        layer.q_proj.bias.fill_(1.0)
    one = Listener(listener.decoder.config, PROMPT, STOP, [[1, 0]])
    one.decoder.load_state_dict(listener.decoder.state_dict())
    heard = one(frames, limit=3)
    layer.load_state_dict(saved)
    assert heard.frames.unique().tolist() == [137]


def test_expected_embeddings_are_the_pieces_weighted_by_their_probability(listener):
    embeddings = torch.eye(10)
    listener.pieces[:] = -1
    listener.pieces[4, :1] = 7
    listener.pieces[5, :2] = torch.tensor([1, 2])
    found = listener.embed_expected(torch.tensor([[0.75, 0.25, 0.0]]), torch.tensor([[4, 5, 6]]), embeddings)
    expected = torch.zeros(10)
    expected[[7, 1, 2]] = torch.tensor([0.75, 0.125, 0.125])
    torch.testing.assert_close(found[0], expected)


@pytest.fixture(scope="module")
def listening(speech_llm, whisper):
    config = WhisperConfig(**{**whisper.config.to_dict(), "dtype": None})
    model, processor = speech_llm(encoder=config, merge="decoder", listener=SETTINGS)
    model.listener.decoder.load_state_dict(whisper.model.decoder.state_dict())
    model.encoder.load_state_dict(whisper.model.encoder.state_dict())
    model.listener.pieces[:STOP, 0] = torch.arange(STOP, dtype=torch.int32)
    return model, processor


def noise(seconds):
    return np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


def test_a_recording_has_a_position_for_each_token_of_the_kept_part(listening):
    model, processor = listening
    samples = noise(14.0)
    encoded = model.encode([samples], processor)
    positions, offset = [], 0
    for window, first, last in processor.cut_windows([samples]):
        with torch.no_grad():
            states = model.encoder(**processor.extract_features([window])).last_hidden_state
        heard = model.listener(states)
        frames = heard.frames[0, : heard.counts[0]] // model.config.stack_factor
        positions += [int(frame) - first + offset for frame in frames if first <= frame < last]
        offset += last - first
    assert encoded.frames.tolist() == positions
    assert encoded.embeds.shape == (len(positions), 32)
    assert len(positions) > 10


def test_it_generates_saves_and_loads(listening, tmp_path):
    model, processor = listening
    inputs = processor.apply_transcription_request([noise(3.0), noise(9.0)])
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path)
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again.listener.pieces, model.listener.pieces)
    assert torch.equal(again.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)


def test_it_needs_whisper(speech_llm):
    with pytest.raises(ValueError, match="needs a Whisper model"):
        speech_llm(merge="decoder")


def test_a_window_with_speech_left_goes_on(listener, states, monkeypatch):
    """The row that ends first is kept from ending as often as is allowed, and no other row changes."""
    nothing = lambda latest, vocabulary: torch.zeros(len(latest), vocabulary, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(
        "unique_asr.models.speech_llm.reading.find_repeating", nothing
    )  # weights at random repeat themselves
    monkeypatch.setattr("unique_asr.models.speech_llm.listener.LOOKAHEAD_SPIKES", ())
    before = listener(states, limit=30)
    first = int(before.counts.argmin())
    unheard = torch.zeros(len(states), states.shape[1], dtype=torch.long)
    unheard[first] = MAX_UNHEARD_SPIKES + 1
    after = listener(states, limit=30, unheard=unheard)
    end = int(before.counts[first])
    assert after.counts[first] > end
    assert torch.equal(after.tokens[first, :end], before.tokens[first, :end])
    for row in set(range(len(states))) - {first}:
        length = int(before.counts[row])
        assert torch.equal(after.tokens[row, :length], before.tokens[row, :length])
    unheard[first] = MAX_UNHEARD_SPIKES
    assert torch.equal(listener(states, limit=30, unheard=unheard).counts, before.counts)


def test_spikes_are_counted_to_the_end_of_a_window():
    best = torch.tensor([[0, 1, 1, 0, 2, 2, 1, 0]]) - 1  # 0: blank
    logits = torch.nn.functional.one_hot(best % 3, 3).float()
    assert count_spikes_after(logits).tolist() == [[3, 2, 2, 2, 1, 1, 0, 0]]


def forward_path(scores):
    """Of scores [W, N, F], in a path that has room for more."""
    path = ForwardPath(len(scores), scores.shape[2], scores.shape[1] + 3)
    for token, score in enumerate(scores.unbind(1)):
        path.add(torch.tensor([token]), score, torch.tensor(True))
    path.add(torch.tensor([scores.shape[1]]), torch.rand_like(score), torch.tensor(False))  # when all have ended
    return path


def test_frames_are_the_best_that_never_go_back():
    scores = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    path = forward_path(scores)
    for found, row in zip(path.trace_frames(4), scores):
        assert found.tolist() == sorted(found.tolist())
        paths = itertools.combinations_with_replacement(range(6), 4)
        best = max(sum(row[token, frame] for token, frame in enumerate(frames)) for frames in paths)
        assert sum(row[range(4), found]) == pytest.approx(float(best))


def test_one_word_that_looks_far_ahead_does_not_move_the_others():
    frames = forward_path(torch.eye(8)[[1, 7, 2, 3, 4]][None]).trace_frames(5)[0]
    assert frames[[0, 2, 3, 4]].tolist() == [1, 2, 3, 4]
    assert 1 <= frames[1] <= 2


def test_a_model_in_16_bits_listens_in_32(listening, tmp_path):
    """What is heard does not depend on the type of the rest of the model, but for the encoder's rounding."""
    model, processor = listening
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    short, _ = load(tmp_path, device="cpu", dtype="bfloat16")
    kinds = {parameter.dtype for parameter in short.listener.parameters()}
    assert kinds == {torch.float32}
    assert short.language_model.dtype == torch.bfloat16
    audio = np.random.default_rng(0).standard_normal(16_000 * 3).astype(np.float32)
    assert short.encode([audio], processor).embeds.dtype == torch.bfloat16


def latest(*rows):
    return torch.tensor([[-1] * (2 * MAX_PERIOD - len(row)) + row for row in rows])


def test_a_third_copy_of_a_repetition_may_not_begin():
    long = list(range(1, MAX_PERIOD + 1))
    words = latest([1, 2, 3, 4] * 2, list(range(1, 9)), [9] * MIN_REPETITION, [9] * (MIN_REPETITION - 1), long * 2)
    expected = torch.zeros(5, 20, dtype=torch.bool)
    expected[0, 1] = expected[2, 9] = expected[4, 1] = True
    assert torch.equal(find_repeating(words, 20), expected)


def test_no_window_repeats_itself_for_long(listener, states):
    def copies(tokens):
        """Whether any window begins a third copy."""
        return any(
            bool(find_repeating(latest(row[:end])[:, -2 * MAX_PERIOD :], 60)[0, row[end]])
            for row in (row[: row.index(STOP)] if STOP in row else row for row in tokens.tolist())
            for end in range(len(row))
        )

    assert copies(listener(states, limit=30).tokens)
    unheard = torch.zeros(states.shape[:2], dtype=torch.long)
    assert not copies(listener(states, limit=30, unheard=unheard).tokens)


def test_frames_too_far_ahead_are_not_seen(listener, states):
    """Spikes that come later than so many change nothing; what comes after the last one is seen."""
    unheard = torch.full(states.shape[:2], LOOKAHEAD_SPIKES[0] + 50)
    unheard[:, 150:280] = 10
    unheard[:, 280:] = 0
    before = listener._read(states, 1, unheard, LOOKAHEAD_SPIKES[0])
    changed = states.clone()
    changed[:, 150:280] = states[:, 150:280].flip(0)
    after = listener._read(changed, 1, unheard, LOOKAHEAD_SPIKES[0])
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.hidden, after.hidden)
    changed[:, 280:] = states[:, 280:].flip(0)
    assert not torch.equal(listener._read(changed, 1, unheard, LOOKAHEAD_SPIKES[0]).hidden, after.hidden)
    assert not torch.equal(listener(states, limit=8).hidden, listener(changed, limit=8).hidden)


def reading(*rows):
    """Of windows with a spike at each of their 100 frames: tokens at these frames."""
    length = max(map(len, rows))
    tokens = torch.tensor([[7] * len(row) + [STOP] * (length - len(row)) for row in rows])
    frames = torch.tensor([[*row, *[99] * (length - len(row))] for row in rows])
    some = torch.ones(*tokens.shape, ALTERNATIVES)
    return Heard(tokens, some, some.long(), some, frames, torch.tensor([len(row) for row in rows]))


def test_what_is_amiss(listener):
    unheard = torch.arange(99, -1, -1).expand(4, -1)
    every = list(range(4, 100, 5))
    cases = every, every[:8] + every[14:], every[:-3], [frame for frame in range(100) for _ in range(2)]
    assert listener.count_mismatches(reading(*cases), unheard).tolist() == [
        0,
        35 - MAX_UNHEARD_SPIKES,
        15 - MAX_UNHEARD_SPIKES,
        200 - 1.5 * 99 - 8,
    ]
    assert listener.count_mismatches(reading([], every), unheard[:2]).tolist() == [99 - MAX_UNHEARD_SPIKES, 0]


def test_the_best_of_several_readings_stays(listener, monkeypatch):
    """Windows that are in order are read once, and each of the others keeps the reading in which least is amiss."""
    every, leap = list(range(4, 100, 5)), [0, 60, 65, 70, 75, 80, 85, 90, 95, 99]
    readings = {
        None: {0: every, 1: leap, 2: leap, 3: leap},
        LOOKAHEAD_SPIKES[0]: {1: every, 2: [99], 3: leap[:1]},
        LOOKAHEAD_SPIKES[1]: {2: [0, *range(50, 100, 5)], 3: [99]},
    }
    seen = []

    def read(states, limit, unheard, ahead=None):
        seen.append((ahead, states[:, 0, 0].tolist()))
        return reading(*(readings[ahead][int(window)] for window in states[:, 0, 0]))

    monkeypatch.setattr(listener, "_read", read)
    states = torch.arange(4.0)[:, None, None].expand(4, 100, 1)
    heard = listener(states, unheard=torch.arange(99, -1, -1).expand(4, -1))
    found = [frames[:count].tolist() for frames, count in zip(heard.frames, heard.counts)]
    assert found == [every, every, [0, *range(50, 100, 5)], leap]
    assert [row.tolist().index(STOP) if STOP in row else len(row) for row in heard.tokens] == heard.counts.tolist()
    assert seen == [(None, [0, 1, 2, 3]), (LOOKAHEAD_SPIKES[0], [1, 2, 3]), (LOOKAHEAD_SPIKES[1], [2, 3])]
