"""Compare super-resolution by a model of condition images with bicubic interpolation and with posterior sampling.

    python scripts/compare_super_resolution.py --minutes 3 --plot docs/images/super_resolution.png
    python scripts/compare_super_resolution.py --mnist data --minutes 10 --plot docs/images/super_resolution.png

Digits of scikit-learn are enlarged from 4x4 to 8x8 pixels; with `--mnist`, digits of MNIST from 8x8 to 32x32. A small
image has the means of blocks of the original. Two models train for equal times. One is conditioned on small images; the
other is unconditional and restores them by `edit=super_resolution restoration=dps`. PSNR and SSIM compare the results
for held-out small images with their originals. The Frechet distance is that to the training images, in the features of
the shipped classifier. A mean of several samples estimates the posterior mean, which has the best PSNR but is blurred.
The table has sampler, steps and network calls of each image; DPS also differentiates each call. ± is the standard error
over images: of a Frechet distance, that of 200 bootstrap resamples of the images.
Finished trainings and results are kept, so the script can be stopped and restarted. Results are named by a hash of
weights, settings and originals.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import diffusion_cli as diffuse
from diffusion_cli.captions import Captions
from diffusion_cli.config import fingerprint
from diffusion_cli.data import spread
from diffusion_cli.images import save_rows
from diffusion_cli.model import Model
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.tensors import digest

SHOWN = 8  # rows of the picture
RESAMPLES = 200
"""Bootstrap resamples of a Frechet distance."""


class Task(NamedTuple):
    """Images, and the factor by which they are enlarged."""

    words: Sequence[str]
    """Words that choose the dataset on the command line."""
    data_dir: str
    factor: int
    window: int
    """Side of the window of SSIM in pixels."""

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


class Sampling(NamedTuple):
    """An edit that samples images of the size of the originals."""

    run: str
    """Name of the run."""
    edit: str
    sampler: str
    steps: int
    restoration: str | None
    overrides: tuple[str, ...]

    def key(self, model: Model, originals: Tensor, seed: int) -> str:
        """Return a name of the results: a hash of the weights, the settings and the originals."""
        content = {
            "weights": digest(model.denoiser.state_dict()), "originals": digest({"originals": originals}),
            "settings": [*self], "seed": seed,
        }  # fmt: skip
        return f"{self.run}_{fingerprint(content)}"

    def images(self, model: Model, originals: Tensor, seed: int) -> tuple[Tensor, int]:
        """Return the results, uint8 [N, 1, H, W], and the network calls of each."""
        before = model.denoiser.evaluations
        images = model.edit(
            self.edit, originals, seed=seed, sampler=self.sampler, steps=self.steps, restoration=self.restoration,
            overrides=self.overrides,
        )  # fmt: skip
        return images, (model.denoiser.evaluations - before) // len(originals)


class Method(NamedTuple):
    """Images of a method, and what they cost."""

    images: Tensor
    """uint8 [N, 1, H, W]."""
    sampler: str = ""
    steps: int | None = None
    """Steps of each sample."""
    calls: int | None = None
    """Network calls of each image, over all its samples."""


def samplings(task: Task, steps: int) -> dict[str, Sampling]:
    """Return the ways of sampling by name."""
    degraded, factor = ("edit.degrade=true", "batch_size=250"), f"edit.factor={task.factor}"
    return {
        "conditional": Sampling("conditional", "translate", "ddim", 50, None, degraded),
        "unconditional, DPS": Sampling(
            "unconditional", "super_resolution", "ddim", steps, "dps", (factor, "batch_size=100")
        ),
    }


def methods(output: Path, task: Task, originals: Tensor, samples: int, steps: int) -> dict[str, Method]:
    """Return the results of each method; those of models are kept in files."""
    small, factor = reduced(originals, task.factor), task.factor
    found = {
        "input": Method(to_bytes(interpolate(small, scale_factor=float(factor), mode="nearest"))),
        "bicubic": Method(to_bytes(interpolate(small, scale_factor=factor, mode="bicubic"))),
    }
    for name, sampling in samplings(task, steps).items():
        model = diffuse.load(output / sampling.run)
        draws = [
            kept(output, sampling, model, originals, number * len(originals)) for number in range(samples)
        ]
        images, calls = draws[0]
        found[name] = Method(images, sampling.sampler, sampling.steps, calls)
        mean = to_bytes(torch.stack([images.float() for images, _ in draws]).mean(0))
        found[f"{name}, mean of {samples}"] = Method(
            mean, sampling.sampler, sampling.steps, sum(calls for _, calls in draws)
        )
    return found | {"originals": Method(originals)}


def kept(output: Path, sampling: Sampling, model: Model, originals: Tensor, seed: int) -> tuple[Tensor, int]:
    """Return images and network calls of a sampling from its file, which is made if it is missing."""
    path = output / f"{sampling.key(model, originals, seed)}.npz"
    if not path.is_file():
        images, calls = sampling.images(model, originals, seed)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images.numpy(), calls=calls)
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["images"]), int(arrays["calls"])


def measured(images: Tensor, originals: Path, task: Task, exact: bool) -> dict[str, tuple[float, float]]:
    """Return value and standard error by metric; without PSNR and SSIM for images that equal the originals."""
    metrics = ["fid"] if exact else ["psnr", "ssim", "fid"]
    words = [f"metric.{name}.originals={originals}" for name in metrics if name != "fid"]
    words += [f"metric.fid.bootstrap={RESAMPLES}"]
    words += [] if exact else [f"metric.ssim.window={task.window}"]
    found = diffuse.evaluate(
        images, metrics, *words, *task.words, f"data_dir={task.data_dir}", "features=classifier", "force=true"
    )
    return {name: (result.value, result.details.get("standard_error", 0.0)) for name, result in found.items()}


def table(found: dict[str, Method], numbers: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Return the results as a Markdown table."""
    heads = ("method", "sampler", "steps", "network calls", "PSNR in dB", "SSIM", "Frechet distance")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in numbers.items():
        _, sampler, steps, calls = found[name]
        distance = next(key for key in row if key.startswith("frechet"))
        cells = [name, sampler, *("" if number is None else str(number) for number in (steps, calls))]
        cells += [
            f"{row[key][0]:.{digits}f} ± {row[key][1]:.{digits}f}" if key in row else ""
            for key, digits in (("psnr", 2), ("ssim", 3), (distance, 2))
        ]
        lines.append(f"| {' | '.join(cells)} |")
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
    parser.add_argument(
        "--samples", type=int, default=8, help="samples of each image for the posterior means"
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of posterior sampling")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/super_resolution"), help="folder of the runs"
    )
    parser.add_argument("--plot", type=Path, help="output PNG; in the folder of the runs by default")
    arguments = parser.parse_args()
    task = Task(["dataset=digits"], "data", 2, 7)
    if arguments.mnist:
        task = Task(["dataset=mnist"], arguments.mnist, 4, 11)
    output = arguments.output / task.dataset
    condition = ["condition=image", "condition.of=downsample", f"condition.factor={task.factor}"]
    train(output, "conditional", task, arguments.minutes, condition)
    train(output, "unconditional", task, arguments.minutes, [])
    originals = held_out(task, arguments.count)
    np.save(output / "originals.npy", originals.numpy())
    found = methods(output, task, originals, arguments.samples, arguments.steps)
    numbers: dict[str, dict[str, tuple[float, float]]] = {}
    for name, method in found.items():
        if name != "input":
            exact = name == "originals"
            numbers[name] = measured(method.images, output / "originals.npy", task, exact)
            print(f"{name}: {json.dumps(numbers[name])}", file=sys.stderr, flush=True)
    print(table(found, numbers))
    shown = torch.stack([method.images for method in found.values()], 1)[:SHOWN]
    words = Captions(columns=[*found], title=f"{task.dataset}, enlarged by {task.factor}")
    save_rows([*shown], arguments.plot or output / "comparison.png", words)


if __name__ == "__main__":
    main()
