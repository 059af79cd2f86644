"""Runs of latent diffusion models."""

from pathlib import Path

import pytest
import torch

from diffusion_cli.cli import run
from helpers import TINY
from helpers.latents import AUTOENCODING, NO_AUTOENCODER, train


@pytest.fixture(scope="session")
def latent_runs(tmp_path_factory) -> Path:
    """A folder with an autoencoder `ae`, denoisers `a`, `b` and a classifier `c` of its latents, and some of pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("latents")
    words = [word for word in TINY if word not in NO_AUTOENCODER]
    assert run([*words, *AUTOENCODING, f"output_dir={folder}/o", "max_steps=20"]) == 0
    told = "model.class_conditional=true"
    for name, more in {
        "a": ["latent.run=ae", "max_steps=6", told],
        "b": ["latent.run=ae", "max_steps=3", told, "seed=1"],
        "c": ["latent.run=ae", "max_steps=3", "task=classifier"],
        "pixels": ["max_steps=3", told],
        "pixel_classifier": ["max_steps=3", "task=classifier"],
    }.items():
        assert train(folder, f"name={name}", *more) == 0
    torch.set_num_threads(threads)
    return folder
