"""Features, augmentation, and the batches made of items."""

import numpy as np
import pytest
import torch
from training_cases import CLEAN
from transformers import SeamlessM4TFeatureExtractor, WhisperFeatureExtractor

from unique_asr.training.augment import AugmentConfig, Perturbation, add_noise, compute_log_mel, mask_spectrogram
from unique_asr.training.corpus import TrainingItem
from unique_asr.training.manifests import read_manifests
from unique_asr.training.speech_batches import SpeechBatcher


@pytest.fixture
def items(write_manifest):
    """An item of one window without case, and one of two windows with it."""
    (source,) = read_manifests([write_manifest()], {}, torch.device("cpu"), min_match=0.4)
    (cat, mat, clock), (baker,) = source.recordings
    short = TrainingItem([(source, cat, 0.0), (source, mat, 0.5)], cased=False)
    long = TrainingItem(
        [(source, baker, 0.0), (source, cat, 0.25), (source, clock, 0.0), (source, baker, 0.7)], cased=True
    )
    return [short, long]


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_that_of_the_feature_extractor(mels):
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=3)
    samples = [np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32) for n in (48_000, 20_001, 300)]
    expected = extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"]
    padded = torch.zeros(3, 48_000)
    for row, values in zip(padded, samples, strict=True):
        row[: len(values)] = torch.from_numpy(values)
    features = compute_log_mel(padded, torch.as_tensor(extractor.mel_filters, dtype=torch.float32))
    assert features.shape == (3, mels, 300)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


def test_a_batch_holds_the_items(tiny, items):
    model, processor = tiny
    batch = SpeechBatcher(model, processor, CLEAN, seed=0).make_batch(items)
    assert batch.windows.tolist() == [1, 2]
    assert batch.seconds == pytest.approx(sum(item.seconds for item in items), abs=1e-3)
    waves = []
    for item in items:
        parts = []
        for source, utterance, gap in item.pieces:
            parts += [np.zeros(int(gap * 16000)), source.audio[utterance.start : utterance.end].numpy() / 32768]
        waves.append(np.concatenate(parts).astype(np.float32))
    cuts = [window for wave in waves for window in processor.cut_windows([wave])]
    expected = processor.extract_features([samples for samples, _, _ in cuts])["input_features"]
    torch.testing.assert_close(batch.features["input_features"], expected, atol=1e-4, rtol=0)
    assert batch.spans.tolist() == [[first, last] for _, first, last in cuts]
    decoded = [processor.tokenizer.decode(model.ctc_tokens[target]) for target in batch.ctc_targets]
    assert [text.replace(" ", "") for text in decoded] == [
        "thecatsatonamat",
        "mrbellthebakerthecatsatit'steno'clockmrbellthebaker",
    ]


def test_the_texts_of_a_batch(tiny, items):
    model, processor = tiny
    batch = SpeechBatcher(model, processor, CLEAN, seed=0).make_batch(items)
    written = ["the cat sat on a mat", "Mr. Bell, the baker The cat sat. It's ten o'clock! Mr. Bell, the baker"]
    prompts = ["lower case", None]
    for row, (text, prompt) in enumerate(zip(written, prompts, strict=True)):
        before, after = processor.tokenize_prompt(prompt)
        assert batch.before[row] == before
        assert batch.after[row][: len(after)] == after
        assert batch.labels[row] == len(batch.after[row]) - len(after)
        labels = batch.after[row][-batch.labels[row] :]
        assert processor.decode(labels, return_format="raw") == text + "<|im_end|>"


def test_other_encoders_use_their_feature_extractor(speech_llm, items):
    model, processor = speech_llm(feature_extractor=SeamlessM4TFeatureExtractor())
    batch = SpeechBatcher(model, processor, CLEAN, seed=0).make_batch(items)
    assert batch.features["input_features"].shape[0] == 3
    assert batch.features["attention_mask"].shape == batch.features["input_features"].shape[:2]


def test_seeds_repeat_the_augmentation(tiny, items):
    batches = []
    for _ in range(2):
        torch.manual_seed(0)
        batches.append(SpeechBatcher(*tiny, AugmentConfig(), seed=3).make_batch(items))
    assert torch.equal(batches[0].features["input_features"], batches[1].features["input_features"])


def test_a_slower_item_is_its_interpolation(tiny, items, monkeypatch):
    model, processor = tiny
    batcher = SpeechBatcher(model, processor, CLEAN, seed=0)
    drawn = Perturbation(torch.tensor([0.75]), torch.ones(1), torch.zeros(1), torch.zeros(1, dtype=torch.bool))
    monkeypatch.setattr(Perturbation, "draw", lambda *_: drawn)
    item = TrainingItem(items[0].pieces[:1], cased=False)
    source, utterance, _ = item.pieces[0]
    samples = source.audio[utterance.start : utterance.end].numpy() / 32768
    slow = np.interp(np.arange(len(samples) * 4 // 3) * 0.75, np.arange(len(samples)), samples).astype(np.float32)
    batch = batcher.make_batch([item])
    assert batch.seconds == pytest.approx(item.seconds / 0.75, abs=1e-3)
    expected = processor.extract_features([slow])["input_features"]
    torch.testing.assert_close(batch.features["input_features"], expected, atol=1e-3, rtol=0)


def test_perturbations_stay_within_the_bounds():
    config = AugmentConfig(speed=0.1, gain_db=6, noise_share=0.5, snr_db=(10, 20))
    drawn = Perturbation.draw(500, config, torch.Generator().manual_seed(0))
    assert 0.9 <= drawn.speed.min() < 0.91 < 1.09 < drawn.speed.max() <= 1.1
    decibels = 20 * drawn.gain.log10()
    assert -6 <= decibels.min() < -5.9 < 5.9 < decibels.max() <= 6
    assert 0.4 < (drawn.noise > 0).float().mean() < 0.6
    levels = -20 * drawn.noise[drawn.noise > 0].log10()
    assert 9.99 <= levels.min() < 10.2 < 19.8 < levels.max() <= 20.01


@pytest.mark.parametrize("low", [False, True])
def test_noise_has_the_wanted_level(low):
    torch.manual_seed(0)
    windows = torch.zeros(2, 16000)
    windows[:, :12000] = torch.sin(torch.arange(12000) * 0.2)
    lengths, ones = torch.tensor([12000, 12000]), torch.ones(2)
    noisy = add_noise(windows, lengths, ones, torch.tensor([0.1, 0.0]), torch.tensor([low, low]))
    noise = (noisy - windows)[0, :12000]
    assert noise.square().mean().sqrt() / windows[0, :12000].square().mean().sqrt() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy[1], windows[1])
    assert noisy[0, 12000:].eq(0).all()
    louder = add_noise(windows, lengths, 2 * ones, 0 * ones, torch.tensor([low, low]))
    assert torch.equal(louder, 2 * windows)
    assert torch.isfinite(add_noise(0 * windows, lengths, ones, ones, torch.tensor([low, low]))).all()


def test_masks_hide_bands_and_spans():
    torch.manual_seed(0)
    features = torch.rand(4, 80, 600) + 1
    config = AugmentConfig(frequency_masks=2, frequency_mask_bins=20, time_masks=3, time_mask_frames=50)
    masked = mask_spectrogram(features, config)
    hidden = masked != features
    assert 0 < hidden.float().mean() < 2 * 20 / 80 + 3 * 50 / 600
    # A hidden value lies in a hidden band or in a hidden span.
    bands, spans = hidden.all(2, keepdim=True), hidden.all(1, keepdim=True)
    assert torch.equal(hidden, bands | spans)
    assert torch.equal(mask_spectrogram(features, CLEAN), features)
