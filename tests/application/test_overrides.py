"""Whatever a file is called, Hydra hands back that name."""

import sys

import pytest
from hydra import compose, initialize_config_dir

from unique_asr.application.overrides import conf_folder, quote_arguments, run

NAMES = [
    "talk.mp3",
    "two words.mp3",
    "talk (1).mp3",
    "a,b.mp3",
    "a=b.mp3",
    "=b.mp3",
    "été, c'est «ça».mp3",
    "会议 记录（全）.wav",
    "emoji 🎧.m4a",
    "~/talk.mp3",
    "~talk",
    "it's.mp3",
    'say "hi".mp3',
    "12345",
    "007.mp3",
    "1e5",
    "true",
    "nan",
    "nulls",
    "a[1].mp3",
    "{x}.mp3",
    "a${b}.mp3",
    r"a\${b}.mp3",
    r"back\slash.mp3",
    r"back\'slash.mp3",
    r"back\\'slash.mp3",
    "end\\",
    "end\\\\",
    "$HOME/a.mp3",
    "a:b.mp3",
    "#1.mp3",
    "a#b.mp3",
    "https://example.org/a.mp3?b=c&d=(e)",
    "line\nbreak.mp3",
    "tab\t.mp3",
    " leading",
    "trailing ",
    "talks/*.mp3",
    "@x",
    "-x",
    "\\",
    "a|b;c!<d>`e`",
]
LITERALS = ["[talk] 1.mp3", "[a,b]", "'tis.mp3", '"quoted".mp3', "''", "${x}.mp3"]  # file names if there is such a file


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """A function that composes a small configuration with one argument, in an empty folder."""
    conf = tmp_path / "conf"
    (conf / "model").mkdir(parents=True)
    (conf / "main.yaml").write_text("defaults:\n  - model: default\n  - _self_\naudio: null\noutput: {dir: null}\n")
    (conf / "model" / "default.yaml").write_text("name_or_path: default\n")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def compose_with(argument):
        quoted = quote_arguments(
            [argument], ["audio", "output.dir", "model.name_or_path"], {"model": "model.name_or_path"}, conf
        )
        with initialize_config_dir(str(conf), version_base="1.3"):
            return compose("main", quoted)

    return compose_with


@pytest.mark.parametrize("name", NAMES)
def test_names(composed, name):
    assert composed(f"audio={name}").audio == name


@pytest.mark.parametrize("name", LITERALS)
def test_names_in_hydras_syntax_if_the_file_exists(composed, tmp_path, name):
    (tmp_path / "work" / name).touch()
    assert composed(f"audio={name}").audio == name


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("[a.mp3,b (1).mp3]", ["a.mp3", "b (1).mp3"]),
        ("['a,b.mp3', c=d.mp3]", ["a,b.mp3", "c=d.mp3"]),
        ('["a b",12]', ["a b", "12"]),
        (r"['it\'s.mp3']", ["it's.mp3"]),
    ],
)
def test_lists(composed, value, names):
    assert composed(f"audio={value}").audio == names


def test_null_stays_null(composed):
    assert composed("output.dir=null").output.dir is None


def test_quotes_of_the_user_stay(composed):
    assert composed("audio='a, b.mp3'").audio == "a, b.mp3"


def test_prefixes_of_hydra(composed):
    assert composed("++audio=a (1).mp3").audio == "a (1).mp3"


def test_nested_keys(composed):
    assert composed("output.dir=out, (2)").output.dir == "out, (2)"


@pytest.mark.parametrize("model", ["./my model", "/models/a=b", "org/name"])
def test_a_path_in_the_place_of_a_group(composed, model):
    assert composed(f"model={model}").model.name_or_path == model


def test_groups_stay(composed):
    assert composed("model=default").model.name_or_path == "default"


@pytest.mark.parametrize("argument", ["--help", "attention.budget=(3)", "~audio", "+x=a,b"])
def test_other_arguments_stay(argument):
    assert quote_arguments([argument], ["audio"]) == [argument]


def test_configuration_is_found():
    assert (conf_folder() / "transcribe.yaml").is_file()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("attention.bugdet=3", "Could not override 'attention.bugdet'"),
        ("attention=none", "Could not find 'attention/none'"),
        ("device=a,b", "Ambiguous value"),
        ("talk.mp3", "did you mean audio=talk.mp3?"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(capsys, monkeypatch, argument, message):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = sys.argv
    with pytest.raises(SystemExit) as exit_:
        run(lambda config: pytest.fail("called"), "transcribe", [argument])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sys.argv is before


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    run(seen.append, "transcribe", ["audio=a (1).mp3"], ["audio"])
    assert seen[0].audio == "a (1).mp3"
    assert list(tmp_path.iterdir()) == []
