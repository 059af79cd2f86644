"""Calls of `diffuse eval` and its records."""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_cli.cli import run

WORDS = ["features=classifier", "features.steps=20", "batch_size=50"]


def evaluate(eval_runs: Path, *words: str) -> int:
    made = [] if any(word.startswith("samples=") for word in words) else ["steps=2"]
    return run(["eval", f"output_dir={eval_runs}/o", f"cache_dir={eval_runs}/cache", *WORDS, *made, *words])


def other_forms(images: Path, folder: Path) -> list[Path]:
    """The same images as a plain folder, a ZIP, an .npz, a compressed one, and an .npy."""
    files = sorted(images.glob("[0-9]*.png"))
    plain = folder / "plain"
    plain.mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in files:
            (plain / file.name).write_bytes(file.read_bytes())
            archive.write(file, file.name)
    array = np.stack([np.asarray(Image.open(file)) for file in files])
    np.savez(folder / "stored.npz", array)
    np.savez_compressed(folder / "packed.npz", arr_0=array)
    np.save(folder / "images.npy", array)
    return [plain, *(folder / name for name in ("images.zip", "stored.npz", "packed.npz", "images.npy"))]
