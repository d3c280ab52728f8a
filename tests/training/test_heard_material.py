"""Rows of what was heard, without audio: their parts, and stages that train on them."""

import difflib
import itertools
import json

import numpy as np
import pytest
import torch
from training_cases import Stopped, configuration, metrics, rows, stage, stop_after

from unique_asr.models import SHIPPED_MODELS, SpeechLLMProcessor, load
from unique_asr.models.speech_llm import packing
from unique_asr.training.finetune import finetune
from unique_asr.training.heard_material import HeardMaterial, RowStream
from unique_asr.training.heard_rows import HeardRow, HeardRowMaker
from unique_asr.training.positions import embed_heard
from unique_asr.training.text_sources import TextSource
from unique_asr.training.trainer import Trainer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
READ = {"train": {"language_model": 3e-3}, "tokens": 256, "lengths": [64, 128, 128]}
MASKS = [
    {"until": 0.5, "share": 0.7, "mode": "soft", "budget": [40, 48]},
    {"share": 0.7, "mode": "hard", "budget": [40, 48]},
]


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    """Makes rows of a file of ten lines; the listener's tokens are those of the LLM."""
    processor = SpeechLLMProcessor.from_pretrained(SHIPPED_MODELS["default"].folder)
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("".join(f"line {word} of the text is read aloud\n" for word in "abcdefghij"))

    def tokens(text):
        return processor.tokenizer(" " + text, add_special_tokens=False)["input_ids"]

    tokens.stop = len(processor.tokenizer)
    return HeardRowMaker([TextSource(file, tokens, weight=1.0)], [], processor)


def test_rows_are_texts_that_were_heard_nearly_as_they_are(maker):
    decode, same, count = maker.processor.tokenizer.decode, 0, 0
    random = np.random.default_rng(0)
    for _ in range(40):
        row = maker.make_row(400, stage(**READ), random)
        assert len(row) <= 400
        answer = decode(row.answer[:-1]).split()
        heard = decode(row.candidates[torch.arange(len(row.weights)), row.weights.argmax(1)]).split()
        matcher = difflib.SequenceMatcher(None, [w.lower().strip(".") for w in answer],
                                          [w.lower().strip(".") for w in heard], False)  # fmt: skip
        same, count = same + sum(block.size for block in matcher.get_matching_blocks()), count + len(answer)
        assert row.answer[-1] == maker.processor.end_token_id
        assert row.weights.sum(1).allclose(torch.ones(len(row.weights)))
    assert same / count > 0.85


def test_a_row_that_nothing_fits_into_is_named(maker):
    with pytest.raises(ValueError, match="stage stage: lengths has 10, too short for what is heard"):
        maker.make_row(10, stage(**READ), np.random.default_rng(0))


def test_recordings_have_their_share(maker):
    """Each recording as likely as any other, whatever its source; the rest of the rows is texts."""
    texts = list(maker.texts[0])
    recordings = [TextSource.__new__(TextSource) for _ in range(2)]
    for source, name, count in zip(recordings, ("few", "many"), (1, 3), strict=True):
        source.__dict__ |= vars(texts[0]) | {"name": name, "recordings": texts[0].recordings * count}
    both = HeardRowMaker(texts, recordings, maker.processor)
    drawn = []
    for name, source in [("texts", both.texts[0][0]), *((source.name, source) for source in recordings)]:
        source.draw_stretch = lambda *given, name=name: drawn.append(name) or TextSource.draw_stretch(texts[0], *given)
    random = np.random.default_rng(0)
    first = []
    for _ in range(300):
        drawn.clear()
        both.make_row(200, stage(**READ, recorded_share=0.4), random)
        first.append(drawn[0])
    del texts[0].__dict__["draw_stretch"]
    assert first.count("few") + first.count("many") == pytest.approx(120, abs=30)
    assert first.count("few") == pytest.approx(30, abs=18)


def test_micro_batches_depend_on_the_seed_and_their_number_alone(maker):
    config = stage(**READ)
    stream = iter(RowStream(maker, config, seed=3))
    drawn = [next(stream) for _ in range(4)]
    again = iter(RowStream(maker, config, seed=3, first=2))
    for (length, made), (same_length, same) in zip(drawn[2:], (next(again) for _ in range(2)), strict=True):
        assert length == same_length in READ["lengths"]
        assert len(made) == 256 // length
        assert [row.answer for row in made] == [row.answer for row in same]
        assert all(torch.equal(a.candidates, b.candidates) for a, b in zip(made, same, strict=True))
    assert RowStream(maker, config, seed=4).draw(0)[1][0].answer != drawn[0][1][0].answer
    length, only = RowStream(maker, stage(**{**READ, "lengths": [512]}), seed=0).draw(0)
    assert (length, len(only)) == (512, 1)  # longer than a step


# Training


@pytest.fixture
def make_trainer(listener, tmp_path):
    """Trainers of one tiny listening model, set back each time, on texts in letters."""
    model, processor = listener
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    file = tmp_path / "texts.txt"
    file.write_text("the cat\nsat on\na mat\nand so did\nthe dog\n")

    def tokens(text):
        return [2 * LETTERS.index(letter) for letter in text.lower() if letter in LETTERS[:25]]

    tokens.stop = 50

    def make(name="output", workers=0, **options):
        model.load_state_dict(begin)
        maker = HeardRowMaker([TextSource(file, tokens, weight=1.0)], [], processor)
        options = {"dtype": torch.float32, "log_every": 1, "log": lambda line: None, **options}
        return Trainer(model, HeardMaterial(model, maker, workers=workers), tmp_path / name, **options)

    return make


def test_the_loss_is_that_of_the_answers(make_trainer):
    """Of rows of odd lengths, against the model's own loss of each row alone."""
    material = make_trainer().material
    config = stage(**{**READ, "lengths": [128]})
    loss, measures = material.compute_loss(config, None)
    model, (_, drawn) = material.model, RowStream(material.maker, config, 0).draw(0)
    assert measures["tokens"] == 256
    table, total = model.get_input_embeddings().weight, 0
    for row in drawn:
        (heard,) = embed_heard(model, [(row.candidates, row.weights)])
        embeds = torch.cat([table[row.before], heard, table[row.after], table[row.answer]])[None]
        logits = model.language_model(inputs_embeds=embeds).logits[0]
        count = len(row.answer)
        total = total + torch.nn.functional.cross_entropy(
            logits[-count - 1 : -1], torch.tensor(row.answer), reduction="sum"
        )
    torch.testing.assert_close(loss, total / sum(len(row.answer) for row in drawn))


@pytest.mark.parametrize("attention", [None, MASKS], ids=["dense", "masked"])
def test_it_learns(make_trainer, attention):
    trainer = make_trainer()
    trainer.run_stage(stage(**READ, steps=40, attention=attention, slips=0.02, slips_share=0.5))
    losses = metrics(trainer)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_share_of_the_micro_batches_is_masked(make_trainer, monkeypatch):
    """Softly in the first half and hard in the second, each at one of the budgets; the rest is dense."""
    seen = []
    loss = HeardMaterial.compute_loss

    def watch(self, config, decoder, mark_decoded):
        attention = self.model.language_model.model.layers[0].self_attn.training_attentions[-1].config
        seen.append((attention.mode, attention.sparse.budget))
        assert mark_decoded == (attention.mode != "dense")
        return loss(self, config, decoder, mark_decoded)

    monkeypatch.setattr(HeardMaterial, "compute_loss", watch)
    torch.manual_seed(0)
    make_trainer().run_stage(stage(**READ, steps=60, attention=MASKS))
    halves = seen[:30], seen[30:]
    for half, mode in zip(halves, ("soft", "hard"), strict=True):
        assert {found for found, _ in half} == {mode, "dense"}
        assert 12 <= sum(found == mode for found, _ in half) <= 29
        assert {budget for found, budget in half if found == mode} == {40, 48}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_steps_see_the_weights_as_they_are_stored(make_trainer, monkeypatch, dtype):
    """And the optimiser goes on with weights that were never rounded."""
    name, bits = "language_model.model.layers.0.mlp.up_proj.weight", {"": 8, "language_model.model.layers": 4}
    seen, loss = [], HeardMaterial.compute_loss

    def watch(self, *given):
        weight = self.model.get_parameter(name).detach().float()
        stored = packing.dequantize(*packing.quantize(weight, 4), 4).to(dtype).float()
        seen.append(torch.allclose(weight, stored, rtol=1e-2, atol=1e-4))
        return loss(self, *given)

    monkeypatch.setattr(HeardMaterial, "compute_loss", watch)
    trainer = make_trainer(dtype=dtype, bits=bits)
    trainer.run_stage(stage(**READ, steps=8, round_last=0.5))
    assert seen == [False] * 4 + [True] * 4
    weight = trainer.model.get_parameter(name)
    assert weight.dtype == torch.float32
    assert not torch.allclose(packing.dequantize(*packing.quantize(weight, 4), 4), weight, rtol=1e-2, atol=1e-4)


def test_what_cannot_be_rounded_is_named(make_trainer):
    with pytest.raises(ValueError, match=r"stage stage: round_last .* give output\.bits"):
        make_trainer().run_stage(stage(**READ, round_last=0.5))
    with pytest.raises(ValueError, match="round_last is 2; give a share"):
        stage(**READ, round_last=2)


def test_first_layers_may_stay(make_trainer):
    trainer = make_trainer()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run_stage(stage(**READ, steps=2, frozen_layers=1))
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith(("language_model.model.layers.1.", "language_model.model.norm.")) for name in moved)
    assert trainer.trained == moved


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_has_the_same_losses(make_trainer, stop, workers):
    """With masks of several budgets, slips, dropout and rounding, cut in either half."""
    options = {"checkpoints": True, "save_minutes": 0.0, "bits": {"": 4}}
    stages = [stage("read", **READ, steps=8, attention=MASKS, slips=0.1, slips_share=0.5, position_dropout=0.1,
                    round_last=0.5)]  # fmt: skip
    torch.manual_seed(5)
    whole = make_trainer("whole", **options)
    whole.run(stages)
    torch.manual_seed(5)
    with pytest.raises(Stopped):
        make_trainer("cut", log=stop_after(stop), **options).run(stages)
    torch.manual_seed(99)
    resumed = make_trainer("cut", resume=True, workers=workers, **options)
    resumed.run(stages)
    again = {row["step"]: row["loss"] for row in rows(resumed)}
    assert again == {row["step"]: row["loss"] for row in rows(whole)}


def test_minutes_alone_end_a_stage(make_trainer):
    trainer = make_trainer()
    trainer.run_stage(stage(**READ, steps=None, minutes=1 / 60))
    assert 1 <= metrics(trainer, "elapsed")[-1] < 6
    assert metrics(trainer, "rate")[0] > 0.9 > 0.2 > metrics(trainer, "rate")[-1]
    with pytest.raises(ValueError, match="stage odd: nothing ends it"):
        stage("odd", steps=None)


def test_a_loss_that_is_no_number_leaves_its_rows(make_trainer):
    trainer = make_trainer()
    trainer.model.language_model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan near step 1"):
        trainer.run_stage(stage(**READ))
    (first, *_) = json.loads((trainer.output_dir / "not_a_number_0.json").read_text())["items"]
    assert first["answer"]


class CopiedWords:
    """Rows of plain tokens, `<bos> heard <mid> text <end>`: nothing but the LLM's own embeddings."""

    def make_row(self, length, config, random):
        words = random.integers(5, 9, (length - 3) // 2).tolist()
        nothing = torch.zeros(0, 1, dtype=torch.long)
        return HeardRow([1, *words, 2], nothing, nothing.float(), [], [*words, 3])


def test_what_is_heard_may_be_plain_tokens(llama, tmp_path):
    """A language model learns to copy them, dense and through a mask."""
    torch.manual_seed(0)
    trainer = Trainer(llama, HeardMaterial(llama, CopiedWords()), tmp_path, dtype=torch.float32, log_every=1,
                      log=lambda line: None)  # fmt: skip
    trainer.run_stage(
        stage(steps=60, train={"language_model": 3e-3}, tokens=512, lengths=[32, 64], attention=MASKS, llm_weight=0.0)
    )
    losses = metrics(trainer)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_packed_model_keeps_what_did_not_train(listener, manifest, tmp_path):
    """From the experiments: what was heard, then the page selection; only the trained weights' bytes change."""
    model, processor = listener
    packing.save_packed_model(model, processor, tmp_path / "start", {"": 8, "language_model.model.layers": 4})
    common = ["device=cpu", "log_every=1", "recipe.tokens=300", "recipe.lengths=[150,300]", "recipe.minutes=0.02"]
    heard = f"data.heard={tmp_path}/heard.pt"
    read = configuration("experiment=default_reading", f"init.model={tmp_path}/start", "output.changes_only=true",
                         f"data.manifests=[{manifest}]", heard, f"output.dir={tmp_path}/one", *common)  # fmt: skip
    finetune(read)
    finetune(configuration("experiment=default_selection", f"init.model={tmp_path}/one/read", "recipe.budget=[40,48]",
                           "recipe.frozen_layers=1", heard, f"output.dir={tmp_path}/two", *common))  # fmt: skip
    states = [packing.load_packed(tmp_path / name, torch.float32) for name in ("start", "one/read", "two/select")]
    changed = [
        {name for name, value in after.items() if not torch.equal(value, before[name])}
        for before, after in itertools.pairwise(states)
    ]
    assert all(name.startswith(("language_model.model.layers.", "language_model.model.norm.")) for name in changed[0])
    assert changed[1]
    assert all(name.startswith(("language_model.model.layers.1.", "language_model.model.norm.")) for name in changed[1])
    trained, _ = load(tmp_path / "two" / "select", device="cpu")
    assert trained.config.sparse_attention["budget"] == 40
    with pytest.raises(ValueError, match=r"output\.changes_only needs packed weights"):
        finetune(configuration("experiment=default_selection", f"init.model={tmp_path}/two", heard, *common))
