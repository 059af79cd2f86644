"""Locks of run folders, as other processes leave them."""

import json
from pathlib import Path
from typing import Any

from diffusion_cli.system.locks import LOCK

RECORD = "filelock/2\npid={pid}\nhost={host}\nmode=lease\ntoken=ab\nduration=60\nstart=7\n"


def leave(folder: Path, earlier: bool = False, **changes: Any) -> Path:
    """Create the lock that a process of another machine has left or keeps; `earlier`: one of an earlier version."""
    folder.mkdir(exist_ok=True)
    owner = {
        "host": "n3",
        "pid": 123,
        "job": "45",
        "restart": None,
        "since": "2099-01-01 00:00:00+00:00",
    } | changes
    lock = folder / LOCK
    lock.unlink(missing_ok=True)
    lock.write_text(
        json.dumps(owner) if earlier else f"{RECORD.format_map(owner)}diffuse={json.dumps(owner)}\n"
    )
    return lock


def owner(folder: Path) -> dict[str, Any]:
    """Return the holder in the lock of a folder."""
    return json.loads((folder / LOCK).read_text().rpartition("diffuse=")[2])
