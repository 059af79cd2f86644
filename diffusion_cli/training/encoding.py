"""The latents of a data set: those of which autoencoder, encoded once and kept by content."""

import json
import math
import os
import shutil
import sys
from contextlib import nullcontext
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm

from diffusion_cli.checkpoint import digest, find_run, load_autoencoder, load_latents, writing
from diffusion_cli.config import TrainConfig
from diffusion_cli.data import Dataset, Images, UnreadableError, normalised
from diffusion_cli.data.array import opened_array
from diffusion_cli.data.base import Split
from diffusion_cli.data.batches import fetched
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.latents import Latents, measured_scale
from diffusion_cli.locks import locked
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.pretrained import from_diffusers
from diffusion_cli.ranks import Ranks

ENCODED = 64  # images read at a time
LEAST = 1e-6  # standard deviation of a channel that says anything
EMPTY = 0.01  # share of its variance that is of the images, under which it hardly does
LARGE = 2**30  # bytes of latents that are worth a word


class Chosen(NamedTuple):
    """The latents that a run works in."""

    latents: Latents
    autoencoder: dict[str, Any]
    """The node that the autoencoder is built of."""
    source: str
    """Where it was taken from."""
    keys: dict[str, str] | None
    """As `LatentDataset` has them, of an earlier start."""

    def about(self, dataset: "LatentDataset") -> dict[str, Any]:
        """What a checkpoint says of it, once the scale is known."""
        return {
            "shape": list(self.latents.shape), "mean": self.latents.mean, "std": self.latents.std,
            "autoencoder": self.autoencoder, "sha256": digest(self.latents.autoencoder.state_dict()),
            "source": self.source, "cache": dataset.keys,
        }  # fmt: skip


def chosen_latents(
    config: TrainConfig, dataset: Dataset, device: torch.device, folder: Path, before: dict[str, Any] | None
) -> Chosen | None:
    """The latents that a configuration names, or that a run was begun in, kept beside it; None for pixels.

    Raises ValueError for an autoencoder that is not there, or of other images.
    """
    if config.latent.key is None:
        return None
    if before is not None:
        latents, known = load_latents(folder, before, device), before["latent"]
        return Chosen(latents, known["autoencoder"], known["source"], known["cache"])
    network, node, channels = _autoencoder(config, dataset)
    sides = "x".join(map(str, dataset.shape[1:]))
    if channels != dataset.shape[0] or len(dataset.shape) != 3:
        raise ValueError(
            f"{config.latent.key}: is of images of {channels} channels, and those of {dataset.name} have "
            f"{dataset.shape[0]}, of {sides}; take another autoencoder"
        )
    if any(side % network.factor for side in dataset.shape[1:]):
        raise ValueError(
            f"{config.latent.key}: its latents stand for {network.factor} pixels of a side, which do not divide images "
            f"of {sides}; take an autoencoder of fewer levels, or images of another size"
        )
    ones = [1.0] * network.latent_channels
    latents = Latents(network.to(device), dataset.shape, [0.0 * one for one in ones], ones)
    return Chosen(latents, node, config.latent.key.partition("=")[2], None)


def _autoencoder(config: TrainConfig, dataset: Dataset) -> tuple[AutoencoderKL, dict[str, Any], int]:
    """The autoencoder that is named, the node that it is built of, and the channels of its images."""
    if config.latent.pretrained is not None:
        network, channels, options = from_diffusers(
            Path(config.latent.pretrained).expanduser(), "latent.pretrained"
        )
        return network, {"_target_": "diffusion_cli.networks.AutoencoderKL", **options}, channels
    run = find_run(config.latent.run, config.output_dir, "latent.run")
    trained = load_autoencoder(run, torch.device("cpu"))
    if trained.form.about() != dataset.form.about():
        raise ValueError(
            f"latent.run={config.latent.run}: was trained on images stored as {trained.form.about()}, and those of "
            f"{dataset.name} are {dataset.form.about()}; train one on these"
        )
    return trained.network, trained.config["model"], trained.shape[0]


class LatentDataset(Dataset):
    """The latents of a dataset's images, encoded when a split is first asked for and kept in `cache_dir`.

    `keys` are the names that they have there by their split, known of another start of the same run, which need not
    look at the images again. Where the images may be mirrored in training, the mirrored ones are encoded too. The
    scale of `latents` is measured on the training images, if it is not known.

    `load` raises UnreadableError for images that cannot be read, and ValueError where a channel of the latents is the
    same everywhere.
    """

    def __init__(
        self, source: Dataset, latents: Latents, cache_dir: Path, keys: dict[str, str] | None = None
    ) -> None:
        self.source, self.latents, self.cache_dir = source, latents, cache_dir
        self.data_dir, self.name, self.form = source.data_dir, source.name, source.form
        self.class_names, self.flip = source.class_names, source.flip
        self.shape = latents.shape
        self.keys = dict(keys or {})
        self._scaled = keys is not None

    def load(self, split: Split) -> Images:
        images = self.source.once(split)
        if not len(images):
            return images
        flip = self.flip and split == "train"
        if Ranks().agree(split not in self.keys or not self._path(split).is_file()):
            key = self._key(images, flip)
            if self.keys.setdefault(split, key) != key:
                raise ValueError(
                    f"dataset: the {split} images are not those that the run was begun on; give back the data, or take "
                    "another name="
                )
        moments = encoded(images, self.latents, self._path(split), flip, self.source.num_workers)
        if split == "train" and not self._scaled:
            self._scale(moments)
        return moments

    def _path(self, split: Split) -> Path:
        return self.cache_dir / f"latents-{self.name}-{self.keys[split]}" / "moments.npy"

    def _key(self, images: Images, flip: bool) -> str:
        network = self.latents.autoencoder
        # By its layers too: of the same weights, another one may group its channels otherwise.
        facts = [source_digest(images), digest(network.state_dict()), repr(network), flip]
        return sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _scale(self, moments: "LatentImages") -> None:
        mean, std, told = measured_scale(moments.pixels.split(ENCODED), self.latents.shape[0])
        if not all(map(math.isfinite, std)):
            raise ValueError(
                "latent: the latents of the training images are not finite; take another autoencoder"
            )
        if min(std) < LEAST:
            raise ValueError(
                f"latent: channel {std.index(min(std))} of the latents is the same everywhere, of no use to the "
                "autoencoder; train one with fewer model.latent_channels"
            )
        if min(told) < EMPTY and Ranks().first:
            print(
                f"latent: channel {told.index(min(told))} of the latents says next to nothing of the images "
                f"({min(told):.2g} of its variance), so that noise is learned; an autoencoder of a smaller "
                "objective.kl_weight or fewer model.latent_channels would use all",
                file=sys.stderr,
            )
        self.latents.mean, self.latents.std, self._scaled = mean, std, True


class LatentImages(MemoryImages):
    """Moments of latents, float32 [N, 2L, h, w], mapped from disk; or [N, 4L, h, w], of mirrored images last."""

    def mirrored(self, images: Tensor, coins: Tensor) -> Tensor:
        """Of each row, the moments of the image, or of the mirrored one where its coin is 1."""
        both = images.unflatten(1, (2, -1))
        return both[torch.arange(len(both), device=both.device), coins]


def source_digest(images: Images) -> str:
    """A SHA-256, in hex, of what images are made of, by all processes together."""
    ranks, state = Ranks(), sha256()
    with tqdm(
        total=len(images), desc="hashing images", unit="image", unit_scale=True, delay=2.0, disable=not ranks.first
    ) as progress:  # fmt: skip
        for mine in ranks.rounds(len(images), ENCODED):
            for digests in ranks.collect(images.sources(torch.arange(mine.start, mine.stop))):
                state.update(b"".join(digests))
                progress.update(len(digests))
    return ranks.agree(state.hexdigest())


def encoded(
    images: Images, latents: Latents, path: Path, flip: bool = False, num_workers: int = 0
) -> LatentImages:
    """The moments of images, from the .npy file `path`, which is made now if it is not there.

    All processes work together; what is made is added to a file as it comes, so that a start that was cut off is gone
    on with. Raises UnreadableError for images that cannot be read, ValueError for a file of others.
    """
    ranks, channels = Ranks(), latents.shape[0]
    row = ((4 if flip else 2) * channels, *latents.shape[1:])
    # Another run may be at work on the same ones.
    with writing(path), locked(path.parent) if ranks.first else nullcontext():
        if not ranks.agree(path.is_file()):
            _encode(images, latents, path, row, flip, num_workers)
    array = opened_array(path, None)
    if array.shape != (len(images), *row) or array.dtype != np.float32:
        raise ValueError(f"{path}: does not hold the latents of these images; remove it, and it is made anew")
    # Mapped to be copied where it is written to, which it never is: torch knows no arrays for reading only.
    start = path.stat().st_size - array.nbytes
    return LatentImages(torch.from_numpy(np.memmap(path, np.float32, "c", start, array.shape)), images.labels)


def _encode(
    images: Images, latents: Latents, path: Path, row: tuple[int, ...], flip: bool, num_workers: int
) -> None:
    """Write the moments of all images to `path`, by way of a file that grows."""
    ranks, part, device = Ranks(), path.with_name("moments.part"), latents.device
    done = ranks.agree(_begun(part, (len(images), *row)) if ranks.first else 0)
    if ranks.first:
        _check_room(part, 4 * (len(images) - done) * math.prod(row))
    rounds = ranks.rounds(len(images) - done, ENCODED)
    rows = (torch.arange(done + mine.start, done + mine.stop) for mine in rounds)
    with (
        part.open("ab" if ranks.first else "rb") as file,
        tqdm(
            total=len(images), initial=done, desc="encoding", unit="image", unit_scale=True, delay=2.0,
            disable=not ranks.first,
        ) as progress,
    ):  # fmt: skip
        for pixels in fetched(images, rows, num_workers, device):
            if isinstance(pixels, Exception):
                raise UnreadableError(str(pixels)) from pixels
            for moments in ranks.collect(_moments(pixels.to(device), latents, row, flip).cpu()):
                file.write(moments.contiguous().numpy().data)
                progress.update(len(moments))
        if ranks.first:
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
    ranks.agree(None)


def _check_room(part: Path, size: int) -> None:
    """Say where many bytes of latents go; ValueError if there is no room for them."""
    free = shutil.disk_usage(part.parent).free
    if size > free:
        raise ValueError(
            f"cache_dir={part.parent.parent}: the latents take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "make room, or take a folder of another disk"
        )
    if size > LARGE:
        print(f"encoding: {size / 1e9:.1f} GB of latents go to {part.parent}", file=sys.stderr)


def _begun(part: Path, shape: tuple[int, ...]) -> int:
    """The images whose latents are there already, of a start that was cut off; the file is cut to these.

    They end where a batch did: the later ones are batched as they would have been, and come out the same to the bit.
    """
    header = BytesIO()
    npy.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    head, size = header.getvalue(), 4 * int(np.prod(shape[1:]))
    if not part.is_file() or not _begins(part, head):
        part.write_bytes(head)
    done = (part.stat().st_size - len(head)) // size // ENCODED * ENCODED
    os.truncate(part, len(head) + done * size)
    return done


def _begins(path: Path, head: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(head)) == head


@torch.inference_mode()
def _moments(pixels: Tensor, latents: Latents, row: tuple[int, ...], flip: bool) -> Tensor:
    images = normalised(pixels)
    if not len(images):  # a process that has no share in the last round
        return torch.empty(0, *row)
    moments = latents.moments(images)
    return torch.cat([moments, latents.moments(images.flip(-1))], 1) if flip else moments
