"""The files of latents in the cache: encoded once, continued after a stop, and checked before they are used."""

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

ENCODED = 64  # images read at a time
PART = "moments.part"
CHECKED_AT_ONCE = 2**30  # bytes of a file that is checked before its use, a larger one while it is used
LARGE = 2**30  # bytes of latents that are worth a word


class LatentImages(MemoryImages):
    """Moments of latents, float32 [N, 2L, h, w], mapped from disk; or [N, 4L, h, w], of mirrored images last.

    Those in a file have its `blocks` of ENCODED rows, which are compared with their checksums before they are used.
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
        """Raise UsageError if rows, or any, are not as they were written; then the next start encodes them again."""
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
    """The moments of images, from the .npy file `path`, which is made now if it is not there.

    All processes work together; what is made is added to a file as it comes, so that a start that was cut off is gone
    on with. Raises UnreadableError for images that cannot be read, UsageError for a file of others.
    """
    ranks, channels = Distributed(), latents.shape[0]
    row = ((4 if flip else 2) * channels, *latents.shape[1:])
    shape = (len(images), *row)
    # Another run may encode the same images.
    with writing(path), locked(path) if ranks.is_main else nullcontext():
        if ranks.is_main and path.is_file():
            _set_back_if_damaged(path, shape)
        if not ranks.broadcast(path.is_file()):
            _encode(images, latents, path, row, flip, num_workers)
    start = _start(path, shape)
    # Mapped to be copied where it is written to, which it never is: torch knows no arrays for reading only.
    pixels = torch.from_numpy(np.memmap(path, np.float32, "c", start, shape))
    return LatentImages(pixels, images.labels, Blocks(path, start, block_size(row)))


def block_size(row: tuple[int, ...]) -> int:
    """Bytes of the rows that are encoded, and have a checksum, together."""
    return ENCODED * 4 * math.prod(row)


def _start(path: Path, shape: tuple[int, ...]) -> int:
    """Bytes before the moments in a file; UsageError if it has others."""
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
    """Turn a finished file into one that is continued after its last good block."""
    part = path.with_name(PART)
    if checksums_path(path).is_file():
        shutil.copyfile(
            checksums_path(path), checksums_path(part)
        )  # first: a file without any would get new ones
    path.replace(part)
    checksums_path(path).unlink(missing_ok=True)


def _encode(
    images: Images, latents: Latents, path: Path, row: tuple[int, ...], flip: bool, num_workers: int
) -> None:
    """Write the moments of all images to `path`, by way of a file that grows."""
    ranks, part, device = Distributed(), path.with_name(PART), latents.device
    done = ranks.broadcast(_begun(part, (len(images), *row)) if ranks.is_main else 0)
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
    """Say where many bytes of latents go; UsageError if there is no room for them."""
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


def _begun(part: Path, shape: tuple[int, ...]) -> int:
    """The images whose latents are there already, of a start that was cut off; the file is cut to these.

    They end where a batch did: the later ones are batched as they would have been, and come out the same to the bit.
    Batches that are damaged, and all after them, do not count.
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
    """Whether a file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(head)) == head


@torch.inference_mode()
def _moments(pixels: Tensor, latents: Latents, row: tuple[int, ...], flip: bool) -> Tensor:
    images = to_model_range(pixels)
    if not len(images):  # a process that has no share in the last round
        return torch.empty(0, *row)
    moments = latents.moments(images)
    return torch.cat([moments, latents.moments(images.flip(-1))], 1) if flip else moments
