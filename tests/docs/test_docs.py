"""README, CONTRIBUTING and the manual tell the truth: commands, options, snippets and links.

Pages mark what a block holds: `sh` commands, which are checked; `python` code, which is run; `python no-run` code,
which needs weights from a hub and is only looked at; `text` and `json`, what programs print.
"""

import ast
import importlib
import re
import shlex
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
import torch
from manual import CONF, DOCS, LINKED, MANUAL, PAGES, PROJECT, ROOT, blocks, configuration, name, options_of, page
from omegaconf import OmegaConf

from unique_asr.application.overrides import quote_arguments
from unique_asr.attention import SparseAttentionConfig


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
    "unique-asr-server": "server",
    "unique-asr-finetune": "finetune",
    "unique-asr-evaluate": "evaluate",
    "unique-asr-generate": "generate",
    "scripts/transcribe.py": "transcribe",
    "scripts/finetune.py": "finetune",
    "scripts/evaluate.py": "evaluate",
    "scripts/generate.py": "generate",
    "scripts/benchmark.py": "benchmark",
    "unique_asr.app": "app",
    "unique_asr.server": "server",
}
TOOLS = {
    "pip",
    "curl",
    "docker",
    "ray",
    "ffmpeg",
    "python3",
    "ruff",
    "accelerate",
    ".ci/run",
}  # everything else is ours, and checked
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
                check_options(PROGRAMS.get(f"unique_asr.{arguments[0]}", arguments[0]), shlex.split(value))
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
    """`unique_asr/audio.py`, `conf/model/`: what looks like a path of the repository is one. NAME stands for any.

    Folders that git ignores hold what programs write, and are there on some machines only.
    """
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").open()}
    tops = [entry.name for entry in ROOT.iterdir() if entry.is_dir() and entry.name not in ignored]
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
