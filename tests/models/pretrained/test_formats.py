"""What speech LLMs write, whole, cut anywhere and malformed: complete utterances survive, however the text arrives."""

import pytest

from unique_asr.models.pretrained.formats import (
    BracketParser,
    JsonParser,
    ParsedUtterance,
    PlainParser,
    TextStream,
    parse_time,
)

MOSS = "[0.00][S01]Good morning.[1.50][1.62][S02]Good morning, [laughter] Ann.[4.00][1:04.5][S01] So? [1:06]"
VIBEVOICE = (
    'assistant\n[{"Start":0.0,"End":1.5,"Speaker":0,"Content":"Good morning."},'
    '{"Start":1.5,"End":2.0,"Content":"[Silence]"},'
    '{"Start":2,"End":4.25,"Speaker":1,"Content":"She said \\"no\\" {twice}, [really]."}]\n'
)
WHOLE = {
    MOSS: [
        ParsedUtterance("Good morning.", 0.0, 1.5, "S01"),
        ParsedUtterance("Good morning, [laughter] Ann.", 1.62, 4.0, "S02"),
        ParsedUtterance("So?", 64.5, 66.0, "S01"),
    ],
    VIBEVOICE: [
        ParsedUtterance("Good morning.", 0.0, 1.5, "S00"),
        ParsedUtterance("", 1.5, 2.0, None),
        ParsedUtterance('She said "no" {twice}, [really].', 2.0, 4.25, "S01"),
    ],
}
PARSERS = {MOSS: BracketParser, VIBEVOICE: JsonParser}


def parse(parser, text, size=1, close=False):
    found = [each for start in range(0, len(text), size) for each in parser.push(text[start : start + size])]
    return found + (parser.close() if close else [])


@pytest.mark.parametrize("text", WHOLE, ids=["moss", "vibevoice"])
@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_a_whole_answer_in_pieces_of_any_size(text, size):
    parser = PARSERS[text]()
    assert parse(parser, text, size) == WHOLE[text]
    assert parser.close() == []


@pytest.mark.parametrize("text", WHOLE, ids=["moss", "vibevoice"])
def test_a_cut_anywhere_keeps_the_complete_utterances(text):
    counts = []
    for end in range(len(text) + 1):
        found = parse(PARSERS[text](), text[:end])
        assert found == WHOLE[text][: len(found)]
        counts.append(len(found))
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3}


def test_an_utterance_comes_with_its_last_character():
    parser = BracketParser()
    assert parse(parser, "[0.00][S01]Yes.[1.5") == []
    assert parser.push("]") == [ParsedUtterance("Yes.", 0.0, 1.5, "S01")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0][S1]One.[2][S2]Two.[3]", [("One.", 0, 2, "S01"), ("Two.", 2, 3, "S02")]),  # no start
        ("[0][S1]One.[5.00][3.00]Two.[4]", [("One.", 0, 5, "S01"), ("Two.", 3, 4, None)]),  # no speaker
        ("[0][S1]One. [S2]Two.[3]", [("One.", 0, None, "S01"), ("Two.", 0, 3, "S02")]),  # no time between them
        ("[4][S1]Back.[2]", [("Back.", 4, 4, "S01")]),  # an end before the start
        ("noise [1.0][S1]One.[2]", [("noise", 0, 1, None), ("One.", 0, 2, "S01")][:1] + [("One.", 1, 2, "S01")]),
    ],
)
def test_malformed_brackets(text, expected):
    assert parse(BracketParser(), text) == [ParsedUtterance(*each) for each in expected]


def test_the_last_words_without_an_end_come_at_the_close_only():
    parser = BracketParser()
    assert parse(parser, "[0][S1]One.[2][2][S1]And so") == [ParsedUtterance("One.", 0.0, 2.0, "S01")]
    assert parser.close() == [ParsedUtterance("And so", 2.0, None, "S01")]


@pytest.mark.parametrize(
    "broken",
    [
        '{"Start":1.0,"End":2.0,"Speaker":0,"Content":"a "quoted" word"}',
        '{"Start":"1.0","End":"2.0","Speaker":"0","Content":"a "quoted" word"}',
        '{"Content":"a "quoted" word","Speaker":0,"Start":1.0,"End":2.0}',
    ],
)
def test_quotes_inside_the_text_of_an_object(broken):
    after = '{"Start":2.0,"End":3.0,"Speaker":0,"Content":"fine"}'
    found = parse(JsonParser(), f"[{broken},{after}]")
    assert found == [ParsedUtterance('a "quoted" word', 1.0, 2.0, "S00"), ParsedUtterance("fine", 2.0, 3.0, "S00")]


def test_an_object_beyond_repair_is_left_out():
    after = '{"Start":2.0,"End":3.0,"Speaker":0,"Content":"fine"}'
    for broken in ('{"Start":1.0,"End":', '{"Start":1.0,"End":2.0,"Speaker":0}', '{"Start":1.0,"Content":null}'):
        assert parse(JsonParser(), f"[{broken},{after}]") == [ParsedUtterance("fine", 2.0, 3.0, "S00")]
    timeless = '{"Start":"soon","End":2.0,"Content":"when?"}'
    assert parse(JsonParser(), timeless) == [ParsedUtterance("when?", None, None, None)]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It rained. He said no! Then", ["It rained.", "He said no!", "Then"]),
        ("language English<asr_text>It rained. Then", ["It rained.", "Then"]),
        ('The spoken content of the audio is "It rained. Then."', ["It rained.", "Then."]),
        ("The transcription of the audio is 'it rained'.", ["it rained"]),
        ("The rain in Spain.", ["The rain in Spain."]),
        ("今天下雨。好", ["今天下雨。", "好"]),
        ("", []),
    ],
)
def test_plain_text_by_sentences(text, expected, size):
    assert [each.text for each in parse(PlainParser(), text, size, close=True)] == expected


def test_sentences_do_not_wait_for_the_end():
    assert [each.text for each in parse(PlainParser(), "It rained. And then")] == ["It rained."]


def test_characters_of_several_tokens(byte_tokenizer):
    tokenizer = byte_tokenizer()
    text = "[0.5][S01]Çà et là 你好[2.0]"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(("value", "seconds"), [(7.56, 7.56), ("7.56", 7.56), ("1:23", 83.0), ("01:02:03.5", 3723.5)])
def test_times(value, seconds):
    assert parse_time(value) == seconds
