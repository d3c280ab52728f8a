"""The speech LLM on random weights: windows, merging, prompts, generation, and transformers' conventions."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from unique_asr.models import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from unique_asr.models.speech_llm.compose import compose
from unique_asr.models.speech_llm.modeling import concatenate
from unique_asr.models.speech_llm.projector import Frames, Residual

FRAME = 1280  # samples of a frame of 0.08 s
PER_FRAME = ("ctc", "log_z", "best", "best_log_prob", "blank_log_prob")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


def without_text(inputs):
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


def assert_same_audio(one, other):
    for name in ("embeds", "frames", *PER_FRAME):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), msg=lambda text, name=name: name + text)
    assert one.duration == pytest.approx(other.duration)
    assert one.frame_seconds == other.frame_seconds


# Windows


@pytest.mark.parametrize("seconds", [0.01, 3.0, 6.0, 6.01, 10.08, 17.3])
def test_the_kept_frames_of_all_windows_are_those_of_the_recording(tiny, seconds):
    _, processor = tiny
    samples = np.arange(int(seconds * 16000), dtype=np.float32)
    places = []
    for window, first, last in processor.cut_windows([samples]):
        assert len(window) <= 6 * 16000
        places += window[first * FRAME : last * FRAME : FRAME].tolist()
    assert places == list(range(0, len(samples), FRAME))


def test_window_spans_are_those_of_windows(tiny):
    _, processor = tiny
    samples = noise(17.3)
    spans = processor.list_window_spans(len(samples))
    windows = list(processor.cut_windows([samples]))
    assert [(first, last) for _, _, first, last in spans] == [(first, last) for _, first, last in windows]
    for (start, end, _, _), (window, _, _) in zip(spans, windows, strict=True):
        assert np.array_equal(samples[start:end], window)


@pytest.mark.parametrize("block", [1001, 16000, 100_000])
def test_blocks_of_any_size_encode_as_one(tiny, block):
    model, processor = tiny
    samples = noise(13.21)
    progress = []
    blocks = (samples[start : start + block] for start in range(0, len(samples), block))
    encoded = model.encode(blocks, processor, progress.append)
    assert_same_audio(encoded, model.encode([samples], processor))
    assert progress == sorted(progress)
    assert progress[-1] == pytest.approx(13.21, abs=1e-4)


@pytest.mark.parametrize("merge", ["ctc", "none"])
def test_encoded_audio_covers_the_recording(speech_llm, merge):
    model, processor = speech_llm(merge=merge)
    encoded = model.encode([noise(13.21)], processor)
    frames = int(np.ceil(13.21 / 0.08))
    assert encoded.duration == pytest.approx(13.21, abs=1e-4)
    assert encoded.embeds.shape == (len(encoded.frames), 32)
    assert {len(getattr(encoded, name)) for name in PER_FRAME} == {frames}
    assert encoded.frames[0] == 0
    assert (encoded.frames.diff() > 0).all()
    assert encoded.frames[-1] < frames
    assert encoded.frames.diff().max() <= model.config.merge_frames
    if merge == "none":
        assert encoded.frames.tolist() == list(range(frames))


def test_a_short_recording_without_speech_is_heard_again_after_silence(tiny, monkeypatch):
    """A word that begins with the first sample; times stay those of the recording."""
    model, processor = tiny
    samples, heard = noise(0.7), iter([False, False, True])
    expected = model.encode([samples], processor)
    monkeypatch.setattr(model, "_has_speech", lambda encoded: next(heard))
    encoded = model.encode([samples], processor)
    assert next(heard, None) is None
    assert encoded.duration == pytest.approx(expected.duration)
    assert len(encoded.best) == len(expected.best)
    assert not torch.equal(encoded.ctc, expected.ctc)


@pytest.mark.parametrize("seconds", [5.9, 6.5])
def test_without_room_for_silence_a_recording_is_heard_once(tiny, monkeypatch, seconds):
    model, processor = tiny
    monkeypatch.setattr(model, "_has_speech", lambda encoded: False)
    samples = noise(seconds)
    encoded = model.encode([samples], processor)
    monkeypatch.undo()
    assert_same_audio(encoded, model.encode([samples], processor))


def test_windows_encoded_together_are_those_encoded_one_by_one(tiny):
    model, processor = tiny
    samples = noise(13.21)
    (group,) = processor.batch_windows(processor.cut_windows([samples]), 8)
    with torch.no_grad():
        together = model.join_windows(model.encode_windows(group.features), group.spans, group.duration)
    assert_same_audio(together, model.encode([samples], processor))


def test_slices_join_to_the_whole(tiny):
    model, processor = tiny
    encoded = model.encode([noise(9.3)], processor)
    middle = encoded.slice(20, 60)
    assert middle.duration == pytest.approx(40 * 0.08)
    assert torch.equal(middle.best, encoded.best[20:60])
    inside = (encoded.frames >= 20) & (encoded.frames < 60)
    assert torch.equal(middle.frames + 20, encoded.frames[inside])
    assert torch.equal(middle.embeds, encoded.embeds[inside])
    assert_same_audio(concatenate([encoded.slice(0, 20), middle, encoded.slice(60)]), encoded)
    assert_same_audio(encoded.slice(-5, 10_000), encoded)
    beyond = encoded.slice(10_000)
    assert (len(beyond.best), len(beyond.frames), beyond.duration) == (0, 0, 0)


# The CTC head and the merged positions


def test_ctc_log_probs_are_the_heads(tiny):
    model, processor = tiny
    samples = noise(4)
    encoded = model.encode([samples], processor)
    with torch.no_grad():
        logits = model.encode_windows(processor.extract_features([samples])).logits[0, :50]
    expected = logits.log_softmax(-1)
    log_probs = model.compute_ctc_log_probs(encoded, model.ctc_tokens)
    torch.testing.assert_close(log_probs, expected[:, :-1])
    torch.testing.assert_close(encoded.blank_log_prob, expected[:, -1])
    torch.testing.assert_close(encoded.best_log_prob, expected.amax(-1))
    total = torch.cat([log_probs, encoded.blank_log_prob[:, None]], 1).logsumexp(1)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-5, rtol=0)
    ids = torch.cat([model.ctc_tokens, torch.tensor([model.config.blank_id])])
    assert torch.equal(encoded.best, ids[expected.argmax(-1)])


LETTERS = torch.eye(3)  # embeddings of a, b, c: what a position expects is how likely they are


def hand_made(path: str, letters: str = "abc") -> Frames:
    """One window whose best path is `path`, `_` being the blank; hidden state t is filled with t."""
    classes = torch.tensor([letters.index(sign) if sign in letters else len(letters) for sign in path])
    logits = 20.0 * torch.nn.functional.one_hot(classes, len(letters) + 1).float()[None]
    hidden = torch.arange(len(path), dtype=torch.float32)[None, :, None].expand(-1, -1, 32)
    return Frames(hidden, torch.zeros(1, len(path), 32), logits)


@pytest.mark.parametrize(
    ("path", "kept", "firsts"),
    [
        ("__aa_b__", (0, 8), [0, 2, 5]),  # a repeated letter is one spike
        ("aab_ba__", (0, 8), [0, 2, 4, 5]),  # another one after a blank, or at once, is the next
        ("________", (0, 8), [0, 4]),  # no run is longer than four frames
        ("_a______b_", (0, 10), [0, 1, 5, 8]),  # counted from the spike
        ("_aaaaaa_", (2, 8), [2, 6]),  # a window's margins are left out
        ("_b__a___", (3, 6), [3, 4]),
    ],
)
def test_frames_merge_at_spikes(speech_llm, path, kept, firsts):
    model, _ = speech_llm(merge_frames=4)
    keep = torch.zeros(1, len(path), dtype=torch.bool)
    keep[0, kept[0] : kept[1]] = True
    positions = model.projector.make_positions(hand_made(path), keep, LETTERS)
    assert positions.frames.tolist() == firsts
    assert positions.counts.tolist() == [len(firsts)]
    for row, (start, end) in enumerate(zip(firsts, [*firsts[1:], kept[1]], strict=True)):
        assert positions.hidden[row, 0] == pytest.approx((start + end - 1) / 2)
        run = path[start:end]
        heard = [run.count(letter) / max(len(run) - run.count("_"), 1) for letter in "abc"]
        assert positions.expected[row].tolist() == pytest.approx(heard, abs=1e-4)


def test_no_merge_keeps_every_frame(speech_llm):
    model, _ = speech_llm(merge="none")
    path = "_aab__cc"
    keep = torch.ones(1, len(path), dtype=torch.bool)
    keep[0, :2] = False
    positions = model.projector.make_positions(hand_made(path), keep, LETTERS)
    assert positions.frames.tolist() == list(range(2, 8))
    assert positions.hidden[:, 0].tolist() == list(range(2, 8))


def test_windows_merge_independently(speech_llm):
    model, _ = speech_llm(merge_frames=4)
    one, other = hand_made("_a___b"), hand_made("bb_c__")
    both = Frames(*(torch.cat([getattr(f, name) for f in (one, other)]) for name in ("hidden", "ctc", "logits")))
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[1, 5] = False
    positions = model.projector.make_positions(both, keep, LETTERS)
    parts = [
        model.projector.make_positions(frames, keep[row : row + 1], LETTERS) for row, frames in enumerate((one, other))
    ]
    assert positions.counts.tolist() == [3, 2]
    for name in ("expected", "hidden", "frames"):
        assert torch.equal(getattr(positions, name), torch.cat([getattr(part, name) for part in parts]))


def test_the_residual_starts_at_zero(tiny):
    """The LLM first reads the expected embeddings of what the CTC head heard, and nothing else."""
    model, processor = tiny
    assert isinstance(model.projector.residual, Residual)
    assert not any(parameter.any() for parameter in model.projector.residual.parameters())
    with torch.no_grad():
        frames = model.encode_windows(processor.extract_features([noise(3)]))
        positions = model.make_positions(frames, torch.tensor([[0, 38]]))
        embeds = model.embed_positions(positions)
        table = model.get_input_embeddings().weight[model.ctc_tokens]
        torch.testing.assert_close(embeds, positions.expected)
        weights = model.projector.make_positions(
            frames, torch.ones(1, 75, dtype=torch.bool), torch.eye(len(table))
        ).expected
        assert (weights.sum(-1) <= 1 + 1e-6).all()
        kept = (model.projector.make_positions(frames, torch.arange(75)[None] < 38, torch.eye(len(table)))).expected
        torch.testing.assert_close(positions.expected, kept @ table)


# Prompts, generation and loss


def test_prompts_and_formats(tiny):
    _, processor = tiny
    before, after = processor.tokenize_prompt()
    assert processor.decode(before, return_format="raw") == "<|im_start|>user\n"
    assert processor.decode(after, return_format="raw") == "<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(processor.tokenize_prompt("lower case")[1], return_format="raw").startswith(
        "lower case<|im_end|>"
    )
    ids = processor(text=" the end")["input_ids"] + [processor.end_token_id]
    assert processor.decode(ids, return_format="raw") == " the end<|im_end|>"
    assert processor.decode(ids) == "the end"
    assert processor.batch_decode([ids, ids[:1]]) == ["the end", "the"]
    assert processor.batch_decode(torch.tensor([ids]), return_format="raw") == [" the end<|im_end|>"]


def test_a_batch_of_two_lengths_generates_what_each_alone_does(tiny):
    model, processor = tiny
    recordings = [noise(10.3), noise(3.4, seed=1)]
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    together = model.generate(**processor(recordings), **options)
    assert together.shape == (2, 10)
    for row, recording in zip(together, recordings, strict=True):
        assert torch.equal(row, model.generate(**processor(recording), **options)[0])
    assert not torch.equal(together[0], together[1])  # the answers depend on the audio
    prompted = model.generate(**processor(recordings[0], "lower case"), **options)
    assert not torch.equal(prompted[0], together[0])


def test_generate_reads_the_positions_of_encode(tiny):
    model, processor = tiny
    samples = noise(10.3)
    (audio,) = model.embed_audio(**without_text(processor(samples)))
    torch.testing.assert_close(audio, model.encode([samples], processor).embeds)


def with_labels(processor, recordings, text=" the end"):
    """A batch whose labels are the text, after the prompts."""
    inputs = processor(recordings)
    ids = torch.tensor([processor.tokenizer(text)["input_ids"] + [processor.end_token_id]] * len(recordings))
    inputs["labels"] = torch.cat([torch.full_like(inputs["input_ids"], -100), ids], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def test_the_loss_is_that_of_the_labels(speech_llm):
    model, processor = speech_llm()
    recordings = [noise(8.3), noise(3.4, seed=1)]
    output = model(**with_labels(processor, recordings))
    log_probs = output.logits.log_softmax(-1)
    labels = with_labels(processor, recordings)["labels"]
    count = int((labels[0] != -100).sum())
    target = labels[:, -count:]
    expected = -log_probs[:, -count - 1 : -1].gather(-1, target[..., None]).mean()
    torch.testing.assert_close(output.loss, expected)
    alone = [model(**with_labels(processor, [recording])).loss for recording in recordings]
    torch.testing.assert_close(output.loss, torch.stack(alone).mean())
    output.loss.backward()
    for part in (model.encoder.layers[0].fc1, model.projector.up, model.projector.residual):
        assert part.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, processor: model.encode([], processor), "recording is empty"),
        (lambda model, processor: processor(np.zeros(0, np.float32)), "recording 0 of the batch has no samples"),
        (lambda model, processor: processor.decode([1], return_format="html"), "'transcription' or 'raw', not 'html'"),
        (
            lambda model, processor: SpeechLLMConfig(merge="mean"),
            "merge must be 'ctc', 'none' or 'decoder', not 'mean'",
        ),
        (
            lambda model, processor: model.generate(
                torch.tensor([[1, 2]]), **without_text(processor(noise(1))), max_new_tokens=1
            ),
            "exactly one audio placeholder, row 0 has 0",
        ),
    ],
)
def test_errors_are_one_line(tiny, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(*tiny)
    assert "\n" not in str(error.value)


# Transformers' conventions


def test_saved_and_loaded_is_the_same(speech_llm, tmp_path):
    model, processor = speech_llm(merge_frames=7, margin_seconds=0.5, max_pass_seconds=99.0)
    torch.nn.init.normal_(model.projector.residual.weight)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    loaded, reader = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(config, SpeechLLMConfig)
    assert isinstance(loaded, SpeechLLMForConditionalGeneration)
    assert isinstance(reader, SpeechLLMProcessor)
    assert (config.merge_frames, config.margin_seconds, config.max_pass_seconds) == (7, 0.5, 99.0)
    assert config.audio_token_id == reader.audio_token_id
    assert reader.tokenize_ctc("The End!") == processor.tokenize_ctc("The End!")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    samples = noise(10.3)
    assert_same_audio(loaded.encode([samples], reader), model.encode([samples], processor))
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**processor(samples), **options)
    assert torch.equal(loaded.generate(**reader(samples), **options), expected)


def encoders():
    """Tiny encoders of other kinds than the fixture's: (model, feature extractor, options of the speech LLM)."""
    whisper = WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_source_positions=300,
    )  # fmt: skip
    bert = Wav2Vec2BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, add_adapter=False,
    )  # fmt: skip
    parakeet = ParakeetEncoderConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        subsampling_conv_channels=8, dropout_positions=0.0,
    )  # fmt: skip
    return {
        "whisper": (WhisperModel, whisper, WhisperFeatureExtractor(chunk_length=6), {}),
        "wav2vec2-bert": (Wav2Vec2BertModel, bert, SeamlessM4TFeatureExtractor(), {}),
        "parakeet": (
            ParakeetEncoder, parakeet, ParakeetFeatureExtractor(), {"encoder_frame_seconds": 0.08, "stack_factor": 1},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2-bert", "parakeet"])
def test_any_encoder_composes_and_runs(kind, byte_tokenizer, tmp_path):
    architecture, config, feature_extractor, options = encoders()[kind]
    torch.manual_seed(0)
    pretrained = architecture(config)
    pretrained.save_pretrained(tmp_path / "encoder")
    feature_extractor.save_pretrained(tmp_path / "encoder")
    tokenizer = byte_tokenizer()
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    model, processor = compose(
        str(tmp_path / "encoder"), str(tmp_path / "llm"), ["The end of the day."], 3, window_seconds=6.0, **options
    )
    model.eval()
    assert len(model.ctc_tokens) == model.config.ctc_vocabulary_size == len(processor.ctc_tokens)
    encoder = pretrained.get_encoder() if kind == "whisper" else pretrained
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value)
    for name, value in llm.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name], value)
    assert model.config.frame_seconds == pytest.approx(0.08)
    assert model.config.audio_token_id == processor.audio_token_id
    assert model.language_model.generation_config.eos_token_id == processor.end_token_id

    samples = noise(10.3)
    encoded = model.encode([samples], processor)
    assert abs(len(encoded.best) - 10.3 / 0.08) < 2
    assert encoded.duration == pytest.approx(10.3, abs=1e-4)
    batch = processor([samples, samples[:48_000]])
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 2
    features = without_text(batch)
    for together, recording in zip(model.embed_audio(**features), (samples, samples[:48_000]), strict=True):
        alone = model.encode([recording], processor).embeds
        certain = len(alone) - 1  # beside a longer window, the last frame may be one of padding
        torch.testing.assert_close(together[:certain], alone[:certain])
        assert len(alone) <= len(together) <= len(alone) + 1


def test_the_end_token_survives_saving(speech_llm, tmp_path):
    """A base LLM ends texts with another token than the one that ends transcripts."""
    model, processor = speech_llm()
    model.config.text_config.eos_token_id = processor.end_token_id
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.language_model.generation_config.eos_token_id == processor.end_token_id


def test_context_layers_let_frames_see_one_another(speech_llm, tmp_path):
    plain, _ = speech_llm()
    model, _ = speech_llm(context_layers=2)
    states = torch.randn(1, 40, 32)
    changed = states.clone()
    changed[0, :4] += 1  # the first stacked frame
    moved = {}
    for name, found in (("plain", plain), ("context", model)):
        directions = found.get_ctc_embeddings()[1]
        with torch.no_grad():
            before, after = found.projector(states, directions), found.projector(changed, directions)
        moved[name] = (before.logits != after.logits).any(-1)[0]
    assert moved["plain"].tolist() == [True] + [False] * 9
    assert moved["context"].all()
    model.save_pretrained(tmp_path)
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again.projector(states, directions).logits, before.logits)


def test_context_layers_drop_out_only_while_they_train(speech_llm):
    model, _ = speech_llm(context_layers=1, context_dropout=0.5)
    states, directions = torch.randn(1, 40, 32), model.get_ctc_embeddings()[1]
    found = {}
    with torch.no_grad():
        for training in (True, False):
            model.projector.train(training)
            found[training] = [model.projector(states, directions).logits for _ in range(2)]
    assert not torch.equal(*found[True])
    assert torch.equal(*found[False])
