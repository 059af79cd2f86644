"""Functions and constants that several test modules share."""

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import torch
from PIL import ImageCms
from torch import Tensor

from diffusion_cli.cli import run
from diffusion_cli.conditions import Condition
from diffusion_cli.formats import Uint8Image
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.schema import CheckpointInfo

TINY = [
    "train", "name=tiny", "model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null",
    "batch_size=16", "lr_schedule=constant", "optimizer.lr=0.001", "lr_schedule.warm_up_steps=3", "precision=fp32",
    "trainer=cpu", "logger=csv", "log_every=5", "checkpoint_every=5", "preview_every=1000", "validate_every=1000",
]  # fmt: skip


def train(folder: Path, *words: str) -> int:
    return run([*TINY, f"output_dir={folder}", *words])


def state(folder: Path) -> dict:
    return read(folder / "tiny" / LAST).state


def assert_same(one, other, path="") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, Condition):
        assert_same({**one.values}, {**other.values}, path)
    else:
        assert one == other, path


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The relative difference of all weights in the Euclidean norm."""
    assert one.keys() == other.keys()
    flat, other_flat = (
        torch.cat([weights[key].double().flatten() for key in one]) for weights in (one, other)
    )
    return float((flat - other_flat).norm() / flat.norm())


def checkpoint_info(shape: tuple[int, ...] = (1, 8, 8), **changes: Any) -> CheckpointInfo:
    """The checkpoint metadata of a small run on 8-bit images; `changes` replace entries or config keys."""
    config = {
        "max_steps": 1, "ema": {}, "dataset": {"_target_": "diffusion_cli.data.Digits"}, "schedule": {},
        "objective": {"label_dropout": 0.1}, "parameterization": {}, "model": {},
        "latent": {"run": None, "pretrained": None}, "condition": None,
    }  # fmt: skip
    config |= {key: changes.pop(key) for key in config.keys() & changes.keys()}
    if "text" in changes:
        config["text"] = {"_target_": "diffusion_cli.data.LearnedText"}
    names = changes.get("class_names")
    entries = {
        "task": "diffusion", "num_images": 1, "shape": shape, "form": Uint8Image(),
        "num_classes": None if names is None else len(names),
    }  # fmt: skip
    return CheckpointInfo.model_validate(entries | {"config": config} | changes)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3 = {  # primaries of Display P3, adapted to D50
    b"rXYZ": (0.51512, 0.2412, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189), b"bXYZ": (0.1571, 0.06657, 0.78407),
}  # fmt: skip


def wide() -> bytes:
    """A colour profile with the primaries of Display P3 and the curve of sRGB."""
    profile = bytearray(SRGB)
    (count,) = struct.unpack(">I", profile[128:132])
    entries = (struct.unpack(">4sII", profile[132 + 12 * k : 144 + 12 * k]) for k in range(count))
    for name, at, _ in entries:
        if name in P3:
            profile[at + 8 : at + 20] = b"".join(struct.pack(">i", round(v * 65536)) for v in P3[name])
    return bytes(profile)


WIDE = wide()
"""A profile of Display P3."""


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(url: str, profile: Path, *flags: str) -> tuple[str, str]:
    """The DOM of a page in a browser, and the browser's log."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={profile}", *flags, "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr
