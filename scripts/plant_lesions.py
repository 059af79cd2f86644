"""Plant lesions in images or volumes, with masks of them, to test the detection of anomalies.

    python scripts/plant_lesions.py digits
    python scripts/plant_lesions.py volumes

`digits` plants in validation images of dataset=digits: a square of 2x2 pixels, white where all were dark, black where
all were bright, within the six columns in which digits lie. `volumes` writes ellipsoids with a bright core for the
training, and plants in others: a ball with the values of the shell in the core, or of the core in the shell. Every
second input has no lesion, so its mask is black. The script prints how well intensities alone detect the lesions: the
distance to the mean training image at each pixel.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from diffusion_cli.data import Digits
from diffusion_cli.editing import GaussianFilter
from diffusion_cli.metrics.detection import Detection, detection
from diffusion_cli.system.seeding import mix

SIZE = 16  # voxels along each axis
SHELL, CORE, OUTSIDE = 100, 600, -1000  # values of ellipsoids
TEXTURE = 20.0  # standard deviation of the values


class Planted(NamedTuple):
    """Inputs with lesions."""

    inputs: np.ndarray
    """Values [N, *sizes]."""
    truth: np.ndarray
    """Whether a pixel or voxel is in a lesion, bool [N, *sizes]."""
    healthy: np.ndarray
    """Images of the training, [M, *sizes]."""


def main() -> None:
    """Write inputs and masks, and print the scores of intensities."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["digits", "volumes"])
    parser.add_argument("--count", type=int, default=100, help="inputs")
    parser.add_argument("--healthy", type=int, default=300, help="volumes for the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blur", type=float, default=0.6, help="Gaussian filter of the distances in pixels")
    parser.add_argument("--output", type=Path, default=Path("lesions"))
    arguments = parser.parse_args()
    if arguments.kind == "digits":
        planted = digits(arguments.count, arguments.seed)
    else:
        planted = volumes(arguments.count, arguments.healthy, arguments.seed)
    write(planted, arguments.output)
    found = baseline(planted, arguments.blur)
    print(
        f"{len(planted.inputs)} inputs in {arguments.output}. Distance to the mean training image: AUROC "
        f"{found[0].auroc:.3f}, average precision {found[0].average_precision:.3f}, best Dice "
        f"{found[0].best_dice:.3f}; inputs by the largest distance: AUROC {found[1].auroc:.3f}"
    )


def digits(count: int, seed: int) -> Planted:
    """Return validation digits, of which every second has a square of 2x2 pixels."""
    dataset = Digits("")
    held_out, healthy = (
        dataset.stream(split)[torch.arange(len(dataset.stream(split)))][:, 0].numpy()
        for split in ("val", "train")
    )
    inputs = held_out[:count].copy()
    truth = np.zeros(inputs.shape, bool)
    for number in range(1, len(inputs), 2):
        squares = np.lib.stride_tricks.sliding_window_view(inputs[number, :, 1:-1], (2, 2))
        dark, bright = squares.max((2, 3)) < 128, squares.min((2, 3)) >= 128
        free = np.argwhere(dark | bright)
        row, column = free[_stream(seed, number).randint(len(free))]
        part = (number, slice(row, row + 2), slice(column + 1, column + 3))
        inputs[part] = 255 if dark[row, column] else 0
        truth[part] = True
    return Planted(inputs, truth, healthy)


def volumes(count: int, healthy: int, seed: int) -> Planted:
    """Return ellipsoids, of which every second has a ball with a radius of 1.5 to 2.5 voxels, and others without."""
    whole = np.stack([ellipsoid(_stream(seed, number)) for number in range(count + healthy)])
    inputs = whole[:count].copy()
    truth = np.zeros(inputs.shape, bool)
    places = np.moveaxis(np.indices((SIZE,) * 3), 0, -1)
    for number in range(1, count, 2):
        draw, inside = _stream(seed, number, "lesion"), inputs[number] > (OUTSIDE + SHELL) / 2
        inner = places[inside]
        middle = inner[draw.randint(len(inner))]
        region = (np.linalg.norm(places - middle, axis=-1) < draw.uniform(1.5, 2.5)) & inside
        in_core = inputs[number][tuple(middle)] > (SHELL + CORE) / 2
        values = (SHELL if in_core else CORE) + TEXTURE * draw.standard_normal(int(region.sum()))
        inputs[number][region] = np.rint(values)
        truth[number] = region
    return Planted(inputs, truth, whole[count:])


def ellipsoid(draw: np.random.RandomState) -> np.ndarray:
    """Return an ellipsoid with a bright core, int16 [D, H, W]."""
    z, y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    a, b, c = draw.uniform(0.5, 0.9, 3)
    radius = np.sqrt((z / a) ** 2 + (y / b) ** 2 + (x / c) ** 2)
    values = np.select([radius < 0.5, radius < 1], [CORE, SHELL], OUTSIDE)
    return np.rint(values + TEXTURE * draw.standard_normal(radius.shape)).astype(np.int16)


def baseline(planted: Planted, blur: float) -> tuple[Detection, Detection]:
    """Return how well distances to the mean training image detect pixels, and inputs by the largest distance.

    Args:
        planted: inputs and truth.
        blur: standard deviation of the filter of the distances in pixels; 0: none.
    """
    distance = torch.from_numpy(np.abs(planted.inputs - planted.healthy.mean(0)))
    if blur:
        distance = GaussianFilter((1, *distance.shape[1:]), sigma=blur)(distance[:, None])[:, 0]
    truth = torch.from_numpy(planted.truth)
    return detection(distance, truth), detection(distance.flatten(1).amax(1), truth.flatten(1).any(1))


def write(planted: Planted, output: Path) -> None:
    """Write inputs and masks as PNG, or as NIfTI with the volumes of the training."""
    if planted.inputs.ndim == 3:
        groups = {"inputs": planted.inputs, "masks": (255 * planted.truth).astype(np.uint8)}
    else:
        groups = {
            "inputs": planted.inputs,
            "masks": planted.truth.astype(np.uint8),
            "healthy": planted.healthy,
        }
    for name, images in groups.items():
        (output / name).mkdir(parents=True)
        for number, image in enumerate(images):
            path = output / name / f"{number:03d}"
            if image.ndim == 2:
                Image.fromarray(image).save(f"{path}.png")
            else:
                import nibabel

                nibabel.Nifti1Image(image.T, np.eye(4)).to_filename(f"{path}.nii.gz")


def _stream(*key: int | str) -> np.random.RandomState:
    """Return a random generator whose stream never changes."""
    return np.random.RandomState(mix(*key) % 2**32)


if __name__ == "__main__":
    main()
