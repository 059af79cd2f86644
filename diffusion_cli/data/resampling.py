"""Linear resampling of volumes to voxels of other sides, by SimpleITK."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from diffusion_cli.errors import NO_VALUE, UsageError

KEY = "dataset.spacing"
SAME = 1e-3
"""Relative difference of two sides of voxels below which a volume is not resampled along an axis."""
EXACT = 1e-3  # largest error of the Gaussian kernel, of its sum
WIDEST = 2**12  # voxels of the Gaussian kernel, at most


class Spacing(NamedTuple):
    """Sides of voxels to which volumes are resampled."""

    sides: tuple[float, float, float]
    """Sides along D, H and W in mm."""
    fill: float
    """Value of voxels outside a volume."""


class Placement(NamedTuple):
    """Places of the voxels of one volume among those of another, along D, H and W."""

    first: tuple[float, ...]
    """Centre of the first voxel, in voxels of the other volume."""
    step: tuple[float, ...]
    """Side of a voxel, in voxels of the other volume."""
    sizes: tuple[int, ...]
    """Number of voxels."""

    @classmethod
    def central(cls, given: Sequence[int], sizes: Sequence[int], step: Sequence[float]) -> "Placement":
        """Return the central block; along axes of equal voxels, these are those of the other volume.

        Args:
            given: sizes of the other volume.
            sizes: number of voxels.
            step: side of a voxel, in voxels of the other volume.
        """
        starts = [(have - want * each) / 2 for have, want, each in zip(given, sizes, step, strict=True)]
        starts = [math.floor(start) if each == 1 else start for start, each in zip(starts, step, strict=True)]
        return cls._starting(starts, sizes, step)

    @classmethod
    def proportional(cls, given: Sequence[int], sizes: Sequence[int]) -> "Placement":
        """Return the largest central block of the proportions of `sizes` that starts with a whole voxel."""
        factor = min(have / want for have, want in zip(given, sizes, strict=True))
        starts = [math.floor((have - want * factor) / 2) for have, want in zip(given, sizes, strict=True)]
        return cls._starting(starts, sizes, [factor] * len(sizes))

    @classmethod
    def _starting(cls, starts: Sequence[float], sizes: Sequence[int], step: Sequence[float]) -> "Placement":
        first = tuple(start + each / 2 - 0.5 for start, each in zip(starts, step, strict=True))
        return cls(first, tuple(step), tuple(sizes))

    @property
    def block(self) -> list[tuple[float, float]]:
        """Start and length of the part of the other volume, along D, H and W."""
        return [
            (first - step / 2 + 0.5, size * step)
            for first, step, size in zip(self.first, self.step, self.sizes, strict=True)
        ]

    def is_identity(self, given: Sequence[int]) -> bool:
        """Return whether the voxels are those of the other volume, of `given` sizes."""
        return self.sizes == tuple(given) and not any(self.first) and set(self.step) == {1.0}

    def kept(self, given: Sequence[int]) -> float:
        """Return the fraction of the other volume, of `given` sizes, that the voxels cover."""
        return math.prod(
            max(0.0, min(have, start + length) - max(0.0, start)) / have
            for have, (start, length) in zip(given, self.block, strict=True)
        )

    def affine(self, matrix: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return the affine [3, 4] of the voxels (w, h, d), by that of the other volume."""
        given = np.array(matrix)
        origin = given @ [*reversed(self.first), 1.0]
        return np.column_stack([given[:, :3] * [*reversed(self.step)], origin]).tolist()

    def inverse(self, given: Sequence[int]) -> "Placement":
        """Return the places of the voxels of the other volume, of `given` sizes, among those of this one."""
        first = tuple(-start / step for start, step in zip(self.first, self.step, strict=True))
        return Placement(first, tuple(1 / step for step in self.step), tuple(given))


def spacing_of(given: float | Sequence[float] | None, fill: float) -> Spacing | None:
    """Return the sides of `dataset.spacing`, a number for all three or one each; None without."""
    if given is None:
        return None
    depth, height, width = [given] * 3 if isinstance(given, float | int) else given
    return Spacing((float(depth), float(height), float(width)), float(fill))


def steps(found: Sequence[float], wanted: Sequence[float]) -> tuple[float, ...]:
    """Return `wanted` sides of voxels in those that are `found`, along D, H and W; 1 for sides that are the same."""
    ratios = [want / have for have, want in zip(found, wanted, strict=True)]
    return tuple(1.0 if abs(ratio - 1) < SAME else ratio for ratio in ratios)


def resampled(values: np.ndarray, place: Placement, fill: float) -> np.ndarray:
    """Return a volume at other places, by linear interpolation of its voxels.

    Values are those of the nearest border within half a voxel around the volume, and `fill` beyond. Along axes whose
    voxels become larger by a factor k, a discrete Gaussian of variance (k^2 - 1) / (8 ln 2) in squared voxels removes
    finer detail first.

    Args:
        values: volume, float64 [C, D, H, W].
        place: places of the voxels of the result.
        fill: value outside the volume.

    Returns:
        The volume at these places, float64 [C, *place.sizes].

    Raises:
        UsageError: SimpleITK is not installed.

    Source: Cardoso et al. 2015 (the variance).
    """
    sitk = simple_itk()
    variances = [max(0.0, (step**2 - 1) / (8 * math.log(2))) for step in reversed(place.step)]
    smooth = sitk.DiscreteGaussianImageFilter()
    smooth.SetVariance(variances)
    smooth.SetUseImageSpacing(False)
    smooth.SetMaximumError(EXACT)
    smooth.SetMaximumKernelWidth(WIDEST)
    move = sitk.ResampleImageFilter()
    move.SetInterpolator(sitk.sitkLinear)
    move.SetOutputOrigin([*reversed(place.first)])
    move.SetOutputSpacing([*reversed(place.step)])
    move.SetSize([*reversed(place.sizes)])
    move.SetDefaultPixelValue(fill)
    found = np.empty((len(values), *place.sizes))
    for channel, given in enumerate(values):
        image = sitk.GetImageFromArray(np.ascontiguousarray(given))
        for each in (smooth, move) if any(variances) else (move,):
            each.SetNumberOfThreads(1)  # callers decode several files at once
            image = each.Execute(image)
        found[channel] = sitk.GetArrayViewFromImage(image)
    return found


def simple_itk() -> ModuleType:
    """Import SimpleITK, which resamples volumes; UsageError with the install command if missing."""
    try:
        import SimpleITK
    except ModuleNotFoundError as error:
        problem, remedy = (
            "resampling volumes needs SimpleITK",
            "install it: pip install 'diffuse-cli[medical]'",
        )
        raise UsageError("dataset", NO_VALUE, problem, remedy) from error
    return SimpleITK
