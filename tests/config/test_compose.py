"""What a command reads and composes, and how often."""

import sys

import hydra
import pytest
import yaml

from diffusion_cli.config import CONF, load
from diffusion_cli.config.catalogue import OWN_LOADER

DDIM = (CONF / "sampler" / "ddim.yaml").read_text()
compositions = sys.modules["diffusion_cli.config.compose"]  # config.compose is the function


@pytest.fixture
def composed(monkeypatch) -> list[str]:
    """The commands that Hydra has composed."""
    made: list[str] = []
    original = hydra.compose

    def counting(command: str, **options):
        made.append(command)
        return original(command, **options)

    monkeypatch.setattr(hydra, "compose", counting)
    compositions._options_cached.cache_clear()
    compositions._compose_cached.cache_clear()
    return made


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        (["train", "name=a", "max_steps=3", "model.channels=16"], ["train"]),
        (["train", "schedule=cosine", "batch_size=8", "ema.decay=0.9"], ["train"]),
        (["sample", "run=a", "num_samples=3"], ["sample"]),
        (["edit", "run=a", "edit=interpolate", "seed=3"], ["edit"]),
        (["eval", "run=a", "metric=fid", "num_samples=20"], ["eval"]),
        (
            ["eval", "samples=a", "dataset=digits", "metric=fid"],
            ["eval", "train"],
        ),  # its dataset is one of training
        (["report", "run=a"], ["report"]),
    ],
)
def test_hydra_composes_a_command_once(composed, words, commands):
    load(words[0], words[1:])
    assert composed == commands


def test_hydra_composes_the_options_of_a_user_once(composed, tmp_path):
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text(DDIM)
    load("train", ["sampler=mine", "name=a", "max_steps=3", "seed=5"], [tmp_path])
    assert composed == ["train"]


def test_a_changed_option_of_a_user_is_read_again(tmp_path):
    (tmp_path / "sampler").mkdir()
    for eta in (0.25, 0.75):
        (tmp_path / "sampler" / "mine.yaml").write_text(DDIM.replace("eta: 0.0", f"eta: {eta}"))
        assert load("sample", ["run=a", "sampler=mine"], [tmp_path]).model_dump()["sampler"]["eta"] == eta


def test_both_parsers_read_the_same_in_every_file_of_this_package():
    for file in CONF.rglob("*.yaml"):
        text = file.read_text()
        assert yaml.load(text, OWN_LOADER) == yaml.safe_load(text), file
