"""One-dimensional signals in NumPy, CSV and WAV files."""

import wave
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.base import STRICT, Original, Shape, ValueFormat
from diffusion_cli.formats.range_check import INTENDED, TOLERANCE, disagreement
from diffusion_cli.formats.ranged import Finite
from diffusion_cli.formats.uint8 import to_bytes
from diffusion_cli.system.files import write_npy
from diffusion_cli.system.untrusted import reason

SUFFIXES = (".npy", ".csv", ".wav")
SAMPLE_BYTES = 2  # of WAV files: 16 bits
HEIGHT, WIDTH = 64, 256  # pixels of the plot of a channel
MARGIN = 4  # pixels above the largest value and below the least one
LINE = 1.5  # width of a line in pixels
MOST_PLOTS = 8  # channels of a preview
FINER = 4  # points of the drawn line per pixel, and per value

Numbers = Literal["float32", "float64", "int16"]


@dataclass(frozen=True, config=STRICT)
class Signal(ValueFormat):
    """Signals [C, L] as .npy or 16-bit WAV, read from CSV too; their value range [low, high] becomes [-1, 1].

    `x = 2 (v - low) / (high - low) - 1`. Values outside the range are clipped; values that are not finite are refused.
    A .npy is [L] or [C, L]; a CSV has a column per channel, and optionally names in its first line. Previews plot one
    channel below the other.

    Args:
        dtype: dtype of the values in files.
        low: value that becomes -1, one for all channels or one per channel.
        high: value that becomes 1, likewise.
        file: file type of samples.
        rate: values per second in WAV files; None for other files.
    """

    kind: ClassVar[str] = "signal"
    dtype: Numbers
    low: list[Finite]
    high: list[Finite]
    file: Literal[".npy", ".wav"] = ".npy"
    rate: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    def __post_init__(self) -> None:
        if not self.low or len(self.low) != len(self.high):
            raise FormatError("a range must be [low, high], or one such pair per channel")
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise FormatError("a range must increase from low to high")
        if (self.file == ".wav") != (self.rate is not None) or (
            self.file == ".wav" and self.dtype != "int16"
        ):
            raise FormatError("WAV files need a rate and dtype int16, and other files have no rate")

    @property
    def suffix(self) -> str:
        return self.file

    @property
    def suffixes(self) -> tuple[str, ...]:
        return SUFFIXES

    @property
    def half_range(self) -> float:
        """Factor from a difference in x to one in file values; 1 if channels differ in their range."""
        return (self.high[0] - self.low[0]) / 2 if len(self.low) == 1 else 1.0

    @property
    def note(self) -> str:
        return "signals with 256 values over the stated range"

    def samples(self, values: np.ndarray) -> Tensor:
        """Return values [..., C, L] as stored samples; FormatError if one is not finite."""
        if not np.isfinite(values).all():
            raise FormatError("has values that are not finite")
        low, half = self._scale()
        x = (values.astype(np.float64) - low) / half - 1
        return torch.from_numpy(x.clip(-1, 1).astype(np.float32))

    def quantize(self, x: Tensor) -> Tensor:
        return self.samples(self.rounded(self.values(x))).to(x.device)

    def values(self, samples: Tensor) -> np.ndarray:
        low, half = self._scale()
        return (samples.double().cpu().numpy().clip(-1, 1) + 1) * half + low

    def beyond(self, values: np.ndarray) -> np.ndarray:
        low, half = self._scale()
        return np.maximum(np.abs(values - low - half) - half, 0)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        return self._numbers(values).astype(np.float64)

    def remark(self, images: Sequence[np.ndarray]) -> str | None:
        found = disagreement([values[:, None] for values in images], self.low, self.high)
        return None if found is None else self.range_remark(found.replace("image", "signal"))

    def range_remark(self, problem: str) -> str:
        """Return the remark that the range does not fit, with its remedy."""
        pairs = [f"[{low:g},{high:g}]" for low, high in zip(self.low, self.high, strict=True)]
        shown = pairs[0] if len(pairs) == 1 else f"[{','.join(pairs)}]"
        return f"dataset.range={shown}: {problem}; {INTENDED.replace('image', 'signal')}"

    def write_values(self, values: np.ndarray, path: Path) -> None:
        numbers = self._numbers(values)
        if self.rate is None:
            write_npy(path, numbers[0] if len(numbers) == 1 else numbers)
            return
        with path.open("wb") as file, wave.open(file) as sound:
            sound.setnchannels(len(numbers))
            sound.setsampwidth(SAMPLE_BYTES)
            sound.setframerate(self.rate)
            sound.writeframes(np.ascontiguousarray(numbers.T, "<i2").tobytes())

    def read(self, data: bytes, shape: Shape) -> Tensor:
        values = self.original(data).values
        if values.shape != tuple(shape):
            raise FormatError(f"has shape {values.shape} (channels, length); expected {tuple(shape)}")
        return self.samples(values)

    def original(self, data: bytes) -> Original:
        """Return the values of a file; FormatError as `content`."""
        held = self.content(data)
        return Original(held.values, {"dtype": held.dtype} if self.rate is None else {})

    def content(self, data: bytes) -> "SignalContent":
        """Return the content of a file; FormatError if it is malformed, or a WAV with another rate."""
        held = read_signal(data)
        if self.rate is not None and held.rate not in (None, self.rate):
            raise FormatError(f"has {held.rate} values per second; expected {self.rate}, so resample it")
        return held

    def share_clipped(self, values: np.ndarray) -> float:
        """Return which share of values [C, L] lies outside the range, beyond rounding of float32."""
        _, half = self._scale()
        return float((self.beyond(values) > TOLERANCE * half).mean())

    def to_rgb(self, samples: Tensor) -> Tensor:
        x = samples[:, :MOST_PLOTS].float()
        count, channels, length = x.shape
        per_pixel = FINER * -(-max(length, WIDTH) // WIDTH)
        line = interpolate(x, WIDTH * per_pixel + 1, mode="linear", align_corners=True)
        y = MARGIN + (1 - line) / 2 * (HEIGHT - 2 * MARGIN)
        columns = y.unfold(2, per_pixel + 1, per_pixel)
        top, bottom = columns.amin(3)[:, :, None] - LINE / 2, columns.amax(3)[:, :, None] + LINE / 2
        row = torch.arange(HEIGHT, device=x.device, dtype=x.dtype)[:, None]
        ink = (torch.minimum(bottom, row + 1) - torch.maximum(top, row)).clamp(0, 1)
        return (255 * (1 - ink)).round().to(torch.uint8).reshape(count, 1, channels * HEIGHT, WIDTH)

    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        return 1, HEIGHT * min(shape[0], MOST_PLOTS), WIDTH

    def measured(self, samples: Tensor) -> Tensor:
        """Return signals as gray images of a row per channel, uint8 [B, 1, C, L]: 256 values over the range."""
        return to_bytes(samples)[:, None]

    def measured_shape(self, shape: Shape) -> tuple[int, int, int]:
        channels, length = shape
        return 1, channels, length

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.array(self.low), np.array(self.high)
        return low[:, None], (high - low)[:, None] / 2

    def _numbers(self, values: np.ndarray) -> np.ndarray:
        """Return the numbers in files, [..., C, L], nearest to values."""
        if self.dtype != "int16":
            return values.astype(self.dtype)
        limits = np.iinfo(np.int16)
        return np.rint(values).clip(limits.min, limits.max).astype(np.int16)


class SignalContent(NamedTuple):
    """Content of the file of a signal."""

    values: np.ndarray
    """float64 [C, L] in the units of the file."""
    dtype: str
    rate: int | None = None
    """Values per second of a WAV file."""


def read_signal(data: bytes) -> SignalContent:
    """Return the signal of a .npy, a WAV or a CSV file, by its first bytes; FormatError if it is malformed."""
    try:
        if data.startswith(npy.MAGIC_PREFIX):
            content = _read_npy(data)
        elif data.startswith(b"RIFF"):
            content = _read_wav(data)
        else:
            content = _read_csv(data)
    except Exception as error:  # the parsers raise errors of many types for damaged headers
        raise FormatError(reason(error)) from error
    if not content.values.size:
        raise FormatError("has no values")
    return content


def _read_npy(data: bytes) -> SignalContent:
    file = BytesIO(data)
    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.name not in Numbers.__args__ or len(shape) not in (1, 2):
        raise FormatError(
            f"has {dtype} of shape {shape}; a signal is [L] or [C, L] of {', '.join(Numbers.__args__)}"
        )
    if int(np.prod(shape, dtype=object)) * dtype.itemsize > len(data) - file.tell():
        raise FormatError(f"has {len(data)} bytes, too few for {shape} of {dtype}")
    return SignalContent(
        np.atleast_2d(npy.read_array(BytesIO(data), allow_pickle=False)).astype(np.float64), dtype.name
    )


def _read_wav(data: bytes) -> SignalContent:
    with wave.open(BytesIO(data)) as sound:
        channels, bits, rate = sound.getnchannels(), 8 * sound.getsampwidth(), sound.getframerate()
        if bits != 8 * SAMPLE_BYTES:
            raise FormatError(f"has {bits} bits per value; convert it to 16-bit PCM")
        frames = sound.readframes(min(sound.getnframes(), len(data)))
    numbers = np.frombuffer(frames, "<i2")
    if len(numbers) < sound.getnframes() * channels:
        raise FormatError(f"ends before its {sound.getnframes()} values per channel")
    return SignalContent(numbers.reshape(-1, channels).T.astype(np.float64), "int16", rate)


def _read_csv(data: bytes) -> SignalContent:
    lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    separator = next((sign for sign in (";", "\t") if lines and sign in lines[0]), ",")
    rows = [line.split(separator) for line in lines]
    if rows and not _are_numbers(rows[0]):
        rows, lines = rows[1:], lines[1:]
    if not rows:
        raise FormatError("has no values")
    for row in rows:
        if len(row) != len(rows[0]):
            raise FormatError(f"has lines of {len(rows[0])} and {len(row)} columns")
        if not _are_numbers(row):
            raise FormatError(f"has a line that is not of numbers: {separator.join(row)[:40]!r}")
    return SignalContent(
        np.array(rows, dtype=np.float64).T.reshape(len(rows[0]) if rows else 0, -1), "float64"
    )


def _are_numbers(row: list[str]) -> bool:
    try:
        return [*map(float, row)] != []
    except ValueError:
        return False
