"""Facts about a user's own images and this machine that choose a recipe, found without importing torch."""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from statistics import median_low
from typing import IO, Any, NamedTuple

from diffusion_cli.foreign import IMAGE_FORMATS, Archive, read

MOST_COUNTED = 10_000
"""Images that are counted at most: no recipe depends on more."""
MOST_OPENED = 16
"""Images whose size is read."""
LARGEST_FILE = 2**26
"""Bytes of an image that is opened for its size."""

LARGEST_HEADER = 2**16
"""Bytes of a `.npy` header."""


class OwnImages(NamedTuple):
    """A user's own images, as far as a recipe depends on them."""

    number: int
    """Number of images, at most MOST_COUNTED."""
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
            files = (Path(folder, name) for folder, _, names in os.walk(target) for name in names)
            return _measured([*islice(files, MOST_COUNTED)], lambda file: read(Path(file), LARGEST_FILE))
        with Archive(target) as archive:
            return _measured(
                [*archive.entries][:MOST_COUNTED], lambda name: archive.read(str(name), LARGEST_FILE)
            )
    return None


def _measured(names: list[Any], content: Callable[[Any], bytes]) -> OwnImages | None:
    """The images among files, of which a few are opened."""
    from PIL import Image

    suffixes = {suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes}
    paths = {name: PurePosixPath(name) for name in names}
    images = [name for name, path in paths.items() if path.suffix.lower() in suffixes and path.name[0] != "."]
    sides = []
    for name in images[:: max(1, len(images) // MOST_OPENED)]:
        with suppress(Exception):  # Pillow's own, of many kinds
            sides.append(min(Image.open(BytesIO(content(name)), formats=[*IMAGE_FORMATS]).size))
    return OwnImages(len(images), median_low(sides) if sides else None) if images else None


def _array(path: Path) -> OwnImages | None:
    """The images of a NumPy file, from its header."""
    if path.suffix == ".npy":
        with path.open("rb") as file:
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
    return OwnImages(min(shape[0], MOST_COUNTED), min(sides))


def _shape(file: IO[bytes]) -> tuple[int, ...]:
    """The shape in a `.npy` header; empty for a damaged one."""
    start = file.read(8)
    size = int.from_bytes(file.read(2 if start[6:7] == b"\x01" else 4), "little")
    found = re.search(rb"'shape': \(([\d, ]*)\)", file.read(min(size, LARGEST_HEADER)))
    return tuple(map(int, re.findall(rb"\d+", found[1]))) if found else ()


def gpu(accelerator: str) -> bool:
    """Return whether training will use a GPU, by the devices that the operating system lists."""
    if accelerator != "auto":
        return accelerator == "cuda"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
