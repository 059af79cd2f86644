"""Configurations and photos of the tests of recipes."""

import io
from pathlib import Path

from PIL import Image

from diffusion_cli.config import TrainConfig, load


def train_config(*words: str) -> TrainConfig:
    config = load("train", words)
    assert isinstance(config, TrainConfig)
    return config


def picture(height: int, width: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(data, "PNG")
    return data.getvalue()


def photos(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (folder / f"{number}.png").write_bytes(picture(*size))
    return folder
