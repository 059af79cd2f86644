"""Runs with results and previews to report on."""

import html
import re
from pathlib import Path

import torch
from PIL import Image

from diffusion_cli import config
from diffusion_cli.cli import run as diffuse
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.runs.migrate import FORMAT

HOSTILE = """a "b" 'c' & <img src=x onerror=hacked=1><script>hacked=1"""


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(path)


def make(
    folder: Path, *words: str, classes: tuple[str, ...] = ("cat", "dog"), steps: tuple[int, ...] = (500, 1000)
):
    """A run's folder, with a checkpoint that holds no more than the page reads."""
    trained = config.load("train", ["name=x", *words]).model_dump()
    about = {
        "format": FORMAT, "task": "diffusion", "config": trained, "shape": [1, 8, 8],
        "form": {"kind": "picture"}, "latent": None, "stages": None, "num_images": 1438,
        "num_classes": len(classes), "class_names": list(classes),
    }  # fmt: skip
    checkpoint = {
        "diffuse": about,
        "global_step": 1200,
        "pytorch-lightning_version": "2.88",
        "callbacks": {"EMA": {"network": {"weight": torch.zeros(300, 500)}}},
    }
    (folder / LAST).parent.mkdir(parents=True)
    torch.save(checkpoint, folder / LAST)
    for shade, step in enumerate(steps):
        picture(folder / "previews" / f"step_{step:08d}.png", shade)
    rows = [f"{step},{1 / step},{0.001 * step}" for step in range(50, 1250, 50)]
    (folder / "metrics.csv").write_text("\n".join(["step,loss,lr", *rows]) + "\n")
    return folder


def written(root: Path, *words: str) -> str:
    """The page of `diffuse report`, which is to be in `page.html`."""
    output = root / "page.html"
    assert diffuse(["report", f"output_dir={root}", f"output={output}", *words]) == 0
    return output.read_text()


def text_of(page: str) -> str:
    """What a reader sees, markup and style taken away."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))
