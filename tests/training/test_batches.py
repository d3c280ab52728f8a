"""Features, augmentation, and the batches made of items."""

import numpy as np
import pytest
import torch
from transformers import SeamlessM4TFeatureExtractor, WhisperFeatureExtractor

from unique_asr.training.augment import AugmentConfig, augment_waveform, log_mel, mask_spectrogram
from unique_asr.training.batches import Batcher
from unique_asr.training.corpus import Item, read_manifests

CLEAN = AugmentConfig(speed=0, gain_db=0, noise_share=0, frequency_masks=0, time_masks=0)


@pytest.fixture
def items(write_manifest):
    """An item of one window without case, and one of two windows with it."""
    (source,) = read_manifests([write_manifest()], {}, torch.device("cpu"), min_match=0.4)
    (cat, mat, clock), (baker,) = source.recordings
    short = Item([(source, cat, 0.0), (source, mat, 0.5)], cased=False)
    long = Item([(source, baker, 0.0), (source, cat, 0.25), (source, clock, 0.0), (source, baker, 0.7)], cased=True)
    return [short, long]


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_that_of_the_feature_extractor(mels):
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=3)
    samples = [np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32) for n in (48_000, 20_001, 300)]
    expected = extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"]
    padded = torch.zeros(3, 48_000)
    for row, values in zip(padded, samples, strict=True):
        row[: len(values)] = torch.from_numpy(values)
    features = log_mel(padded, torch.as_tensor(extractor.mel_filters, dtype=torch.float32))
    assert features.shape == (3, mels, 300)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


def test_a_batch_holds_the_items(tiny, items):
    model, processor = tiny
    batch = Batcher(model, processor, CLEAN, seed=0).batch(items)
    assert batch.windows.tolist() == [1, 2]
    assert batch.seconds == pytest.approx(sum(item.seconds for item in items), abs=1e-3)
    waves = []
    for item in items:
        parts = []
        for source, utterance, gap in item.pieces:
            parts += [np.zeros(int(gap * 16000)), source.audio[utterance.start : utterance.end].numpy() / 32768]
        waves.append(np.concatenate(parts).astype(np.float32))
    cuts = [window for wave in waves for window in processor.windows([wave])]
    expected = processor.features([samples for samples, _, _ in cuts])["input_features"]
    torch.testing.assert_close(batch.features["input_features"], expected, atol=1e-4, rtol=0)
    assert batch.spans.tolist() == [[first, last] for _, first, last in cuts]
    decoded = [processor.tokenizer.decode(model.ctc_tokens[target]) for target in batch.ctc_targets]
    assert [text.replace(" ", "") for text in decoded] == [
        "thecatsatonamat",
        "mrbellthebakerthecatsatit'steno'clockmrbellthebaker",
    ]


def test_the_texts_of_a_batch(tiny, items):
    model, processor = tiny
    batch = Batcher(model, processor, CLEAN, seed=0).batch(items)
    written = ["the cat sat on a mat", "Mr. Bell, the baker The cat sat. It's ten o'clock! Mr. Bell, the baker"]
    prompts = ["lower case", None]
    for row, (text, prompt) in enumerate(zip(written, prompts, strict=True)):
        before, after = processor.prompt(prompt)
        assert batch.before[row] == before
        assert batch.after[row][: len(after)] == after
        assert batch.labels[row] == len(batch.after[row]) - len(after)
        labels = batch.after[row][-batch.labels[row] :]
        assert processor.decode(labels, return_format="raw") == text + "<|im_end|>"


def test_other_encoders_use_their_feature_extractor(speech_llm, items):
    model, processor = speech_llm(feature_extractor=SeamlessM4TFeatureExtractor())
    batch = Batcher(model, processor, CLEAN, seed=0).batch(items)
    assert batch.features["input_features"].shape[0] == 3
    assert batch.features["attention_mask"].shape == batch.features["input_features"].shape[:2]


def test_seeds_repeat_the_augmentation(tiny, items):
    batches = []
    for _ in range(2):
        torch.manual_seed(0)
        batches.append(Batcher(*tiny, AugmentConfig(), seed=3).batch(items))
    assert torch.equal(batches[0].features["input_features"], batches[1].features["input_features"])


def test_waveforms_stay_within_the_bounds():
    random = torch.Generator().manual_seed(0)
    samples = torch.sin(torch.arange(16000) * 0.2)
    config = AugmentConfig(speed=0.1, gain_db=6, noise_share=0)
    lengths, levels = set(), []
    for _ in range(50):
        augmented = augment_waveform(samples, config, random)
        lengths.add(len(augmented))
        levels.append(20 * (augmented.std() / samples.std()).log10().item())
    assert min(lengths) >= 16000 / 1.1 - 1
    assert max(lengths) <= 16000 / 0.9 + 1
    assert len(lengths) > 40
    assert -6.2 < min(levels) < -4
    assert 4 < max(levels) < 6.2


def test_noise_has_the_wanted_level():
    random = torch.Generator().manual_seed(0)
    samples = torch.sin(torch.arange(16000) * 0.2)
    config = AugmentConfig(speed=0, gain_db=0, noise_share=1, snr_db=(10, 20))
    for _ in range(20):
        noise = augment_waveform(samples, config, random) - samples
        assert 9.9 < 20 * (samples.std() / noise.square().mean().sqrt()).log10() < 20.1
    assert torch.equal(augment_waveform(samples, CLEAN, random), samples)
    silence = augment_waveform(torch.zeros(1000), config, random)
    assert torch.isfinite(silence).all()


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
