"""Pixels of DICOM files, decoded by pydicom and its plugins."""

import logging
import warnings
from functools import cache
from io import BytesIO
from struct import unpack_from
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from diffusion_cli.errors import FormatError
from diffusion_cli.system.untrusted import LARGEST, reason

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.pixels.decoders.base import Decoder
    from pydicom.tag import BaseTag

MAGIC = 132  # length of the preamble and the magic number
PIXELS = (b"\xe0\x7f\x10\0", b"\x7f\xe0\0\x10")  # tag of the pixel data, little and big endian
USUAL_HEADER = 2**16
"""Bytes in front of the pixels, at most, in almost all files."""
LONGEST_HEADER = 2**23  # bytes; nested elements take up to 30 times as much memory
LARGEST_RLE = 2**24  # bytes of a frame: two bytes of a run may inflate to 128
PLUGINS = ("pydicom", "pyjpegls", "pylibjpeg", "pillow")
"""Decoders of pydicom in order of preference, without GDCM: it ends the process on some damaged files."""
FIRST_PIXELS = 0x7FE00008  # first tag of pixel data of any type
RLE = "1.2.840.10008.1.2.5"
JPEG_2000 = b"\xff\x4f\xff\x51"  # start of a codestream
START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG markers before the size of an image
GRAY = ("MONOCHROME1", "MONOCHROME2")
ELEMENTS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "WindowCenter", "WindowWidth", "LossyImageCompression", "ICCProfile",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "ImageType", "PatientID", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SpacingBetweenSlices", "SliceThickness", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip

# pydicom and its decoders warn and log about broken files, which get an error of this package.
for _name in ("pydicom", "openjpeg", "pylibjpeg"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="pydicom")


class Scan(NamedTuple):
    """Pixels and display properties of a grayscale DICOM file."""

    pixels: np.ndarray
    """Stored numbers [H, W], or [F, H, W] with frames, white highest; values if the file has a table of them."""
    bits: int
    """Number of bits of the stored numbers."""
    slope: float
    intercept: float
    header: "Dataset"

    @property
    def values(self) -> np.ndarray:
        """Rescaled values, float64 [1, H, W]."""
        return (self.pixels * self.slope + self.intercept)[None]

    @property
    def window(self) -> tuple[float, float] | None:
        """Lowest and highest rescaled value to display: [c - w / 2, c + w / 2 - 1] (DICOM PS3.3, C.11.2.1.2.1)."""
        centre, width = (self.header.get(name) for name in ("WindowCenter", "WindowWidth"))
        if centre is None or width is None:
            return None
        centre, width = (
            float(each if isinstance(each, float | int) else each[0]) for each in (centre, width)
        )
        return (centre - width / 2, centre + width / 2 - 1) if width > 1 else None


def is_dicom(data: bytes) -> bool:
    """Return whether a file has the DICOM magic number."""
    return data[MAGIC - 4 : MAGIC] == b"DICM"


def is_gray_dicom(data: bytes) -> bool:
    """Return whether a DICOM file is grayscale, by its header."""
    return str(read_header(data).get("PhotometricInterpretation")) in GRAY


def limits(dtype: str, bits: int) -> tuple[int, int]:
    """Return the lowest and the highest number with `bits` bits."""
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def read_header(data: bytes) -> "Dataset":
    """Return the elements in front of the pixels of a DICOM file, or of its first LONGEST_HEADER bytes.

    Raises FormatError if the file is malformed or has no pixels there, or if pydicom is not installed.
    """
    return _header(data)[0]


def header_of(file: IO[bytes]) -> "Dataset":
    """Return the elements of an open DICOM file, from the usual length of a header or, if it is longer, from more.

    Raises FormatError as `read_header`.
    """
    start = file.read(USUAL_HEADER)
    try:
        return read_header(start)
    except FormatError:  # perhaps longer
        return read_header(start + file.read(LONGEST_HEADER - len(start)))


def patient_id(header: "Dataset") -> str:
    """Return the PatientID in a header; empty without one."""
    return str(header.get("PatientID") or "").strip()


@cache
def _tags() -> list["BaseTag"]:
    from pydicom.tag import Tag

    return [Tag(keyword) for keyword in ELEMENTS]


def whole_header(data: bytes) -> "Dataset":
    """Return all elements in front of the pixels, private ones too; FormatError as `read_header`."""
    return _header(data, every=True)[0]


def _header(data: bytes, every: bool = False) -> tuple["Dataset", int]:
    """Return the elements, all or those of `ELEMENTS`, and the offset of the pixels."""
    try:
        from pydicom import config
        from pydicom.dataset import FileMetaDataset
        from pydicom.filereader import read_dataset
    except ImportError as error:
        raise FormatError("is DICOM, which needs pydicom; pip install 'diffuse-cli[medical]'") from error
    if not is_dicom(data):
        raise FormatError("is not a DICOM file")
    config.settings.reading_validation_mode = config.IGNORE  # the fields in use are checked below
    head = BytesIO(data[:LONGEST_HEADER])
    try:
        head.seek(MAGIC)
        meta = read_dataset(head, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
        syntax = meta.TransferSyntaxUID
        if syntax.is_deflated:  # pydicom would inflate it without bounds
            raise FormatError("is compressed as a whole; decompress it, for example with gdcmconv --raw")
        little = syntax.is_little_endian
        stop = {"stop_when": lambda tag, *_: tag >= FIRST_PIXELS, "specific_tags": None if every else _tags()}
        header = read_dataset(head, syntax.is_implicit_VR, little, **stop)
        header.file_meta = FileMetaDataset(meta)
    except Exception as error:  # pydicom raises errors of many types for broken data
        raise FormatError(reason(error)) from error
    if data[head.tell() : head.tell() + 4] not in PIXELS:
        raise FormatError(f"has no integer pixels in its first {LONGEST_HEADER} bytes")
    return header, head.tell()


def read_scan(data: bytes) -> Scan:
    """Return the image of a DICOM file with one grayscale frame of up to 16 bits; FormatError for others."""
    scan = read_frames(data)
    if len(scan.pixels) > 1:
        raise FormatError(
            f"has {len(scan.pixels)} frames; set dataset.resolution=[depth,height,width] to read them as a volume"
        )
    if scan.pixels.dtype.name not in ("uint8", "uint16", "int16"):
        raise FormatError(
            f"has {scan.bits} bits in {scan.pixels.dtype}; up to 16 are supported, and 16 if signed"
        )
    return scan._replace(pixels=scan.pixels[0])


def read_frames(data: bytes) -> Scan:
    """Return the grayscale frames of a DICOM file; FormatError if it is malformed, unsupported or in colour."""
    header, start = _header(data)
    try:
        return _scan(data, header, start)
    except Exception as error:  # as in `_header`, and the decoders
        raise FormatError(reason(error)) from error


def _scan(data: bytes, header: "Dataset", start: int) -> Scan:
    from pydicom.pixels.processing import apply_modality_lut

    what = str(header.PhotometricInterpretation)
    if what not in GRAY or int(header.get("SamplesPerPixel") or 1) != 1:
        raise FormatError(f"is {what}, not grayscale; colours are read as images with dataset.channels=3")
    pixels, bits = _decoded(data, header, start), int(header.BitsStored)
    slope = 1.0 if header.get("RescaleSlope") is None else float(header.RescaleSlope)
    intercept = float(header.get("RescaleIntercept") or 0)
    if header.get("ModalityLUTSequence"):
        pixels, slope, intercept = apply_modality_lut(pixels, header), 1.0, 0.0
        bits = 8 * pixels.itemsize
    if what == "MONOCHROME1":
        pixels = (sum(limits(pixels.dtype.name, bits)) - pixels.astype(np.int64)).astype(pixels.dtype)
    if not (0 < slope < np.inf and abs(intercept) < np.inf):
        raise FormatError(
            f"has slope {slope} and intercept {intercept}; they must be finite, the slope positive"
        )
    return Scan(pixels, bits, slope, intercept, header)


def colour_image(data: bytes) -> Image.Image:
    """Return a DICOM image in 8-bit colour or with a palette as RGB, with its colour profile if any.

    Raises FormatError if it is malformed, grayscale, or has another depth or several frames.
    """
    from pydicom.pixels.processing import apply_color_lut

    header, start = _header(data)
    try:
        what = str(header.PhotometricInterpretation)
        if what in GRAY:
            raise FormatError("is a grayscale DICOM image; set dataset.channels=1 dataset.depth=auto")
        frames = _decoded(data, header, start)
        if len(frames) > 1:
            raise FormatError(f"has {len(frames)} frames; only one is supported in colour")
        pixels = frames[0] if frames.ndim == 4 else apply_color_lut(frames[0], header)
        if frames.ndim == 3 and pixels.dtype == np.uint16:  # the entries of most palettes
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if pixels.dtype != np.uint8:
            raise FormatError(f"has colours in {pixels.dtype}; only 8 bits are supported")
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if header.get("ICCProfile"):
            image.info["icc_profile"] = header.ICCProfile
    except Exception as error:  # as in `_header`, and the decoders
        raise FormatError(reason(error)) from error
    return image


def is_lossy(data: bytes) -> bool:
    """Return whether a DICOM file is marked as having had lossy compression."""
    try:
        return read_header(data).get("LossyImageCompression") == "01"
    except FormatError:
        return False


def _decoded(data: bytes, header: "Dataset", start: int) -> np.ndarray:
    """Return the stored numbers of all frames, [F, H, W] or [F, H, W, 3]; colours as RGB."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.get("SamplesPerPixel") or 1)
    frames, allocated, bits = (
        int(header.get("NumberOfFrames") or 1),
        int(header.BitsAllocated),
        int(header.BitsStored),
    )
    if allocated not in (8, 16, 32) or not 0 < bits <= allocated:
        raise FormatError(f"has {bits} of {allocated} bits; 8, 16 and 32 are supported")
    if int(header.HighBit) != bits - 1:
        raise FormatError(f"has its highest bit at {header.HighBit}; expected {bits - 1}")
    size = frames * rows * columns * samples * allocated // 8
    if min(frames, rows, columns) < 1 or samples not in (1, 3):
        raise FormatError(f"has {frames} frames of {columns} x {rows} with {samples} samples per pixel")
    syntax = header.file_meta.TransferSyntaxUID
    content, plugin = data[start + (8 if syntax.is_implicit_VR else 12) :], ""
    if syntax.is_encapsulated:
        if size > LARGEST:
            raise FormatError(f"inflates to {size} bytes; at most {LARGEST} are supported")
        plugin = _plugin(get_decoder(syntax))
        _check_frames(content, frames, (rows, columns, samples), size // frames, syntax == RLE)
    else:
        halved = header.PhotometricInterpretation == "YBR_FULL_422"  # every second colour is left out
        size = size // 3 * 2 if halved else size
        if len(content) < size:
            raise FormatError(
                f"has {len(content)} bytes of pixels, too few for {frames} frames of {columns} x {rows}"
            )
        content = content[: size + size % 2]
    header.add_new(
        "PixelData", "OW" if syntax.is_implicit_VR else data[start + 4 : start + 6].decode(), content
    )
    pixels = pixel_array(header, decoding_plugin=plugin)
    del header.PixelData
    return pixels.reshape(frames, rows, columns, *[samples][: samples > 1])


def _plugin(decoder: "Decoder") -> str:
    """Return the name of the decoder to use; FormatError with the remedy if it is not installed."""
    found = next((name for name in PLUGINS if name in decoder.available_plugins), None)
    if found is None:
        name, *_ = decoder.UID.name.split(",")
        package = "pylibjpeg-libjpeg" if name == "JPEG Lossless" else "'diffuse-cli[medical]'"
        raise FormatError(f"is compressed ({name}); pip install {package} to read it")
    return found


def _check_frames(content: bytes, count: int, shape: tuple[int, int, int], size: int, is_rle: bool) -> None:
    """Raise FormatError for compressed frames that would not inflate to `size` bytes each."""
    from pydicom.encaps import generate_frames

    if is_rle:
        if size > LARGEST_RLE:
            raise FormatError(f"has RLE frames of {size} bytes; at most {LARGEST_RLE} are supported")
        return
    for number, frame in enumerate(generate_frames(content, number_of_frames=count)):
        found = _frame_shape(frame)
        if number >= count or found != shape:
            raise FormatError(f"has a frame that is damaged, or not of {' x '.join(map(str, shape))}")


def _frame_shape(frame: bytes) -> tuple[int, int, int] | None:
    """Return rows, columns and samples by the header of a JPEG, JPEG-LS or JPEG 2000 codestream; None if damaged."""
    if frame[:4] == JPEG_2000 and len(frame) >= 42:
        right, lower, left, upper = unpack_from(">4I", frame, 8)
        return lower - upper, right - left, unpack_from(">H", frame, 40)[0]
    at = 2
    while at + 10 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] in START_OF_FRAME:
            return unpack_from(">HHB", frame, at + 5)
        at += 1 if frame[at + 1] == 0xFF else 2 + unpack_from(">H", frame, at + 2)[0]
    return None
