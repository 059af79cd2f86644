"""Remarks from the headers of image files: sizes, frames and colour profiles, without decoding pixels."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from diffusion_cli.data.base import spread
from diffusion_cli.formats.dicom_reader import MAGIC, header_of, is_dicom, patient_id
from diffusion_cli.formats.files import is_turned, parsed
from diffusion_cli.formats.profiles import conversion
from diffusion_cli.system.untrusted import LARGEST, Archive, regular

MOST = 256
"""Maximum number of files to open; of more files, evenly spaced ones are chosen."""


class ImageHeader(NamedTuple):
    """Properties from the header of an image file."""

    name: str
    size: tuple[int, ...]
    """Height and width of the upright image."""
    is_tiff: bool
    frames: bool
    """Whether the file has more than one frame or page."""
    profile: str | None
    """Name of the colour profile that is converted; empty for a broken one; None otherwise."""
    patient: str = ""
    """PatientID of a DICOM file; empty without one."""


def headers(path: Path, names: list[str]) -> list[ImageHeader]:
    """Return the headers of at most MOST image files in a folder or archive; broken files are skipped.

    Includes DICOM files, with the size of a slice.
    """
    chosen = [names[row] for row in spread(len(names), min(len(names), MOST)).tolist()]
    return [*_headers(path, chosen)]


def headers_of(contents: Iterable[tuple[str, bytes]]) -> list[ImageHeader]:
    """Return the headers of image files, given by name and content; broken files are skipped."""
    found = []
    for name, data in contents:
        with suppress(Exception):  # decoders raise errors of many types; reported where pixels are read
            found.append(_header(name, BytesIO(data)))
    return found


def _headers(path: Path, names: Sequence[str]) -> Iterator[ImageHeader]:
    with nullcontext() if path.is_dir() else Archive(path) as archive:
        for name in names:
            try:
                if archive is not None:
                    yield _header(name, BytesIO(archive.read(name)))
                elif regular(path / name) <= LARGEST:
                    with (path / name).open("rb") as file:
                        yield _header(name, file)
            except (
                Exception
            ):  # decoders raise errors of many types for broken data; reported where pixels are read
                continue


def _header(name: str, file: IO[bytes]) -> ImageHeader:
    is_scan = is_dicom(file.read(MAGIC))
    file.seek(0)
    if is_scan:
        header = header_of(file)
        return ImageHeader(
            name, (int(header.Rows), int(header.Columns)), False, False, None, patient_id(header)
        )
    image = parsed(file)
    # For a PNG without "exif" in its header, Pillow would decode all pixels to look for the orientation.
    turned = (image.format != "PNG" or "exif" in image.info) and is_turned(image)
    size = image.size if turned else image.size[::-1]
    found = conversion(
        image.info.get("icc_profile") or b"", "RGB" if image.mode in ("P", "RGBA") else image.mode
    )
    profile = (
        {"converted": found.name, "broken": ""}.get(found.kind) if image.info.get("icc_profile") else None
    )
    return ImageHeader(name, size, image.format == "TIFF", _has_frames(image), profile)


def _has_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # further images of an MPO photo are previews, gain maps or stereo views
        return False
    try:
        if image.format != "TIFF":
            return getattr(image, "is_animated", False)
        image.seek(1)
    except Exception:  # EOFError after the last page; errors of other types if the next page is broken
        return False
    return True


def remarks(
    key: str,
    found: Sequence[ImageHeader],
    total: int,
    wanted: Sequence[int] | None = None,
    own_numbers: bool = False,
    profiles: bool = True,
) -> list[str]:
    """Return remarks about images smaller than the `wanted` height and width, about frames, and about profiles.

    Args:
        key: configuration key and path, the start of each line.
        found: headers of some of the files.
        total: number of all files.
        wanted: target height and width, or None.
        own_numbers: whether pixels are read as values, not colours: pages are channels, profiles are ignored.
        profiles: whether colour profiles are converted.
    """
    looked_at = len(found) if total > MOST else None
    lines = []
    small = [header.size for header in found if wanted is not None and _is_smaller(header.size, wanted)]
    if wanted is not None and small:
        size = " x ".join(map(str, reversed(min(small, key=sorted))))
        shown = wanted[0] if len(set(wanted)) == 1 else str([*wanted]).replace(" ", "")
        lines.append(
            f"dataset.resolution={shown}: {_count(len(small), looked_at)} smaller and enlarged (smallest: "
            f"{size} pixels); set dataset.resolution to at most {min(map(min, small))} to avoid this"
        )
    moving = [header.name for header in found if header.frames and not (header.is_tiff and own_numbers)]
    if moving:
        lines.append(
            f"{key}: {_count(len(moving), looked_at)} in files with several frames or pages; only the first is "
            f"read: {_named(moving)}"
        )
    return [*lines, *(_profile_remarks(key, found, looked_at) if profiles and not own_numbers else [])]


def patient_remarks(key: str, found: Sequence[ImageHeader], val: Collection[str]) -> list[str]:
    """Return a remark if patients of DICOM files are on both sides of the split, unless all files are of one patient.

    Args:
        key: configuration key and path, the start of the line.
        found: headers of some of the files.
        val: names of the files for validation.
    """
    train, other = (
        {each.patient for each in found if (each.name in val) is side} - {""} for side in (False, True)
    )
    count = len(train & other)
    if not count or len(train | other) == 1:
        return []
    patients = "1 patient has" if count == 1 else f"{count} patients have"
    return [
        f"{key}: {patients} images in both splits, by PatientID; dataset.group=PatientID keeps patients of a "
        "new run together"
    ]


def _profile_remarks(key: str, found: Sequence[ImageHeader], looked_at: int | None) -> Iterator[str]:
    names = Counter(header.profile for header in found if header.profile)
    if names:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(names.items()))
        yield f"{key}: {_count(names.total(), looked_at)} converted to sRGB from a colour profile: {counts}"
    broken = [header.name for header in found if header.profile == ""]
    if broken:
        count = _count(len(broken), looked_at)
        yield f"{key}: {count} read as sRGB because the colour profile is broken: {_named(broken)}"


def _is_smaller(size: tuple[int, ...], wanted: Sequence[int]) -> bool:
    return any(have < want for have, want in zip(size, wanted, strict=True))


def _count(count: int, looked_at: int | None) -> str:
    if looked_at is not None:
        return f"{count} of the {looked_at} images examined are"
    return "1 image is" if count == 1 else f"{count} images are"


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
