"""Latents, pixels and their moments."""

from pathlib import Path

from diffusion_cli.cli import run
from helpers import TINY

AUTOENCODING = [
    "task=autoencoder", "model.channel_mult=[1,2]", "model.latent_channels=3", "optimizer.lr=0.005", "name=ae",
]  # fmt: skip
NO_AUTOENCODER = ("model.num_heads=1", "model.head_channels=null", "name=tiny")
FEATURES = ["features=classifier", "features.steps=20"]


def train(latent_runs: Path, *words: str) -> int:
    return run([*TINY, f"output_dir={latent_runs}/o", f"cache_dir={latent_runs}/cache", *words])


def call(latent_runs: Path, command: str, *words: str) -> int:
    return run([command, "run=a", f"output_dir={latent_runs}/o", *words])


def refused(capsys, line: str) -> None:
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said
