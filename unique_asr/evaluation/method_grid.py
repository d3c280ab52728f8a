"""From options to methods: one configuration of attention for each combination of methods, budgets and settings."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from unique_asr.application.overrides import conf_folder
from unique_asr.attention import SparseAttentionConfig
from unique_asr.evaluation.methods import METHODS, Sliding


def build_methods(config: DictConfig) -> dict[str, SparseAttentionConfig | Sliding]:
    """Make the configurations of attention that a run compares, by the names of their systems.

    Args:
        config: of the command. `methods` names files of conf/attention, each taken at every `attention.budget`; without
            it, `attention` alone says what is run.

    Raises:
        ValueError: a method is unknown, or needs a budget and has none.
    """
    attention, rivals = OmegaConf.to_container(config.attention), OmegaConf.to_container(config.rivals)
    if config.methods is None:
        return expand_attention(attention, rivals)
    budgets = attention["budget"] if isinstance(attention["budget"], list) else [attention["budget"]]
    budgets = [budget for budget in budgets if budget is not None]
    methods: dict[str, SparseAttentionConfig | Sliding] = {}
    for name in sorted(config.methods, key=lambda name: name != "dense"):  # the others are compared with dense
        settings = read_method_settings(name)
        if settings["budget"] is not None:
            if not budgets:
                raise ValueError(f"methods names {name}, which needs a budget: attention.budget=[256,512]")
            settings["budget"] = budgets
        methods |= expand_attention(settings, rivals)
    return methods


def read_method_settings(name: str) -> dict[str, Any]:
    """Read conf/attention/NAME.yaml together with the files that its `defaults` name.

    Raises:
        ValueError: there is no such file.
    """
    path = conf_folder() / "attention" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"methods names {name!r}: choose from {known}")
    own = OmegaConf.to_container(OmegaConf.load(path))
    settings: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        if base != "_self_":
            settings |= read_method_settings(base)
    return settings | own


def expand_attention(
    attention: dict[str, Any], rivals: dict[str, Any] | None = None
) -> dict[str, SparseAttentionConfig | Sliding]:
    """Make a configuration for each combination of the values that are lists.

    Args:
        attention: fields of `SparseAttentionConfig`, each a value or a list of values. A `score` that the library does
            not have is a rival's.
        rivals: settings that only the rivals have, by rival: {"h2o": {"recent": 0.5}}.

    Returns:
        Configurations by name: `dense`, `unique-512`, `mean-512-page_size16` ... A combination without a budget is
        dense, and comes once, whatever else varies.

    Raises:
        ValueError: a rival has no such setting, or the settings do not fit each other.
    """
    rivals = rivals or {}
    lists = {key: value if isinstance(value, list) else [value] for key, value in attention.items()}
    varying = [key for key, values in lists.items() if len(values) > 1 and key not in ("budget", "score")]
    methods: dict[str, SparseAttentionConfig | Sliding] = {}
    for values in itertools.product(*lists.values()):
        settings = dict(zip(lists, values, strict=True))
        score = settings["score"]
        if score == "sliding":
            methods["sliding"] = Sliding(**rivals.get("sliding", {}))
            continue
        if settings["budget"] is None:
            name = "dense"
        else:
            name = "-".join([score, str(settings["budget"]), *(f"{key}{settings[key]}" for key in varying)])
        if score in METHODS and name != "dense":
            known = {field.name for field in fields(METHODS[score])}
            options = rivals.get(score, {})
            if unknown := set(options) - known:
                raise ValueError(
                    f"rivals.{score} has {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}"
                )
            method = SparseAttentionConfig(**settings | {"score": "mean"}, selector=METHODS[score](**options))
        else:
            method = SparseAttentionConfig(**settings | ({"score": "unique"} if name == "dense" else {}))
        methods.setdefault(name, method)
    return methods
