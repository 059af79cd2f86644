"""Compare fine-tuning and LoRA with training from scratch, for equal training times.

    python scripts/compare_initialization.py --output outputs/initialization --plot docs/images/initialization.png

A class-conditional network learns the digits 0 to 4 of scikit-learn. Then the same network learns 100 images of each of
the digits 5 to 9: from random weights, from the weights of the first run, and by LoRA adapters on them. The learning
rate is constant, so that one run gives the results of all training times. The Frechet distance is that of `--samples`
images to the remaining real images of the digits 5 to 9, in the features of the shipped classifier of digits. Finished
trainings are kept, so the script can be stopped and restarted.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import diffusion_cli as diffuse

WAYS: dict[str, Sequence[str]] = {
    "from scratch": ("optimizer.lr=0.001",),
    "fine-tuning": ("init.run=digits_0_to_4", "optimizer.lr=0.001"),
    "LoRA, rank 8": ("init.run=digits_0_to_4", "lora.rank=8", "optimizer.lr=0.01"),
}
IMAGES_PER_CLASS = 100


def write_images(folder: Path) -> None:
    """Write the digits as folders of classes: 0 to 4, 5 to 9 for training, and the others of 5 to 9 as reference."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    for label in range(10):
        some = pixels[labels == label]
        parts = (
            {"low": some}
            if label < 5
            else {"high": some[:IMAGES_PER_CLASS], "reference": some[IMAGES_PER_CLASS:]}
        )
        for part, chosen in parts.items():
            place = folder / part / str(label)
            place.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(chosen):
                Image.fromarray(image).save(place / f"{number:03d}.png")


def train(output: Path, name: str, data: str, seconds: int, words: Sequence[str]) -> None:
    """Train a run, or continue it, until it has trained for some seconds."""
    command = [sys.executable, "-m", "diffusion_cli", "train"]
    if (output / name / "checkpoints").is_dir():
        command += [f"run={output / name}", f"max_time={seconds}s"]
    else:
        command += [
            f"name={name}", f"output_dir={output}", "dataset=folder", f"dataset.path={output / 'images' / data}",
            "dataset.resolution=8", "dataset.channels=1", "dataset.flip=false", "model=unet_tiny",
            "model.class_conditional=true", "lr_schedule=constant", "max_steps=null", f"max_time={seconds}s",
            "validate_every=100000", "preview_every=null", "trainer.threads=1", "logger=[csv]", *words,
        ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def distance(run: Path, reference: Path, samples: int) -> float:
    """Return the Frechet distance of samples of a run, the same number of each class, to a folder of images."""
    images = diffuse.load(run).sample(samples, steps=50, label="all", batch_size=250)
    results = diffuse.evaluate(
        images, ["fid"], "dataset=digits", "features=classifier", "reference=images",
        f"reference.path={reference}", "force=true",
    )  # fmt: skip
    return results["frechet_classifier"].value


def parameters(run: Path) -> tuple[int, float]:
    """Return the number of trained parameters and the megabytes of a checkpoint of a run."""
    import torch

    path = run / "checkpoints" / "last.ckpt"
    states = torch.load(path, weights_only=True, mmap=True)["optimizer_states"][0]["state"]
    return sum(state["exp_avg"].numel() for state in states.values()), path.stat().st_size / 1e6


def measure(output: Path, times: Sequence[int], samples: int) -> dict[str, dict[str, Any]]:
    """Return the results of each way: distances by seconds, trained parameters, and the size of a checkpoint."""
    write_images(output / "images")
    train(output, "digits_0_to_4", "low", max(times) * 2, WAYS["from scratch"])
    measured: dict[str, dict[str, Any]] = {}
    for way, words in WAYS.items():
        name = way.replace(" ", "_").replace(",", "")
        found = output / f"{name}.json"
        if not found.is_file():
            distances = {}
            for seconds in times:
                words_here = [word.replace("=digits", f"={output}/digits") for word in words]
                train(output, name, "high", seconds, words_here)
                distances[seconds] = distance(output / name, output / "images" / "reference", samples)
                print(f"{way}, {seconds} s: {distances[seconds]:.3f}", file=sys.stderr, flush=True)
            number, size = parameters(output / name)
            found.write_text(json.dumps({"distances": distances, "parameters": number, "megabytes": size}))
        measured[way] = json.loads(found.read_text())
    return measured


def draw(measured: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the distance over the training time, a line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=100)
    seconds = [int(each) for each in next(iter(measured.values()))["distances"]]
    for way, row in measured.items():
        axes.plot(seconds, list(row["distances"].values()), "o-", label=way)
    axes.set(xscale="log", yscale="log", xlabel="training time in seconds", ylabel="Frechet distance")
    axes.set_xticks(seconds, [str(each) for each in seconds])
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Train, print the table and draw the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/initialization"), help="folder of the runs"
    )
    parser.add_argument(
        "--seconds", type=int, nargs="+", default=[30, 60, 120], help="increasing training times"
    )
    parser.add_argument("--samples", type=int, default=1000, help="number of images for a distance")
    parser.add_argument("--plot", type=Path, help="output PNG")
    arguments = parser.parse_args()
    measured = measure(arguments.output, arguments.seconds, arguments.samples)
    times = [f"{seconds} s" for seconds in arguments.seconds]
    print(f"| training | {' | '.join(times)} | trained parameters | checkpoint |")
    print(f"|---|{'---|' * (len(times) + 2)}")
    for way, row in measured.items():
        cells = [f"{value:.3f}" for value in row["distances"].values()]
        print(f"| {way} | {' | '.join(cells)} | {row['parameters']:,} | {row['megabytes']:.1f} MB |")
    if arguments.plot:
        draw(measured, arguments.plot)


if __name__ == "__main__":
    main()
