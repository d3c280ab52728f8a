"""The losses against torch's CTC and the model's own forward."""

import numpy as np
import pytest
import torch

from unique_asr.attention.huggingface_training import training_attention
from unique_asr.models.speech_llm.projector import Frames
from unique_asr.training.decoders import PlainDecoder
from unique_asr.training.losses import compute_ctc_loss, compute_llm_loss, pack_rows
from unique_asr.training.speech_batches import SpeechBatch


def frames(windows, length, classes=5):
    torch.manual_seed(0)
    logits = torch.randn(windows, length, classes + 1, requires_grad=True)
    return Frames(torch.zeros(windows, length, 4), torch.zeros(windows, length, 4), logits)


def batch(ctc_targets, spans, windows):
    return SpeechBatch({}, torch.tensor(spans), torch.tensor(windows), ctc_targets, [], [], [], 0.0)


def torch_ctc(logits, target):
    """Negative log-likelihood of one target over the frames [T, C + 1] given."""
    log_probs = logits.log_softmax(-1)[:, None]
    lengths = torch.tensor([len(logits)]), torch.tensor([len(target)])
    return torch.nn.functional.ctc_loss(
        log_probs, torch.tensor([target]), *lengths, blank=logits.shape[-1] - 1, reduction="sum"
    )


def test_ctc_is_torchs_a_token():
    heard = frames(1, 20)
    loss = compute_ctc_loss(heard, batch([[1, 2, 2, 0]], [(0, 17)], [1]))
    torch.testing.assert_close(loss, torch_ctc(heard.logits[0, :17], [1, 2, 2, 0]) / 4)


def test_ctc_leaves_cut_items_out():
    """The second item has two windows, so the text of each is unknown."""
    heard = frames(4, 20)
    targets = [[1, 2], [0, 1, 2, 3, 4], [3]]
    loss = compute_ctc_loss(heard, batch(targets, [(0, 9), (0, 18), (2, 14), (0, 20)], [1, 2, 1]))
    expected = torch_ctc(heard.logits[0, :9], [1, 2]) + torch_ctc(heard.logits[3], [3])
    torch.testing.assert_close(loss, expected / 3)
    loss.backward()
    moved = heard.logits.grad.abs().amax((1, 2)) > 0
    assert moved.tolist() == [True, False, False, True]


def test_ctc_of_the_impossible_is_zero():
    heard = frames(1, 3)
    loss = compute_ctc_loss(heard, batch([[1, 1, 1, 1]], [(0, 3)], [1]))
    loss.backward()
    assert loss == 0
    assert torch.isfinite(heard.logits.grad).all()
    assert torch.isfinite(compute_ctc_loss(frames(1, 3), batch([[]], [(0, 3)], [1])))


def test_ctc_spans_may_end_after_the_last_frame():
    heard = frames(1, 20)
    loss = compute_ctc_loss(heard, batch([[1]], [(0, 21)], [1]))
    torch.testing.assert_close(loss, torch_ctc(heard.logits[0], [1]))


@pytest.mark.parametrize("prompt", [None, "lower case"])
def test_the_llms_loss_is_that_of_forward(tiny, prompt):
    model, processor = tiny
    random = np.random.default_rng(0)
    recordings = [random.normal(0, 0.1, length).astype(np.float32) for length in (120_000, 40_000)]
    inputs = processor(recordings, prompt)
    transcripts = [processor.tokenizer(text)["input_ids"] + [processor.end_token_id] for text in ("the end", "a thee")]
    assert len(transcripts[0]) == 6
    assert len(transcripts[1]) == 4

    before, after = processor.tokenize_prompt(prompt)
    features = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    audio = model.embed_audio(**features)
    joined = batch([], [], [])
    joined.before = [before] * 2
    joined.after = [after + transcript for transcript in transcripts]
    joined.labels = [len(transcript) for transcript in transcripts]
    loss, tokens = compute_llm_loss(model, audio, joined)

    ids = torch.tensor([[*prompt_ids, *transcripts[0]] for prompt_ids in inputs.pop("input_ids").tolist()])
    ids[1, -6:] = torch.tensor([*transcripts[1], 0, 0])  # padded on the right
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    labels[0, -6:], labels[1, -6:-2], mask[1, -2:] = ids[0, -6:], ids[1, -6:-2], 0
    inputs.pop("attention_mask")
    expected = model(input_ids=ids, attention_mask=mask, labels=labels, **inputs).loss
    torch.testing.assert_close(loss, expected)
    assert tokens == 2 * max(len(a) + len(before) + len(b) for a, b in zip(audio, joined.after, strict=True))


def test_an_item_longer_than_a_step_is_named(tiny):
    model, processor = tiny
    before, after = processor.tokenize_prompt(None)
    joined = batch([], [], [])
    joined.before, joined.after, joined.labels = [before] * 2, [[*after, *[5] * 60], [*after, *[5] * 90]], [60, 90]
    audio = [torch.zeros(8, 32)] * 2
    length = len(before) + 8 + len(joined.after[0])
    with pytest.raises(
        ValueError, match=rf"an item has {length} tokens, 60 of them its transcript's, more than the 64"
    ):
        compute_llm_loss(model, audio, joined, (1, 64))
    _, tokens = compute_llm_loss(model, audio, joined, (2, 64))  # the shorter one alone
    assert tokens == length


def test_slips_are_read_and_not_written(tiny, monkeypatch):
    """The LLM reads another token of the transcript here and there; what it is to write stays."""
    model, processor = tiny
    before, after = processor.tokenize_prompt(None)
    transcript = list(range(5, 45))
    joined = batch([], [], [])
    joined.before, joined.after, joined.labels = [before], [after + transcript], [len(transcript)]
    seen = {}
    cross_entropy = torch.nn.functional.cross_entropy

    def decoder(embeds):
        seen["embeds"] = embeds[0, -len(transcript) :]
        return embeds

    def watched(logits, targets):
        seen["targets"] = targets
        return cross_entropy(logits, targets)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched)
    torch.manual_seed(0)
    compute_llm_loss(model, [torch.zeros(3, 32)], joined, decoder=decoder, slips=0.2)
    table = model.get_input_embeddings().weight
    read = [(table == vector).all(1).nonzero()[0].item() for vector in seen["embeds"]]
    assert seen["targets"].tolist() == transcript
    assert 1 <= sum(a != b for a, b in zip(read, transcript, strict=True)) <= 16
    assert set(read) <= set(transcript)


# Items that share a row


def several(processor, transcripts=(23, 9, 61, 40, 3), positions=(33, 70, 12, 57, 1)):
    """Positions of random items of odd lengths, and the LLM's side of their batch."""
    random = np.random.default_rng(0)
    before, after = processor.tokenize_prompt(None)
    joined = batch([], [], [])
    joined.before = [before] * len(transcripts)
    joined.after = [after + random.integers(5, 200, count).tolist() for count in transcripts]
    joined.labels = list(transcripts)
    return [torch.tensor(random.normal(0, 0.3, (count, 32))) for count in positions], joined


@pytest.fixture
def double(speech_llm):
    """Two query heads a KV head, in float64."""
    model, processor = speech_llm()
    return model.double(), processor


MASKS = [
    {"mode": "dense"},
    *({"mode": mode, "queries": queries} for mode in ("soft", "hard") for queries in ("decoded", "all")),
]


@pytest.mark.parametrize("attention", MASKS, ids=lambda values: "-".join(values.values()))
def test_items_that_share_rows_have_their_losses_and_gradients(double, attention):
    """Against one item a row, in dense stages with transformers' own attention."""
    model, processor = double
    audio, joined = several(processor)
    found = {}
    for page_size, shape in ((None, None), (8, (2, 301)), (8, (1, 533))):
        model.zero_grad()
        heard = [positions.clone().requires_grad_() for positions in audio]
        handle = training_attention(model.language_model, budget=40, **attention)
        if page_size is None and attention["mode"] == "dense":
            handle.restore()
        with handle:
            loss, tokens = compute_llm_loss(model, heard, joined, shape, mark_decoded=True, page_size=page_size)
            loss.backward()
        assert shape is None or tokens == shape[0] * shape[1]
        weights = [parameter.grad for parameter in model.language_model.model.layers.parameters()]
        found[shape] = [loss.detach(), *weights, *(positions.grad for positions in heard)]
    alone, *packed = found.values()
    assert all(gradient.abs().sum() > 0 for gradient in alone)
    for each in packed:
        torch.testing.assert_close(each, alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
def test_an_item_sees_nothing_of_the_others_in_its_row(double, mode):
    """The states of each, bit by bit, whatever the text and the positions of one of them are."""
    model, processor = double
    audio, joined = several(processor)
    decoder, states = PlainDecoder(model.get_decoder()), []

    def watched(*inputs):
        states.append(decoder(*inputs))
        return states[-1]

    lengths = [len(a) + len(b) + len(c) for a, b, c in zip(joined.before, audio, joined.after, strict=True)]
    places = pack_rows(lengths, 1, 533, 8)
    assert len(places) == len(audio)
    with training_attention(model.language_model, mode=mode, budget=40, queries="all"), torch.no_grad():
        compute_llm_loss(model, audio, joined, (1, 533), watched, page_size=8)
        audio[2] = audio[2] + 1
        joined.after[2] = [*joined.after[2][:-5], *[7] * 5]
        compute_llm_loss(model, audio, joined, (1, 533), watched, page_size=8)
    for item, (row, begin) in places.items():
        before, after = (each[row, begin : begin + lengths[item]] for each in states)
        assert torch.equal(before, after) == (item != 2)


def test_packing_takes_the_first_row_with_room():
    assert pack_rows([9, 20, 7, 30, 8], 2, 32, 8) == {0: (0, 0), 1: (1, 0), 2: (0, 16), 4: (0, 24)}
    assert pack_rows([9, 20, 7], 2, 32, 32) == {0: (0, 0), 1: (1, 0)}
    assert pack_rows([33], 1, 32, 8) == {}
