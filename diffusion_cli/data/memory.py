"""Images held in memory, on the CPU or a GPU."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from diffusion_cli.data.base import Images
from diffusion_cli.system.distributed import started
from diffusion_cli.system.machine import physical_memory

GENERATED = "generated"
"""Fingerprint of generated images: the configuration identifies them, as their last digits depend on the machine."""
SHARE = 4  # use at most a quarter of the free memory


class MemoryImages(Images):
    """Images as one tensor `pixels` [N, C, H, W] on any device.

    Args:
        pixels: uint8, or float32 in about [-1, 1].
        labels: class of each image, int64 [N] on the same device, or None.
        fingerprint: that of the images' source; None: computed from `pixels`.
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None, fingerprint: str | None = None) -> None:
        self._fingerprint = fingerprint
        self.shape = tuple(pixels.shape[1:])
        self.device = pixels.device
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pixels)

    def known_as(self, fingerprint: str) -> None:
        """Set the fingerprint of the images' source."""
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        return super().fingerprint() if self._fingerprint is None else self._fingerprint

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.pixels.index_select(0, index)

    def to(self, device: torch.device) -> Self:
        """Return the images on a device."""
        moved = type(self)(self.pixels.to(device), None if self.labels is None else self.labels.to(device))
        moved._fingerprint = self._fingerprint
        moved._digest = self._digest
        return moved


def to_device(images: Images, device: torch.device | str) -> Images:
    """Return the images, moved to `device` if they are in memory.

    They stay where they are if they are read from disk, or need more than a quarter of the free GPU memory.
    """
    device = torch.device(device)
    if not isinstance(images, MemoryImages) or images.device == device:
        return images
    if device.type == "cuda" and images.pixels.nbytes > torch.cuda.mem_get_info(device)[0] // SHARE:
        return images
    return images.to(device)


def fits_in_memory(size: int) -> bool:
    """Return whether `size` bytes per process on this node are at most a quarter of the free RAM."""
    return size * started().local_world <= free_memory() // SHARE


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of RAM available to this process: free on the machine, and in the cgroups of its job.

    Returns half of all RAM if the system reports no number. `root` is the folder of `proc` and `sys`.
    """
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = physical_memory() // 2
    return max(0, min([free, *_free_in_cgroups(root)]))


class _Cgroups(NamedTuple):
    """File and entry names of a cgroup version for the memory of a group."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    reclaimable: str
    """Entry of `memory.stat` with the bytes of cached files that the kernel frees first."""


VERSION_1 = _Cgroups(
    ("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
VERSION_2 = _Cgroups(
    ("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file"
)


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """Yield the free bytes of this process's cgroup, and of each above it."""
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
                    with suppress(OSError, ValueError):  # no such group, or "max": no limit
                        yield _free_in(folder, version)


def _free_in(folder: Path, version: _Cgroups) -> int:
    limit = int((folder / version.limit).read_text())
    used = int((folder / version.usage).read_text())
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - used + int(statistics.get(version.reclaimable, 0))
