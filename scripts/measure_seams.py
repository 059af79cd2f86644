"""Measure seams of samples from overlapping windows, on random fields with a closed-form denoiser.

    python scripts/measure_seams.py

The field is stationary and normal, with the covariance `exp(-|d|^2 / (2 length^2)) + rough^2 [d = 0]`, so that steps
between neighbouring voxels are equally large everywhere. Each window has the optimal denoiser given its own voxels
alone, and predictions are averaged over windows as a network with `model.window=` averages its outputs. The table has
the mean squared step across the borders of windows over that elsewhere, and the variance of the samples, beside those
of a sample that is denoised as a whole. The variance of the field is 1; the error of the whole is that of the steps.
"""

import argparse
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.schedules import Cosine, Schedule
from diffusion_cli.networks.tiles import Tiles, windows
from diffusion_cli.samplers import DDIM, integrate

ROUGH = 0.1
"""Standard deviation of the part of the field that is independent in each voxel."""


class Field:
    """Windows of a stationary normal field of unit variance: the covariance along each axis is a factor.

    Args:
        sizes: sizes of the windows.
        length: correlation length in voxels.
    """

    def __init__(self, sizes: Sequence[int], length: float) -> None:
        self.bases: list[Tensor] = []
        smooth = torch.ones((), dtype=torch.float32)
        for size in sizes:
            place = torch.arange(size, dtype=torch.float64)
            covariance = torch.exp(-0.5 * ((place[:, None] - place) / length) ** 2)
            values, vectors = torch.linalg.eigh(covariance)
            self.bases.append(vectors.float())
            smooth = smooth[..., None] * values.clamp(min=0).float()
        self.variances = (1 - ROUGH**2) * smooth + ROUGH**2
        """Variances along the products of the eigenvectors of the axes."""

    def filtered(self, x: Tensor, gains: Tensor) -> Tensor:
        """Return x [B, C, *sizes] with its part along each eigenvector multiplied by a gain."""
        return self._turned(self._turned(x, inverse=True) * gains, inverse=False)

    def _turned(self, x: Tensor, *, inverse: bool) -> Tensor:
        for axis, basis in enumerate(self.bases, start=2):
            x = (x.movedim(axis, -1) @ (basis if inverse else basis.T)).movedim(-1, axis)
        return x

    def denoised(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """Return E[x_0 | x_t] for `x_t = alpha x_0 + sigma eps`."""
        return self.filtered(x_t, alpha * self.variances / (alpha**2 * self.variances + sigma**2))


def sampled(schedule: Schedule, tiles: Tiles, field: Field, steps: int, generator: torch.Generator) -> Tensor:
    """Return a sample [1, 1, *image] whose predictions are averaged over tiles."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (level.item() for level in schedule(t))
        x0 = tiles.mean(lambda place: field.denoised(x_t[(..., *place)], alpha, sigma))
        return Prediction(x0, (x_t - alpha * x0) / sigma, torch.tensor(sigma))

    sampler = DDIM(schedule)
    times = sampler.grid(steps)
    x = schedule.prior_std(times[0]).item() * torch.randn(1, 1, *tiles.image, generator=generator)
    (x,) = deque(integrate(sampler, denoise, x, times, lambda: torch.zeros_like(x)), maxlen=1)
    return x


def seam_ratio(x: Tensor, tiles: Tiles) -> float | None:
    """Return the mean squared step across the borders of windows over that elsewhere; None without borders."""
    across, elsewhere = [], []
    for axis, (size, part, starts) in enumerate(
        zip(tiles.image, tiles.tile, tiles.starts, strict=True), start=2
    ):
        borders = {edge for start in starts for edge in (start, start + part)} - {0, size}
        steps = x.diff(dim=axis).square().movedim(axis, 0).flatten(1).mean(1)
        for place, step in enumerate(steps.tolist(), start=1):
            (across if place in borders else elsewhere).append(step)
    return (sum(across) / len(across)) / (sum(elsewhere) / len(elsewhere)) if across else None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=96, help="voxels per axis")
    parser.add_argument("--window", type=int, default=32, help="voxels per axis of a window")
    parser.add_argument("--length", type=float, default=3.0, help="correlation length of the field in voxels")
    parser.add_argument("--steps", type=int, default=100, help="DDIM steps")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 4, 8, 16], help="overlaps in voxels")
    given = parser.parse_args()
    image, window = (given.size,) * 3, (given.window,) * 3
    print("| overlap | windows | steps across borders over those elsewhere | variance | seconds |")
    print("|---|---|---|---|---|")
    for name, tiles in [
        ("whole", windows(image, image, 0)),
        *((str(overlap), windows(image, window, overlap)) for overlap in given.overlaps),
    ]:
        began, field = time.perf_counter(), Field(tiles.tile, given.length)
        x = sampled(Cosine(), tiles, field, given.steps, torch.Generator().manual_seed(0))
        seconds = time.perf_counter() - began
        ratio = seam_ratio(x, tiles)
        seam = "" if ratio is None else f"{ratio:.3f}"
        print(f"| {name} | {len(tiles)} | {seam} | {x.var():.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
