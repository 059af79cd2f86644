"""Volumes in the numbers of their files: NIfTI and NumPy."""

import gzip
import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field, FiniteFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats.base import STRICT, SampleFormat, Shape
from diffusion_cli.formats.uint8 import to_bytes
from diffusion_cli.system.untrusted import inflated, reason

LAST_ROW = [0.0, 0.0, 0.0, 1.0]  # of a matrix that acts on [w, h, d, 1]
SUFFIXES = (".nii", ".nii.gz", ".npy")
Numbers = Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
Row = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
Affine = Annotated[list[Row], Field(min_length=3, max_length=3)]
"""Where the voxel (w, h, d) lies, as [right, anterior, superior] = A [w, h, d, 1], in the units of the file."""


@dataclass(frozen=True, config=STRICT)
class Volume(SampleFormat):
    """Volumes [C, D, H, W] as NIfTI or .npy; -1 is the value `low` and 1 is `high`.

    A file holds `dtype` numbers n of the value slope n + inter. The axes of a NIfTI are W, H, D and C, turned such that
    W runs to the right of what is imaged, H to its front and D to its top, or nearly so; `affine` says where its voxels
    lie. Those of a .npy are [D, H, W] or [C, D, H, W].
    """

    low: float
    high: float
    dtype: Numbers
    slope: float
    inter: float
    affine: Affine
    file: Literal[".nii", ".nii.gz", ".npy"]
    kind: ClassVar[str] = "volume"

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
        return self.scaled(self._value(self._numbers(x)))

    def write(self, sample: Tensor, path: Path) -> None:
        numbers = self._numbers(sample).numpy().astype(self.dtype)
        numbers = numbers[0] if len(numbers) == 1 else numbers
        if self.file == ".npy":
            with path.open("wb") as file:
                np.save(file, numbers)
            return
        image = nibabel().Nifti1Image(numbers.T, np.array([*self.affine, LAST_ROW]), dtype=numbers.dtype)
        image.header.set_slope_inter(self.slope, self.inter)  # numbers are as the file has them already
        data = image.to_bytes()
        path.write_bytes(gzip.compress(data, mtime=0) if self.file == ".nii.gz" else data)

    def read(self, data: bytes, shape: Shape) -> Tensor:
        values = read_volume(data).values
        if values.shape != tuple(shape):
            raise FormatError(f"is a volume {values.shape}, not {tuple(shape)}")
        return self.scaled(torch.from_numpy(values))

    def of(self, data: bytes) -> Self:
        header = read_volume(data).header
        return self if header.file == ".npy" else replace(self, affine=header.affine)

    def scaled(self, values: Tensor) -> Tensor:
        """Return values in the units of the data as float32 in [-1, 1], what is beyond the range at its end."""
        return ((values.double() - self.low) / self.half_range - 1).clamp(-1, 1).float()

    def _numbers(self, x: Tensor) -> Tensor:
        """The numbers of a file for samples around [-1, 1], float64."""
        value = self.low + (x.double().clamp(-1, 1) + 1) * self.half_range
        numbers = (value - self.inter) / self.slope
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return numbers.to(getattr(torch, self.dtype)).double()
        limits = np.iinfo(kind)
        return numbers.round().clamp(int(limits.min), int(limits.max))

    def _value(self, numbers: Tensor) -> Tensor:
        return self.slope * numbers + self.inter

    def to_rgb(self, samples: Tensor) -> Tensor:
        """Return the middle slices across D, H and W side by side; of more channels than colours have the first."""
        shown = self._shown(samples)
        depth, height, width = (size // 2 for size in shown.shape[2:])
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
    """The fields of a `Volume` that follow from a file."""

    dtype: str
    slope: float
    inter: float
    affine: list[list[float]]
    file: str


class Held(NamedTuple):
    """What a file of a volume holds."""

    values: np.ndarray
    """float64 [C, D, H, W] in the units of the data."""
    header: VolumeHeader

    @property
    def spacing(self) -> list[float] | None:
        """The sides of a voxel along W, H and D, in the units of the file; a .npy has none."""
        if self.header.file == ".npy":
            return None
        return np.linalg.norm(np.array(self.header.affine)[:, :3], axis=0).tolist()


def read_volume(data: bytes) -> Held:
    """The volume of a NIfTI file, compressed or not, or of a .npy; FormatError if it is none or not whole."""
    try:
        if data.startswith(npy.MAGIC_PREFIX):
            return _read_npy(data)
        packed = data.startswith(b"\x1f\x8b")
        return _read_nifti(inflated(data) if packed else data, ".nii.gz" if packed else ".nii")
    except UsageError:
        raise
    except Exception as error:  # damaged headers fail in many ways in the parsers
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
    second = data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # NIfTI-2: a header of 540 bytes
    image = getattr(nibabel(), "Nifti2Image" if second else "Nifti1Image").from_bytes(data)
    shape, dtype = image.shape, image.header.get_data_dtype()
    _check(shape, dtype, len(data))
    slope, inter = image.dataobj.slope, image.dataobj.inter
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine) < 4:
        raise FormatError("says nowhere that its voxels could lie: its affine is singular, or not finite")
    orientations = nibabel().orientations
    turned = orientations.io_orientation(image.affine)
    values = orientations.apply_orientation(
        np.asanyarray(image.dataobj), turned
    ).T  # [C, D, H, W], from W, H, D, C
    values = values[None] if values.ndim == 3 else values
    affine = (image.affine @ orientations.inv_ornt_aff(turned, shape[:3]))[:3].tolist()
    return Held(_finite(values), VolumeHeader(dtype.name, float(slope), float(inter), affine, file))


def _check(shape: tuple[int, ...], dtype: np.dtype, size: int) -> None:
    if len(shape) not in (3, 4) or min(shape) < 1 or dtype.name not in Numbers.__args__:
        raise FormatError(
            f"holds {dtype} {shape}; a volume is real numbers with three axes, and maybe one of channels"
        )
    if math.prod(shape) * dtype.itemsize > size:
        raise FormatError(f"has {size} bytes, fewer than {shape} of {dtype} take")


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise FormatError("holds numbers that are not finite")
    return values


def nibabel() -> ModuleType:
    """The package that reads NIfTI; UsageError saying how to install it."""
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise UsageError(
            "dataset", NO_VALUE, "NIfTI files need nibabel", "install it: pip install 'diffuse-cli[medical]'"
        ) from error
    return nibabel
