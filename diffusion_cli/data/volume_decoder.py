"""Decoder from the bytes of volume files to arrays of one shape."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.data.resampling import KEY, Placement, Spacing, resampled, steps
from diffusion_cli.errors import FormatError, format_value
from diffusion_cli.formats import Original, Shape, Volume
from diffusion_cli.formats.volume import Held, read_volume

FEW_KEPT = 0.5
"""Fraction of a volume below which a remark says how much of it is kept."""


class VolumeDecoder(NamedTuple):
    """Decodes NIfTI, .npy and DICOM volumes to float32 [C, D, H, W] in [-1, 1], by the value range of `form`.

    The largest central block with the proportions of `shape` is resized with an antialiased trilinear filter. The
    filter is a triangle of two voxels of the result or of the file, whichever are larger. A volume of the right size
    is unchanged. With a `target`, volumes are instead resampled to voxels of its sides, by `resampled`, and cropped or
    filled around their centre.
    """

    form: Volume
    shape: Shape
    spacing: list[float] | None
    """Voxel sides along W, H and D that all files must have; None for .npy, which has no spacing, and with a target."""
    target: Spacing | None = None
    """Sides of voxels to which volumes are resampled; None: those of the files."""
    dtype = np.dtype(np.float32)

    def __call__(self, data: bytes, *slices: bytes) -> np.ndarray:
        """Return the decoded volume; FormatError if it cannot be decoded, or if channels or spacing (by 1 %) differ."""
        return self.decoded(read_volume(data, *slices)).numpy()

    def original(self, data: bytes, *slices: bytes) -> Original:
        """Return the values of a volume before clipping and resizing."""
        held = read_volume(data, *slices)
        place = placement(held, self.shape[1:], self.target)
        return held.original._replace(resampled=not place.is_identity(held.values.shape[1:]))

    def decoded(self, held: Held) -> Tensor:
        """Return the decoded volume of a file's content; FormatError as for a call."""
        if self.spacing and held.spacing and not np.allclose(held.spacing, self.spacing, rtol=0.01, atol=0):
            found, wanted = (
                " x ".join(f"{side:.4g}" for side in each) for each in (held.spacing, self.spacing)
            )
            raise FormatError(
                f"has a voxel spacing of {found}, and the first file of {wanted}; "
                f"resample them to one spacing, as {KEY} of dataset=folder does"
            )
        values = torch.from_numpy(held.values)
        channels, *sizes = self.shape
        if len(values) != channels:
            raise FormatError(
                f"has {len(values)} channels; expected {channels}, set dataset.channels={len(values)}"
            )
        place = placement(held, sizes, self.target)
        if self.target is not None:
            return self.form.scaled(torch.from_numpy(resampled(held.values, place, self.target.fill)))
        for axis, size in enumerate(sizes, start=1):
            matrix = _triangles(values.shape[axis], size, place.first[axis - 1], place.step[axis - 1])
            values = (values.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
        return self.form.scaled(values)


def placement(held: Held, sizes: Sequence[int], target: Spacing | None) -> Placement:
    """Return the places of the voxels of a decoded volume among those of its file.

    Args:
        held: content of the file.
        sizes: depth, height and width of the decoded volume.
        target: sides of its voxels; None: the file's voxels enlarged by one factor.

    Raises:
        FormatError: the file has no spacing, and a target is given.
    """
    given = held.values.shape[1:]
    if target is None:
        return Placement.proportional(given, sizes)
    if held.spacing is None:
        raise FormatError(f"has no voxel spacing, which {KEY} needs; convert it to NIfTI")
    return Placement.central(given, sizes, steps(held.spacing[::-1], target.sides))


def order_remarks(held: Held, sizes: Sequence[int], target: Spacing | None) -> list[str]:
    """Return a remark if `sizes` keep less than half of a volume, and so does the opposite order or the spacing."""
    given = held.values.shape[1:]
    kept, opposite = (placement(held, order, target).kept(given) for order in (sizes, sizes[::-1]))
    if kept >= FEW_KEPT or (2 * kept > opposite and target is None):
        return []
    shown, other = (f"[{','.join(map(str, order))}]" for order in (sizes, sizes[::-1]))
    said = (
        f"dataset.resolution={shown}: keeps {100 * kept:.0f} % of the first volume, {' x '.join(map(str, given))} "
        "(depth x height x width)"
    )
    if 2 * kept <= opposite:
        return [f"{said}; {other} keeps {100 * opposite:.0f} %"]
    return [f"{said}; a larger {KEY} than {format_value(list(target.sides if target else ()))} keeps more"]


def _triangles(given: int, wanted: int, first: float, factor: float) -> Tensor:
    """Return the filter weights [wanted, given] along an axis."""
    centres = first + factor * torch.arange(wanted, dtype=torch.float64)[:, None]
    weights = (1 - (torch.arange(given) - centres).abs() / max(factor, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
