"""A dataset as it looks: what metrics measure that look at images in bytes."""

import torch
from torch import Tensor

from diffusion_cli.data.base import Dataset, Images, Split
from diffusion_cli.formats import SampleFormat, Uint8Image


def pictured(dataset: Dataset) -> Dataset:
    """The dataset with its images as pictures, uint8 [B, 1 or 3, H, W]; itself if they are that already."""
    return dataset if isinstance(dataset.form, Uint8Image) else _Pictured(dataset)


class _Pictured(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.data_dir = dataset, dataset.data_dir
        self.name, self.class_names, self.flip = dataset.name, dataset.class_names, dataset.flip
        self.num_workers = dataset.num_workers
        self.shape = dataset.form.picture_shape(dataset.shape)

    def load(self, split: Split) -> Images:
        return PicturedImages(self.dataset.load(split), self.dataset.form)


class PicturedImages(Images):
    """Images as the pictures that their format makes of them."""

    def __init__(self, images: Images, form: SampleFormat) -> None:
        self.images, self.form = images, form
        self.shape = form.picture_shape(images.shape)
        self.labels, self.device = images.labels, images.device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.form.to_rgb(quantized(self.images[index], self.form))

    def lossy(self, index: Tensor) -> dict[str, int]:
        return self.images.lossy(index)


def quantized(images: Tensor, form: SampleFormat) -> Tensor:
    """The images of a dataset as files of its format store them."""
    return images if images.dtype == torch.uint8 else form.quantize(images)
