"""Compare super-resolution by a model of condition images with bicubic interpolation and with posterior sampling.

    python scripts/compare_super_resolution.py --minutes 3 --plot docs/images/super_resolution.png
    python scripts/compare_super_resolution.py --mnist data --minutes 10 --plot docs/images/super_resolution.png

Digits of scikit-learn are enlarged from 4x4 to 8x8 pixels; with `--mnist`, digits of MNIST from 8x8 to 32x32. A small
image has the means of blocks of the original. Two models train for equal times. One is conditioned on small images; the
other is unconditional and restores them by `edit=super_resolution restoration=dps`. PSNR and SSIM compare the results
for held-out small images with their originals. The Frechet distance is that to the training images, in the features of
the shipped classifier. A mean of several samples estimates the posterior mean, which has the best PSNR but is blurred.
Finished trainings and results are kept, so the script can be stopped and restarted.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import diffusion_cli as diffuse
from diffusion_cli.captions import Captions
from diffusion_cli.data import spread
from diffusion_cli.images import save_rows

SHOWN = 8  # rows of the picture


class Task(NamedTuple):
    """Images, and the factor by which they are enlarged."""

    words: Sequence[str]
    """Words that choose the dataset on the command line."""
    data_dir: str
    factor: int
    window: int
    """Side of the window of SSIM in pixels."""
    steps: int
    """Sampling steps of posterior sampling."""

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return self.words[0].partition("=")[2]


def train(output: Path, name: str, task: Task, minutes: float, words: Sequence[str]) -> None:
    """Train a run until it has trained for some minutes."""
    command = [sys.executable, "-m", "diffusion_cli", "train"]
    budget = f"max_time={round(60 * minutes)}s"
    if (output / name / "checkpoints").is_dir():
        command += [f"run={output / name}", budget]
    else:
        command += [
            *task.words, *words, f"name={name}", f"output_dir={output}", f"data_dir={task.data_dir}", "max_steps=null",
            budget, "lr_schedule=constant", "validate_every=100000", "preview_every=null", "logger=[csv]",
        ]  # fmt: skip
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def held_out(task: Task, count: int) -> Tensor:
    """Return `count` images spread evenly over the validation split, uint8 [N, 1, H, W]."""
    images = diffuse.option("dataset", task.dataset, task.data_dir).load("val")
    return images[spread(len(images), min(count, len(images)))]


def reduced(originals: Tensor, factor: int) -> Tensor:
    """Return the means of blocks, float32 in 0..255."""
    return interpolate(originals.float(), [size // factor for size in originals.shape[2:]], mode="area")


def to_bytes(images: Tensor) -> Tensor:
    """Return images in 0..255 as uint8."""
    return images.clamp(0, 255).round().to(torch.uint8)


def results_of(output: Path, task: Task, originals: Tensor, samples: int) -> dict[str, Callable[[], Tensor]]:
    """Return functions that make the images of each method, uint8 [N, 1, H, W]."""
    small, factor = reduced(originals, task.factor), task.factor

    def translated(seed: int) -> Tensor:
        model = diffuse.load(output / "conditional")
        return model.edit(
            "translate", originals, seed=seed, overrides=["edit.degrade=true", "batch_size=250"]
        )

    def mean() -> Tensor:
        made = [translated(1000 + number * len(originals)).float() for number in range(samples)]
        return to_bytes(torch.stack(made).mean(0))

    def restored() -> Tensor:
        model = diffuse.load(output / "unconditional")
        return model.edit(
            "super_resolution", originals, restoration="dps", steps=task.steps,
            overrides=[f"edit.factor={factor}", "batch_size=100"],
        )  # fmt: skip

    return {
        "input": lambda: to_bytes(interpolate(small, scale_factor=float(factor), mode="nearest")),
        "bicubic": lambda: to_bytes(interpolate(small, scale_factor=factor, mode="bicubic")),
        "conditional": lambda: translated(0),
        f"conditional, mean of {samples}": mean,
        "unconditional, dps": restored,
        "original": lambda: originals,
    }


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """Return the images in a file, which is made if it is missing."""
    if not path.is_file():
        np.save(path, make().numpy())
    return torch.from_numpy(np.load(path))


def measured(images: Tensor, originals: Path, task: Task, exact: bool) -> dict[str, tuple[float, float]]:
    """Return value and standard error by metric; without PSNR and SSIM for images that equal the originals."""
    metrics = ["fid"] if exact else ["psnr", "ssim", "fid"]
    words = [f"metric.{name}.originals={originals}" for name in metrics if name != "fid"]
    words += [] if exact else [f"metric.ssim.window={task.window}"]
    found = diffuse.evaluate(
        images, metrics, *words, *task.words, f"data_dir={task.data_dir}", "features=classifier", "force=true"
    )
    return {name: (result.value, result.details.get("standard_error", 0.0)) for name, result in found.items()}


def table(numbers: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| method | PSNR in dB | SSIM | Frechet distance |", "|---|---|---|---|"]
    for method, row in numbers.items():
        cells = [
            f"{row[name][0]:.{digits}f} ± {row[name][1]:.{digits}f}" if name in row else ""
            for name, digits in (("psnr", 2), ("ssim", 3))
        ]
        distance = next(value for name, (value, _) in row.items() if name.startswith("frechet"))
        lines.append(f"| {method} | {' | '.join(cells)} | {distance:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Train, print the table and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mnist", help="folder with MNIST/raw of torchvision; without it, scikit-learn's digits"
    )
    parser.add_argument("--minutes", type=float, default=10, help="training time of each model")
    parser.add_argument("--count", type=int, default=360, help="number of held-out images")
    parser.add_argument("--samples", type=int, default=8, help="samples of each image for the posterior mean")
    parser.add_argument("--steps", type=int, default=100, help="steps of posterior sampling")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/super_resolution"), help="folder of the runs"
    )
    parser.add_argument("--plot", type=Path, help="output PNG; in the folder of the runs by default")
    arguments = parser.parse_args()
    steps = arguments.steps
    task = Task(["dataset=digits"], "data", 2, 7, steps)
    if arguments.mnist:
        task = Task(["dataset=mnist"], arguments.mnist, 4, 11, steps)
    output = arguments.output / task.dataset
    condition = ["condition=image", "condition.of=downsample", f"condition.factor={task.factor}"]
    train(output, "conditional", task, arguments.minutes, condition)
    train(output, "unconditional", task, arguments.minutes, [])
    originals = held_out(task, arguments.count)
    pictures: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, tuple[float, float]]] = {}
    np.save(output / "originals.npy", originals.numpy())
    for method, make in results_of(output, task, originals, arguments.samples).items():
        file = output / f"{method.replace(',', '').replace(' ', '_')}.npy"
        pictures[method] = make() if method == "original" else kept(file, make)
        if method != "input":
            numbers[method] = measured(pictures[method], output / "originals.npy", task, method == "original")
            print(f"{method}: {json.dumps(numbers[method])}", file=sys.stderr, flush=True)
    print(table(numbers))
    shown = torch.stack([*pictures.values()], 1)[:SHOWN]
    words = Captions(columns=[*pictures], title=f"{task.dataset}, enlarged by {task.factor}")
    save_rows([*shown], arguments.plot or output / "comparison.png", words)


if __name__ == "__main__":
    main()
