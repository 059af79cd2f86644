"""Images given by the user: a folder, ZIP or NumPy file, read without resizing."""

from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.data import survey
from diffusion_cli.data.array import ArrayImages, first_images, read_contents, shape_remarks
from diffusion_cli.data.base import Images, spread
from diffusion_cli.data.decoding import NoResize
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.file_names import RULES, file_names, ignored_files, own_images
from diffusion_cli.data.labels import class_labels, composed, read
from diffusion_cli.data.listing import MANIFEST, manifests
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.data.signal_array import read_signal_array
from diffusion_cli.data.signal_decoder import SignalDecoder
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats import (
    HighDepthImage,
    RangedImage,
    SampleFormat,
    Shape,
    Signal,
    Uint8Image,
    has_own_numbers,
)
from diffusion_cli.formats.files import is_gray, opened
from diffusion_cli.formats.range_check import LOOKED_AT, disagreement
from diffusion_cli.system.untrusted import LONGEST_MANIFEST, reason


class ExternalImages(NamedTuple):
    """Images and their class names, None without classes."""

    images: Images
    class_names: tuple[str, ...] | None
    remarks: tuple[str, ...] = ()
    """Remarks for the user about the files, one line each."""


def given_images(
    path: Path,
    key: str,
    shape: Shape | None = None,
    form: SampleFormat | None = None,
) -> ExternalImages:
    """Return the images of a folder, ZIP, .npz or .npy in the order of names or rows, without resizing or cropping.

    Classes come from `labels.csv`, class folders or the .npz, if present. Grids and other figures that this program
    wrote are skipped. Files are decoded on access.

    Args:
        path: the folder or file.
        key: configuration key of the path, for errors.
        shape: required shape; gray files become RGB if it has three channels. None: the size of the first image.
        form: storage format; None: 8-bit images.

    Raises:
        UsageError: the path has no such images, or images of another shape.
    """
    if path.suffix in (".npy", ".npz") and path.is_file():
        given = _array(path, key, form or Uint8Image())
        if shape is not None and given.images.shape != shape:
            raise UsageError(key, path, f"has images of shape {given.images.shape}", f"expected {shape}")
        return given
    names = file_names(path, key)
    form = form or Uint8Image()
    files = sample_files(path, names, form, key)
    try:
        # Samples have labels in their manifest; their labels.csv is complete only once all are generated.
        own = manifests(
            [name for name in names if name == MANIFEST], lambda name: read(path, name, LONGEST_MANIFEST)
        )
        class_names, labels, *_ = class_labels(path, names, files, "none" if own else "auto", RULES)
        decoder = NoResize(form, shape or _shape(read(path, files[0])))
    except UsageError as error:
        raise error.renamed({"dataset.path": key}) from error
    except ValueError as error:
        raise UsageError(key, path, reason(error)) from error
    remarks = ignored_files(path, names, key, form.suffixes)
    if isinstance(form, Uint8Image | HighDepthImage):
        seen = survey.headers(path, files)
        remarks += survey.remarks(f"{key}={path}", seen, len(files), own_numbers=has_own_numbers(form))
    images = FileImages(path, files, labels, decoder, key)
    if isinstance(form, Uint8Image):
        with suppress(ValueError):  # undecodable files are reported where all are read
            few = images[spread(len(files), min(len(files), LOOKED_AT))]
            remarks += _byte_remarks(f"{key}={path}", few.numpy())
    return ExternalImages(images, class_names, tuple(remarks))


def sample_files(path: Path, names: list[str], form: SampleFormat, key: str) -> list[str]:
    """Return the names that are files of format `form`, sorted; UsageError if there are none.

    A sample and its further files, such as a volume and its mesh, are one: the sample.
    """
    found = own_images(path, names, key, form.suffixes)
    samples = {name.removesuffix(form.suffix) for name in found if name.endswith(form.suffix)}
    return [
        name
        for name in found
        if not (name.endswith(form.suffixes_beside) and str(PurePosixPath(name).with_suffix("")) in samples)
    ]


def _signals(path: Path, key: str, form: Signal) -> ExternalImages:
    try:
        array = read_signal_array(path)
        decoder = SignalDecoder(form, array.shape)
        decoder.check_dtype(array.dtype)
        samples = array.samples(torch.arange(array.number), decoder)
    except UsageError:
        raise
    except Exception as error:  # the parsers of ZIP and NumPy headers raise errors of many types
        raise UsageError(key, path, reason(error)) from error
    return ExternalImages(MemoryImages(samples, array.labels), array.class_names)


def _array(path: Path, key: str, form: SampleFormat) -> ExternalImages:
    if isinstance(form, Signal):
        return _signals(path, key, form)
    try:
        contents = read_contents(path)
        if isinstance(form, RangedImage) and contents.dtype != form.dtype:
            raise FormatError(f"has dtype {contents.dtype}; expected {form.dtype}")
        if isinstance(form, Uint8Image) and contents.dtype != "uint8":
            raise FormatError(f"has dtype {contents.dtype}; images must be uint8 in 0..255")
    except Exception as error:  # the parsers of ZIP and NumPy headers raise errors of many types
        raise UsageError(key, path, reason(error)) from error
    images = ArrayImages(path, contents, form, torch.arange(contents.number))
    remarks = shape_remarks(f"{key}={path}", contents)
    if isinstance(form, Uint8Image):
        remarks += _byte_remarks(f"{key}={path}", first_images(path, contents))
    return ExternalImages(images, contents.class_names, tuple(remarks))


def _byte_remarks(key: str, images: np.ndarray) -> list[str]:
    found = disagreement([*images], [0.0], [255.0])
    return (
        [f"{key}: bytes have the range [0,255], and {found}; rescale them if this is not intended"]
        if found
        else []
    )


def _shape(data: bytes) -> Shape:
    image = opened(data)
    return (1 if is_gray(image) else 3), image.height, image.width


def relabelled(given: ExternalImages, class_names: tuple[str, ...] | None) -> Tensor | None:
    """Return the labels as indices into `class_names`, int64 [N]; None if some class is not among them.

    A missing label stays -1. Classes are matched by name; if all names are numbers, as in a .npz, they are the indices
    themselves.
    """
    labels, names = given.images.labels, given.class_names
    if labels is None or names is None or class_names is None:
        return None
    number = {composed(name): label for label, name in enumerate(class_names)}
    if all(composed(name) in number for name in names):
        # The last entry is that of a missing label, -1.
        return torch.tensor([*(number[composed(name)] for name in names), -1])[labels]
    by_number = names == tuple(str(number) for number in range(len(names)))
    return labels if by_number and len(names) <= len(class_names) else None
