"""Files of cached latents: encoded once, resumed after an interruption, and verified before use."""

import math
import os
import shutil
import sys
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from diffusion_cli.data import Images, UnreadableError, to_model_range
from diffusion_cli.data.array import opened_array
from diffusion_cli.data.batches import fetched
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.cache import (
    Blocks,
    ChecksumError,
    checksum,
    checksums_path,
    continued,
    report_damage,
)
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.files import writing
from diffusion_cli.system.locks import locked
from diffusion_cli.system.progress import ProgressBar

ENCODED = 64  # images per batch
PART = "moments.part"
CHECKED_AT_ONCE = 2**30  # bytes; larger files are verified during use, not before
LARGE = 2**30  # bytes of latents from which a line is printed


class LatentImages(MemoryImages):
    """Memory-mapped moments of latents, float32 [N, 2L, *sizes], or [N, 4L, *sizes] with mirrored images last.

    With `blocks`, rows are compared with the checksums of the file before their first use.
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None, blocks: Blocks | None = None) -> None:
        super().__init__(pixels, labels)
        self.blocks = blocks

    def __getitem__(self, index: Tensor) -> Tensor:
        self.check(index)
        return super().__getitem__(index)

    def to(self, device: torch.device) -> Self:
        self.check()
        return super().to(device)

    def check(self, index: Tensor | None = None) -> None:
        """Raise UsageError if the given rows (None: all) are damaged; the next start encodes them again."""
        if self.blocks is None:
            return
        try:
            self.blocks.check(None if index is None else np.unique(index.numpy() // ENCODED))
        except ChecksumError as error:
            with suppress(FileNotFoundError):  # another process has found the damage too
                _set_back(self.blocks.path)
            raise UsageError(
                self.blocks.path,
                NO_VALUE,
                f"is damaged ({error})",
                "run the command again to encode these latents again",
            ) from error

    def hflip(self, images: Tensor, flip_mask: Tensor) -> Tensor:
        """Return the moments of each image, or of its mirror image where `flip_mask` is 1."""
        both = images.unflatten(1, (2, -1))
        return both[torch.arange(len(both), device=both.device), flip_mask]


def encoded(
    images: Images, latents: Latents, path: Path, flip: bool = False, num_workers: int = 0
) -> LatentImages:
    """Return the moments of images from the .npy file `path`, encoding them first if it does not exist.

    All processes must call this together. Moments are appended to a file, so that an interrupted encoding
    resumes. Raises UnreadableError for unreadable images, and UsageError if the file has another shape or
    type.
    """
    ranks, channels = Distributed(), latents.shape[0]
    row = ((4 if flip else 2) * channels, *latents.shape[1:])
    shape = (len(images), *row)
    # Another run may be encoding the same images.
    with writing(path), locked(path) if ranks.is_main else nullcontext():
        if ranks.is_main and path.is_file():
            _set_back_if_damaged(path, shape)
        if not ranks.broadcast(path.is_file()):
            _encode(images, latents, path, row, flip, num_workers)
    start = _start(path, shape)
    # Copy-on-write, because torch does not support read-only arrays; nothing writes to it.
    pixels = torch.from_numpy(np.memmap(path, np.float32, "c", start, shape))
    moments = LatentImages(pixels, images.labels, Blocks(path, start, block_size(row)))
    moments.captions = images.captions
    return moments.with_conditions(images.conditions)


def block_size(row: tuple[int, ...]) -> int:
    """Return the bytes of a block: the rows of a batch, with one checksum."""
    return ENCODED * 4 * math.prod(row)


def _start(path: Path, shape: tuple[int, ...]) -> int:
    """Return the bytes before the moments in a file; UsageError for another shape or type."""
    array = opened_array(path, None)
    if array.shape != shape or array.dtype != np.float32:
        raise UsageError(
            path,
            NO_VALUE,
            "has another shape or type than the latents of these images",
            "remove it to encode them again",
        )
    return path.stat().st_size - array.nbytes


def _set_back_if_damaged(path: Path, shape: tuple[int, ...]) -> None:
    try:
        blocks = Blocks(path, _start(path, shape), block_size(shape[1:]))
        if path.stat().st_size <= CHECKED_AT_ONCE:
            blocks.check()
    except ChecksumError as error:
        report_damage(path, error)
        _set_back(path)


def _set_back(path: Path) -> None:
    """Turn a complete file into a partial one, which encoding continues after its last valid block."""
    part = path.with_name(PART)
    if checksums_path(path).is_file():
        shutil.copyfile(
            checksums_path(path), checksums_path(part)
        )  # first, because a file without checksums would get new ones
    path.replace(part)
    checksums_path(path).unlink(missing_ok=True)


def _encode(
    images: Images, latents: Latents, path: Path, row: tuple[int, ...], flip: bool, num_workers: int
) -> None:
    """Write the moments of all images to `path`, first to a partial file."""
    ranks, part, device = Distributed(), path.with_name(PART), latents.device
    done = ranks.broadcast(_num_encoded(part, (len(images), *row)) if ranks.is_main else 0)
    if ranks.is_main:
        _check_room(part, 4 * (len(images) - done) * math.prod(row))
    rounds = ranks.shard(len(images) - done, ENCODED)
    rows = (torch.arange(done + mine.start, done + mine.stop) for mine in rounds)
    mode = "ab" if ranks.is_main else "rb"
    with (
        part.open(mode) as file,
        checksums_path(part).open(mode) as checksums,
        ProgressBar(
            total=len(images), initial=done, desc="encoding", unit="image", unit_scale=True, delay=2.0,
            disable=not ranks.is_main,
        ) as progress,
    ):  # fmt: skip
        for pixels in fetched(images, rows, num_workers, device):
            if isinstance(pixels, Exception):
                raise UnreadableError(str(pixels)) from pixels
            for moments in ranks.gather(_moments(pixels.to(device), latents, row, flip).cpu()):
                data = moments.contiguous().numpy().data
                file.write(data)
                checksums.write(checksum(data) if len(moments) else b"")
                progress.update(len(moments))
        if ranks.is_main:
            file.flush()
            os.fsync(file.fileno())
            checksums.flush()
            checksums_path(part).replace(checksums_path(path))
            part.replace(path)
    ranks.broadcast(None)


def _check_room(part: Path, size: int) -> None:
    """Raise UsageError if the disk lacks space for `size` bytes; print a line if they are many."""
    free = shutil.disk_usage(part.parent).free
    if size > free:
        raise UsageError(
            "cache_dir",
            part.parent.parent,
            f"the latents need {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free",
            "free some space, or use a folder on another disk",
        )
    if size > LARGE:
        print(f"encoding: writing {size / 1e9:.1f} GB of latents to {part.parent}", file=sys.stderr)


def _num_encoded(part: Path, shape: tuple[int, ...]) -> int:
    """Return the number of images already encoded in a partial file, and truncate it to them.

    It is a multiple of the batch size, so that later latents have the same bits as in an uninterrupted
    encoding. The first damaged batch and all after it are dropped.
    """
    header = BytesIO()
    npy.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    head, size = header.getvalue(), 4 * int(np.prod(shape[1:]))
    if not part.is_file() or not _begins(part, head):
        part.write_bytes(head)
        checksums_path(part).unlink(missing_ok=True)
    blocks = continued(part, len(head), ENCODED * size)
    return blocks * ENCODED


def _begins(path: Path, head: bytes) -> bool:
    """Return whether a file starts with the given bytes."""
    with path.open("rb") as file:
        return file.read(len(head)) == head


@torch.inference_mode()
def _moments(pixels: Tensor, latents: Latents, row: tuple[int, ...], flip: bool) -> Tensor:
    images = to_model_range(pixels)
    if not len(images):  # this process has no images in the last round
        return torch.empty(0, *row)
    moments = latents.moments(images)
    return torch.cat([moments, latents.moments(images.flip(-1))], 1) if flip else moments
