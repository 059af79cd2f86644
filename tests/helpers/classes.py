"""Folders of labelled images, and settings of a small run on them."""

from pathlib import Path

import yaml
from PIL import Image

from diffusion_cli.config import CONF
from diffusion_cli.data import Folder

TINY = [
    "model=unet_tiny",
    "model.channels=8",
    "model.norm_groups=4",
    "model.num_heads=1",
    "model.head_channels=null",
    "batch_size=6",
    "preview_steps=1",
    "logger=csv",
    "trainer=cpu",
    "precision=fp32",
    "model.class_conditional=true",
]


def write(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def folder(path: Path, **changes) -> Folder:
    node = yaml.safe_load((CONF / "dataset" / "folder.yaml").read_text())["dataset"]
    options = {**node, "path": str(path), "resolution": 8, "channels": 1, "val_fraction": 0, **changes}
    return Folder(".", **{key: value for key, value in options.items() if key != "_target_"})
