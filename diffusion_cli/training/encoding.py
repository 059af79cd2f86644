"""The latents of a data set, encoded once and kept by content."""

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm

from diffusion_cli.checkpoint import digest, whole_file
from diffusion_cli.data import Images, UnreadableError, normalised
from diffusion_cli.data.array import opened_array
from diffusion_cli.data.batches import fetched
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.foreign import read_json
from diffusion_cli.latents import Latents
from diffusion_cli.locks import locked
from diffusion_cli.ranks import Ranks

ENCODED = 64  # images read at a time


class LatentImages(MemoryImages):
    """The moments of images' latents, float32 [N, 2L, h, w], mapped from disk; or [N, 4L, h, w], mirrored ones last."""

    def mirrored(self, images: Tensor, coins: Tensor) -> Tensor:
        """Of each row, the moments of the image, or of the mirrored one where its coin is 1."""
        both = images.unflatten(1, (2, -1))
        return both[torch.arange(len(both), device=both.device), coins]


class Encoding:
    """The latents of the images of one split in `cache_dir`, found again by what the images and the autoencoder are.

    `key` is the name that they have there, of another start of the same run, which need not look at the images again.
    With `flip` the mirrored images are encoded too. All processes work together; what is made is added to a file as it
    comes, so that a start that was cut off is gone on with.
    """

    def __init__(
        self,
        images: Images,
        latents: Latents,
        cache_dir: Path,
        name: str,
        flip: bool = False,
        num_workers: int = 0,
        key: str | None = None,
    ) -> None:
        self.images, self.latents, self.flip, self.num_workers = images, latents, flip, num_workers
        channels, *sizes = latents.shape
        self.row = ((4 if flip else 2) * channels, *sizes)
        self.key = key or Ranks().agree(self._key() if Ranks().first else "")
        self.folder = cache_dir / f"latents-{name}-{self.key}"

    def _key(self) -> str:
        facts = [self.images.pixel_digest(), digest(self.latents.autoencoder.state_dict()), self.flip]
        return sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def load(self) -> LatentImages:
        """The latents, encoded now where they are not there yet; UnreadableError for images that cannot be read."""
        ranks, path = Ranks(), self.folder / "moments.npy"
        with (
            locked(self.folder) if ranks.first else nullcontext()
        ):  # another run may be at work on the same ones
            if not ranks.agree(path.is_file()):
                self._encode(path)
        array = opened_array(path, None)
        if array.shape != (len(self.images), *self.row) or array.dtype != np.float32:
            raise ValueError(
                f"{path}: does not hold the latents of these images; remove it, and it is made anew"
            )
        # Mapped to be copied where it is written to, which it never is: torch knows no arrays for reading only.
        start = path.stat().st_size - array.nbytes
        moments = np.memmap(path, np.float32, "c", start, array.shape)
        return LatentImages(torch.from_numpy(moments), self.images.labels)

    def scale(self, moments: LatentImages) -> tuple[list[float], list[float]]:
        """The mean and standard deviation of the latents, drawn anew for every step, in each channel."""
        path = self.folder / "scale.json"
        return Ranks().one_by_one(lambda: _kept(path, moments.pixels, self.latents.shape[0]))

    def _encode(self, path: Path) -> None:
        """Write the moments of all images to `path`, by way of a file that grows."""
        ranks, part = Ranks(), path.with_name("moments.part")
        done = ranks.agree(self._begun(part) if ranks.first else 0)
        count, device = len(self.images), self.latents.device
        rounds = list(ranks.rounds(count - done, ENCODED))
        rows = (torch.arange(done + mine.start, done + mine.stop) for mine in rounds)
        with (
            part.open("ab") if ranks.first else nullcontext() as file,
            tqdm(
                total=count, initial=done, desc="encoding", unit="image", unit_scale=True, delay=2.0,
                disable=not ranks.first,
            ) as progress,
        ):  # fmt: skip
            for pixels in fetched(self.images, rows, self.num_workers, device):
                if isinstance(pixels, Exception):
                    raise UnreadableError(str(pixels)) from pixels
                for moments in ranks.collect(self._moments(pixels.to(device)).cpu()):
                    assert file is not None
                    file.write(moments.contiguous().numpy().data)
                    progress.update(len(moments))
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        if ranks.first:
            part.replace(path)
        ranks.agree(None)

    def _begun(self, part: Path) -> int:
        """The images whose latents are there already, of a start that was cut off; the file is cut to these."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.images), *self.row)}
        if not part.is_file():
            with part.open("wb") as file:
                npy.write_array_header_1_0(file, header)
        size = 4 * int(np.prod(self.row))
        with part.open("rb") as file:
            npy.read_magic(file)
            npy.read_array_header_1_0(file)
            start = file.tell()
        done = (part.stat().st_size - start) // size
        os.truncate(part, start + done * size)
        return done

    @torch.inference_mode()
    def _moments(self, pixels: Tensor) -> Tensor:
        images = normalised(pixels)
        if not len(images):
            return torch.empty(0, *self.row)
        moments = self.latents.moments(images)
        return torch.cat([moments, self.latents.moments(images.flip(-1))], 1) if self.flip else moments


def _kept(path: Path, moments: Tensor, channels: int) -> tuple[list[float], list[float]]:
    """The scale that a file holds, or is measured and written now."""
    if path.is_file():
        kept: Any = read_json(path)
        return kept["mean"], kept["std"]
    mean, std = measured_scale(moments.split(ENCODED), channels)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"mean": mean, "std": std}))
    return mean, std


def measured_scale(
    parts: Iterator[Tensor] | tuple[Tensor, ...], channels: int
) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of z ~ N(mean, variance) in each of L channels, of parts [B, 2L, h, w] of all.

    `Var z = E[variance] + Var[mean]`, over images and places; [B, 4L, h, w] is taken as two images each.
    """
    count, sums, squares = 0, torch.zeros(channels).double(), torch.zeros(channels).double()
    for part in parts:
        mean, log_variance = part.double().unflatten(1, (-1, 2, channels)).movedim(2, 0)
        others = [dim for dim in range(mean.ndim) if dim != 2]
        sums += mean.sum(others)
        squares += (mean.square() + log_variance.exp()).sum(others)
        count += mean.numel() // channels
    mean = sums / count
    return mean.tolist(), (squares / count - mean.square()).sqrt().tolist()
