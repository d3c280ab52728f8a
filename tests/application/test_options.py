"""Options that do not fit are told in one line before anything is loaded, and no is not yes."""

from pathlib import Path

import pytest


@pytest.mark.parametrize("word", ["no", "off", "False", "0"])
def test_no_is_no(talk, command, word):
    Path("talk.txt").write_text("corrected by hand\n")
    command("audio=talk.opus", f"output.overwrite={word}")
    assert Path("talk.txt").read_text() == "corrected by hand\n"


@pytest.mark.parametrize("word", ["yes", "on", "true"])
def test_yes_is_yes(talk, command, word):
    Path("talk.txt").write_text("of another program\n")
    assert command("audio=talk.opus", f"output.overwrite={word}")[0] == 0
    assert Path("talk.txt").read_text() != "of another program\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("output.overwrite=x", "output.overwrite=x: give true or false"),
        ("resume=maybe", "resume=maybe: give true or false"),
        ("vad=2", "vad=2: give true or false"),
        ("quiet=null", "quiet=null: give true or false"),
        ("output.format=null", "output.format=null: choose from txt"),
        ("output.dir=[a]", "output.dir=['a']: give one folder"),
        ("fetch=null", "fetch=null: is a group of options"),
        ("attention=null", "attention=null: choose from"),
        ("decoding.max_pass_seconds=x", "decoding.max_pass_seconds=x: give a positive number of seconds"),
        ("decoding.prefill_chunk=x", "prefill_chunk=x: give a whole number of audio positions"),
        ("attention.budget=x", "attention.budget is 'x': give a whole number"),
        ("attention.budget=[1]", "attention.budget is [1]: give a whole number"),
        ("attention.sink_pages=null", "attention.sink_pages is None: give a whole number"),
        ("attention.scale=nan", "attention.scale is nan: give a finite number"),
        ("attention.super_pages=4", "attention.super_pages is 4 without super_page_size"),
        ("attention.dense_layers=-1", "attention.dense_layers is -1: give 0 or more layers"),
        ("start=-0:05", "-0:05 is not a time"),
    ],
)
def test_what_does_not_fit_is_one_line(talk, command, option, message):
    code, out, err = command("audio=talk.opus", option)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_file_whose_name_begins_with_a_tilde(talk, command):
    talk.rename("~tilde.opus")
    assert command("audio=~tilde.opus")[0] == 0
    assert Path("~tilde.txt").read_text()
    code, _, err = command("audio=~nobody9/talk.opus")
    assert (code, err) == (1, "error: ~nobody9/talk.opus: no such file\n")
