"""Hydra for applications: file names as they are, errors in one line, nothing left behind in the working directory."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

LITERAL_STARTS = ("'", '"', "${")  # the user wrote Hydra's own syntax


def conf_folder() -> Path:
    """conf/ of the checkout, or the copy of it inside the installed package."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "conf"
    return checkout if checkout.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "conf"


def quote_arguments(
    arguments: Sequence[str], keys: Iterable[str], groups: Mapping[str, str] | None = None, conf: Path | None = None
) -> list[str]:
    """Quote the values of `keys`, so that Hydra takes `audio=50% (live), «été».mp3` for a file name.

    `groups` maps a configuration group to the key that a path given in its place means: {"model": "model.name_or_path"}
    makes `model.name_or_path='./my model'` of `model=./my model`, and leaves `model=default`, the name of a file in
    conf/model/.
    """
    keys = set(keys)
    groups = groups or {}
    quoted = []
    for argument in arguments:
        match = re.fullmatch(r"(\+{0,2})([\w./@-]+)=(.*)", argument, re.DOTALL)
        if match is None:
            quoted.append(argument)
            continue
        prefix, key, value = match.groups()
        if key in groups and not (conf / key / f"{value.removesuffix('.yaml')}.yaml").is_file():
            key = groups[key]
        elif key not in keys:
            quoted.append(argument)
            continue
        quoted.append(f"{prefix}{key}={_quote_value(value)}")
    return quoted


def _quote_value(value: str) -> str:
    if value in ("null", "???") or Path(value).exists():
        return value if value in ("null", "???") else _quote(value)
    if value.startswith("[") and value.endswith("]"):
        return "[" + ",".join(_quote_element(element.strip()) for element in _split(value[1:-1])) + "]"
    return _quote_element(value)


def _quote_element(value: str) -> str:
    return value if value.startswith(LITERAL_STARTS) and not Path(value).exists() else _quote(value)


def _quote(value: str) -> str:
    # "${" would be an interpolation, and a backslash escapes it; then Hydra's own quotes, where only backslashes right
    # before a quote need doubling.
    value = re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", value)
    value = re.sub(r"(\\*)'", lambda match: 2 * match[1] + r"\'", value)
    value = re.sub(r"(\\+)$", lambda match: 2 * match[1], value)
    return f"'{value}'"


def _split(elements: str) -> list[str]:
    """Split at commas outside quotes."""
    return re.findall(r"""\s*(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]+)\s*""", elements)


def whole_number(config: DictConfig, name: str, of: str) -> int:
    """An option that has to be 1 or more, or a ValueError; of: what it counts."""
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value}: give a whole number of {of}, 1 or more")
    return value


def run(
    task: Callable[[DictConfig], None],
    config_name: str,
    arguments: Sequence[str],
    literal_keys: Iterable[str] = (),
    literal_groups: Mapping[str, str] | None = None,
) -> None:
    """Compose conf/<config_name>.yaml with `arguments` and call `task`; exits with 2 and one line if they do not fit.

    The values of `literal_keys`, file names for instance, are taken as they are written: see quote_arguments.
    The environment variable HYDRA_FULL_ERROR=1 shows tracebacks.
    """
    conf = conf_folder()
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Hydra would print several lines and exit; told to raise, it leaves the wording to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *quote_arguments(arguments, literal_keys, literal_groups, conf)]
    try:
        hydra.main(config_path=str(conf), config_name=config_name, version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        if full_error == "1":
            raise
        print(f"error: {_message(error)}{_hint(arguments)}", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _message(error: Exception) -> str:
    text = re.split(r"\n\s*(?:Config search path|See https|full_key|To append to your config)", str(error))[0]
    return " ".join(text.split()).removesuffix(".")


def _hint(arguments: Sequence[str]) -> str:
    for argument in arguments:
        if "=" not in argument and not argument.startswith(("-", "~")):
            return f" (options are written key=value; did you mean audio={argument}?)"
    return " (--help shows every option)"
