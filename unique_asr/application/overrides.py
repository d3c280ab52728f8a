"""Hydra for applications: file names as they are, errors in one line, nothing left behind in the working directory."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unique_asr.application.standard_streams import guard_standard_streams

SUCCESS, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes
LITERAL_STARTS = ("'", '"', "${")  # the user wrote Hydra's own syntax
FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class OptionError(ValueError):
    """An option whose value cannot be; the message is one line with the remedy."""


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


def read_flag(name: str, value: object) -> bool:
    """Return the bool that a value of an option means: true or false, yes or no, on or off; else raise OptionError."""
    flag = value if isinstance(value, bool) else FLAGS.get(str(value).strip().lower())
    if flag is None:
        raise OptionError(f"{name}={'null' if value is None else value}: give true or false")
    return flag


def check_kinds(config: DictConfig, defaults: DictConfig, above: str = "") -> None:
    """Make a bool of each value whose default is one, where it means one.

    Raises:
        OptionError: if a value means none, or stands in the place of a group of options.
    """
    for key in defaults:
        if key == "hydra" or key not in config or OmegaConf.is_missing(defaults, key):
            continue
        name, default = f"{above}{key}", defaults._get_node(key)
        if isinstance(default, DictConfig) and not default._is_none() and len(default):
            group = config._get_node(key)
            if not isinstance(group, DictConfig) or group._is_none():
                shown = "null" if config[key] is None else config[key]
                raise OptionError(f"{name}={shown}: is a group of options; give {name}.OPTION=VALUE")
            check_kinds(group, default, f"{name}.")
        elif isinstance(default._value(), bool):
            value = "???" if OmegaConf.is_missing(config, key) else config[key]
            OmegaConf.update(config, key, read_flag(name, value))


def _check(config: DictConfig, literal_groups: Mapping[str, str]) -> None:
    """Raise OptionError if a value is not of the kind that its default is."""
    if HydraConfig.get().overrides.task:
        check_kinds(config, _compose_defaults())
    for group, key in literal_groups.items():
        if OmegaConf.is_missing(config[group], key.rpartition(".")[2]):
            continue
        named = OmegaConf.select(config, key)
        if not isinstance(named, str):
            raise OptionError(f"{group}={'null' if named is None else named}: give a name, a folder or a hub id")


def _compose_defaults() -> DictConfig:
    """The configuration of the groups that were chosen, without any other option."""
    hydra_config = HydraConfig.get()
    chosen = [
        override
        for override in hydra_config.overrides.task
        if override.lstrip("+").partition("=")[0].partition("@")[0] in hydra_config.runtime.choices
    ]
    composer = GlobalHydra.instance().hydra
    return composer.compose_config(hydra_config.job.config_name, chosen, RunMode.RUN, with_log_configuration=False)


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
    code, began = SUCCESS, False

    def keep_code(config: DictConfig) -> None:
        nonlocal code, began
        try:
            _check(config, literal_groups or {})
        except OptionError as error:  # Hydra would print a line of its own
            print(f"error: {error}", file=sys.stderr)
            code = USAGE
            return
        began = True
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
    except ValueError as error:
        if began or full_error == "1":  # of the task
            raise
        text = str(error)
        if text.startswith("Config group override must be a string"):
            text = _describe_group(arguments, conf) or text
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    return code


def _describe_group(arguments: Sequence[str], conf: Path) -> str:
    """One line about the group of options that is given no name."""
    for argument in arguments:
        group, _, value = argument.lstrip("+").partition("=")
        if group and (conf / group).is_dir() and (value in ("null", "true", "false") or value.isdigit()):
            return f"{argument}: choose from {', '.join(sorted(path.stem for path in (conf / group).glob('*.yaml')))}"
    return ""


def _message(error: Exception) -> str:
    text = re.split(r"\n\s*(?:Config search path|See https|full_key|To append to your config)", str(error))[0]
    return " ".join(text.split()).removesuffix(".")


def _hint(arguments: Sequence[str]) -> str:
    for argument in arguments:
        if "=" not in argument and not argument.startswith(("-", "~")):
            return f" (options are written key=value; did you mean audio={argument}?)"
    return " (--help shows every option)"
