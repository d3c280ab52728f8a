"""Every configuration composes, with every choice of every group, and fits what reads it."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from unique_asr.attention import SparseAttentionConfig

CONF = Path(__file__).parents[1] / "conf"
ROOTS = sorted(path.stem for path in CONF.glob("*.yaml"))
CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))


def configuration(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=True)


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes(root):
    assert "device" in configuration(root)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice):
    group = choice.partition("=")[0]
    roots = [root for root in ROOTS if any(group in entry for entry in OmegaConf.load(CONF / f"{root}.yaml").defaults)]
    assert roots
    for root in roots:
        configuration(root, choice)


@pytest.mark.parametrize("attention", ["unique", "dense", "fast"])
def test_attention_is_an_attention_config(attention):
    SparseAttentionConfig(**configuration("transcribe", f"attention={attention}")["attention"])
