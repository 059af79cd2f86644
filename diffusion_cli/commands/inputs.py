"""Input images of a command: files, or images of the run's dataset."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion_cli.data import (
    Dataset,
    center_crop_resize,
    file_names,
    quantized,
    sample_files,
    spread,
    survey,
)
from diffusion_cli.data.folder import ignored_files
from diffusion_cli.data.listing import MANIFEST, manifests
from diffusion_cli.errors import NO_VALUE, FormatError, Problem, UsageError
from diffusion_cli.formats import (
    HighDepthImage,
    RangedImage,
    SampleFormat,
    Shape,
    Uint8Image,
    Volume,
    has_own_numbers,
)
from diffusion_cli.formats.files import flattened, is_gray, opened
from diffusion_cli.runs.migrate import result_name
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.untrusted import printable, read, reason

MOST_LINES = 10
LONGEST = 200  # bytes of a name
MOST_OF_A_COLOUR = 0.1  # largest fraction of the opaque pixels of a photograph with one colour
OTHER_SPLITS = {"valid": "val", "validation": "val", "test": "val", "training": "train"}
"""Our splits by common names of splits."""
RESERVED = ("grid", "grid.png", "strip", "strip.png")  # names that results must not have


class Input(NamedTuple):
    """An input image."""

    name: str
    """Unique name for its output files."""
    pixels: Tensor
    """Image as stored, [C, H, W]."""
    form: SampleFormat | None = None
    """Format of its result; None for the format of the model."""


def show_remarks(lines: Iterable[str]) -> None:
    """Print remarks about data on rank 0."""
    for line in lines if Distributed().is_main else ():
        print(printable(f"diffuse: {line}"), file=sys.stderr)


def real_images(dataset: Dataset, split: str, count: int | None) -> list[Input]:
    """Return `count` images spread evenly over the `train` or `val` split, or all for None."""
    images = dataset.load("train" if split == "train" else "val")
    count = len(images) if count is None else min(count, len(images))
    rows = spread(len(images), count)
    if not count:
        raise UsageError("input", split, f"{dataset.name} has no images in this split", "give image files")
    pixels = quantized(images[rows.to(images.device)].cpu(), dataset.form)
    return [Input(result_name(split, row), image) for row, image in zip(rows.tolist(), pixels, strict=True)]


def read_input(
    given: str | list[str], shapes: list[Shape], fit: bool, count: int | None, form: SampleFormat
) -> list[Input]:
    """Return the images of a file, a folder or a list of files.

    Args:
        given: file, folder or list of files.
        shapes: accepted shapes.
        fit: center-crop, resize and convert images to the first of the shapes.
        count: largest number of images, or None.
        form: format of the samples of the model.

    Raises:
        UsageError: for images of another format or shape; it names each file.
    """
    files = [Path(file).expanduser() for file in ([given] if isinstance(given, str) else given)]
    if len(files) == 1 and files[0].is_dir():
        files = _files(files[0], form)
    files = files[:count]
    if isinstance(form, Uint8Image | HighDepthImage):
        found = survey.headers(Path(), [str(file) for file in files])
        show_remarks(survey.remarks("input", found, len(files), own_numbers=has_own_numbers(form)))
    labels = _names(files)
    images: list[Input] = []
    lines: list[Problem] = []
    for file, name in zip(files, labels, strict=True):
        try:
            data = _content(file)
            images.append(Input(name, _pixels(data, shapes, fit, form), form.of(data)))
        except (ValueError, OSError) as error:
            lines.append(Problem("input", file, reason(error)))
    if lines:
        more = (
            [Problem("input", NO_VALUE, f"and {len(lines) - MOST_LINES} more")]
            if len(lines) > MOST_LINES
            else []
        )
        raise UsageError.several([*lines[:MOST_LINES], *more])
    if len({image.pixels.shape for image in images}) > 1:
        sizes = " and ".join(dict.fromkeys(described(image.pixels.shape) for image in images))
        raise UsageError(
            "input", given, f"the images differ in size: {sizes}", "give images of one size, or set fit=true"
        )
    return images


def _files(folder: Path, form: SampleFormat) -> list[Path]:
    """Return the images of a folder, without results that `diffuse` wrote to its subfolders."""
    inside = _but_results(file_names(folder, "input"))
    names = sample_files(folder, inside, form, "input")
    if manifests([name for name in inside if name == MANIFEST], lambda name: read(folder / name)):
        names = [name for name in names if "/" not in name]
        if not names:
            raise UsageError(
                "input", folder, "contains only subfolders of image series", "give one of the subfolders"
            )
    show_remarks(ignored_files(folder, inside, "input", form.suffixes))
    return [folder / name for name in names]


def read_mask(path: str) -> Tensor:
    """Read a mask file as uint8 [H, W]; values >= 128 mark the pixels to paint.

    A mask is white on a black or transparent background. In a photograph, the transparent part marks the pixels to
    paint, as in other programs.

    Raises UsageError if the file cannot be read, or if the meaning of its transparent part is ambiguous.
    """
    try:
        image = opened(read(Path(path).expanduser()))
        pixels = np.array(flattened(image, 1, "black", srgb=False))
    except (ValueError, OSError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else reason(error)
        raise UsageError(
            "edit.mask", path, what, "give an image file, a box [left,top,right,bottom], or centre"
        ) from error
    if not image.has_transparency_data:
        return torch.from_numpy(pixels)
    whole = np.array(image.convert("RGBA"))
    erased = whole[..., 3] < 128
    if erased.all() or not erased.any():
        return torch.from_numpy(pixels)
    opaque = whole[~erased][:, :3]
    if _is_white_on_black(opaque):
        show_remarks([f"edit.mask={path}: the white part is painted, not the transparent part"])
        return torch.from_numpy(pixels)
    if not _is_photograph(opaque):
        raise UsageError(
            "edit.mask",
            path,
            "the meaning of its transparent part is ambiguous",
            "save the mask as black and white without transparency",
        )
    show_remarks([f"edit.mask={path}: the transparent part is painted, whatever its colours"])
    return torch.from_numpy(np.where(erased, 255, 0).astype(np.uint8))


def _is_white_on_black(colours: np.ndarray) -> bool:
    """Return whether colours, uint8 [N, 3], are all white or black, with at least one white."""
    white, black = (colours == 255).all(1), (colours == 0).all(1)
    return bool(white.any() and (white | black).all())


def _is_photograph(colours: np.ndarray) -> bool:
    """Return whether each colour, uint8 [N, 3], covers less than a tenth of the pixels."""
    _, counts = np.unique(
        colours.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32), return_counts=True
    )
    return bool(counts.max() < MOST_OF_A_COLOUR * len(colours))


def _content(file: Path) -> bytes:
    if not file.is_file():
        split = OTHER_SPLITS.get(str(file))
        split = f", or input={split} for images of the run's dataset" if split else ""
        raise FormatError(f"is not a file; give an image, a folder or a list of images{split}")
    return read(file)


def _pixels(data: bytes, shapes: list[Shape], fit: bool, form: SampleFormat) -> Tensor:
    if isinstance(form, Volume):
        return form.read(data, shapes[0])
    if not isinstance(form, RangedImage):
        return _bytes(data, shapes, fit)
    sample = form.decode(data)
    if tuple(sample.shape) in shapes:
        return sample
    _refuse(tuple(sample.shape), shapes, fit and len(sample) == shapes[0][0], "crop and resize it")
    return center_crop_resize(sample, form, shapes[0])


def _refuse(shape: Shape, shapes: list[Shape], fit: bool, remedy: str) -> None:
    """Raise FormatError for an image of another shape, unless `fit` is true."""
    if not fit:
        wanted = " or ".join(map(described, shapes))
        raise FormatError(
            f"is {described(shape)}, but must be {wanted}; convert it, or set fit=true to {remedy}"
        )


def _bytes(data: bytes, shapes: list[Shape], fit: bool) -> Tensor:
    image = opened(data)
    channels = 1 if is_gray(image) else 3
    shape = (channels, image.height, image.width)
    if shape not in shapes:
        _refuse(shape, shapes, fit, "crop, resize and convert it")
        channels, height, width = shapes[0]
        image = ImageOps.fit(flattened(image, channels, "white"), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(flattened(image, channels, "white")))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def described(shape: Sequence[int]) -> str:
    """Return a shape as text, such as 64 x 32 gray (width x height)."""
    channels, *sizes = shape
    colours = {1: "gray", 3: "colour"}.get(channels, f"of {channels} channels")
    return f"{' x '.join(str(size) for size in reversed(sizes))} {colours}"


def _but_results(names: list[str]) -> list[str]:
    """Return the names of a folder's files, except those in subfolders with a manifest of `diffuse`."""
    written = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == "manifest.json"}
    written -= {PurePosixPath()}
    return [name for name in names if written.isdisjoint(PurePosixPath(name).parents)]


def _names(files: list[Path]) -> list[str]:
    """Return unique names of files: stems, or file names if stems are equal, with a number if these are equal too."""
    stems = Counter(file.stem for file in files)
    names = [file.stem if stems[file.stem] == 1 else file.name for file in files]
    again = Counter([*names, *RESERVED])
    return [name if again[name] == 1 else f"{row:05d}_{name}" for row, name in enumerate(names)]


def shortened(name: str) -> str:
    """Return a name of at most 200 bytes; a longer name is cut and gets a digest."""
    if len(name.encode()) <= LONGEST:
        return name
    end = hashlib.sha256(name.encode()).hexdigest()[:10]
    return f"{name.encode()[: LONGEST - 11].decode(errors='ignore')}-{end}"
