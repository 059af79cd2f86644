"""Images held in memory, on the CPU or a GPU."""

from typing import Self

import torch
from torch import Tensor

from diffusion_cli.data.base import Images
from diffusion_cli.system.distributed import started
from diffusion_cli.system.machine import free_memory

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
        moved.conditions = {name: source.to(device) for name, source in self.conditions.items()}
        moved._fingerprint = self._fingerprint
        moved._digest = self._digest
        moved.captions = self.captions
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
