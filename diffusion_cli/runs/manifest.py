"""The manifest of a folder of images, which several machines can write concurrently without a lock.

`manifest.json` contains the settings of the images in a folder, and the list of the images. The protocol:

* Claim: the first task creates `manifest.json` with its full content in one atomic step. Other tasks find the file and
  compare their settings with it. A task lists the folder before it checks for `manifest.json`. Images are written after
  the manifest, so a task that lists an image of another task also finds the manifest.
* Records: each process adds its work to its own file `.manifest/RANDOM.json`, which no other process writes.
* Merging: readers merge all records with `manifest.json`. A process that has written its record writes the merged
  manifest to `manifest.json` and reads the records again, until `manifest.json` contains all of them. The last writer
  has read all records, so `manifest.json` is complete when the last task ends. The temporary file of `manifest.json`
  is in `.manifest`, because an NFS client lists a folder again after changing it.

Records are not deleted, because a slow process may still overwrite `manifest.json` with an older merge. Only a claim
deletes records: those that it listed before it found no `manifest.json`, because the user has deleted their manifest.
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from diffusion_cli.data.listing import MANIFEST
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.system.files import atomic_write, writing
from diffusion_cli.system.seeding import seed_ranges
from diffusion_cli.system.temporary_files import create_linked, temporary_path
from diffusion_cli.system.untrusted import LONGEST_MANIFEST, MOST_IN_MANIFEST, read_json

RECORDS = ".manifest"


def create(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Create `manifest.json`, unless it exists; OSError as `writing`."""
    path = folder / MANIFEST
    temporary = temporary_path(path)
    with writing(path):
        try:
            write_json(temporary, manifest)
            synchronize(temporary)
            create_linked(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path, name: str) -> Iterator[Path]:
    """Yield a temporary path in `.manifest`; on exit it atomically replaces the file `name`.

    Use it for `manifest.json` and files derived from it. Raises OSError as `writing`.
    """
    temporary = temporary_path(folder / RECORDS / name)
    with writing(folder / name):
        temporary.parent.mkdir(exist_ok=True)
        try:
            yield temporary
            synchronize(temporary)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def record_files(folder: Path) -> list[Path]:
    """Return the record files of all processes."""
    return sorted((folder / RECORDS).glob("[0-9a-f]*.json"))


def read_records(folder: Path) -> dict[Path, Any]:
    """Return the content of all records by file; UsageError for a damaged record."""
    found = {}
    for path in record_files(folder):
        try:
            found[path] = migrated(read_json(path, LONGEST_MANIFEST, MOST_IN_MANIFEST))
        except FileNotFoundError:  # deleted by a new claim
            continue
        except FormatError as error:
            raise UsageError(path, NO_VALUE, str(error), "remove it, or choose another output=") from error
    return found


def add_record(folder: Path, additions: Mapping[str, Any]) -> None:
    """Add to the record of this process; OSError as `writing`."""
    path = folder / RECORDS / f"{_own_name(os.getpid())}.json"
    before = migrated(read_json(path, LONGEST_MANIFEST, MOST_IN_MANIFEST)) if path.is_file() else {}
    with atomic_write(path) as temporary:
        write_json(temporary, merge(before, additions))


@cache
def _own_name(pid: int) -> str:
    """Return the name of the record of a process; a forked child gets another name."""
    return secrets.token_hex(8)


def merge(manifest: Mapping[str, Any], *records: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with the seeds and results of all records, and the maximum of their network calls."""
    merged = dict(manifest)
    for record in records:
        if "seeds" in record:
            ranges = seed_ranges([*merged.get("seeds", []), *record["seeds"]])
            merged["seeds"] = [[part[0], part[-1]] for part in ranges]
        if "network_calls" in record:
            merged["network_calls"] = max(merged.get("network_calls", 0), record["network_calls"])
        if "results" in record:
            merged["results"] = merged.get("results", {}) | record["results"]
    return merged


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest or a record."""
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def synchronize(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
