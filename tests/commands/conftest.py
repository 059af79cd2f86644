"""Runs that the tests of commands sample from, edit with and evaluate."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_cli.cli import run
from helpers import TINY


@pytest.fixture(scope="session")
def edit_runs(tmp_path_factory):
    """Runs of a few steps: class-conditional, unconditional, a classifier; and images."""
    root = tmp_path_factory.mktemp("outputs")
    common = [
        "train", "model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null",
        "max_steps=20", "checkpoint_every=10", "logger=csv", "trainer=cpu", f"output_dir={root}",
    ]  # fmt: skip
    assert run([*common, "task=classifier", "name=judge", "validate_every=10"]) == 0
    assert run([*common, "name=plain"]) == 0
    assert run([*common, "name=told", "model.class_conditional=true"]) == 0
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for name in "abc":
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(
            root / "images" / f"{name}.png"
        )
    return root


@pytest.fixture(scope="session")
def eval_runs(tmp_path_factory) -> Path:
    """A folder with two runs, `a` and `b`, class-conditional, trained for a few steps, and a cache."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b", 1)):
        words = ["max_steps=4", f"seed={seed}", "model.class_conditional=true", f"output_dir={folder}/o"]
        assert run([*TINY, *words, f"name={name}"]) == 0
    return folder


@pytest.fixture(scope="session")
def images(eval_runs) -> Path:
    """A folder of 90 samples of `a`, made by `diffuse sample`."""
    words = ["run=a", "steps=2", "num_samples=90", f"output={eval_runs}/samples", f"output_dir={eval_runs}/o"]
    assert run(["sample", *words]) == 0
    return eval_runs / "samples"


@pytest.fixture(scope="session")
def sample_runs(tmp_path_factory):
    """A run of a few steps."""
    root = tmp_path_factory.mktemp("outputs")
    words = [
        "model.channels=8",
        "model.norm_groups=4",
        "model.num_heads=1",
        "model.head_channels=null",
        "batch_size=64",
        "max_steps=20",
    ]
    assert run(["train", *words, "logger=csv", "name=small", f"output_dir={root}", "trainer=cpu"]) == 0
    return root
