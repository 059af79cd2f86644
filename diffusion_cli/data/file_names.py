"""Names of the image files, masks and volumes below a folder or in a ZIP archive."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from diffusion_cli.data.labels import LABELS_CSV
from diffusion_cli.data.labels import read as entry
from diffusion_cli.data.listing import (
    MANIFEST,
    ends_in,
    is_result,
    manifests,
    passed_over,
    visible_name,
    without_pictures,
)
from diffusion_cli.data.series import SeriesFiles, dicom_files, series
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats.dicom import SUFFIXES as SCANS
from diffusion_cli.formats.files import SUFFIXES as PICTURES
from diffusion_cli.formats.volume import SUFFIXES as VOLUMES
from diffusion_cli.system.untrusted import LONGEST_MANIFEST, Archive

SUFFIXES = (*PICTURES, *SCANS)
RULES = 4
"""Version of the rules that convert files to images or point clouds.

Version 3 mirrors training images with attributes or captions too, unless `flip=false`.
Version 2 reads no meshes as point clouds.
Version 1 reads only `FIRST_SUFFIXES` and DICOM, includes figures that this program wrote, has no modes with opacity,
and ignores colour profiles. It treats split folders as classes, and backslashes in an archive as part of names.
"""


def source_name(path: Path) -> str:
    """Return the name of the images: the folder's name, or the file's without its last suffix."""
    whole = path.resolve() if path.name in ("", "..") else path
    return whole.name if path.is_dir() else whole.stem


def file_names(
    path: Path, key: str = "dataset.path", rules: int = RULES, given: str | None = None
) -> list[str]:
    """Return the names of all files below a folder or in a ZIP archive, relative, with `/`.

    Some Windows tools separate folders in an archive by backslashes; version 1 of the rules keeps these in names.

    Raises:
        UsageError: `path` is missing or not a readable archive. The error names the configuration key `key` with the
            value `given`, such as the URL of a copy; None: `path`.
    """
    if not path.exists():
        raise UsageError(key, given or path, "does not exist", "give a folder or .zip of images")
    if path.is_dir():
        return list(folder_names(path))
    try:
        with Archive(path) as archive:
            names = [name for name in archive.entries if not name.endswith("/")]
            if rules > 1 and not any("/" in name for name in archive.entries):
                names = [name.replace("\\", "/") for name in names if not name.endswith("\\")]
            return names
    except FormatError as error:
        raise UsageError(key, given or path, f"is neither a folder nor a readable .zip ({error})") from error


def image_files(
    path: Path,
    names: list[str],
    key: str = "dataset.path",
    suffixes: tuple[str, ...] = SUFFIXES,
    given: str | None = None,
) -> list[str]:
    """Return the names with a suffix of images, sorted; if there are none, those of DICOM files if these are images.

    Raises UsageError, as `file_names`, if there are none of them either.
    """
    images = sorted(
        name
        for name in names
        if ends_in(PurePosixPath(name), suffixes) and not name.lower().endswith(LABELS_CSV)
    )
    if not images and SCANS[0] in suffixes:
        images = dicom_files(path, names)
    if not images:
        expected = f"expected files with {' '.join(suffixes)}"
        raise UsageError(key, given or path, "has no images", _other_kind(path, names, key) or expected)
    return images


def _other_kind(path: Path, names: list[str], key: str) -> str | None:
    """Return how to read a folder or archive of volumes, or of the library datasets; None for others."""
    volumes = Counter(
        suffix for name in names for suffix in VOLUMES if ends_in(PurePosixPath(name), (suffix,))
    )
    if key == "dataset.path" and {"dataset_info.json", "dataset_dict.json"} & {*names}:
        return "it was saved by the library datasets; use dataset=huggingface"
    if volumes and key == "dataset.path":
        ((suffix, count),) = volumes.most_common(1)
        return (
            f"it has {count} volumes in {suffix} files: "
            "set dataset.resolution=[depth,height,width] dataset.channels=1 dataset.range=[low,high]"
        )
    return None


def own_images(
    path: Path, names: list[str], key: str, suffixes: tuple[str, ...], given: str | None = None
) -> list[str]:
    """Return the names as `image_files`, without figures that this program wrote; UsageError if none is left."""
    images = image_files(path, names, key, suffixes, given)
    kept = without_pictures(images, names, lambda name: entry(path, name, LONGEST_MANIFEST))
    if path.is_dir() and (path.parent / MANIFEST).is_file():  # a series inside the output of an edit
        manifest = manifests([MANIFEST], lambda name: entry(path.parent, name, LONGEST_MANIFEST)).get("", {})
        if path.name in manifest.get("results", {}):
            kept = [name for name in kept if is_result(f"{path.name}/{name}", manifest)]
    if not kept:
        raise UsageError(
            key,
            given or path,
            "is an output folder of diffuse without samples or results",
            "give another folder",
        )
    return kept


def ignored_files(path: Path, names: list[str], key: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the remark of `passed_over`, not counting figures that this program wrote."""
    rest = without_pictures(names, names, lambda name: entry(path, name, LONGEST_MANIFEST))
    return passed_over(f"{key}={path}", rest, suffixes)


def mask_names(
    path: Path, masks: str, names: list[str], suffixes: tuple[str, ...]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the masks in their folder, by name there and by name for reading; the other `names`; and remarks.

    Raises UsageError if there is no such folder, or no mask in it.
    """
    if path.is_dir():
        place = Path(masks).expanduser().resolve()
        top, inside = f"{place.as_posix()}/", list(folder_names(place)) if place.is_dir() else []
        root = path.resolve()
        below = f"{place.relative_to(root).as_posix()}/" if place.is_relative_to(root) else top
    else:
        top = below = f"{masks.strip('/')}/"
        inside = [name.removeprefix(top) for name in names if name.startswith(top)]
    found = {name: top + name for name in inside if ends_in(PurePosixPath(name), suffixes)}
    if not found:
        where = "a folder" if path.is_dir() else f"a folder inside {path}"
        raise UsageError(
            "dataset.masks", masks, "has no masks", f"give {where} with {' '.join(suffixes)} files"
        )
    rest = [name for name in names if not name.startswith(below)]
    return found, rest, passed_over(f"dataset.masks={masks}", inside, suffixes)


def volume_files(
    path: Path, names: list[str], given: str | None = None, data_dir: Path | None = None
) -> SeriesFiles:
    """Return the files of each volume: NIfTI and .npy files, or else DICOM `series`.

    Raises UsageError if there are none.
    """
    volumes = sorted(n for n in names if n.lower().endswith(VOLUMES) and visible_name(PurePosixPath(n)))
    found = SeriesFiles({name: [name] for name in volumes}, []) if volumes else series(path, names, data_dir)
    if not found.volumes:
        expected = f"expected files with {' '.join(VOLUMES)}, or DICOM files"
        raise UsageError("dataset.path", given or path, "has no volumes", expected)
    return found


def folder_names(path: Path) -> Iterator[str]:
    """Yield the files below a folder, each once, even if links reach it by several or endless paths."""
    visited: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(path, followlinks=True, onerror=_refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()  # for a deterministic order
        for file in files:
            yield (Path(folder) / file).relative_to(path).as_posix()


def _refuse(error: OSError) -> None:
    """Raise the error of an unreadable folder instead of silently skipping its images."""
    raise error
