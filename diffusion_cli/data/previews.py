"""8-bit images of a dataset, for metrics that need them."""

from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.data.base import Dataset, Images, Split
from diffusion_cli.data.external import ExternalImages, given_images
from diffusion_cli.formats import SampleFormat, Signal, Uint8Image


def pictured(dataset: Dataset) -> Dataset:
    """Return the dataset as 8-bit images for metrics, uint8 [B, 1 or 3, H, W]; itself if it is 8-bit."""
    return dataset if isinstance(dataset.form, Uint8Image) else _Pictured(dataset)


def has_signals(dataset: Dataset) -> bool:
    """Return whether a dataset has signals, also one that shows them as 8-bit images."""
    return isinstance(dataset.dataset.form if isinstance(dataset, _Pictured) else dataset.form, Signal)


def shows_signals(images: Images) -> bool:
    """Return whether images are signals as 8-bit images, with a row per channel."""
    return isinstance(images, PicturedImages) and isinstance(images.form, Signal)


def pictured_as(dataset: Dataset, path: Path, key: str) -> ExternalImages:
    """Return images of a path as 8-bit images of the shape of a dataset of `pictured`; UsageError as `given_images`.

    Those for signals are signals. Others are 8-bit images.
    """
    if not (isinstance(dataset, _Pictured) and has_signals(dataset)):
        return given_images(path, key, dataset.shape)
    given = given_images(path, key, dataset.dataset.shape, dataset.dataset.form)
    return given._replace(images=PicturedImages(given.images, dataset.dataset.form))


def stored_as(dataset: Dataset, path: Path, key: str) -> "PicturedImages":
    """Return samples of a path in the format of a dataset of `pictured`; UsageError as `given_images`."""
    assert isinstance(dataset, _Pictured)
    form = dataset.dataset.form
    return PicturedImages(given_images(path, key, dataset.dataset.shape, form).images, form)


class _Pictured(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.data_dir = dataset, dataset.data_dir
        self.name, self.class_names, self.flip = dataset.name, dataset.class_names, dataset.flip
        self.num_workers, self.attributes = dataset.num_workers, dataset.attributes
        self.captions, self.missing_captions = dataset.captions, dataset.missing_captions
        self.shape = dataset.form.measured_shape(dataset.shape)

    def load(self, split: Split) -> Images:
        return PicturedImages(self.dataset.load(split), self.dataset.form)


class PicturedImages(Images):
    """Images in 8 bits for metrics, by their storage format."""

    def __init__(self, images: Images, form: SampleFormat) -> None:
        self.images, self.form = images, form
        self.shape = form.measured_shape(images.shape)
        self.labels, self.captions, self.device = images.labels, images.captions, images.device
        self.with_conditions(images.conditions)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.form.measured(self.stored(index))

    def stored(self, index: Tensor) -> Tensor:
        """Return the stored samples of rows `index` (int64 [B]), without rounding to 8 bits, [B, *shape]."""
        return quantized(self.images[index], self.form)

    def lossy(self, index: Tensor) -> dict[str, int]:
        return self.images.lossy(index)


def quantized(images: Tensor, form: SampleFormat) -> Tensor:
    """Return images of a dataset in the precision of their storage format."""
    return images if images.dtype == torch.uint8 else form.quantize(images)
