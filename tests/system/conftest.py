"""A run, its checkpoint and a memory limit for the tests of untrusted files."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_cli.config import load
from diffusion_cli.networks import UNet
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.runs.migrate import FORMAT
from helpers.foreign import MOST_MEMORY, TINY


@pytest.fixture
def memory() -> Iterator[None]:
    """Fail a test that takes more memory than a small file may cost."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


@pytest.fixture(scope="session")
def checkpoint() -> dict[str, Any]:
    """A small checkpoint as training writes it."""
    checked = load("train", TINY).model_dump()
    arguments = {key: value for key, value in checked["model"].items() if key != "_target_"}
    network = UNet((1, 8, 8), None, **arguments)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    return {
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"model.network.{key}": value for key, value in state.items()},
        "callbacks": {"EMA": {"network": state}},
        "diffuse": {
            "task": "diffusion", "num_images": 20, "labels_sha256": None, "format": FORMAT, "config": checked,
            "shape": [1, 8, 8], "form": {"kind": "picture"}, "latent": None, "stages": None,
            "num_classes": None, "class_names": None,
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory, checkpoint) -> Path:
    """A folder with that checkpoint."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    (folder / LAST).parent.mkdir(parents=True)
    torch.save(checkpoint, folder / LAST)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Where the files of one input after the other lie."""
    return tmp_path_factory.mktemp("inputs")
