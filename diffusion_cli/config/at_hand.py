"""Facts about a user's own images and this machine that choose a recipe, found without importing torch."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from statistics import median_low
from typing import IO, Any, NamedTuple

from diffusion_cli.system.untrusted import IMAGE_FORMATS, Archive, regular

MOST_COUNTED = 1_000_000
"""Maximum number of files to look at."""
MOST_OPENED = 16
"""Maximum number of images to read the size of."""
OTHER_SUFFIXES = (".dcm", ".dicom", ".nii", ".nii.gz", ".npy")
"""Suffixes of scans and volumes, which are counted too."""

LARGEST_HEADER = 2**16
"""Bytes of a `.npy` header."""


class OwnImages(NamedTuple):
    """The facts about a user's own images that a recipe depends on."""

    number: int
    """Number of images."""
    size: int | None
    """Typical short side in pixels; None where the files do not show it."""


def own_images(dataset: Mapping[str, Any]) -> OwnImages | None:
    """Return the images of a `dataset` node that has a path; None where there are none.

    A path that cannot be read is reported where the data set is built.
    """
    path = dataset.get("path")
    if not isinstance(path, str):
        return None
    with suppress(OSError, ValueError):
        target = Path(path).expanduser()
        if target.suffix in (".npy", ".npz"):
            return _array(target)
        if target.is_dir():
            return _measured([*islice(_files(target), MOST_COUNTED)], _opened)
        with Archive(target) as archive:
            return _measured([*archive.entries][:MOST_COUNTED], archive.open)
    return None


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, in the same order on every machine."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (str(Path(place, name)) for name in sorted(names))


def _opened(path: str) -> IO[bytes]:
    regular(Path(path))
    return Path(path).open("rb")


def _measured(names: Sequence[str], opened: Callable[[str], IO[bytes]]) -> OwnImages | None:
    """The images among files; the headers of a few of them are read."""
    from PIL import Image

    suffixes = (*(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes), *OTHER_SUFFIXES)
    images = [
        name for name in names if name.lower().endswith(suffixes) and PurePosixPath(name).name[0] != "."
    ]
    sides = []
    for name in images[:: max(1, len(images) // MOST_OPENED)][:MOST_OPENED]:
        # Pillow's own errors are of many kinds; scans and volumes are no pictures.
        with suppress(Exception), opened(name) as file, Image.open(file, formats=[*IMAGE_FORMATS]) as image:
            sides.append(min(image.size))
    return OwnImages(len(images), median_low(sides) if sides else None) if images else None


def _array(path: Path) -> OwnImages | None:
    """The images of a NumPy file, from its header."""
    if path.suffix == ".npy":
        with _opened(str(path)) as file:
            shape = _shape(file)
    else:
        with Archive(path) as archive:
            names = (f"{key}.npy" for key in ("images", "arr_0", "x"))
            with archive.open(
                next((name for name in names if name in archive.entries), "images.npy")
            ) as file:
                shape = _shape(file)
    if len(shape) not in (3, 4):
        return None
    sides = shape[1:] if len(shape) == 3 else sorted(shape[1:])[1:]  # the channels are the least of the three
    return OwnImages(shape[0], min(sides))


def _shape(file: IO[bytes]) -> tuple[int, ...]:
    """The shape in a `.npy` header; empty for a damaged one."""
    start = file.read(8)
    size = int.from_bytes(file.read(2 if start[6:7] == b"\x01" else 4), "little")
    found = re.search(rb"'shape': \(([\d, ]*)\)", file.read(min(size, LARGEST_HEADER)))
    return tuple(map(int, re.findall(rb"\d+", found[1]))) if found else ()


def gpu(accelerator: str) -> bool:
    """Return whether training will use a GPU, by the devices that the operating system lists."""
    if accelerator != "auto":
        return accelerator != "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\d|GPU-|MIG-", visible):  # SLURM writes NoDevFiles for none
        return False
    # /dev/dxg: Windows Subsystem for Linux; /dev/kfd: ROCm
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(map(os.path.exists, ("/dev/dxg", "/dev/kfd")))
