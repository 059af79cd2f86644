"""Images held in memory, on the CPU or on the device that trains."""

import os
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from diffusion_cli.data.base import Images
from diffusion_cli.ranks import started

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

    def gather(self, index: Tensor) -> Tensor:
        return self.pixels.index_select(0, index)

    def to(self, device: torch.device) -> Self:
        """The same images on a device."""
        moved = type(self)(self.pixels.to(device), None if self.labels is None else self.labels.to(device))
        moved._digest = self._digest
        return moved


def hold(images: Images, device: torch.device | str) -> Images:
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


def free_memory() -> int:
    """Bytes of RAM that programs can still use, or half of all RAM where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
