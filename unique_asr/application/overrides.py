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

from unique_asr.application.standard_streams import guard_standard_streams

SUCCESS, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes
LITERAL_STARTS = ("'", '"', "${")  # the user wrote Hydra's own syntax


def conf_folder() -> Path:
    """Return conf/ of the checkout, or the copy of it inside the installed package."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "conf"
    return checkout if checkout.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "conf"


def quote_arguments(
    arguments: Sequence[str], keys: Iterable[str], groups: Mapping[str, str] | None = None, conf: Path | None = None
) -> list[str]:
    """Quote the values of `keys`, so that Hydra takes `audio=50% (live), «été».mp3` for a file name.

    Args:
        groups: from a configuration group to the key that a path given in its place means: {"model":
            "model.name_or_path"} makes `model.name_or_path='./my model'` of `model=./my model`, and leaves
            `model=default`, the name of a file in conf/model/.
        conf: the folder of the configuration groups.
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
    if value in ("null", "???"):
        return value
    if os.path.exists(value):  # Path.exists would raise for what is too long for a name, as prompts and lists are
        return _quote(value)
    if value.startswith("[") and value.endswith("]"):
        return "[" + ",".join(_quote_element(element.strip()) for element in _split(value[1:-1])) + "]"
    return _quote_element(value)


def _quote_element(value: str) -> str:
    return value if value.startswith(LITERAL_STARTS) and not os.path.exists(value) else _quote(value)


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
    """Return an option that has to be a whole number of 1 or more, else raise ValueError; `of` is what it counts."""
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value}: give a whole number of {of}, 1 or more")
    return value


def run(
    task: Callable[[DictConfig], int | None],
    config_name: str,
    arguments: Sequence[str],
    literal_keys: Iterable[str] = (),
    literal_groups: Mapping[str, str] | None = None,
) -> int:
    """Compose conf/<config_name>.yaml with `arguments`, call `task`, and return its exit code; None counts as 0.

    Arguments that do not fit end the process with the code USAGE and one line (HYDRA_FULL_ERROR=1 shows the traceback),
    an interrupt ends it with the code INTERRUPTED. Standard output that is closed ends nothing; one that cannot be
    written for another reason, such as a full disk, makes the code FAILED. What takes long to import is best imported
    in `task`: then wrong arguments are told at once.

    Args:
        task: gets the configuration. With Hydra's --multirun it is called for each job, and the last code that is not 0
            is returned.
        literal_keys: options whose values, file names for instance, are taken as they are written.
        literal_groups: see `quote_arguments`.
    """
    with guard_standard_streams() as outputs:
        code = _run(task, config_name, arguments, literal_keys, literal_groups)
        sys.stdout.flush()
        errors = [file.error for file in outputs if file.error and not isinstance(file.error, BrokenPipeError)]
        if errors:
            print(f"error: standard output: cannot be written ({errors[0].strerror})", file=sys.stderr)
    return code or (FAILED if errors else SUCCESS)


def _run(
    task: Callable[[DictConfig], int | None],
    config_name: str,
    arguments: Sequence[str],
    literal_keys: Iterable[str],
    literal_groups: Mapping[str, str] | None,
) -> int:
    # Notices and bars of libraries would break into the output. They are read when those are imported, which follows.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = SUCCESS

    def keep_code(config: DictConfig) -> None:
        nonlocal code
        code = task(config) or code

    conf = conf_folder()
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Hydra would print several lines and exit; told to raise, it leaves the wording to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *quote_arguments(arguments, literal_keys, literal_groups, conf)]
    try:
        hydra.main(config_path=str(conf), config_name=config_name, version_base="1.3")(keep_code)()
    except (HydraException, OmegaConfBaseException) as error:
        if full_error == "1":
            raise
        print(f"error: {_message(error)}{_hint(arguments)}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    return code


def _message(error: Exception) -> str:
    text = re.split(r"\n\s*(?:Config search path|See https|full_key|To append to your config)", str(error))[0]
    return " ".join(text.split()).removesuffix(".")


def _hint(arguments: Sequence[str]) -> str:
    for argument in arguments:
        if "=" not in argument and not argument.startswith(("-", "~")):
            return f" (options are written key=value; did you mean audio={argument}?)"
    return " (--help shows every option)"
