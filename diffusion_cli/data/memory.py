"""Images held in memory, on the CPU or on the device that trains."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from diffusion_cli.data.base import Images
from diffusion_cli.system.distributed import started

GENERATED = "generated"
"""The fingerprint of images that follow from the configuration, which machines compute to different last digits."""
SHARE = 4  # a set is held where it takes at most this part of what is free, for it is not alone there


class MemoryImages(Images):
    """Images as one tensor `pixels` [N, C, H, W] on any device; `fingerprint` is that of their source, if any."""

    def __init__(self, pixels: Tensor, labels: Tensor | None, fingerprint: str | None = None) -> None:
        self._fingerprint = fingerprint
        self.shape = tuple(pixels.shape[1:])
        self.device = pixels.device
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pixels)

    def known_as(self, fingerprint: str) -> None:
        """Set the fingerprint of their source."""
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        return super().fingerprint() if self._fingerprint is None else self._fingerprint

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.pixels.index_select(0, index)

    def to(self, device: torch.device) -> Self:
        """The same images on a device."""
        moved = type(self)(self.pixels.to(device), None if self.labels is None else self.labels.to(device))
        moved._fingerprint = self._fingerprint
        moved._digest = self._digest
        return moved


def to_device(images: Images, device: torch.device | str) -> Images:
    """The same images, moved to `device` once if they are held in memory, to be batched there.

    They stay where they are if they are read from disk, or would take over a quarter of a GPU's free memory.
    """
    device = torch.device(device)
    if not isinstance(images, MemoryImages) or images.device == device:
        return images
    if device.type == "cuda" and images.pixels.nbytes > torch.cuda.mem_get_info(device)[0] // SHARE:
        return images
    return images.to(device)


def fits_in_memory(size: int) -> bool:
    """Whether `size` bytes are at most a quarter of the free RAM, in each process of this node."""
    return size * started().local_world <= free_memory() // SHARE


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that this process can still use: what is free on the machine, and in the cgroups of its job.

    Half of all RAM where the system gives no number. `root` is the folder in which `proc` and `sys` lie.
    """
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, min([free, *_free_in_cgroups(root)]))


class _Cgroups(NamedTuple):
    """The names that a version of cgroups gives to the memory of a group."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    reclaimable: str
    """The entry of `memory.stat` with the bytes of files that the kernel drops first."""


VERSION_1 = _Cgroups(
    ("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
VERSION_2 = _Cgroups(
    ("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file"
)


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes that this process's cgroup, and each above it, leaves free."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version = VERSION_2 if number == "0" else VERSION_1
        for mount in (root / name for name in version.mounts):
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    with suppress(OSError, ValueError):  # no such group here, or "max": no limit
                        yield _free_in(folder, version)


def _free_in(folder: Path, version: _Cgroups) -> int:
    limit = int((folder / version.limit).read_text())
    used = int((folder / version.usage).read_text())
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - used + int(statistics.get(version.reclaimable, 0))


def usable_cores() -> int:
    """Cores that this process may use: of a node's, those that a batch job was given."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1
