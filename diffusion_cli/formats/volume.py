"""Volumes in NIfTI, NumPy and DICOM files."""

import gzip
import math
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field, FiniteFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats.base import STRICT, Original, SampleFormat, Shape, ValueFormat
from diffusion_cli.formats.dicom_reader import is_dicom
from diffusion_cli.formats.dicom_volume import read_series
from diffusion_cli.formats.range_check import INTENDED, disagreement
from diffusion_cli.formats.uint8 import to_bytes
from diffusion_cli.system.files import write_npy
from diffusion_cli.system.untrusted import inflated, reason

SYNTHETIC = b"synthetic, diffuse"
"""Description in the header of written NIfTI files."""
LAST_ROW = [0.0, 0.0, 0.0, 1.0]  # of an affine matrix
SUFFIXES = (".nii", ".nii.gz", ".npy")
Numbers = Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
Row = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
Affine = Annotated[list[Row], Field(min_length=3, max_length=3)]
"""Affine A of the voxel (w, h, d): [right, anterior, superior] = A [w, h, d, 1], in mm."""
MM = {1: 1000.0, 3: 0.001}
"""Lengths in mm of the units of NIfTI by their code, metre and micrometre; others, also unknown ones, are mm."""
UNIT_BITS = 7
"""Bits of `xyzt_units` that have the code of the unit of length."""


class FileAxes(NamedTuple):
    """Axes of a volume in its file."""

    affine: np.ndarray
    """Affine matrix [4, 4] of the file, in mm."""
    turn: np.ndarray
    """Orientation of nibabel that turns the axes of the file to RAS+, [3, 2]."""
    order: tuple[int, ...] = ()
    """Numbers of the DICOM files of the slices along the last axis; empty for a file of the whole volume."""

    def in_file(self, values: np.ndarray) -> np.ndarray:
        """Return values [C, D, H, W] of RAS+ axes as the file stores them, [X, Y, Z, C]."""
        orientations = nibabel().orientations
        upright = [[0, 1], [1, 1], [2, 1]]
        return orientations.apply_orientation(values.T, orientations.ornt_transform(upright, self.turn))

    def upright(self, values: np.ndarray) -> np.ndarray:
        """Return values [X, Y, Z, C] of a file with RAS+ axes, [C, D, H, W]."""
        return nibabel().orientations.apply_orientation(values, self.turn).T


@dataclass(frozen=True, config=STRICT)
class Volume(ValueFormat):
    """Volumes [C, D, H, W] as NIfTI or .npy, read from DICOM too; their value range [low, high] becomes [-1, 1].

    A file stores numbers n with values slope n + inter. The axes of a NIfTI are W, H, D and C, reoriented so that W
    points nearest to right, H to anterior and D to superior. Those of a .npy are [D, H, W] or [C, D, H, W].

    Args:
        low: value that becomes -1.
        high: value that becomes 1.
        dtype: dtype of the stored numbers.
        slope: scale of the stored numbers.
        inter: offset of the stored numbers.
        affine: affine matrix of voxel positions in written files, in mm, [3, 4].
        file: file type of samples.
    """

    low: float
    high: float
    dtype: Numbers
    slope: float
    inter: float
    affine: Affine
    file: Literal[".nii", ".nii.gz", ".npy"]
    kind: ClassVar[str] = "volume"

    def difference(self, other: SampleFormat, besides: Collection[str] = ()) -> tuple[str, Any, Any] | None:
        # Earlier versions stored the affine in the units of the file.
        units = (unit**sign for unit in MM.values() for sign in (1, -1))
        if isinstance(other, Volume) and any(
            np.allclose(scale * np.array(self.affine), other.affine, rtol=1e-6, atol=0) for scale in units
        ):
            besides = [*besides, "affine"]
        return super().difference(other, besides)

    @property
    def suffix(self) -> str:
        return self.file

    @property
    def half_range(self) -> float:
        return (self.high - self.low) / 2

    @property
    def note(self) -> str:
        return "of the middle slices of volumes"

    def quantize(self, x: Tensor) -> Tensor:
        return self.scaled(self._rounded(self._values(x)))

    def values(self, samples: Tensor) -> np.ndarray:
        return self._values(samples).cpu().numpy()

    def rounded(self, values: np.ndarray) -> np.ndarray:
        return self._rounded(torch.from_numpy(values)).numpy()

    def beyond(self, values: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(values - self.low - self.half_range) - self.half_range, 0)

    def original(self, data: bytes) -> Original:
        return read_volume(data).original

    def remark(self, images: Sequence[np.ndarray]) -> str | None:
        found = disagreement(
            [values.reshape(len(values), 1, -1) for values in images], [self.low], [self.high]
        )
        if found is None:
            return None
        return f"dataset.range=[{self.low:g},{self.high:g}]: {found}; {INTENDED}"

    def write_values(self, values: np.ndarray, path: Path) -> None:
        if self.file == ".npy":
            numbers = self._in_dtype(values)
            write_npy(path, numbers[0] if len(numbers) == 1 else numbers)
            return
        self._write_nifti(values.T, np.array([*self.affine, LAST_ROW]), path)

    def write_in(self, axes: FileAxes, values: np.ndarray, path: Path) -> None:
        """Write values [C, D, H, W] of RAS+ axes to a NIfTI file of other axes."""
        self._write_nifti(axes.in_file(values), axes.affine, path)

    def _in_dtype(self, values: np.ndarray) -> np.ndarray:
        return self._numbers(torch.from_numpy(values)).numpy().astype(self.dtype)

    def _write_nifti(self, values: np.ndarray, affine: np.ndarray, path: Path) -> None:
        """Write values [X, Y, Z, C]."""
        numbers = self._in_dtype(np.ascontiguousarray(values))
        numbers = numbers[..., 0] if numbers.shape[-1] == 1 else numbers
        image = nibabel().Nifti1Image(numbers, affine, dtype=numbers.dtype)
        image.header.set_slope_inter(self.slope, self.inter)  # the numbers are scaled already
        image.header["descrip"] = SYNTHETIC
        data = image.to_bytes()
        path.write_bytes(gzip.compress(data, mtime=0) if self.file == ".nii.gz" else data)

    def read(self, data: bytes, shape: Shape) -> Tensor:
        values = read_volume(data).values
        if values.shape != tuple(shape):
            raise FormatError(f"has shape {values.shape}; expected {tuple(shape)}")
        return self.scaled(torch.from_numpy(values))

    def scaled(self, values: Tensor) -> Tensor:
        """Return values in the units of the data as float32 in [-1, 1], clipped to the range."""
        return ((values.double() - self.low) / self.half_range - 1).clamp(-1, 1).float()

    def _values(self, x: Tensor) -> Tensor:
        return self.low + (x.double().clamp(-1, 1) + 1) * self.half_range

    def _numbers(self, values: Tensor) -> Tensor:
        """Return the numbers in files nearest to values, float64."""
        numbers = (values - self.inter) / self.slope
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return numbers.to(getattr(torch, self.dtype)).double()
        limits = np.iinfo(kind)
        return numbers.round().clamp(int(limits.min), int(limits.max))

    def clipped(self, values: np.ndarray) -> int:
        """Return the number of values beyond those that a file can store."""
        kind = np.dtype(self.dtype)
        limits = np.finfo(kind) if kind.kind == "f" else np.iinfo(kind)
        numbers = (values - self.inter) / self.slope
        half = 0.0 if kind.kind == "f" else 0.5
        return int(((numbers < float(limits.min) - half) | (numbers > float(limits.max) + half)).sum())

    def _rounded(self, values: Tensor) -> Tensor:
        return self.slope * self._numbers(values) + self.inter

    def to_rgb(self, samples: Tensor) -> Tensor:
        """Return the central slices across D, H and W side by side, of the first channel unless there are three."""
        return self.slices(samples, None)

    def slices(self, samples: Tensor, place: Sequence[int] | None) -> Tensor:
        shown = self._shown(samples)
        depth, height, width = place or [size // 2 for size in shown.shape[2:]]
        slices = [shown[:, :, depth], shown[:, :, :, height], shown[..., width]]
        tallest = max(each.shape[2] for each in slices)
        padded = [torch.nn.functional.pad(each, (0, 0, 0, tallest - each.shape[2])) for each in slices]
        return torch.cat(padded, 3)

    def frames(self, samples: Tensor) -> Tensor:
        return self._shown(samples).transpose(1, 2)

    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        channels, depth, height, width = shape
        return channels if channels == 3 else 1, max(depth, height), 2 * width + height

    def _shown(self, samples: Tensor) -> Tensor:
        return to_bytes(samples if samples.shape[1] == 3 else samples[:, :1])


class VolumeHeader(NamedTuple):
    """Fields of a `Volume` that a file determines."""

    dtype: str
    slope: float
    inter: float
    affine: list[list[float]]
    file: str


class Held(NamedTuple):
    """Content of a volume file."""

    values: np.ndarray
    """float64 [C, D, H, W] in the units of the data."""
    header: VolumeHeader
    axes: FileAxes | None = None
    """Axes of the file; None for .npy, and frames without positions."""

    @property
    def original(self) -> Original:
        """Values of the file, and how it stores them."""
        header = self.header
        return Original(self.values, {"dtype": header.dtype, "slope": header.slope, "inter": header.inter})

    @property
    def spacing(self) -> list[float] | None:
        """Voxel sides along W, H and D in mm; None for .npy."""
        if self.header.file == ".npy":
            return None
        return np.linalg.norm(np.array(self.header.affine)[:, :3], axis=0).tolist()


def read_volume(data: bytes, *slices: bytes) -> Held:
    """Return the volume of a NIfTI file, compressed or not, of a .npy, or of the DICOM files of a series.

    Raises FormatError if they are malformed or truncated.
    """
    try:
        if data.startswith(npy.MAGIC_PREFIX):
            return _read_npy(data)
        if is_dicom(data):
            return _read_dicom([data, *slices])
        packed = data.startswith(b"\x1f\x8b")
        return _read_nifti(inflated(data) if packed else data, ".nii.gz" if packed else ".nii")
    except UsageError:
        raise
    except Exception as error:  # the parsers raise errors of many types for damaged headers
        raise FormatError(reason(error)) from error


def _read_npy(data: bytes) -> Held:
    file = BytesIO(data)
    version = npy.read_magic(file)
    shape, _, dtype = (
        npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
    )
    _check(shape, dtype, len(data) - file.tell())
    values = npy.read_array(BytesIO(data), allow_pickle=False)
    values = values[None] if values.ndim == 3 else values
    return Held(_finite(values), VolumeHeader(dtype.name, 1.0, 0.0, np.eye(4)[:3].tolist(), ".npy"))


def _read_nifti(data: bytes, file: str) -> Held:
    second = data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # NIfTI-2 has a header of 540 bytes
    image = getattr(nibabel(), "Nifti2Image" if second else "Nifti1Image").from_bytes(data)
    shape, dtype = image.shape, image.header.get_data_dtype()
    _check(shape, dtype, len(data))
    slope, inter = image.dataobj.slope, image.dataobj.inter
    numbers = VolumeHeader(dtype.name, float(slope), float(inter), [], file)
    unit = int(image.header["xyzt_units"]) & UNIT_BITS
    scale = np.diag([*[MM.get(unit, 1.0)] * 3, 1.0])
    return _oriented(np.asanyarray(image.dataobj), scale @ image.affine, numbers)


def _read_dicom(files: Sequence[bytes]) -> Held:
    series = read_series(files)
    header = VolumeHeader(series.dtype, series.slope, series.intercept, np.eye(4)[:3].tolist(), ".npy")
    if series.affine is None:  # such as the frames of a film
        return Held(_finite(series.values[None]), header)
    return _oriented(series.values.T, series.affine, header._replace(file=".nii.gz"), series.order)


def _oriented(
    values: np.ndarray, affine: np.ndarray, header: VolumeHeader, order: tuple[int, ...] = ()
) -> Held:
    """Return a volume of axes W, H, D and optionally C, turned so that W points nearest to right and so on."""
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise FormatError("has an affine that is singular or not finite")
    orientations = nibabel().orientations
    turned = orientations.io_orientation(affine)
    shape = values.shape[:3]
    values = orientations.apply_orientation(values, turned).T
    values = values[None] if values.ndim == 3 else values
    upright = (affine @ orientations.inv_ornt_aff(turned, shape))[:3]
    return Held(_finite(values), header._replace(affine=upright.tolist()), FileAxes(affine, turned, order))


def _check(shape: tuple[int, ...], dtype: np.dtype, size: int) -> None:
    if len(shape) not in (3, 4) or min(shape) < 1 or dtype.name not in Numbers.__args__:
        raise FormatError(
            f"has {dtype} of shape {shape}; a volume has real numbers, three axes and optionally one of channels"
        )
    if math.prod(shape) * dtype.itemsize > size:
        raise FormatError(f"has {size} bytes, too few for {shape} of {dtype}")


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise FormatError("has values that are not finite")
    return values


def nibabel() -> ModuleType:
    """Import nibabel, which reads NIfTI; UsageError with the install command if missing."""
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise UsageError(
            "dataset", NO_VALUE, "NIfTI files need nibabel", "install it: pip install 'diffuse-cli[medical]'"
        ) from error
    return nibabel
