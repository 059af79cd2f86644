"""Latents of a dataset: the choice of the autoencoder, and a cache of encoded images."""

import json
import math
import sys
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusion_cli.config import build
from diffusion_cli.convert import read_autoencoder, read_source
from diffusion_cli.convert.base import Autoencoder, PretrainedModel
from diffusion_cli.data import Dataset, Images
from diffusion_cli.data.base import Split
from diffusion_cli.diffusion.latents import Latents, measured_scale
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.runs.find import newest
from diffusion_cli.runs.imported import weights_of
from diffusion_cli.runs.load import load_autoencoder, load_latents, load_weights
from diffusion_cli.runs.schema import CheckpointInfo, LatentInfo
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.tensors import digest
from diffusion_cli.training.latent_cache import ENCODED, LatentImages, encoded

LEAST = 1e-6  # smallest standard deviation of a channel
OF_FILES = ("affine", "bits", "dtype", "file", "inter", "intercept", "rate", "slope")
"""Fields of formats that say how files store the values, and where; an autoencoder does not see them."""
EMPTY = 0.01  # explained share of a channel's variance, below which a warning is printed


class LatentSource(NamedTuple):
    """The latent space of a run, and its origin."""

    latents: Latents
    autoencoder: dict[str, Any]
    """Configuration node of the autoencoder."""
    source: str
    """Its origin as the user named it: a run, or a folder in diffusers format."""
    keys: dict[Split, str] | None
    """Known cache keys by split (see `LatentDataset`); None if the scale of the latents must be measured."""

    def info(self, dataset: "LatentDataset") -> LatentInfo:
        """Return the entry of a checkpoint; the scale of the latents must be measured."""
        return LatentInfo(
            shape=self.latents.shape, mean=self.latents.mean, std=self.latents.std, autoencoder=self.autoencoder,
            sha256=digest(self.latents.autoencoder.state_dict()), source=self.source, cache=dataset.keys,
        )  # fmt: skip


def resumed_latents(folder: Path, info: CheckpointInfo, device: torch.device) -> LatentSource:
    """Return the latents that a run folder uses; UsageError as `load_latents`."""
    assert info.latent is not None
    latents = load_latents(folder, info, device)
    return LatentSource(latents, info.latent.autoencoder, info.latent.source, dict(info.latent.cache))


def pretrained_latents(source: str, dataset: Dataset, device: torch.device) -> LatentSource:
    """Return the latents of the autoencoder of `latent.pretrained`; UsageError if it does not fit."""
    model = read_autoencoder(source, "latent.pretrained")
    network = _pretrained(model, source, "latent.pretrained", dataset)
    return _unscaled(network.to(device), model.network.node, source, dataset)


def bundled_latents(source: str, dataset: Dataset, device: torch.device) -> LatentSource:
    """Return the latents of the model of `init.pretrained` with their scale; UsageError if they do not fit."""
    parts = read_source(source, "init.pretrained").autoencoder
    if parts is None:
        raise UsageError("latent.pretrained", source, "is a model of pixels", "leave it out")
    network = _pretrained(parts, source, "init.pretrained", dataset)
    latents = Latents(network.to(device), dataset.shape, parts.mean, parts.std)
    return LatentSource(latents, parts.network.node, source, {})


def _pretrained(
    model: PretrainedModel | Autoencoder, source: str, key: str, dataset: Dataset
) -> ImageAutoencoder:
    """Return an autoencoder of another program with its weights; UsageError, about `key`, if it does not fit."""
    state = weights_of(model, source, key)
    network = build(model.network.node, model.network.shape, None)
    network.load_state_dict(state)
    _check_images(key, source, network, model.network.shape[0], dataset)
    return network


def run_latents(run: Path, named: str, dataset: Dataset, device: torch.device) -> LatentSource:
    """Return the latents of a run of an autoencoder, which the user `named`; UsageError if it does not fit.

    A run of latent diffusion has the scale of its latents too.
    """
    found = newest(run, sums=False)
    if found is not None and found.checkpoint.info.latent is not None:
        return _shared_latents(run, named, dataset, device, found.checkpoint.info.task)
    trained = load_autoencoder(run, torch.device("cpu"))
    _check_form(named, trained.info, dataset)
    _check_images("latent.run", named, trained.network, trained.shape[0], dataset)
    return _unscaled(trained.network.to(device), trained.info.config.model, named, dataset)


def _shared_latents(run: Path, named: str, dataset: Dataset, device: torch.device, task: str) -> LatentSource:
    """Return the latents of a run of latent diffusion with their scale."""
    info = load_weights(run, "ema", None, task).info
    assert info.latent is not None
    _check_form(named, info, dataset)
    network = load_latents(run, info, device).autoencoder
    _check_images("latent.run", named, network, info.shape[0], dataset)
    latents = Latents(network, dataset.shape, info.latent.mean, info.latent.std)
    return LatentSource(latents, info.latent.autoencoder, named, {})


def _check_form(named: str, info: CheckpointInfo, dataset: Dataset) -> None:
    """Raise UsageError unless the images of a dataset are of the kind that an autoencoder was trained on."""
    if difference := info.form.difference(dataset.form, OF_FILES):
        key, theirs, ours = difference
        raise UsageError(
            "latent.run",
            named,
            f"was trained on images with {key}={theirs}, but those of {dataset.name} have {key}={ours}",
            f"use an autoencoder trained on {dataset.name}",
        )


def _unscaled(network: ImageAutoencoder, node: dict[str, Any], source: str, dataset: Dataset) -> LatentSource:
    """Return latents before their scale is measured."""
    channels = network.latent_channels
    latents = Latents(network, dataset.shape, [0.0] * channels, [1.0] * channels)
    return LatentSource(latents, node, source, None)


def _check_images(key: str, named: str, network: ImageAutoencoder, channels: int, dataset: Dataset) -> None:
    """Raise UsageError unless an autoencoder for images with `channels` channels fits those of a dataset."""
    sides = "x".join(map(str, dataset.shape[1:]))
    if len(dataset.shape) - 1 != network.ndim:
        encodes = "images" if network.ndim == 2 else "volumes"
        problem = f"encodes {encodes}, but {dataset.name} has the shape {list(dataset.shape)}"
        raise UsageError(key, named, problem, "train an autoencoder on this dataset")
    if channels != dataset.shape[0]:
        raise UsageError(
            key,
            named,
            f"encodes images with {channels} channels, but those of {dataset.name} have {dataset.shape[0]} "
            f"(size {sides})",
            "use another autoencoder",
        )
    if any(side % network.factor for side in dataset.shape[1:]):
        raise UsageError(
            key,
            named,
            f"downsamples by {network.factor}, which does not divide the image size {sides}",
            "use an autoencoder with fewer levels, or images of another size",
        )


class LatentDataset(Dataset):
    """The latents of a dataset's images or volumes, encoded when a split is first loaded and cached in `cache_dir`.

    `keys` are the cache keys by split of a resumed run, which need not hash the images again. If training
    flips images, the mirrored images are encoded too. The scale of `latents` is measured on the training
    images, unless `keys` is given.

    `load` raises UnreadableError for unreadable images, and UsageError if the images of a resumed run have
    changed, or if latents are not finite or constant in a channel.
    """

    def __init__(
        self, source: Dataset, latents: Latents, cache_dir: Path, keys: dict[Split, str] | None = None
    ) -> None:
        self.source, self.latents, self.cache_dir = source, latents, cache_dir
        self.data_dir, self.name, self.form = source.data_dir, source.name, source.form
        self.class_names, self.flip = source.class_names, source.flip
        self.captions, self.missing_captions = source.captions, source.missing_captions
        self.has_masks = source.has_masks
        self.shape = latents.shape
        self.keys = dict(keys or {})
        self._scaled = keys is not None

    def load(self, split: Split) -> Images:
        images = self.source.stream(split)
        if not len(images):
            return images
        flip = self.flip and split == "train"
        if Distributed().broadcast(split not in self.keys or not self._path(split).is_file()):
            key = self._key(images, flip)
            if self.keys.setdefault(split, key) != key:
                raise UsageError(
                    "dataset",
                    NO_VALUE,
                    f"the {split} images differ from those that the run started with",
                    "restore the data, or use another name=",
                )
        moments = encoded(images, self.latents, self._path(split), flip, self.source.num_workers)
        moments.known_as(self.keys[split])
        if split == "train" and not self._scaled:
            self._scale(moments)
        return moments

    def _path(self, split: Split) -> Path:
        """Return the file of a split; the folder may have an earlier dataset name."""
        key = self.keys[split]
        own = self.cache_dir / f"latents-{self.name}-{key}" / "moments.npy"
        if own.is_file():
            return own
        return next(iter(sorted(self.cache_dir.glob(f"latents-*-{escape(key)}/{own.name}"))), own)

    def _key(self, images: Images, flip: bool) -> str:
        network = self.latents.autoencoder
        # The layers count too: equal weights with other normalisation groups give other latents.
        facts = [source_digest(images), digest(network.state_dict()), repr(network), flip]
        return sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _scale(self, moments: "LatentImages") -> None:
        moments.check()
        mean, std, explained = measured_scale(moments.pixels.split(ENCODED), self.latents.shape[0])
        if not all(map(math.isfinite, std)):
            raise UsageError(
                "latent",
                NO_VALUE,
                "the latents of the training images are not finite",
                "use another autoencoder",
            )
        if min(std) < LEAST:
            raise UsageError(
                "latent",
                NO_VALUE,
                f"channel {std.index(min(std))} of the latents is constant",
                "train an autoencoder with fewer model.latent_channels",
            )
        if min(explained) < EMPTY and Distributed().is_main:
            print(
                f"latent: channel {explained.index(min(explained))} of the latents is mostly noise (the images explain "
                f"{min(explained):.2g} of its variance); train an autoencoder with a smaller "
                "objective.kl_weight or fewer model.latent_channels",
                file=sys.stderr,
            )
        self.latents.mean, self.latents.std, self._scaled = mean, std, True


def source_digest(images: Images) -> str:
    """Return a hexadecimal SHA-256 of the sources of images; all processes must call this together."""
    ranks, state = Distributed(), sha256()
    with ProgressBar(
        total=len(images), desc="hashing images", unit="image", unit_scale=True, delay=2.0, disable=not ranks.is_main
    ) as progress:  # fmt: skip
        for mine in ranks.shard(len(images), ENCODED):
            for digests in ranks.gather(images.sources(torch.arange(mine.start, mine.stop))):
                state.update(b"".join(digests))
                progress.update(len(digests))
    return ranks.broadcast(state.hexdigest())
