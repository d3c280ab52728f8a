"""What a listener hears of recordings and would hear of texts, and training on it."""

import itertools
import json

import numpy as np
import pytest
import soundfile
import torch
from training_cases import SOFT, Stopped, configuration, metrics, rows, stage, stop_after

from unique_asr.models import load
from unique_asr.training import listening as listening_module
from unique_asr.training import losses as losses_module
from unique_asr.training import speech_material as speech_module
from unique_asr.training.augment import AugmentConfig
from unique_asr.training.corpus import Corpus, TrainingItem, TrainingUtterance
from unique_asr.training.finetune import finetune
from unique_asr.training.listening import (
    CLEAN,
    can_listen_once,
    cut_stretch,
    decode_position_texts,
    hear,
    listen,
    load_or_listen,
)
from unique_asr.training.manifests import read_manifests
from unique_asr.training.speech_batches import SpeechBatcher
from unique_asr.training.speech_material import SpeechMaterial
from unique_asr.training.text_sources import ListenerTokens, TextSource
from unique_asr.training.trainer import Trainer


def test_positions_are_those_of_the_model(listener, manifest, tmp_path):
    """Expected embeddings of what is heard in a recording of several windows, those that inference gives the LLM."""
    model, processor = listener
    (source,) = read_manifests([manifest], {}, model.device)
    utterances = source.recordings[0]
    item = TrainingItem(
        [(source, TrainingUtterance(utterances[0].start, utterances[-1].end, "", None), 0.0)], cased=False
    )
    ((_, candidates, weights),) = hear(model, SpeechBatcher(*listener, CLEAN, 0), [item], windows=1)
    samples = soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
    encoded = model.encode([samples], processor)
    table = model.get_input_embeddings().weight
    found = model.listener.embed_expected(weights.float(), candidates, table)
    assert len(found) > 10
    torch.testing.assert_close(found, encoded.embeds, atol=2e-3, rtol=1e-3)  # weights were kept in 16 bits


def test_parts_have_the_text_that_was_heard(listener, manifest):
    model, processor = listener
    sources = read_manifests([manifest], {}, model.device)
    lines = []
    ((name, recordings),) = listen(model, processor, sources, log=lines.append).items()
    assert name == "news"
    assert [len(recording) for recording in recordings] == [2, 1]
    texts = decode_position_texts(model, processor)
    for recording, utterances in zip(recordings, sources[0].recordings, strict=True):
        for (text, seconds, candidates, weights), utterance in zip(recording, utterances, strict=True):
            assert text.lower() == utterance.text
            best = candidates[torch.arange(len(candidates)), weights.float().argmax(1)]
            assert "".join(texts[token] for token in best.tolist()).strip() == utterance.text
            assert seconds == pytest.approx(utterance.seconds)
    assert "100.0% of the words heard" in lines[-1]


def test_a_recording_is_cut_where_both_ends_were_heard():
    """Parts cover what was heard; a misheard end joins two utterances, and one that was not heard is left out."""
    texts = ("the cat sat", "on the mat", "far away now", "zebras hum quietly")
    stretch = [TrainingUtterance(0, 16000, text, None) for text in texts]
    heard = [" The", " cat", " sat", ".", " On", " the", " m", "at", ".", " Far", " away", " how"]
    parts, matched, words = cut_stretch(stretch, heard)
    assert [(part.text, part.first, part.end) for part in parts] == [("The cat sat.", 0, 1), ("On the mat.", 1, 2)]
    assert [heard[part.start : part.stop] for part in parts] == [heard[:4], heard[4:9]]
    assert (matched, words) == (8, 12)
    cased = [TrainingUtterance(0, 16000, text, text.upper().capitalize() + "!") for text in texts]
    assert [part.text for part in cut_stretch(cased, heard)[0]] == ["The cat sat!", "On the mat!"]


def test_it_listens_once(listener, manifest, tmp_path, monkeypatch):
    """What was heard is read from its file, until the data or the listener are others."""
    model, processor = listener
    reads, augment = [], AugmentConfig(speed=0.1)

    def read():
        reads.append(1)
        return read_manifests([manifest], {}, model.device)

    def sources(about="data", **options):
        path = tmp_path / "kept" / "heard.pt"
        return load_or_listen(model, processor, read, about, path, augment, log=lambda line: None, **options)

    (first,), (second,) = sources(), sources()
    assert len(reads) == 1
    assert [[part.text for part in each] for each in first.recordings] == [
        [part.text for part in each] for each in second.recordings
    ]
    (twice,) = sources(readings=2)
    assert len(reads) == 2
    assert len(twice.recordings) >= len(first.recordings)
    sources("other data")
    with torch.no_grad():
        model.listener.decoder.layer_norm.weight += 0.1
    sources("other data")
    assert len(reads) == 4
    (tmp_path / "kept" / "heard.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"heard\.pt: not a file of what was heard"):
        sources()


def hear_all(listener, manifest, tmp_path, **options):
    model, processor = listener
    return load_or_listen(
        model, processor, lambda: read_manifests([manifest], {}, model.device, log=lambda line: None), {},
        tmp_path / "heard.pt", CLEAN, log=lambda line: None, **options,
    )  # fmt: skip


def test_what_falls_out_is_counted(listener, write_manifest, tmp_path):
    """Of texts that are not those of the audio nothing is kept, and that is said in one line."""
    half = {"start": 4.0, "end": 9.0, "text": "B C D"}
    segments = {"a.wav": [{"start": 0.0, "end": 4.0, "text": 12 * "zebras "}, half], "b.wav": None}
    manifest = write_manifest(segments, seconds=9.0, text=" ")
    with pytest.raises(ValueError) as caught:
        hear_all(listener, manifest, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "data: no utterance to train on: of 3 utterances none is kept, 2 lie where fewer than 70% of the words were "
        'heard, 1 have no words (0% of all words were); where the text is "zebras zebras'
    )
    assert '...", "' in message
    assert "are the texts those of the audio" in message
    assert not (tmp_path / "heard.pt").exists()


def test_it_does_not_listen_on_where_nothing_is_kept(listener, write_manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(listening_module, "TRIAL_UTTERANCES", 3)
    monkeypatch.setattr(listening_module, "TRIAL_STRETCHES", 2)
    listened, hears = [], listening_module.hear

    def count(model, batcher, items, *rest):
        listened.append(len(items))
        return hears(model, batcher, items, *rest)

    monkeypatch.setattr(listening_module, "hear", count)
    manifest = write_manifest({f"{index}.wav": None for index in range(12)}, seconds=2.0, text="zebras hum quietly")
    with pytest.raises(ValueError, match="of 3 utterances, drawn from all 12, none is kept, 3 lie where"):
        hear_all(listener, manifest, tmp_path)
    assert listened == [3]


def test_what_is_heard_first_is_no_other_way_to_hear(listener, manifest, tmp_path, monkeypatch):
    """The trial takes stretches from everywhere; recordings keep their order, and each is heard once."""
    model, processor = listener
    sources = read_manifests([manifest, manifest, manifest], {}, model.device)
    whole = listen(model, processor, sources, readings=2, log=lambda line: None)
    monkeypatch.setattr(listening_module, "TRIAL_UTTERANCES", 1)
    monkeypatch.setattr(listening_module, "TRIAL_STRETCHES", 2)
    lines = []
    split = listen(model, processor, sources, readings=2, log=lines.append)
    assert [[[part[:2] for part in each] for each in found] for found in split.values()] == [
        [[part[:2] for part in each] for each in found] for found in whole.values()
    ]
    assert "listened to 100%" in lines[-1]
    assert "12 of 12 stretches kept" in lines[-1]


@pytest.mark.parametrize("processes", [1, 3])
def test_the_trial_is_large_enough_and_spread(processes):
    utterances = [1, 50] * 200
    trial, rest = listening_module._split_trial(range(400), utterances, processes)
    assert sorted(trial + rest) == list(range(400))
    assert rest == sorted(rest)
    assert len(trial) == -(-20 // processes)  # enough of them have 50 utterances
    assert max(trial) > 200
    trial, _ = listening_module._split_trial(range(400), [1] * 400, processes)
    assert len(trial) == -(-200 // processes)
    assert listening_module._split_trial(range(0), [], processes) == ([], [])


def test_what_the_filters_leave_is_said_before_listening(listener, write_manifest, tmp_path):
    segments = [{"start": 0, "end": 1, "text": "a", "match": 0.1}, {"start": 1, "end": 30, "text": "b"}]
    manifest = write_manifest({"a.wav": segments}, seconds=31.0)
    wanted = r"train on: left out are 1 misread, 1 longer than 28 s; check data\.manifests"
    with pytest.raises(ValueError, match=wanted):
        hear_all(listener, manifest, tmp_path)


def test_what_trains_decides_whether_once_is_enough(listener, speech_llm):
    model, _ = listener
    reads, hears = stage(train={"language_model": 1e-3}), stage(train={"language_model": 1e-3, "projector.down": 1e-3})
    assert can_listen_once(model, [reads])
    assert not can_listen_once(model, [reads, hears])
    assert not can_listen_once(model, [stage(train={"residual": 1e-3})])
    assert not can_listen_once(speech_llm()[0], [reads])
    torch.nn.init.ones_(model.projector.residual.bias)
    assert not can_listen_once(model, [reads])


READ = {"train": {"language_model": 3e-3}, "ctc_weight": 0.0, "seconds": (4.0, 9.0), "tokens": 128, "slips": 0.05}


def heard_trainer(listener, manifest, output, **options):
    model, processor = listener
    sources = load_or_listen(
        model, processor, lambda: read_manifests([manifest], {}, model.device), {}, output / "heard.pt", CLEAN,
        log=lambda line: None,
    )  # fmt: skip
    options = {"dtype": torch.float32, "log_every": 1, "log": lambda line: None, **options}
    return Trainer(model, SpeechMaterial(model, processor, Corpus(sources, seed=0), CLEAN), output, **options)


PACKED = {**READ, "tokens": 512, "pack": True}


@pytest.mark.parametrize(("mode", "read"), [("dense", READ), ("soft", READ), ("dense", PACKED), ("soft", PACKED)])
def test_the_llm_learns_from_what_was_heard(listener, manifest, tmp_path, mode, read):
    trainer = heard_trainer(listener, manifest, tmp_path / "output")
    trainer.run_stage(stage(**read, attention={**SOFT, "mode": mode}))
    losses = metrics(trainer)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    with pytest.raises(ValueError, match="trains the LLM alone"):
        trainer.run_stage(stage(**{**READ, "train": {"projector": 1e-3}}))


@pytest.mark.parametrize("read", [READ, PACKED], ids=["padded", "packed"])
def test_a_resumed_run_on_what_was_heard_has_the_same_losses(listener, manifest, tmp_path, read):
    model, _ = listener
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    stages, options = [stage("read", steps=6, **read)], {"checkpoints": True, "save_minutes": 0.0}
    torch.manual_seed(5)
    whole = heard_trainer(listener, manifest, tmp_path / "whole", **options)
    whole.run(stages)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(begin)
    torch.manual_seed(5)
    with pytest.raises(Stopped):
        heard_trainer(listener, manifest, tmp_path / "cut", log=stop_after(3), **options).run(stages)
    model.load_state_dict(begin)
    torch.manual_seed(99)
    resumed = heard_trainer(listener, manifest, tmp_path / "cut", resume=True, **options)
    resumed.run(stages)
    again = {row["step"]: row["loss"] for row in rows(resumed)}
    assert again == {row["step"]: row["loss"] for row in rows(whole)}
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


@pytest.fixture
def texts(tmp_path, byte_tokenizer):
    path = tmp_path / "texts.txt"
    path.write_text("the cat sat on the mat\nIt was ten o'clock.\n\nthe end\n")
    tokenizer = byte_tokenizer()

    def tokens(text):
        return tokenizer(" " + text)["input_ids"]

    tokens.stop = 200
    return TextSource(path, tokens, weight=2.0), tokenizer


def test_texts_are_heard_nearly_as_they_are(texts):
    source, tokenizer = texts
    assert source.lines == ["The cat sat on the mat.", "It was ten o'clock.", "The end."]
    random = np.random.default_rng(0)
    lines = [utterance for _ in range(40) for utterance in source.draw_stretch(cased=False, random=random)]
    same = 0
    for line in lines:
        candidates, weights = line.heard
        assert line.cased == line.text
        assert line.seconds == pytest.approx(len(line.text.split()) / 2.7, abs=1e-3)
        assert weights.sum(1).allclose(torch.ones(len(weights)))
        best = candidates[torch.arange(len(weights)), weights.argmax(1)]
        same += tokenizer.decode(best.tolist()).strip() == line.text
    assert 0.9 < same / len(lines) < 1
    assert any(line.text not in source.lines for line in lines)  # made-up words
    first, second, _ = source.lines
    follow = [after.text == second for before, after in itertools.pairwise(lines) if before.text == first]
    assert 0.5 < sum(follow) / len(follow) < 1


def test_packed_rows_have_little_padding(listener, texts, monkeypatch):
    """Half of the tokens are padding with an item a row; the tokenizer of bytes has three times as many as others."""
    monkeypatch.setattr(speech_module, "TOKENS_A_SECOND", 40)
    shares = {}
    for pack in (False, True):
        speech = SpeechMaterial(*listener, Corpus([texts[0]], seed=0), CLEAN)
        real = total = 0
        for _ in range(20):
            items, (rows, length) = speech.draw_items(stage(seconds=(3.0, 100.0), tokens=4096, pack=pack))
            lengths = [speech.count_tokens(item) for item in items]
            assert rows * length == 4096
            real += sum(lengths[item] for item in losses_module.pack_rows(lengths, rows, length, 8 if pack else length))
            total += rows * length
        shares[pack] = real / total
    assert shares[False] < 0.6
    assert shares[True] > 0.95


def test_seeds_repeat_the_texts(texts):
    source, _ = texts
    items = [Corpus([source], seed=3).draw_item(60, cased_share=1.0) for _ in range(2)]
    assert items[0].text == items[1].text
    assert 42 < items[0].seconds <= 60


def test_the_tokenizer_has_to_be_the_listeners(listener, tmp_path, byte_tokenizer):
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer is not the listener's, which has 60 tokens"):
        ListenerTokens(tmp_path, listener[0].listener)


def test_the_script_listens_trains_and_saves(listener, manifest, tmp_path, monkeypatch, capsys):
    """From a listening model on disk to one trained with a soft mask; a second run does not listen again."""
    model, processor = listener
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    overrides = [
        *("experiment=sparsity", "training=soft", "training.budget=40", f"init.model={tmp_path}/start", "device=cpu"),
        *(f"data.manifests=[{manifest}]", f"data.heard={tmp_path}/heard.pt", "recipe.steps=2", "recipe.tokens=128"),
        *("recipe.seconds=[4,9]", f"output.dir={tmp_path}/run", "log_every=1"),
    ]
    finetune(configuration(*overrides))
    assert "listened to 100%" in capsys.readouterr().out
    monkeypatch.setattr(listening_module, "listen", None)
    finetune(configuration(*overrides, f"output.dir={tmp_path}/again"))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("run", "again")
    ]
    assert losses[0] == losses[1]
    trained, _ = load(tmp_path / "run" / "adapt", device="cpu")
    assert trained.config.sparse_attention["budget"] == 40
    with pytest.raises(ValueError, match=r"data\.listener_tokenizer is missing"):
        finetune(configuration(*overrides, f"data.texts=[{manifest}]"))
