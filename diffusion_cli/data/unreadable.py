"""Image files that cannot be decoded: found once, and listed for later commands."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from diffusion_cli.data.encoded import EncodedImages, by_reason
from diffusion_cli.system.cache import optional, parse_json, write_json
from diffusion_cli.system.untrusted import LONGEST_MANIFEST, read

LISTS = "unreadable"
"""Folder of the lists, below the folder of downloaded datasets."""
MOST = 5
"""Number of reasons that a remark lists."""


class Unreadable(NamedTuple):
    """Files that are skipped."""

    reasons: dict[str, str]
    """Why each file cannot be decoded, by name."""
    place: Path
    """File with the list."""

    @classmethod
    def of(cls, images: EncodedImages, data_dir: Path, state: str) -> "Unreadable":
        """Return the unreadable files of some images: from their list, or found by decoding all images.

        Args:
            images: the images.
            data_dir: folder of downloaded datasets.
            state: hash of the files and of their decoder.
        """
        place = data_dir / LISTS / f"{state}.json"
        with suppress(OSError, ValueError):  # no list yet, or a damaged one
            listed = parse_json(read(place, LONGEST_MANIFEST))
            return cls({name: str(reason) for name, reason in listed.items()}, place)
        reasons = {images.title(row): reason for row, reason in images.unreadable().items()}
        with optional():
            write_json(place, reasons)
        return cls(reasons, place)

    def remarks(self, key: str) -> list[str]:
        """Return a remark that counts and names the files; none without such files."""
        if not self.reasons:
            return []
        count = "1 file is" if len(self.reasons) == 1 else f"{len(self.reasons)} files are"
        return [
            f"{key}: {count} unreadable and skipped, as listed in {self.place}: {by_reason(self.reasons, MOST)}"
        ]
