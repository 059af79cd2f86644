"""8-bit previews of a dataset, for metrics that need 8-bit images."""

import torch
from torch import Tensor

from diffusion_cli.data.base import Dataset, Images, Split
from diffusion_cli.formats import SampleFormat, Uint8Image


def pictured(dataset: Dataset) -> Dataset:
    """Return the dataset with its images as 8-bit previews, uint8 [B, 1 or 3, H, W]; itself if it is 8-bit."""
    return dataset if isinstance(dataset.form, Uint8Image) else _Pictured(dataset)


class _Pictured(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.data_dir = dataset, dataset.data_dir
        self.name, self.class_names, self.flip = dataset.name, dataset.class_names, dataset.flip
        self.num_workers, self.attributes = dataset.num_workers, dataset.attributes
        self.captions, self.missing_captions = dataset.captions, dataset.missing_captions
        self.shape = dataset.form.picture_shape(dataset.shape)

    def load(self, split: Split) -> Images:
        return PicturedImages(self.dataset.load(split), self.dataset.form)


class PicturedImages(Images):
    """Images as 8-bit previews, by their storage format."""

    def __init__(self, images: Images, form: SampleFormat) -> None:
        self.images, self.form = images, form
        self.shape = form.picture_shape(images.shape)
        self.labels, self.captions, self.device = images.labels, images.captions, images.device
        self.with_conditions(images.conditions)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.form.to_rgb(quantized(self.images[index], self.form))

    def lossy(self, index: Tensor) -> dict[str, int]:
        return self.images.lossy(index)


def quantized(images: Tensor, form: SampleFormat) -> Tensor:
    """Return images of a dataset in the precision of their storage format."""
    return images if images.dtype == torch.uint8 else form.quantize(images)
