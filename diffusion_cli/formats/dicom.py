"""Grayscale DICOM images."""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats.base import STRICT, Original
from diffusion_cli.formats.dicom_reader import Scan, limits, read_scan
from diffusion_cli.formats.lossy import lossy_format
from diffusion_cli.formats.ranged import Dtype, Finite, Range, RangedImage, ranges

SUFFIXES = (".dcm", ".dicom")
"""Suffixes of DICOM files, which may also have none."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
LITTLE_ENDIAN = "1.2.840.10008.1.2.1"


@dataclass(frozen=True, config=STRICT)
class Dicom(RangedImage):
    """Grayscale DICOM images, by their rescaled values v = slope n + intercept, such as Hounsfield units.

    Files are read with their own slope and intercept; MONOCHROME1 (white is low) is inverted. Files are written as
    secondary captures that are marked as synthetic, without data from other files. Their UIDs are hashes of their
    content.

    Args:
        dtype: integer dtype of the stored numbers n.
        bits: number of bits of n.
        slope: rescale slope of written files.
        intercept: rescale intercept of written files.
        low: value that becomes -1, as a list of one.
        high: value that becomes 1, as a list of one.
    """

    kind: ClassVar[str] = "dicom"
    dtype: Dtype
    bits: Annotated[int, Field(ge=1, le=16)]
    slope: Annotated[Finite, Field(gt=0)]
    intercept: Finite
    low: list[Finite]
    high: list[Finite]

    def __post_init__(self) -> None:
        self.check_range()
        if self.dtype == "float32" or self.bits > 8 * np.dtype(self.dtype).itemsize:
            raise FormatError(f"cannot have {self.bits} bits in {self.dtype}")

    @property
    def suffix(self) -> str:
        return ".dcm"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return SUFFIXES

    def to_numbers(self, values: np.ndarray) -> np.ndarray:
        numbers = np.rint((values - self.intercept) / self.slope)
        return numbers.clip(*limits(self.dtype, self.bits)).astype(self.dtype)

    def to_values(self, numbers: np.ndarray) -> np.ndarray:
        return numbers * self.slope + self.intercept

    def decode(self, data: bytes) -> Tensor:
        scan = read_scan(data)
        if [*self.low, *self.high] == whole(self.dtype, self.bits, self.slope, self.intercept):
            self._check_whole(scan)
        return self.samples(scan.values)

    def original(self, data: bytes) -> Original:
        scan = read_scan(data)
        numbers = {"dtype": scan.pixels.dtype.name, "bits": scan.bits, "slope": scan.slope}
        return Original(scan.values, {**numbers, "intercept": scan.intercept})

    def lossy(self, data: bytes) -> str | None:
        return lossy_format(data)

    def _check_whole(self, scan: "Scan") -> None:
        """Raise FormatError if the range is the whole range of the first file, and this file has another one."""
        dtype, remedy = scan.pixels.dtype.name, "set dataset.range=[low,high]"
        if (dtype, scan.bits) != (self.dtype, self.bits):
            raise FormatError(
                f"has {scan.bits} bits in {dtype}, but the first file {self.bits} in {self.dtype}; {remedy}"
            )
        low, high = whole(dtype, scan.bits, scan.slope, scan.intercept)
        spare = self.slope / 2  # rounds to the same number; slopes are written with 16 characters
        if low < self.low[0] - spare or high > self.high[0] + spare:
            raise FormatError(
                f"has the range {low:g} to {high:g}, but the first file {self.low[0]:g} to {self.high[0]:g}; {remedy}"
            )

    def write_values(self, values: np.ndarray, path: Path) -> None:
        from pydicom import Dataset
        from pydicom.dataset import FileMetaDataset
        from pydicom.uid import UID
        from pydicom.valuerep import DSfloat

        numbers = np.ascontiguousarray(self.to_numbers(values)[0])
        pixels = numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
        form = repr(asdict(self)).encode()  # pyright: ignore[reportArgumentType]
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = UID(LITTLE_ENDIAN)
        image.SOPClassUID = SECONDARY_CAPTURE
        image.SOPInstanceUID = identifier(form, str(numbers.shape).encode(), pixels)
        image.StudyInstanceUID, image.SeriesInstanceUID = (
            identifier(b"study", form),
            identifier(b"series", form),
        )
        image.ImageType = ["DERIVED", "SECONDARY"]
        image.ConversionType, image.Modality = "SYN", "OT"  # synthetic, other
        image.PatientName, image.PatientID, image.PatientIdentityRemoved = "SYNTHETIC", "SYNTHETIC", "YES"
        image.DerivationDescription = "Sample of a diffusion model: synthetic, of no patient"
        for empty in (
            "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "SeriesNumber", "InstanceNumber",
            "AccessionNumber", "ReferringPhysicianName",
        ):  # fmt: skip
            setattr(image, empty, "")
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.Rows, image.Columns = numbers.shape
        image.BitsAllocated, image.BitsStored, image.HighBit = 8 * numbers.itemsize, self.bits, self.bits - 1
        image.PixelRepresentation = int(self.dtype == "int16")
        image.RescaleSlope = DSfloat(self.slope, auto_format=True)
        image.RescaleIntercept = DSfloat(self.intercept, auto_format=True)
        image.RescaleType = "US"  # unspecified
        (low,), (high,) = self.low, self.high
        image.WindowCenter = DSfloat((low + high + 1) / 2, auto_format=True)
        image.WindowWidth = DSfloat(high - low + 1, auto_format=True)
        image.add_new(
            "PixelData", "OW" if numbers.itemsize == 2 else "OB", pixels + b"\0" * (len(pixels) % 2)
        )
        image.save_as(path, enforce_file_format=True)


def dicom_form(data: bytes, given: Range | list[Range] | Literal["window"] | None) -> Dicom:
    """Return the format of images like a DICOM file: with a given range of rescaled values, its window or full range.

    Raises UsageError, about `dataset.range` or the file, for an invalid range.
    """
    scan = read_scan(data)
    dtype = scan.pixels.dtype.name
    if given is None:
        pair = whole(dtype, scan.bits, scan.slope, scan.intercept)
    elif given == "window":
        if scan.window is None:
            raise UsageError("dataset.range", "window", "the first file has no window", "give [low,high]")
        pair = [*scan.window]
    else:
        (low, *_), (high, *_) = ranges(given, 1)
        pair = [low, high]
    return Dicom(dtype, scan.bits, scan.slope, scan.intercept, [pair[0]], [pair[1]])  # pyright: ignore


def whole(dtype: str, bits: int, slope: float, intercept: float) -> list[float]:
    """Return the lowest and the highest rescaled value of numbers with `bits` bits."""
    return [end * slope + intercept for end in limits(dtype, bits)]


def identifier(*parts: bytes) -> str:
    """Return a DICOM UID from a hash (PS3.5, B.2)."""
    return f"2.25.{int.from_bytes(sha256(b'|'.join(parts)).digest()[:16])}"
