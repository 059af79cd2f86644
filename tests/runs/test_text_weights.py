"""The weights of a frozen text encoder that a run names: read only if the user has named them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.conditions import Conditions, TextDescription
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.texts import load_text_encoder
from diffusion_cli.system.trusted_paths import WEIGHTS, remember, remember_run


@pytest.fixture(autouse=True)
def stranger(tmp_path, monkeypatch) -> None:
    """A user who has named nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def text(weights: str) -> dict[str, Any]:
    return {
        "_target_": "diffusion_cli.data.FrozenText",
        "encoder": "clip",
        "weights": weights,
        "length": 8,
        "width": 16,
    }


def loaded(weights: str, folder: Path | None) -> object:
    """Load the encoder of a run whose checkpoint names weights; a frozen encoder reads them at its first use only."""
    description = TextDescription(length=8, features=4, width=16)
    info: Any = SimpleNamespace(
        conditions=Conditions(text=description), text="0" * 64, config=SimpleNamespace(text=text(weights))
    )
    return load_text_encoder(info, torch.device("cpu"), folder)


@pytest.mark.parametrize("weights", ["folder", "owner/name"])
def test_weights_of_a_foreign_run_are_read_only_if_the_user_has_named_them(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError) as error:
        loaded(weights, tmp_path / "theirs")
    assert str(error.value) == (
        f"text.weights={weights}: comes from the checkpoint in {tmp_path}/theirs, and you have never used it on this "
        f"machine; if you trust the checkpoint, run once: diffuse data fetch text=clip text.weights={weights}"
    )
    remember(text(weights), WEIGHTS)
    assert loaded(weights, tmp_path / "theirs") is not None


def test_weights_of_options_and_of_own_runs_are_read(tmp_path):
    for weights in ("openai/clip-vit-large-patch14", "google/flan-t5-base"):
        assert loaded(weights, tmp_path / "theirs") is not None
    remember_run(tmp_path / "ours")
    assert loaded("owner/name", tmp_path / "ours") is not None
    assert loaded("owner/name", None) is not None


def test_other_settings_of_options_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    with pytest.raises(UsageError, match=r"you have never used it"):
        loaded("clip", tmp_path / "theirs")


def test_fetching_weights_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert run(["data", "list", "text=clip", "text.weights=folder"]) == 0
    with pytest.raises(UsageError, match=r"you have never used it"):
        loaded("folder", tmp_path / "theirs")
    assert run(["data", "fetch", "text=clip", "text.weights=folder"]) == 0
    assert loaded("folder", tmp_path / "theirs") is not None
