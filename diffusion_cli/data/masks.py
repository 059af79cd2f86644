"""Masks: label numbers of every pixel, in files beside the images, that become a further channel of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image

from diffusion_cli.data.decoding import HighDepthDecoder, ImageDecoder, center_crop_resize
from diffusion_cli.data.labels import common_depth, composed, examples
from diffusion_cli.errors import FormatError
from diffusion_cli.formats import HighDepthImage, Range, Shape, image_form
from diffusion_cli.formats.pixel_readers import depth_of
from diffusion_cli.formats.ranged import Dtype
from diffusion_cli.system.untrusted import reason

BYTES = [0.0, 255.0]


class MaskedDecoder(NamedTuple):
    """Decodes an image and its mask to float32 [C + 1, H, W] in [-1, 1], the mask as the last channel.

    Both are cropped to the same part; a pixel of the mask is the nearest of the file: label numbers stay what they are.
    """

    image: ImageDecoder | HighDepthDecoder
    mask: HighDepthImage
    form: HighDepthImage
    """Of image and mask together."""

    @property
    def shape(self) -> Shape:
        """Of what it returns."""
        channels, *sizes = self.image.shape
        return (channels + 1, *sizes)

    @property
    def dtype(self) -> np.dtype:
        """Real numbers."""
        return np.dtype(np.float32)

    def __call__(self, data: bytes, mask: bytes) -> np.ndarray:
        """Raises FormatError if one cannot be decoded, they differ in size, or a label is beyond its range."""
        pixels = torch.tensor(self.image(data))
        x = pixels if pixels.is_floating_point() else pixels / 127.5 - 1
        try:
            labels = self._labels(mask)
        except ValueError as error:
            raise FormatError(f"its mask: {reason(error)}") from error
        if (found := tuple(labels.shape)) != (wanted := (1, *self.image.size(data))):
            raise FormatError(f"its mask is {found} in channels, height and width, not {wanted}")
        labels = center_crop_resize(labels, self.mask, self.shape, Image.Resampling.NEAREST)
        return self.form.quantize(torch.cat([x, labels])).numpy()

    def _labels(self, mask: bytes) -> torch.Tensor:
        """The labels of a file in [-1, 1]; FormatError for those beyond their range, of which none is the nearest."""
        numbers, low, high = self.mask.held(mask), self.mask.low[0], self.mask.high[0]
        if numbers.min() < low or numbers.max() > high:
            raise FormatError(
                f"has labels {numbers.min()} to {numbers.max()}, and dataset.range gives masks [{low:g},{high:g}]; "
                "give a pair that includes them"
            )
        return self.mask.samples(numbers)


def masked_decoder(
    image: ImageDecoder | HighDepthDecoder, first: bytes, given: Range | None
) -> MaskedDecoder:
    """The decoder of images with masks like the first one, whose labels have a range, None for all of their depth.

    Raises FormatError, about the mask or `dataset.range`, where there is none.
    """
    depth = depth_of(first)
    if depth not in ("uint8", "uint16"):
        raise FormatError(f"holds {depth}; masks are label numbers of 8 or 16 bits")
    mask = _raster(depth, [given or [0.0, float(np.iinfo(depth).max)]])
    own = image.form if isinstance(image, HighDepthDecoder) else _raster("uint8", [BYTES])
    both = np.promote_types(own.dtype, depth).name
    if both not in get_args(Dtype):
        raise FormatError(f"holds {depth} beside images of {own.dtype}; save masks in 8 bits")
    pairs = [list(pair) for pair in zip(own.low, own.high, strict=True)]
    pairs *= image.shape[0] // len(pairs)  # one pair for all channels, or each
    return MaskedDecoder(image, mask, _raster(both, [*pairs, [mask.low[0], mask.high[0]]]))


def _raster(dtype: str, pairs: list[Range]) -> HighDepthImage:
    form = image_form(dtype, len(pairs), pairs)
    assert isinstance(form, HighDepthImage)  # as all with a range are
    return form


GivenRange = Range | list[Range] | Literal["window"] | None


def divided(given: GivenRange, channels: int) -> tuple[GivenRange, Range | None]:
    """The range of images of so many channels and that of their masks, where there is a pair for each channel."""
    if isinstance(given, list) and len(given) == channels + 1 and isinstance(given[-1], list):
        return given[:-1], given[-1]  # pyright: ignore[reportReturnType]
    return given, None


def mask_files(images: list[str], masks: Sequence[str]) -> list[str]:
    """For every image the one of the masks with the same name but for its suffix.

    Names are relative to the folder of the images, or to one below that holds all: to the one that fits most images.
    Raises FormatError naming images without a mask, or with more than one.
    """
    stems = Counter(_stem(name) for name in masks)
    tops = range(common_depth([PurePosixPath(name).parts[:-1] for name in images]) + 1)
    named = max(
        ([_stem(name, top) for name in images] for top in tops), key=lambda row: sum(s in stems for s in row)
    )
    for wrong, remedy in ((0, "no mask for"), (2, "more than one mask for")):
        found = [name for name, stem in zip(images, named, strict=True) if min(stems[stem], 2) == wrong]
        if found:
            raise FormatError(f"has {remedy} {examples(found)}; give each image one, of its name")
    files = {_stem(name): name for name in masks}
    return [files[stem] for stem in named]


def _stem(name: str, top: int = 0) -> str:
    """A name without its suffix and its first folders, in one Unicode form."""
    return composed(PurePosixPath(*PurePosixPath(name).parts[top:]).with_suffix("").as_posix())
