"""Volumes in DICOM files: the slices of a series, or the frames of one file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.dicom_reader import Scan, read_frames
from diffusion_cli.system.untrusted import LARGEST, reason

if TYPE_CHECKING:
    from pydicom import Dataset

LARGEST_SERIES = 2 * LARGEST
"""Bytes of the stored numbers of a series, at most: 1000 slices of 512 x 512."""
UNEQUAL = 0.01  # largest deviation of a gap between slices from their mean, relative to it
PARALLEL = 1e-3  # largest deviation of the direction cosines of slices


class Series(NamedTuple):
    """A volume in DICOM files."""

    values: np.ndarray
    """Rescaled values, float64 [D, H, W]."""
    dtype: str
    """Dtype of the stored numbers; float32 if the slices differ in their slope or intercept."""
    slope: float
    intercept: float
    affine: np.ndarray | None
    """Affine matrix [4, 4] from (w, h, d) to right, anterior and superior in mm; None for frames without positions."""
    order: tuple[int, ...]
    """Numbers of the files of the slices along D; empty if files have several frames."""


class Plane(NamedTuple):
    """A slice of a volume."""

    pixels: np.ndarray
    """Stored numbers [H, W]."""
    slope: float
    intercept: float
    geometry: np.ndarray | None
    """Direction of rows [3], direction of columns [3], distance of rows and of columns, and position [3], in mm."""


def read_series(files: Sequence[bytes]) -> Series:
    """Return the volume of the files of one series, in any order; FormatError if they do not form a volume.

    Slices are sorted along their normal. Their gaps must be equal, to 1 %.
    """
    planes: list[Plane] = []
    thickness = None
    for number, data in enumerate(files, start=1):
        try:
            scan = read_frames(data)
            planes += _planes(scan)
        except Exception as error:  # pydicom raises errors of many types for broken elements
            where = f"file {number} of {len(files)}: " if len(files) > 1 else ""
            raise FormatError(where + reason(error)) from error
        thickness = thickness or scan.header.get("SpacingBetweenSlices") or scan.header.get("SliceThickness")
        shapes = {plane.pixels.shape for plane in planes}
        if len(shapes) > 1:
            raise FormatError(f"has slices of {' and '.join(f'{w} x {h}' for h, w in sorted(shapes))}")
        if sum(plane.pixels.nbytes for plane in planes) > LARGEST_SERIES:
            raise FormatError(f"has slices of more than {LARGEST_SERIES} bytes together")
    affine, order = _affine(planes, len(files), thickness)
    planes = [planes[place] for place in order]
    single = tuple(order) if len(planes) == len(files) else ()
    values = np.empty((len(planes), *planes[0].pixels.shape))
    for place, plane in enumerate(planes):  # a list of them would double the memory
        values[place] = plane.pixels * plane.slope + plane.intercept
    if len({(plane.slope, plane.intercept) for plane in planes}) > 1:
        return Series(values, "float32", 1.0, 0.0, affine, single)
    dtype = np.result_type(*{plane.pixels.dtype for plane in planes}).name
    return Series(values, dtype, planes[0].slope, planes[0].intercept, affine, single)


def _planes(scan: Scan) -> list[Plane]:
    """Return the frames of a file; their geometry and rescaling may be in groups shared by frames or of each one."""
    from pydicom import Dataset

    header = scan.header
    if len(scan.pixels) == 1 and "SharedFunctionalGroupsSequence" not in header:
        return [Plane(scan.pixels[0], scan.slope, scan.intercept, _geometry(header, header, header))]
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    each = header.get("PerFrameFunctionalGroupsSequence") or [Dataset()] * len(scan.pixels)
    if len(each) != len(scan.pixels):
        raise FormatError(f"has {len(scan.pixels)} frames, and describes {len(each)}")

    def group(own: Dataset, name: str) -> Dataset:
        return (own.get(name) or shared.get(name) or [Dataset()])[0]

    planes = []
    for pixels, own in zip(scan.pixels, each, strict=True):
        values = group(own, "PixelValueTransformationSequence")
        planes.append(
            Plane(
                pixels,
                float(values.get("RescaleSlope", scan.slope)),
                float(values.get("RescaleIntercept", scan.intercept)),
                _geometry(
                    group(own, "PlaneOrientationSequence"),
                    group(own, "PixelMeasuresSequence"),
                    group(own, "PlanePositionSequence"),
                ),
            )
        )
    return planes


def _geometry(orientation: "Dataset", measures: "Dataset", position: "Dataset") -> np.ndarray | None:
    parts = (
        orientation.get("ImageOrientationPatient"),
        measures.get("PixelSpacing"),
        position.get("ImagePositionPatient"),
    )
    if any(part is None for part in parts):
        return None
    geometry = np.array([float(number) for part in parts for number in part or ()])
    if geometry.shape != (11,) or not np.isfinite(geometry).all() or min(geometry[6:8]) <= 0:
        raise FormatError("has a position, orientation or pixel spacing that is malformed")
    return geometry


def _affine(
    planes: Sequence[Plane], files: int, thickness: float | None
) -> tuple[np.ndarray | None, Sequence[int]]:
    """Return the affine matrix of slices, and their order along the normal."""
    found = [plane.geometry for plane in planes if plane.geometry is not None]
    if not found and files == 1 and len(planes) > 1:
        return None, range(len(planes))
    if len(found) < len(planes):
        raise FormatError(
            "has slices without position, orientation or pixel spacing; convert it to NIfTI or .npy"
        )
    geometry = np.stack(found)
    rows, columns, (down, across) = geometry[0, :3], geometry[0, 3:6], geometry[0, 6:8]
    if np.abs(geometry[:, :8] - geometry[0, :8]).max() > PARALLEL:
        raise FormatError("has slices of different orientation or pixel spacing")
    normal = np.cross(rows, columns)
    order = np.argsort(geometry[:, 8:] @ normal, kind="stable")
    positions = geometry[order, 8:]
    if len(planes) == 1:
        if not thickness:
            raise FormatError("has one slice, without SliceThickness; a volume needs the distance of slices")
        step = normal * float(thickness)
    else:
        steps = np.diff(positions, axis=0)
        step, gaps = steps.mean(axis=0), steps @ normal
        if gaps.min() < UNEQUAL * gaps.mean():
            raise FormatError(
                "has two slices at one position; keep one of its phases, or convert them to volumes of their own"
            )
        if np.linalg.norm(steps - step, axis=1).max() > UNEQUAL * np.linalg.norm(step):
            raise FormatError(
                f"has gaps of {gaps.min():.4g} to {gaps.max():.4g} mm between its {len(planes)} slices; "
                "complete or resample it"
            )
    affine = np.eye(4)
    affine[:3] = np.column_stack([rows * across, columns * down, step, positions[0]])
    affine[:2] *= -1  # from left and posterior to right and anterior
    return affine, order.tolist()
