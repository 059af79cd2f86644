"""The real images that samples are compared with, as a feature network sees them."""

import hashlib
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusion_cli.data import Dataset, Images
from diffusion_cli.data.base import Split
from diffusion_cli.metrics.features import Features
from diffusion_cli.metrics.moments import Moments

ROWS = 256  # images read at a time


class RealImages:
    """The splits of a dataset and the moments of their features, each computed once and kept in `cache_dir`.

    Raises ValueError or FileNotFoundError, when a split is first used, as `Dataset.load` and `Images.gather`.
    """

    def __init__(self, dataset: Dataset, features: Features, cache_dir: Path) -> None:
        self.dataset, self.features, self.cache_dir = dataset, features, cache_dir
        self.images = cache(self._load)

    def _load(self, split: Split) -> Images:
        return self.dataset.load(split)

    def moments(self, split: Split, count: int | None = None) -> Moments:
        """The moments of a whole split, or of `count` of its images, evenly spread over it."""
        images = self.images(split)
        count = len(images) if count is None else count
        path = self._path(split, images, count)
        if path.is_file():
            try:
                return Moments.load(path, self.features.dim)
            except Exception as error:  # a damaged file fails in many ways in the parsers of ZIP and NumPy
                reason = str(error).partition("\n")[0]
                warnings.warn(f"{path}: is damaged and made anew ({reason})", stacklevel=2)
        moments = self._compute(split, images, count)
        moments.save(path)
        return moments

    def protocol(self, split: Split) -> dict[str, Any]:
        """What identifies a split as a reference."""
        images = self.images(split)
        return {
            "dataset": self.dataset.name,
            "split": split,
            "images": len(images),
            "digest": images.digest(),
        }

    def _path(self, split: Split, images: Images, count: int) -> Path:
        key = hashlib.sha256(f"{images.digest()} {self.features.digest} {count}".encode()).hexdigest()
        return self.cache_dir / f"moments-{self.dataset.name}-{split}-{self.features.name}-{key[:16]}.npz"

    def _compute(self, split: Split, images: Images, count: int) -> Moments:
        moments = Moments(self.features.dim)
        rows = torch.arange(count, device=images.device) * len(images) // count
        title = f"features of {self.dataset.name}/{split}"
        with tqdm(total=count, desc=title, unit="image", unit_scale=True, delay=1.0) as progress:
            for some in rows.split(ROWS):
                moments.update(self.features(images.gather(some)).features)
                progress.update(len(some))
        return moments
