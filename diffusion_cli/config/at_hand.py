"""Facts about a user's own images and this machine that choose a recipe, found without importing torch."""

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from statistics import median_low
from typing import IO, Any, NamedTuple, TypeVar
from warnings import catch_warnings

from diffusion_cli.config.tables_at_hand import IMAGES, MOST_OPENED, READERS, images_in
from diffusion_cli.errors import class_name
from diffusion_cli.system.untrusted import IMAGE_FORMATS, Archive, regular

Place = TypeVar("Place", str, bytes)
MOST_COUNTED = 1_000_000
"""Maximum number of files to look at."""
OTHER_SUFFIXES = (".dcm", ".dicom", ".nii", ".nii.gz", ".npy")
"""Suffixes of scans and volumes, which are counted too."""

LARGEST_HEADER = 2**16
"""Bytes of a header, at most."""


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
    with suppress(OSError, ValueError, csv.Error):
        target = Path(path).expanduser()
        if class_name(dataset) == "HuggingFace" and (tables := _tables(target, dataset)):
            return _tabled(tables, dataset)
        if target.suffix in (".npy", ".npz"):
            return _array(target)
        if target.suffix.lower() == ".csv":
            return _measured(_targets(target), _opened)
        if target.is_dir():
            return _measured([*islice(_files(target), MOST_COUNTED)], _opened)
        with Archive(target) as archive:
            return _measured([*archive.entries][:MOST_COUNTED], archive.open)
    return None


def _tables(target: Path, dataset: Mapping[str, Any]) -> list[Path]:
    """The tables or tars that a path or a pattern names; empty for other files."""
    if target.is_dir():
        files = [Path(name) for name in islice(_files(target), MOST_COUNTED)]
        split = str(dataset.get("split")).partition("[")[0]
        files = [file for file in files if file.parent.name == split] or files
    else:
        files = sorted(Path(target.anchor).glob(str(target.relative_to(target.anchor))))
    # The library caches what it computes beside its own files.
    files = [file for file in files if not file.name.startswith("cache-")]
    kinds = ([file for file in files if file.suffix.lower() == suffix] for suffix in READERS)
    return next(filter(None, kinds), [])


def _tabled(files: Sequence[Path], dataset: Mapping[str, Any]) -> OwnImages | None:
    """The images in tables or tars."""
    column, most = dataset.get("image"), dataset.get("max_images")
    with suppress(Exception):  # pyarrow and tarfile have errors of many kinds; pyarrow may be missing
        number, contents = images_in(files, column if isinstance(column, str) else None)
        number = min(number, most) if isinstance(most, int) else number
        return OwnImages(number, _short_side(contents, BytesIO))
    return None


def _targets(table: Path) -> list[str]:
    """The files in the column `target` of a table of pairs."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, skipinitialspace=True)
        names = [name.strip() for name in next(rows, [])]
        place = names.index("target")
        found = {row[place].strip() for row in islice(rows, MOST_COUNTED) if len(row) > place}
    return [str(table.parent / name) for name in sorted(found)]


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
    visible = [name for name in names if PurePosixPath(name).name[0] != "."]
    images = [name for name in visible if name.lower().endswith((*IMAGES, *OTHER_SUFFIXES))]
    scans = images or [name for name in visible if not PurePosixPath(name).suffix]
    few = scans[:: max(1, len(scans) // MOST_OPENED)][:MOST_OPENED]
    side = _short_side(few, opened)
    found = images if side is None else scans
    return OwnImages(len(found), side) if found else None


def _short_side(places: Sequence[Place], opened: Callable[[Place], IO[bytes]]) -> int | None:
    """The median of the short sides of images; None if no header shows one."""
    sides = []
    for place in places:
        # Pillow and pydicom have errors of many kinds; volumes are no pictures, and pydicom may be missing.
        with suppress(Exception), opened(place) as file:
            sides.append(_side(file))
    return median_low(sides) if sides else None


def _side(file: IO[bytes]) -> int:
    from PIL import Image

    is_scan = file.read(132).endswith(b"DICM")
    file.seek(0)
    if is_scan:
        return _side_of_scan(file.read(LARGEST_HEADER))
    with Image.open(file, formats=[*IMAGE_FORMATS]) as image:
        return min(image.size)


def _side_of_scan(start: bytes) -> int:
    """The short side by the first bytes of a DICOM file: pydicom inflates some files as a whole."""
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    rows, columns = Tag("Rows"), Tag("Columns")
    with catch_warnings(action="ignore"):
        header = read_partial(BytesIO(start), lambda tag, *_: tag > columns, specific_tags=[rows, columns])
        return min(int(header.Rows), int(header.Columns))


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
