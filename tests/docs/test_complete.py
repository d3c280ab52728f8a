"""The manual leaves nothing out: every option, field, model, method and error message is explained, and no other."""

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from manual import CONF, DOCS, PROJECT, ROOT, configuration, name, options_of, page
from omegaconf import OmegaConf

from unique_asr.attention import SparsityCounters
from unique_asr.transcript import Segment, TranscriptionInfo, Word

OPTION_PAGES = {  # where the options of a program are explained; the first is its own page
    "transcribe": ["transcribing.md", "sparse-attention.md"],
    "app": ["web-page-and-server.md", "transcribing.md", "sparse-attention.md"],
    "server": ["web-page-and-server.md", "transcribing.md", "sparse-attention.md"],
    "finetune": ["fine-tuning.md"],
    "evaluate": ["evaluation.md", "sparse-attention.md"],
    "generate": ["sparse-attention.md"],
}


def code_of(*names):
    """What stands in backticks on these pages."""
    return {code for page_name in names for code in re.findall(r"`([^`\n]+)`", page(DOCS / page_name))}


@pytest.mark.parametrize("program", OPTION_PAGES)
def test_every_option_is_explained(program):
    config = configuration(program)
    missing = options_of(config) - {"hydra"} - code_of(*OPTION_PAGES[program])
    missing = {option for option in missing if not option.startswith(("output.bits.", "augment."))}
    assert not missing, f"{OPTION_PAGES[program][0]} does not explain {sorted(missing)}"


def option_rows(path):
    """The first column of every table that is headed `option`."""
    rows, inside = [], False
    for line in page(path).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[0] == "option")
        if inside:
            rows += re.findall(r"`([^`]+)`", cells[0])
    return rows


@pytest.mark.parametrize("program", OPTION_PAGES)
def test_explained_options_exist(program):
    """Each option of a page is one of a program that the page is about, or of an experiment."""
    known = {group.name for group in CONF.iterdir() if group.is_dir()}
    for other, pages in OPTION_PAGES.items():
        if OPTION_PAGES[program][0] in pages:
            known |= options_of(configuration(other)) | set(configuration(other))
    for experiment in CONF.glob("experiment/*.yaml") if program == "finetune" else ():
        config = configuration("finetune", [f"experiment={experiment.stem}"])
        known |= options_of(config) | {f"recipe.{option}" for option in config.get("recipe", ())}
    for option in option_rows(DOCS / OPTION_PAGES[program][0]):
        assert option in known, f"there is no option {option}"


@pytest.mark.parametrize("group", ["experiment", "study", "training"])
def test_every_choice_is_explained(group):
    named = code_of("fine-tuning.md", "evaluation.md")
    assert {path.stem for path in CONF.glob(f"{group}/*.yaml")} <= named


def test_every_method_is_explained():
    """Files of conf/attention, of which the rivals are for the evaluation."""
    methods = {path.stem for path in CONF.glob("attention/*.yaml")}
    assert methods <= code_of("evaluation.md") | {code.partition("=")[2] for code in code_of("sparse-attention.md")}


def test_every_field_of_the_json_file_is_explained():
    explained = code_of("transcribing.md")
    for kind in (Segment, Word, TranscriptionInfo, SparsityCounters):
        missing = {field.name for field in fields(kind)} - explained
        assert not missing, f"{kind.__name__}: {sorted(missing)}"
    assert set(TranscriptionInfo("talk.m4a").settings) <= explained


def test_every_stop_reason_is_explained():
    """Of a table whose rows are those reasons and no others."""
    from unique_asr.transcript import STOP_REASONS

    table = page(DOCS / "transcribing.md").partition("**`stop_reason`**")[2].strip().partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(STOP_REASONS)


def test_every_field_of_a_stage_is_explained():
    from unique_asr.training.stages import StageConfig

    assert {field.name for field in fields(StageConfig)} <= code_of("fine-tuning.md")


def test_every_console_command_is_explained():
    assert set(PROJECT["scripts"]) <= code_of("install.md")


def test_every_extra_is_explained():
    text = (DOCS / "install.md").read_text(encoding="utf-8")
    for extra in PROJECT["optional-dependencies"]:
        assert f'".[{extra}]"' in text, f"install.md does not explain the extra {extra}"


@pytest.mark.parametrize("path", sorted(CONF.glob("model/*.yaml")), ids=lambda path: path.stem)
def test_every_model_is_listed(path):
    listed = f"`{path.stem}`"
    assert listed in page(ROOT / "README.md")
    assert listed in page(DOCS / "models.md").partition("## The matrix")[2]
    hub_id = OmegaConf.load(path).name_or_path.partition("@")[0]
    assert hub_id == "default" or f"| {listed} | `{hub_id}` |" in page(DOCS / "models.md")


def test_the_matrix_has_the_numbers_that_the_package_computes():
    """Of each hub id: licence, one pass, what it gives, and two estimates of memory."""
    printed = subprocess.run(
        [sys.executable, "-m", "unique_asr.models.pretrained"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    written = {}
    for line in page(DOCS / "models.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8:
            written[cells[1]] = [cells[3], cells[4], cells[5], cells[6], cells[7]]
    computed = {}
    for line in printed.splitlines()[2:]:
        hub_id, licence, one_pass, _, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        computed[hub_id] = [licence, one_pass, *rest]
    assert computed
    assert {hub_id: written.get(hub_id) for hub_id in computed} == computed


# Error messages

USER_CODE = ("unique_asr", "app", "scripts", "kernels")


def messages():
    """What `raise`, `warnings.append` and `_warn` show in each file: the longest fixed piece of each message."""
    for folder in USER_CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found = []
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                call = node.exc if isinstance(node, ast.Raise) else node
                if not isinstance(call, ast.Call) or not call.args:
                    continue
                if isinstance(node, ast.Raise) or ast.unparse(call.func).endswith("warnings.append"):
                    found += fixed_part(call.args[0])
                elif ast.unparse(call.func).endswith("._warn"):
                    found += fixed_part(call.args[-1])
            if found:
                yield pytest.param(found, id=name(path))


def fixed_part(message):
    if isinstance(message, ast.JoinedStr):
        pieces = [value.value for value in message.values if isinstance(value, ast.Constant)]
    else:
        pieces = [message.value] if isinstance(message, ast.Constant) and isinstance(message.value, str) else []
    longest = max(map(plain, pieces), key=len, default="")
    return [longest] if longest else []


def plain(text):
    """Without backticks, the backslashes of tables, and the spaces around."""
    return " ".join(text.replace("`", "").replace(r"\|", "|").split())


def literals():
    """All strings of the code, f-strings with a gap for each value."""
    found = []
    for folder in USER_CODE:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return plain("\n".join(value for value in found if isinstance(value, str)))


def test_no_remedy_is_stale():
    """Of each message in a table, a piece of seven characters or more, without CAPITALS and numbers, is in the code."""
    code, stale = literals(), []
    for line in page(DOCS / "troubleshooting.md").splitlines():
        for message in re.findall(r"^\| `(.*?)` \|", line):
            pieces = re.split(r"\b(?!JSON)[A-Z]{2,}|\b[A-Z]\b|'\w+'|\d|[();,]|\.\.\.", plain(message))
            pieces = [piece.strip(" :") for piece in pieces]
            if not any(len(piece) >= 7 and piece in code for piece in pieces):
                stale.append(message)
    assert not stale, f"nothing says any more: {stale}"


@pytest.mark.parametrize("found", messages())
def test_every_error_message_has_a_remedy(found):
    troubleshooting = plain(page(DOCS / "troubleshooting.md"))
    for message in found:
        if message == "has no attribute":  # of a module: Python's own words
            continue
        assert message in troubleshooting, f"docs/troubleshooting.md has no row for an error with {message!r}"
