"""A small manifest on disk, and a model that listens."""

import json

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig

from unique_asr.training.corpus import TrainingItem
from unique_asr.training.listening import CLEAN, decode_position_texts, hear
from unique_asr.training.manifests import read_manifests
from unique_asr.training.speech_batches import SpeechBatcher

SEGMENTS = {
    "first.wav": [
        {"start": 0.0, "end": 1.5, "text": "the cat sat", "cased": "The cat sat.", "match": 1.0},
        {"start": 1.5, "end": 2.25, "text": "on a mat", "cased": None, "match": 0.9},
        {"start": 2.5, "end": 4.0, "text": "it's ten o'clock", "cased": "It's ten o'clock!"},
    ],
    "second.wav": [{"start": 0.25, "end": 2.0, "text": "Mr. Bell, the baker", "match": 0.5}],
}


@pytest.fixture
def write_manifest(tmp_path):
    """Writes a manifest and noise for its files: {file: its segments} and the fields of every row."""

    def write(segments=SEGMENTS, seconds=4.0, name="train.jsonl", rate=16000, **fields):
        rows = []
        for number, (file, found) in enumerate(segments.items()):
            samples = np.random.default_rng(number).normal(0, 3000, int(seconds * rate)).astype(np.int16)
            soundfile.write(tmp_path / file, samples, rate)
            row = {"audio_filepath": file, "duration": seconds, "source": "news", "segments": found}
            rows.append({**row, **fields})
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


STOP = 50  # of a listener; ids from 51 on are no text
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def listener(speech_llm):
    """A tiny model that hears a letter or " the" of noise."""
    config = WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=60, pad_token_id=STOP, bos_token_id=STOP,
        eos_token_id=STOP, decoder_start_token_id=51, max_source_positions=300, max_target_positions=40, init_std=0.4,
    )  # fmt: skip
    settings = {"prompt": [51, 52], "stop": STOP, "heads": [[0, 1], [1, 0]]}
    model, processor = speech_llm(encoder=config, merge="decoder", listener=settings)
    texts = [" the" if token % 2 else LETTERS[token // 2] for token in range(STOP)]
    for token, text in enumerate(texts):
        model.listener.pieces[token, 0] = processor.tokenizer(text)["input_ids"][0]
    return model, processor


@pytest.fixture
def manifest(listener, write_manifest, tmp_path):
    """Two recordings of noise whose text is what is heard, the first in two utterances."""
    model, processor = listener
    path = write_manifest({"a.wav": [{"start": 0, "end": 9, "text": "x"}], "b.wav": None}, seconds=9.0, text="x")
    (source,) = read_manifests([path], {}, torch.device("cpu"))
    texts = decode_position_texts(model, processor)
    items = [TrainingItem([(source, utterances[0], 0.0)], cased=False) for utterances in source.recordings]
    found = hear(model, SpeechBatcher(*listener, CLEAN, 0), items)
    heard = ["".join(texts[token] for token in tokens).strip() for tokens, _, _ in found]
    words = heard[0].split()
    half = len(words) // 2
    segments = {
        "a.wav": [
            {"start": 0.0, "end": 4.0, "text": " ".join(words[:half])},
            {"start": 4.0, "end": 9.0, "text": " ".join(words[half:])},
        ],
        "b.wav": [{"start": 0.0, "end": 9.0, "text": heard[1]}],
    }
    return write_manifest(segments, seconds=9.0)
