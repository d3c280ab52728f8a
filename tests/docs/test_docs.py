"""README, CONTRIBUTING and the manual tell the truth: commands, options, snippets, links; and they leave nothing out.

Pages mark what a block holds: `sh` commands, which are checked; `python` code, which is run; `python no-run` code,
which needs weights from a hub and is only looked at; `text` and `json`, what programs print.
"""

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from unique_asr.application.overrides import quote_arguments
from unique_asr.attention import SparseAttentionConfig, SparsityCounters
from unique_asr.transcript import Segment, TranscriptionInfo, Word

ROOT = Path(__file__).parents[2]
CONF, DOCS = ROOT / "conf", ROOT / "docs"
MANUAL = sorted(DOCS.glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *MANUAL]
LINKED = [*PAGES, ROOT / "kernels" / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name(path):
    return str(path.relative_to(ROOT))


def page(path):
    """Its text without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def blocks(path, language):
    """Fenced blocks whose first line is exactly ```language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def every(items, where=PAGES):
    """A parameter for each item of each page."""
    return [
        pytest.param(path, item, id=f"{name(path)}-{number}")
        for path in where
        for number, item in enumerate(items(path), 1)
    ]


# Commands

PROGRAMS = {  # each a file of conf/
    "unique-asr": "transcribe",
    "unique-asr-app": "app",
    "unique-asr-finetune": "finetune",
    "unique-asr-evaluate": "evaluate",
    "unique-asr-generate": "generate",
    "scripts/transcribe.py": "transcribe",
    "scripts/finetune.py": "finetune",
    "scripts/evaluate.py": "evaluate",
    "scripts/generate.py": "generate",
    "scripts/benchmark.py": "benchmark",
    "unique_asr.app": "app",
}
TOOLS = {"pip", "docker", "ffmpeg", "python3", "ruff", "accelerate", ".ci/run"}  # everything else is ours, and checked
FREE_TEXT = {  # options that the programs take as they are written, not as Hydra's own syntax
    *("audio", "start", "end", "language", "hotwords", "decoding.prompt", "output.dir", "output.format"),
    *("prompt", "context", "system", "folders", "jobs"),
}


def commands(path):
    """Command lines as words: pipes and && part commands, and variables in front of one are left out."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = []
            for word in [*lexer, "&&"]:
                if word in ("|", "&&"):
                    if words:
                        found.append(words)
                    words = []
                elif words or not re.fullmatch(r"[A-Z_]+=\S*", word):
                    words.append(word)
    return found


@pytest.mark.parametrize(("path", "words"), every(commands))
def test_commands_exist(path, words):
    check_command([word.removeprefix(".venv/bin/") for word in words])


def check_command(words):
    program, *arguments = words
    if program == "make":
        check_make(arguments)
    elif program == "docker" and "unique-asr" in arguments[:-1]:
        image = arguments.index("unique-asr")
        if arguments[0] == "run" and arguments[image + 1 :]:
            check_command(arguments[image + 1 :])
    elif program in ("pip", "python") and "install" in arguments:
        check_extras(arguments)
    elif program == "accelerate":
        script = next(index for index, word in enumerate(arguments) if word.endswith(".py"))
        check_command(["python", *arguments[script:]])
    elif program == "python":
        check_python(arguments)
    elif program in PROGRAMS:
        assert program in PROJECT["scripts"], f"{program} is no console command of pyproject.toml"
        check_options(PROGRAMS[program], arguments)
    else:
        assert program in TOOLS, f"{program}: neither a program of this project nor one of {sorted(TOOLS)}"


def check_make(arguments):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        variable, equals, value = word.partition("=")
        if equals:
            assert re.search(rf"\$\(?\$?{variable}\b|^export {variable}$", makefile, re.MULTILINE), word
            if variable == "options":
                check_options({"transcribe": "transcribe", "app": "app"}[arguments[0]], shlex.split(value))
        else:
            assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"make has no target {word}"


def check_extras(arguments):
    for word in arguments:
        for extra in re.findall(r"^\.\[(.*)\]$", word):
            assert extra in PROJECT["optional-dependencies"], f"there is no extra {extra}"


def check_python(arguments):
    if arguments[0] == "-m":
        module, options = arguments[1], arguments[2:]
        assert find_spec(module), f"there is no module {module}"
        if module in PROGRAMS:
            check_options(PROGRAMS[module], options)
        if module == "pytest":
            for word in options:
                assert (ROOT / word).exists() or word in ("-m", "slow", "gpu"), word
        return
    script, options = arguments[0], arguments[1:]
    assert (ROOT / script).is_file(), f"there is no {script}"
    if script in PROGRAMS:
        check_options(PROGRAMS[script], options)
    else:
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in options:
            assert not word.startswith("--") or word == "--help" or f'"{word}"' in source, f"{script} has no {word}"


def check_options(program, words):
    """The options compose with conf/, each of them exists, and what is true or false stays so."""
    overrides, given = [], []
    for word in words:
        if word in ("--help", "-m", "..."):
            continue
        key, equals, value = word.partition("=")
        assert equals, f"{word} is no option: options are written name=value"
        if not (CONF / key).is_dir():
            given.append((key, value))
        elif value != "null" and not (CONF / key / f"{value}.yaml").is_file():
            assert key == "model", f"conf/{key}/{value}.yaml does not exist"
        overrides.append(word)
    overrides = quote_arguments(overrides, FREE_TEXT, {"model": "model.name_or_path"}, CONF)
    config = configuration(program, overrides)
    default = configuration(program, [word for word in overrides if (CONF / word.partition("=")[0]).is_dir()])
    for key, value in given:
        node = OmegaConf.select(default, key)
        assert key in options_of(default) or OmegaConf.is_config(node), f"{program} has no option {key}"
        assert not isinstance(node, bool) or value in ("true", "false"), f"{key}={value}"
    attention = OmegaConf.to_container(config).get("attention")
    if attention and program != "evaluate":  # where each setting may be a list
        SparseAttentionConfig(**attention)


def configuration(program, overrides=()):
    return composed(program, tuple(overrides))


@functools.cache
def composed(program, overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(program, overrides=list(overrides))


def options_of(config, prefix=""):
    """Return the dotted names of all options; a group without content counts as an option itself."""
    found = set()
    for key in config:
        if OmegaConf.is_missing(config, key) or not (OmegaConf.is_dict(config[key]) and config[key]):
            found.add(f"{prefix}{key}")
        else:
            found |= options_of(config[key], f"{prefix}{key}.")
    return found


# Python


@pytest.mark.parametrize(("path", "code"), every(lambda path: blocks(path, "python") + blocks(path, "python no-run")))
def test_snippets_import_what_exists(path, code):
    """Everything that is imported is there, and so are the attributes that are taken of it."""
    tree = ast.parse(code)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert hasattr(names[node.value.id], node.attr), f"{node.value.id} has no {node.attr}"


@pytest.mark.parametrize(("path", "code"), every(lambda path: blocks(path, "python")))
def test_snippets_run(path, code, llama, tmp_path, monkeypatch, capsys):
    """`talk.m4a` is a second of speech, `model` a tiny random Llama, `inputs` a prompt beyond the budget."""
    monkeypatch.chdir(tmp_path)
    samples, rate = soundfile.read(ROOT / "tests" / "data" / "nomads.opus", stop=2 * 48000, dtype="float32")
    soundfile.write(tmp_path / "talk.wav", samples, rate)
    (tmp_path / "talk.wav").rename(tmp_path / "talk.m4a")  # FFmpeg looks inside
    inputs = {"input_ids": torch.randint(1, 97, (1, 600), generator=torch.Generator().manual_seed(0))}
    space = {"model": llama, "inputs": inputs}
    exec(compile(code, name(path), "exec"), space)
    printed = capsys.readouterr().out
    if "print(" in code:
        assert printed.strip()
    if "sparse_attention(" in code:
        counters = space["sparse"].counters
        assert counters.sparse_steps > 0
        assert counters.share_of_pages_read < 1
    if "transcribe(" in code:
        info = space["info"]
        assert info.stop_reason in ("end", "silence")
        assert isinstance(space.get("samples"), np.ndarray) or info.coverage > 0.5


# Links

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def links(path):
    return [link for link in LINK.findall(page(path)) if not re.match(r"[a-z]+:", link)]


def anchors(path):
    """The anchors that GitHub gives to headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", page(path), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_links_lead_somewhere(path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{link}: there is no {target}"
        assert file.is_relative_to(ROOT), f"{link} leaves the repository"
        assert not anchor or anchor in anchors(file), f"{link}: no such heading; there are {anchors(file)}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_files_that_are_named_exist(path):
    """`unique_asr/audio.py`, `conf/model/`: what looks like a path of the repository is one. NAME stands for any."""
    tops = [entry.name for entry in ROOT.iterdir() if entry.is_dir()]
    for code in re.findall(r"`([^`\n]+)`", page(path)):
        top, slash, _ = code.partition("/")
        if slash and top in tops and "NAME" not in code and re.fullmatch(r"[\w./-]+", code):
            assert (ROOT / code).exists(), f"there is no {code}"


def test_index_links_every_page():
    linked = {link.partition("#")[0] for link in links(DOCS / "index.md")}
    assert {path.name for path in MANUAL} - {"index.md"} <= linked


# Size


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


# Nothing is left out

OPTION_PAGES = {  # where the options of a program are explained; the first is its own page
    "transcribe": ["transcribing.md", "sparse-attention.md"],
    "app": ["web-page-and-server.md", "transcribing.md", "sparse-attention.md"],
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
    """What `raise` and `warnings.append` show in each file: the longest piece of each message that does not vary."""
    for folder in USER_CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found = []
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                call = node.exc if isinstance(node, ast.Raise) else node
                if not isinstance(call, ast.Call) or not call.args:
                    continue
                if isinstance(node, ast.Raise) or ast.unparse(call.func).endswith("warnings.append"):
                    found += fixed_part(call.args[0])
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
    """Of each message in a table, a piece of eight characters or more, without CAPITALS and numbers, is in the code."""
    code, stale = literals(), []
    for line in page(DOCS / "troubleshooting.md").splitlines():
        for message in re.findall(r"^\| `(.*?)` \|", line):
            pieces = re.split(r"\b(?!JSON)[A-Z]{2,}|\b[A-Z]\b|'\w+'|\d|[();,]|\.\.\.", plain(message))
            if not any(len(piece.strip()) >= 8 and piece.strip() in code for piece in pieces):
                stale.append(message)
    assert not stale, f"nothing says any more: {stale}"


@pytest.mark.parametrize("found", messages())
def test_every_error_message_has_a_remedy(found):
    troubleshooting = plain(page(DOCS / "troubleshooting.md"))
    for message in found:
        if message == "has no attribute":  # of a module: Python's own words
            continue
        assert message in troubleshooting, f"docs/troubleshooting.md has no row for an error with {message!r}"
