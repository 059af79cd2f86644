"""Folders of paired images."""

from pathlib import Path

import numpy as np

from diffusion_cli.data import Pairs
from helpers.data import save

RNG = np.random.default_rng(0)


def write_pairs(root: Path, count: int = 6, size: tuple[int, int] = (8, 12), factor: int = 1) -> Path:
    """Colour targets and gray sources; the values of a source are those of the red channel of its target."""
    for number in range(count):
        target = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
        source = target[::factor, ::factor, 0]
        save(root / f"targets/{'ab'[number % 2]}/{number}.png", target)
        save(root / f"sources/{'ab'[number % 2]}/{number}.bmp", source)
    return root


def pairs(root: Path, **changes) -> Pairs:
    """The pairs that `write_pairs` wrote."""
    given = {
        "path": str(root / "targets"), "source": str(root / "sources"), "resolution": [8, 12], "source_channels": 1,
        "flip": False, "val_fraction": 0.0, "in_memory": True, "num_workers": 0,
    }  # fmt: skip
    return Pairs("", **(given | changes))
