"""DICOM files of a folder or archive: those without a suffix, and the series that form volumes."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar

from diffusion_cli.data.base import row_chunks
from diffusion_cli.data.listing import ends_in, may_be_image
from diffusion_cli.formats.dicom import SUFFIXES
from diffusion_cli.formats.dicom_reader import MAGIC, header_of, is_dicom, patient_id
from diffusion_cli.system.cache import optional, parse_json, write_json
from diffusion_cli.system.untrusted import LONGEST_MANIFEST, Archive, read, regular

Found = TypeVar("Found")
LISTS = "series"
"""Folder of the lists of files, below the folder of downloaded datasets."""
AT_ONCE = 8
"""Files read at the same time."""


def dicom_files(path: Path, names: list[str]) -> list[str]:
    """Return the names of DICOM files, sorted: by their suffix or, if no file has it, by their first bytes."""
    files = [PurePosixPath(name) for name in sorted(names)]
    if found := [str(file) for file in files if ends_in(file, SUFFIXES)]:
        return found
    others = [str(file) for file in files if may_be_image(file)]
    found = _read_each(path, others, lambda file: is_dicom(file.read(MAGIC)), False)
    return [name for name, is_scan in zip(others, found, strict=True) if is_scan]


class SeriesFiles(NamedTuple):
    """DICOM files that form volumes."""

    volumes: dict[str, list[str]]
    """Files of each volume by its name, sorted."""
    localizers: list[str]
    """Overview images, which show where the slices of other series are."""


def series(path: Path, names: list[str], data_dir: Path | None = None) -> SeriesFiles:
    """Return the DICOM files of each volume.

    With a `data_dir`, the series of each file in a folder are listed there until its size or time changes.

    A series is named after its folder, or `folder/SeriesInstanceUID` if there are others; a file with several frames
    has its own name. Files with a broken header are volumes of their own, so that reading reports them.
    """
    localizers: list[str] = []
    found: dict[tuple[str, str], list[str]] = {}
    files = dicom_files(path, names)
    if data_dir is not None and path.is_dir():
        uids = _listed(path, files, data_dir)
    else:
        uids = _read_each(path, files, _series_uid, "")
    for name, uid in zip(files, uids, strict=True):
        if uid is None:
            localizers.append(name)
        else:
            found.setdefault((PurePosixPath(name).parent.as_posix(), uid or name), []).append(name)
    several = Counter(folder for folder, _ in found)
    named = {}
    for (folder, uid), slices in found.items():
        if uid == slices[0]:
            named[uid] = slices
        else:
            alone = path.resolve().name if folder == "." else folder
            named[alone if several[folder] == 1 else PurePosixPath(folder, uid).as_posix()] = slices
    return SeriesFiles(dict(sorted(named.items())), localizers)


def _listed(path: Path, files: list[str], data_dir: Path) -> list[str | None]:
    """Return `_series_uid` of each file in a folder, from its list if the file has not changed."""
    place = data_dir / LISTS / f"{sha256(str(path.resolve()).encode()).hexdigest()[:16]}.json"
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError, LookupError):  # no list yet, or a damaged one
        known = parse_json(read(place, LONGEST_MANIFEST))["files"]

    def entry(file: IO[bytes]) -> list[Any]:
        status = os.fstat(file.fileno())
        stamp = [status.st_size, status.st_mtime_ns]
        name = Path(file.name).relative_to(path).as_posix()
        before = known.get(name, [])
        # A file without a series may be readable now, for example by a newer pydicom.
        return before if before[:2] == stamp and before[2] != "" else [*stamp, _series_uid(file)]

    found = dict(zip(files, _read_each(path, files, entry, [None, None, ""]), strict=True))
    if found != known:
        with optional():
            write_json(place, {"files": found})
    return [uid for *_, uid in found.values()]


def patient_ids(path: Path, names: list[str]) -> list[str]:
    """Return the PatientID of DICOM files; empty for a file that has none or is no DICOM file."""
    return _read_each(path, names, lambda file: patient_id(header_of(file)), "")


def _series_uid(file: IO[bytes]) -> str | None:
    """Return the UID of the series of a slice; empty for several frames or a broken file, None for a localizer."""
    try:
        header = header_of(file)
        frames = int(header.get("NumberOfFrames") or 1)
    except ValueError:
        return ""
    if "LOCALIZER" in (header.get("ImageType") or []):
        return None
    return "" if frames > 1 else str(header.get("SeriesInstanceUID") or "")


def _read_each(
    path: Path, names: list[str], use: Callable[[IO[bytes]], Found], unreadable: Found
) -> list[Found]:
    """Return what `use` makes of each open file, or `unreadable`. Threads wait for a slow disk together."""
    with nullcontext() if path.is_dir() else Archive(path) as archive:

        def one(name: str) -> Found:
            try:
                if archive is None:
                    regular(path / name)
                with (path / name).open("rb") if archive is None else archive.open(name) as file:
                    return use(file)
            except Exception:  # of the file system, zlib or a damaged archive; reported where pixels are read
                return unreadable

        with ThreadPoolExecutor(AT_ONCE) as pool:
            chunks = row_chunks(len(names), f"reading headers of {path.name}")
            return [
                found for rows in chunks for found in pool.map(one, [names[row] for row in rows.tolist()])
            ]
