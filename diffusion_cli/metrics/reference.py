"""Reference of distances: real images or published statistics."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.data import Dataset, ExternalImages, Images, pictured_as, relabelled, spread
from diffusion_cli.data.array import opened_array, read_arrays
from diffusion_cli.data.base import Split
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.moments import Moments
from diffusion_cli.metrics.rows import GrowingRows, Rows
from diffusion_cli.system.cache import Blocks, optional, report_damage
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.files import file_digest
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.temporary_files import remove_abandoned
from diffusion_cli.system.untrusted import reason

READ = 256  # images per batch
Part = Literal["images", "other"]
Stream = Literal["features", "spatial"]
Kept = TypeVar("Kept")
STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Reference(ABC):
    """Base class of references: real images, optionally a second set that a perfect model resembles, or statistics."""

    name: str
    other_name: str
    stats: Path | None
    """A .npz with `mu` and `sigma` of features that replace those of the images, or None."""

    @cached_property
    @abstractmethod
    def images(self) -> Images:
        """Real images; UsageError if there are none."""

    @cached_property
    @abstractmethod
    def other(self) -> Images | None:
        """Other real images, disjoint from `images`, or None."""

    @abstractmethod
    def given(self) -> ExternalImages | None:
        """Return the images with their class names, or None, without reading them, if they have no classes."""

    def class_counts(self, class_names: tuple[str, ...]) -> list[int] | None:
        """Return the number of images of each class; None without labels, or if the classes differ.

        Also None with `stats`, which have no labels.
        """
        if self.stats is not None:
            return None
        given = self.given()
        labels = None if given is None else relabelled(given, class_names)
        if labels is None:
            return None
        return torch.bincount(labels[labels >= 0].cpu(), minlength=len(class_names)).tolist()

    def protocol(self) -> dict[str, Any]:
        """Return what identifies both sets of images."""
        images, other = self.images, self.other
        beside = {} if other is None else {"images": len(other), "pixels_sha256": other.pixel_digest()}
        return {
            "name": self.name,
            "images": len(images),
            "pixels_sha256": images.pixel_digest(),
            **({"beside": beside} if beside else {}),
        }

    def identity(self) -> dict[str, Any]:
        """Return what all values with this reference depend on: its images, and its statistics if given."""
        return self.protocol() | ({} if self.stats is None else {"stats_sha256": file_digest(self.stats)})

    def published(self, stream: Stream, dim: int) -> tuple[Tensor, Tensor]:
        """Return mean and covariance from `stats`; UsageError if missing, invalid, or of another number of features."""
        assert self.stats is not None
        keys = STATISTICS[stream]
        try:
            mean, covariance = (torch.from_numpy(array).double() for array in read_arrays(self.stats, *keys))
            if not mean.isfinite().all() or not covariance.isfinite().all():
                raise FormatError("has numbers that are not finite")
        except OSError as error:
            raise UsageError(
                "reference.stats", self.stats, "cannot be read", "give a .npz with mu and sigma"
            ) from error
        except Exception as error:  # the parsers of ZIP and NumPy raise errors of many types
            raise UsageError(
                "reference.stats",
                self.stats,
                reason(error),
                "give an intact .npz with finite mu and sigma",
            ) from error
        if mean.shape != (dim,) or covariance.shape != (dim, dim):
            raise UsageError(
                "reference.stats",
                self.stats,
                f"has {tuple(mean.shape)} features, but the network has {dim}",
                "use statistics of the same network",
            )
        values = torch.linalg.eigvalsh((covariance + covariance.T) / 2)
        if values[0] < -1e-6 * values[-1].abs() or not torch.allclose(
            covariance, covariance.T, rtol=1e-4, atol=1e-6
        ):
            raise UsageError(
                "reference.stats",
                self.stats,
                f"{keys[1]} is not a covariance matrix",
                "recompute the statistics",
            )
        return mean, covariance


class DatasetReference(Reference):
    """One split of the dataset, without augmentation, with the other split to show what a perfect model reaches.

    Args:
        dataset: the dataset.
        split: split to compare with.
        stats: .npz of published statistics that replace those of the split in Frechet distances.
    """

    def __init__(
        self, dataset: Dataset, *, split: Literal["train", "val"] = "train", stats: str | None = None
    ) -> None:
        self.dataset = dataset
        self.split: Split = split
        self.other_split: Split = "val" if split == "train" else "train"
        self.name, self.other_name = (f"{dataset.name}/{part}" for part in (split, self.other_split))
        self.stats = None if stats is None else Path(stats).expanduser()

    @cached_property
    def images(self) -> Images:
        return self.dataset.load(self.split)

    @cached_property
    def other(self) -> Images | None:
        images = self.dataset.load(self.other_split)
        return images if len(images) else None

    def given(self) -> ExternalImages | None:
        names = self.dataset.class_names
        return None if names is None else ExternalImages(self.images, names)


class GivenReference(Reference):
    """Images, or signals, of a folder, ZIP or NumPy file, of the size of the samples.

    Args:
        dataset: dataset with the shape of the samples.
        path: the folder or file.
    """

    other_name = ""
    stats = None

    def __init__(self, dataset: Dataset, *, path: str) -> None:
        self.path, self.dataset = Path(path).expanduser(), dataset
        self.name = self.path.name

    @cached_property
    def _given(self) -> ExternalImages:
        return pictured_as(self.dataset, self.path, "reference.path")

    @cached_property
    def images(self) -> Images:
        return self._given.images

    @cached_property
    def other(self) -> None:
        return None

    def given(self) -> ExternalImages:
        return self._given


class RealImages:
    """Features of the images of a reference, computed once and cached in `cache_dir`.

    Cache entries are identified by the content of the images and the weights of the network.
    """

    def __init__(
        self, reference: Reference, features: Features, cache_dir: Path, ranks: Distributed | None = None
    ) -> None:
        self.reference, self.features, self.cache_dir = reference, features, cache_dir
        self.ranks = ranks or Distributed()

    def images(self, part: Part = "images") -> Images:
        """Return the images of a part; UsageError if there are none."""
        images = self.reference.images if part == "images" else self.reference.other
        if images is None:
            raise UsageError("reference", NO_VALUE, f"{self.reference.name} has no other images")
        return images

    def name(self, part: Part = "images") -> str:
        """Return the name of a part for notes."""
        return self.reference.name if part == "images" else self.reference.other_name

    def protocol(self) -> dict[str, Any]:
        """Return what identifies the reference."""
        return self.reference.protocol()

    def moments(
        self, part: Part = "images", count: int | None = None, stream: Stream = "features"
    ) -> Moments:
        """Return the moments of a part, or of `count` evenly spaced images of it."""
        number = len(self.images(part)) if count is None else count
        path = self._path(part, f"moments-{stream}", number)
        dim = self.features.dim if stream == "features" else self.features.spatial_dim
        kept = self._kept(
            path,
            lambda: Moments.load(path, dim),
            lambda: self._look(part, spread(len(self.images(part)), number), None)[stream],
        )
        known = self.ranks.broadcast(kept)
        assert known is not None  # set in the first process
        return known

    def rows(self, part: Part = "images") -> Rows:
        """Return the features of all images of a part; empty in all processes but the first."""
        count = len(self.images(part))
        path = self._path(part, "features", count)

        def load() -> Rows:
            array = opened_array(path, None)
            if array.shape != (count, self.features.dim) or array.dtype != np.float32:
                raise FormatError(f"has {array.dtype} {array.shape}")
            Blocks(path).check()
            return Rows(array)

        def make() -> Rows:
            rows = GrowingRows(self.features.dim, self.cache_dir)
            self._look(part, torch.arange(count), rows)
            if self.ranks.is_main:
                with optional():
                    rows.save(path)
            return rows

        kept = self._kept(path, load, make)
        return Rows(np.empty((0, self.features.dim), np.float32)) if kept is None else kept

    def _kept(self, path: Path, load: Callable[[], Kept], make: Callable[[], Kept]) -> Kept | None:
        """Load a file of the cache, or compute it with all processes if it is missing or damaged.

        Returns None in all processes but the first, which alone reads and writes the cache.
        """
        kept = None
        if self.ranks.is_main and path.is_file():
            try:
                kept = load()
            except Exception as error:  # the parsers of ZIP and NumPy raise errors of many types
                report_damage(path, error)
        if self.ranks.broadcast(kept is None):
            remove_abandoned(path.parent)
            kept = make()
        return kept if self.ranks.is_main else None

    def _look(self, part: Part, numbers: Tensor, rows: GrowingRows | None) -> dict[Stream, Moments]:
        """Compute the moments, and optionally all features, of images of a part in one pass of the network.

        The first process caches the moments; the other processes return empty ones.
        """
        dims: dict[Stream, int] = {"features": self.features.dim, "spatial": self.features.spatial_dim}
        moments: dict[Stream, Moments] = {stream: Moments(dim) for stream, dim in dims.items() if dim}
        images, title, ranks = self.images(part), f"features of {self.name(part)}", self.ranks
        with ProgressBar(
            total=len(numbers),
            desc=title,
            unit="image",
            unit_scale=True,
            delay=1.0,
            disable=not ranks.is_main,
        ) as progress:
            for round_ in numbers.split(READ * ranks.world):
                mine = round_[ranks.rank * READ : (ranks.rank + 1) * READ]
                look = self.features(images[mine.to(images.device)]) if len(mine) else None
                for batch in ranks.all_gather(look if look is None or ranks.world == 1 else look.cpu()):
                    if batch is None or not ranks.is_main:
                        continue
                    for stream, taken in moments.items():
                        taken.update(getattr(batch, stream))
                    if rows is not None:
                        rows.append(batch.features)
                progress.update(len(round_))
        if ranks.is_main:
            for stream, taken in moments.items():
                if taken.n > 1:
                    with optional():
                        taken.save(self._path(part, f"moments-{stream}", taken.n))
        return moments

    def _path(self, part: Part, kind: str, count: int) -> Path:
        """Return the file of a part in the cache, also if older versions named it after the former split name."""
        images, features = self.images(part), self.features
        facts = f"{images.pixel_digest()} {features.digest} {features.resize} {features.precision} {count}"
        key = hashlib.sha256(facts.encode()).hexdigest()
        name = self.name(part).replace("/", "-")
        suffix = "npy" if kind == "features" else "npz"
        ending = f"{features.name}-{key[:16]}.{suffix}"
        own = self.cache_dir / f"{kind}-{name}-{ending}"
        if own.is_file():
            return own
        return next(iter(sorted(self.cache_dir.glob(f"{kind}-*-{escape(ending)}"))), own)
