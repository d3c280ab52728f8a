"""The pages of README and manual, taken apart; and conf/ as the programs see it."""

import functools
import re
import tomllib
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
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
