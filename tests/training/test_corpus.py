"""Manifests and shards to sources, and the items drawn from them."""

import itertools
import json

import numpy as np
import pytest
import soundfile
import torch

from unique_asr.data import Recording, Span
from unique_asr.data import Utterance as Spoken
from unique_asr.training import manifests as manifests_module
from unique_asr.training.corpus import Corpus, Source, TrainingUtterance
from unique_asr.training.manifests import read_manifests, read_synthetic

CPU = torch.device("cpu")


def texts(source):
    return [[utterance.text for utterance in recording] for recording in source.recordings]


def test_a_manifest_becomes_a_source(write_manifest, tmp_path):
    (source,) = read_manifests([write_manifest()], {"news": 2.5}, CPU, min_match=0.4)
    assert (source.name, source.weight) == ("news", 2.5)
    assert texts(source) == [["the cat sat", "on a mat", "it's ten o'clock"], ["Mr. Bell, the baker"]]
    files = [soundfile.read(tmp_path / name, dtype="int16")[0] for name in ("first.wav", "second.wav")]
    assert source.audio.dtype == torch.int16
    assert np.array_equal(source.audio.numpy(), np.concatenate(files))
    last = source.recordings[1][0]
    assert np.array_equal(source.audio[last.start : last.end].numpy(), files[1][4000:32000])
    assert last.seconds == 1.75
    assert source.hours == pytest.approx((1.5 + 0.75 + 1.5 + 1.75) / 3600)


def test_case_comes_from_cased_or_from_the_text(write_manifest):
    (source,) = read_manifests([write_manifest()], {}, CPU, min_match=0.4)
    cased = [[utterance.cased for utterance in recording] for recording in source.recordings]
    assert cased == [["The cat sat.", None, "It's ten o'clock!"], ["Mr. Bell, the baker"]]
    # An utterance whose case is unknown interrupts a recording.
    assert [[utterance.cased for utterance in run] for run in source.cased_runs] == [
        ["The cat sat."],
        ["It's ten o'clock!"],
        ["Mr. Bell, the baker"],
    ]


def test_misread_long_and_overhanging_segments_are_left_out(write_manifest):
    segments = [
        {"start": 0, "end": 1, "text": "misread", "match": 0.79},
        {"start": 1, "end": 2, "text": "kept", "match": 0.8},
        {"start": 2, "end": 30.5, "text": "long"},
        {"start": 30, "end": 31.05, "text": "to the end"},
        {"start": 30, "end": 32, "text": "beyond the end"},
    ]
    (source,) = read_manifests([write_manifest({"a.wav": segments}, seconds=31)], {}, CPU)
    assert texts(source) == [["kept", "to the end"]]
    assert source.recordings[0][1].end == 31 * 16000


def test_rows_without_segments_are_one_utterance(write_manifest):
    (source,) = read_manifests([write_manifest({"a.wav": None}, text="all of it")], {}, CPU)
    assert texts(source) == [["all of it"]]
    assert source.recordings[0][0].seconds == 4


def test_sources_of_several_manifests(write_manifest):
    paths = [write_manifest(name="a.jsonl"), write_manifest({"b.wav": None}, name="b.jsonl", source="talks", text="b")]
    assert [source.name for source in read_manifests(paths, {}, CPU)] == ["news", "talks"]
    assert [source.name for source in read_manifests(paths, {"news": 0}, CPU)] == ["talks"]


def test_errors_name_the_file(write_manifest, tmp_path):
    path = write_manifest()
    with pytest.raises(ValueError, match=r"none\.jsonl: no such manifest"):
        read_manifests([tmp_path / "none.jsonl"], {}, CPU)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: the manifest is empty"):
        read_manifests([path, tmp_path / "empty.jsonl"], {}, CPU)
    (tmp_path / "second.wav").unlink()
    with pytest.raises(ValueError, match=r"second\.wav: missing audio \(1 of 2 files"):
        read_manifests([path], {}, CPU)
    path = write_manifest()
    (tmp_path / "first.wav").write_bytes(b"no audio at all")
    with pytest.raises(ValueError, match=r"first\.wav"):
        read_manifests([path], {}, CPU)


def test_other_rates_and_channels_are_read_too(write_manifest, tmp_path):
    path = write_manifest({"a.wav": None}, text="all of it")
    times = np.arange(4 * 44100) / 44100
    tone = np.sin(2 * np.pi * 300 * times) / 2
    soundfile.write(tmp_path / "a.wav", np.stack([tone, 0 * tone], 1), 44100)
    (source,) = read_manifests([path], {}, CPU)
    assert len(source.audio) == pytest.approx(64000, abs=200)
    assert source.audio.abs().max().item() == pytest.approx(32767 / 4, rel=0.02)  # the mean of both


def test_hub_data_sets_are_read(write_manifest, tmp_path, monkeypatch):
    write_manifest({"a.wav": None}, text="x")
    asked = []

    def read_hub(name):
        asked.append(name)
        span = Span(tmp_path / "a.wav", 0.0, 4.0)
        return [Recording("0", (span,), (Spoken(0.0, 4.0, "from the hub"),), source=name)]

    monkeypatch.setattr(manifests_module, "read_hub", read_hub)
    sources = read_manifests(["owner/data:clean", "owner/data:clean:dev"], {}, CPU)
    assert asked == ["owner/data:clean:train", "owner/data:clean:dev"]
    assert [source.name for source in sources] == ["owner/data:clean", "owner/data:clean:dev"]
    assert texts(sources[0]) == [["from the hub"]]


def test_what_is_left_out_is_counted(write_manifest):
    segments = [
        {"start": 0, "end": 1, "text": "misread", "match": 0.1},
        {"start": 1, "end": 2, "text": "kept"},
        {"start": 2, "end": 30.5, "text": "long"},
        {"start": 29, "end": 33, "text": "beyond"},
    ]
    lines = []
    read_manifests([write_manifest({"a.wav": segments}, seconds=31)], {}, CPU, log=lines.append)
    assert lines == ["segments left out: 1 misread, 1 longer than 28 s, 1 outside their audio"]


def test_synthetic_speakers_are_recordings(tmp_path):
    shards = {"0.npy": np.arange(40_000, dtype=np.int16), "1.npy": np.arange(20_000, dtype=np.int16) + 100}
    for name, samples in shards.items():
        np.save(tmp_path / name, samples)
    rows = [
        ("1.npy", 4_000, 16_000, "anna", "one"),
        ("0.npy", 0, 16_000, "ben", "Two."),
        ("0.npy", 20_000, 8_000, "anna", "three"),
    ]
    keys = ("shard", "offset", "samples", "speaker", "text")
    index = [{**dict(zip(keys, row, strict=True)), "source": "made"} for row in rows]
    index[2]["cased"] = "Three?"
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in index))
    (source,) = read_synthetic(tmp_path, {"made": 3}, CPU)
    assert source.weight == 3
    assert texts(source) == [["one", "three"], ["Two."]]
    assert [[utterance.cased for utterance in run] for run in source.cased_runs] == [["Three?"], ["Two."]]
    one = source.recordings[0][0]
    assert np.array_equal(source.audio[one.start : one.end].numpy(), shards["1.npy"][4_000:20_000])
    with pytest.raises(ValueError, match=r"index\.jsonl: no such file; make it with scripts/recipes/synthesize\.py"):
        read_synthetic(tmp_path / "none", {}, CPU)


def source(name="news", weight=1.0, recordings=4, utterances=20, seconds=2.0, cased_every=2):
    """Recordings of utterances named by recording and number, every second recording with case."""
    samples = int(seconds * 16000)
    made = []
    for r in range(recordings):
        starts = [(r * utterances + u) * samples for u in range(utterances)]
        cased = r % cased_every == 0
        made.append(
            [
                TrainingUtterance(start, start + samples, f"r{r} u{u}", f"R{r} u{u}." if cased else None)
                for u, start in enumerate(starts)
            ]
        )
    return Source(name, torch.zeros(recordings * utterances * samples, dtype=torch.int16), made, weight)


@pytest.mark.parametrize("seconds", [3, 10, 29, 100])
def test_items_have_the_wanted_length(seconds):
    corpus = Corpus([source()], seed=0)
    for _ in range(20):
        item = corpus.draw_item(seconds, cased_share=0.5)
        assert 0.65 * seconds < item.seconds <= seconds
        assert item.pieces[0][2] == 0
        assert all(0 <= gap <= 0.8 for _, _, gap in item.pieces)


def test_items_are_consecutive_utterances():
    corpus = Corpus([source()], seed=0, max_gap_seconds=0)
    item = corpus.draw_item(16, cased_share=0)
    found = [utterance for _, utterance, _ in item.pieces]
    jumps = sum(after.start != before.end for before, after in itertools.pairwise(found))
    assert jumps <= 1  # to a further recording, where the first was too short
    assert item.seconds == pytest.approx(sum(utterance.seconds for utterance in found))


def test_texts_follow_the_case():
    corpus = Corpus([source(cased_every=2)], seed=0)
    items = [corpus.draw_item(8, cased_share=0.5) for _ in range(40)]
    assert {item.cased for item in items} == {True, False}
    for item in items:
        utterances = [utterance for _, utterance, _ in item.pieces]
        if item.cased:
            assert item.text == " ".join(utterance.cased for utterance in utterances)
            assert item.prompt is None
        else:
            assert item.text == " ".join("r u" for _ in utterances)  # digits are not spelt
            assert item.prompt == "lower case"


def test_without_case_all_items_are_lower_case():
    plain = Source("plain", torch.zeros(16000), [[TrainingUtterance(0, 16000, "a", None)]], weight=1.0)
    assert not Corpus([plain], seed=0).draw_item(1, cased_share=1.0).cased


def test_sources_are_drawn_by_weight_and_seeds_repeat():
    sources = [source("often", weight=3), source("seldom", weight=1), source("never", weight=5, recordings=0)]
    draws = []
    for _ in range(2):
        corpus = Corpus(sources, seed=7)
        draws.append([corpus.draw_item(2, cased_share=0.5).pieces[0][0].name for _ in range(400)])
    assert draws[0] == draws[1]
    assert draws[0].count("often") == pytest.approx(300, abs=40)
    assert draws[0].count("never") == 0


def test_nothing_to_draw_from_names_the_options():
    with pytest.raises(ValueError, match=r"no utterance to train on; check data\.manifests"):
        Corpus([source(recordings=0)], seed=0).draw_item(5, 0.5)
