"""Train every default configuration for a few minutes, and compare each loss with that of predicting zero.

    python scripts/recipes.py --photos PHOTOS --images CIFAR10.zip --data-dir data --output outputs/recipes

Datasets, networks on suitable data, and the presets that fit a CPU are trained one after the other by `diffuse train`.
A few steps are timed first, to choose `max_steps` for the available time. Finished runs are kept, so the script can be
stopped and restarted. It writes table.md and samples.png to the output folder.
"""

import argparse
import csv
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image, ImageDraw

from timed_training import QUIET, Pace, diffuse, timed

DDPM = ["sampler=ddim", "steps=50"]
HEUN = ["sampler=heun", "steps=25"]
WIDE = [
    "unet_small", "unet_cifar10", "unet_iddpm_cifar10", "ddpmpp_cifar10", "ddpmpp_edm_cifar10", "ncsnpp_cifar10",
    "dit_s_2", "dit_b_2",
]  # fmt: skip
PICTURES = 8
FEWEST_STEPS = 150


class Case(NamedTuple):
    """A training run with default settings."""

    name: str
    train: list[str]
    sample: list[str] | None
    """Arguments for `diffuse sample`; None for models without samples."""


def cases(photos: Path, images: Path, volumes: Path, array: Path) -> list[Case]:
    """Return the run of every dataset, network and preset."""
    own = ["dataset=folder", f"dataset.path={images}"]
    own_photos, mnist = ["dataset=folder", f"dataset.path={photos}"], ["dataset=mnist"]
    volume = [
        "dataset=folder",
        f"dataset.path={volumes}",
        "dataset.resolution=[16,16,16]",
        "dataset.range=[0,255]",
    ]
    volume += ["dataset.channels=1"]
    found = [
        Case("dataset=digits", ["dataset=digits"], DDPM),
        Case("dataset=mnist", mnist, HEUN),
        Case("dataset=folder, 60 photographs", own_photos, DDPM),
        Case("dataset=folder, 32x32", own, DDPM),
        Case("dataset=array, 16x16", ["dataset=array", f"dataset.path={array}"], DDPM),
        Case("dataset=gaussian_mixture", ["dataset=gaussian_mixture"], None),
        Case("dataset=points", ["dataset=points"], DDPM),
        Case("dataset=folder, volumes", volume, DDPM),
    ]
    # Small batches are hard for wide networks.
    wide = [*own, "dataset.resolution=16", "batch_size=16"]
    for model in WIDE:
        found.append(Case(f"model={model}, 16x16", [*wide, f"model={model}"], DDPM))
    found += [
        Case(
            f"model=unet_small, 16x16, batch 32, seed {seed}",
            [*wide, "model=unet_small", "batch_size=32", f"seed={seed}"],
            DDPM,
        )
        for seed in range(3)
    ]
    found += [
        Case("model=unet_small, 64x64, photographs",
             [*own_photos, "dataset.resolution=64", "model=unet_small", "batch_size=16"], DDPM),
        Case("model=unet_tiny, 32x32", [*own, "model=unet_tiny"], DDPM),
        Case("model=ddpmpp_tiny", ["model=ddpmpp_tiny"], DDPM),
        Case("model=ncsnpp_tiny", ["model=ncsnpp_tiny"], DDPM),
        Case("model=dit_tiny", ["model=dit_tiny"], DDPM),
        Case("model=set_tiny", ["dataset=points", "model=set_tiny"], DDPM),
        Case("task=classifier", ["task=classifier"], None),
        Case("model=classifier_cifar10, 16x16",
             [*wide, "task=classifier", "model=classifier_cifar10"], None),
        Case("model=kl_tiny", [*mnist, "task=autoencoder"], None),
        Case("model=kl_f4, 32x32", [*own, "batch_size=16", "task=autoencoder", "model=kl_f4"], None),
    ]  # fmt: skip
    samplers = {
        "ddpm_digits": ["sampler=ddpm", "steps=100"],
        "iddpm_digits": ["sampler=ddpm", "sampler.variance=learned", "steps=100"],
        "iddpm_digits_vlb": ["sampler=ddpm", "sampler.variance=learned", "steps=100"],
        "score_sde_ve_digits": ["sampler=pc", "steps=100"],
        "score_sde_vp_digits": ["sampler=euler_maruyama", "steps=200"],
        "edm_digits": ["sampler=heun", "steps=18"],
        "edm2_digits": ["sampler=heun", "steps=32"],
        "flow_digits": HEUN,
    }
    found += [Case(f"experiment={name}", [f"experiment={name}"], words) for name, words in samplers.items()]
    return found


def make_volumes(folder: Path) -> None:
    """Write 200 ellipsoids of 16x16x16 voxels as NumPy files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij"))
    for number in range(200):
        centre, radii = rng.uniform(-0.3, 0.3, (3, 1, 1, 1)), rng.uniform(0.3, 0.8, (3, 1, 1, 1))
        inside = (((grid - centre) / radii) ** 2).sum(0) <= 1
        np.save(folder / f"{number:03d}.npy", (inside * rng.uniform(100, 255)).astype(np.float32))


def run_command(log: Path, *words: str) -> None:
    """Run a command; SystemExit with its log if it fails."""
    print(f"diffuse {' '.join(words)}", flush=True)
    if diffuse(words, log):
        raise SystemExit(f"the command failed, see {log}")


def result_file(case: Case, output: Path) -> Path:
    """Return the file with the results of a case."""
    return output / f"{re.sub('[^a-z0-9]+', '_', case.name)}.json"


def trained(case: Case, output: Path, seconds: float, data_dir: Path) -> None:
    """Train a case, sample from it and write its results, unless they exist."""
    result = result_file(case, output)
    if result.is_file():
        return
    run, log = result.stem, result.with_suffix(".log")
    words = [*case.train, f"data_dir={data_dir}"]
    speed = timed(words, output / f"{run}_timed", log, steps=12)
    if speed is None:
        raise SystemExit(f"a short training failed, see {log}")
    steps = max(FEWEST_STEPS, int(seconds * speed))
    own = [f"name={run}", f"output_dir={output}", f"max_steps={steps}", f"log_every={min(25, steps // 8)}"]
    run_command(log, "train", *words, *QUIET, *own)
    if case.sample is not None:
        samples = f"output={output / run / 'shown'}"
        run_command(
            log,
            "sample",
            f"run={output / run}",
            f"num_samples={PICTURES}",
            "captions=false",
            *case.sample,
            samples,
        )
    row = {"case": case.name, "run": run, **curve(output / run)}
    result.write_text(json.dumps(row))


def curve(run: Path) -> dict[str, float]:
    """Return the ends of a run's loss, and its settings."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("loss")]
    name = "relative_loss" if rows[-1].get("relative_loss") else "loss"
    losses = [float(row[name]) for row in rows]
    config = yaml.safe_load((run / "config.yaml").read_text())
    return {
        "steps": float(rows[-1]["step"]),
        "lr": config["optimizer"]["lr"],
        "batch_size": config["batch_size"],
        "first": losses[0],
        "lowest": min(losses),
        "last": float(np.mean(losses[-4:])),
        "images_per_second": Pace.of(run).images_per_second,
        "relative": float(name == "relative_loss"),
    }


def picture(rows: list[dict[str, float | str]], output: Path) -> None:
    """Draw the samples, one row per run in the order of the table."""
    side, margin = 64, 290
    shown = [row for row in rows if (output / str(row["run"]) / "shown" / "grid.png").is_file()]
    canvas = Image.new("RGB", (margin + PICTURES * side, max(1, len(shown)) * side), "white")
    draw = ImageDraw.Draw(canvas)
    for line, row in enumerate(shown):
        draw.text((8, line * side + side // 2), str(row["case"]), "black", anchor="lm")
        for column, tile in enumerate(tiles(output / str(row["run"]) / "shown" / "grid.png")):
            tile = tile.resize((side - 2, side - 2), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + column * side + 1, line * side + 1))
    canvas.save(output / "samples.png")


def tiles(grid: Path) -> list[Image.Image]:
    """Return the images of a square grid of `diffuse sample`."""
    image = Image.open(grid).convert("RGB")
    across = math.ceil(math.sqrt(PICTURES))
    down = math.ceil(PICTURES / across)
    width, height = image.width / across, image.height / down
    boxes = [(column * width, row * height) for row in range(down) for column in range(across)]
    return [image.crop((int(x), int(y), int(x + width), int(y + height))) for x, y in boxes[:PICTURES]]


def table(rows: list[dict[str, float | str]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| training | learning rate | batch | steps | images/s | loss: first | lowest | last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        unit = "" if row["relative"] else " (not relative)"
        numbers = [f"{row[key]:.3g}" for key in ("first", "lowest", "last")]
        lines.append(
            f"| `{row['case']}` | {row['lr']:g} | {row['batch_size']} | {row['steps']:.0f} | "
            f"{row['images_per_second']:.0f} | {' | '.join(numbers)}{unit} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train missing runs, and write the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of a few photographs")
    parser.add_argument(
        "--images", type=Path, required=True, help="ZIP of 32x32 colour images in class folders"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with MNIST")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/recipes"), help="folder of runs and results"
    )
    parser.add_argument("--seconds", type=float, default=180, help="time per run (default 180)")
    parser.add_argument("--only", default="", help="regular expression for the names of runs")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    make_volumes(output / "volumes")
    array = output / "array.npz"
    if not array.is_file():
        words = ["dataset=folder", f"dataset.path={arguments.images}", "dataset.resolution=16"]
        run_command(output / "pack.log", "data", "pack", *words, f"output={array.with_suffix('')}")
    every = cases(arguments.photos, arguments.images, output / "volumes", array)
    for case in every:
        if re.search(arguments.only, case.name):
            trained(case, output, arguments.seconds, arguments.data_dir)
    rows = [json.loads(file.read_text()) for case in every if (file := result_file(case, output)).is_file()]
    (output / "table.md").write_text(table(rows) + "\n")
    picture(rows, output)
    print(table(rows))


if __name__ == "__main__":
    main()
