"""`diffuse sample`: images of a trained model, one PNG a seed."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_cli import __version__
from diffusion_cli.checkpoint import Model, whole_file
from diffusion_cli.commands.trained import open_run
from diffusion_cli.config import Mistakes, SampleConfig, fingerprint, flatten, shown
from diffusion_cli.generate import generate
from diffusion_cli.report import save_grid, save_png

GRID_IMAGES = 100


def run(config: SampleConfig) -> None:
    """Make the images that are not there yet, a grid of the first ones, and the manifest."""
    trained = open_run(config)
    model, settings = trained.model, trained.settings
    trained.sampler.check(model.denoiser)  # refused before a folder is made
    trained.sampler.grid(config.steps)
    name = f"{config.sampler['_target_'].rpartition('.')[2].lower()}-{config.steps}-{fingerprint(settings)}"
    output = Path(config.output) if config.output else trained.folder / "samples" / name
    manifest = claim(output, settings, model)
    seeds = range(config.seed, config.seed + config.num_samples)
    todo = [seed for seed in seeds if not image_path(output, seed).is_file()]
    if len(todo) < len(seeds):
        print(
            f"{output} has {len(seeds) - len(todo)} of {len(seeds)} images; making the others",
            file=sys.stderr,
        )

    most_calls = 0
    with tqdm(total=len(todo), unit="image", desc="sample", dynamic_ncols=True) as bar:
        for batch, images, _, calls in generate(
            model,
            trained.sampler,
            config.steps,
            todo,
            config.batch_size,
            clip=config.clip_x0,
            precision=config.precision,
        ):
            for seed, image in zip(batch, images, strict=True):
                save_png(image, image_path(output, seed))
            bar.update(len(batch))
            most_calls = max(most_calls, calls)
    write_manifest(output, manifest | {"seeds": sorted({*manifest.get("seeds", []), *seeds})})
    grid = output / "grid.png"
    save_grid(read_images(output, list(seeds)[:GRID_IMAGES]), grid)
    made = f", {most_calls} network calls each" if todo else ""
    print(f"{len(seeds)} images of step {model.step}{made}, in {output}\nGrid: {grid}")


def image_path(output: Path, seed: int) -> Path:
    """The PNG of a seed."""
    return output / f"{seed:06d}.png"


def read_images(output: Path, seeds: list[int]) -> Tensor:
    """The saved images of the given seeds, uint8 [N, C, H, W]."""
    pixels = np.stack([np.array(Image.open(image_path(output, seed))) for seed in seeds])
    images = torch.from_numpy(pixels)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)


def claim(output: Path, settings: dict[str, Any], model: Model) -> dict[str, Any]:
    """Return the manifest of the folder, made now if it is new; Mistakes if it is someone else's."""
    path = output / "manifest.json"
    if path.is_file():
        try:
            manifest = json.loads(path.read_text())
            before, now = flatten(manifest["settings"]), flatten(settings)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Mistakes(f"{path}: is not a manifest of diffuse sample; choose another output=") from error
        keys = sorted(key for key in before | now if before.get(key) != now.get(key))
        if keys:
            raise Mistakes(
                *(
                    f"{key}={shown(now.get(key))}: the images in {output} were made with {shown(before.get(key))}"
                    for key in keys
                ),
                f"output={output}: holds images of other settings; choose another folder",
            )
        return manifest
    if output.exists() and not output.is_dir():
        raise Mistakes(f"output={output}: is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        raise Mistakes(f"output={output}: is not empty and has no manifest.json; choose another folder")
    manifest = {
        "settings": settings,
        "step": model.step,
        "model": model.config,
        "versions": {"diffuse": __version__, "torch": torch.__version__},
    }
    write_manifest(output, manifest)
    return manifest


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json`."""
    with whole_file(output / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=2))
