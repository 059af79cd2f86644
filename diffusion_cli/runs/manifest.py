"""The files of a manifest, which tasks on several machines write at the same time without any lock.

`manifest.json` contains the settings of the images in a folder, and which images are there. The protocol:

* Claim: the first task creates `manifest.json` with its whole content in one step that the file server decides. The
  others find it, and compare their settings with it. A task lists the folder before it looks for `manifest.json`:
  every image is younger than the manifest, so a task that lists an image of another task also finds the manifest.
* Records: a process adds what it has done to a file of its own, `.manifest/RANDOM.json`, that no other process writes.
* Merging: readers merge all records with `manifest.json`. After a process has written its record, it writes the merged
  manifest to `manifest.json`, then reads the records again, until `manifest.json` lacks nothing. The process that
  writes last has seen all records, so that `manifest.json` is whole once the last task has ended. The temporary file
  of `manifest.json` lies in `.manifest`, because a client of NFS lists a folder anew after it has changed the folder.

Records stay: a slow process may still replace `manifest.json` by what it merged before. Only a claim removes records,
namely those that it listed before it found `manifest.json` missing: their manifest was removed by the user.
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
    """Create `manifest.json`, unless another process has done so; OSError as `writing`."""
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
    """Give a temporary path in `.manifest` to write to; at the end it takes the place of the file in one step.

    It is for `manifest.json` and what is derived from it. Raises OSError as `writing`.
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
    """The records of all processes."""
    return sorted((folder / RECORDS).glob("[0-9a-f]*.json"))


def read_records(folder: Path) -> dict[Path, Any]:
    """The content of all records by file; UsageError about a damaged one."""
    found = {}
    for path in record_files(folder):
        try:
            found[path] = migrated(read_json(path, LONGEST_MANIFEST, MOST_IN_MANIFEST))
        except FileNotFoundError:  # removed by a new claim
            continue
        except FormatError as error:
            raise UsageError(path, NO_VALUE, str(error), "remove it, or choose another output=") from error
    return found


def add_record(folder: Path, additions: Mapping[str, Any]) -> None:
    """Add to this process's own record; OSError as `writing`."""
    path = folder / RECORDS / f"{_own_name(os.getpid())}.json"
    before = migrated(read_json(path, LONGEST_MANIFEST, MOST_IN_MANIFEST)) if path.is_file() else {}
    with atomic_write(path) as temporary:
        write_json(temporary, merge(before, additions))


@cache
def _own_name(pid: int) -> str:
    """The name of the record of this process; a forked child has its own."""
    return secrets.token_hex(8)


def merge(manifest: Mapping[str, Any], *records: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the seeds and results of all records, and their largest number of network calls."""
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
