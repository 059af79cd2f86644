"""Segmentation masks: label images beside the images, which become an additional channel."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image

from diffusion_cli.data.decoding import (
    HighDepthDecoder,
    ImageDecoder,
    center_crop_resize,
    image_decoder,
)
from diffusion_cli.data.labels import common_depth, composed
from diffusion_cli.data.listing import stem
from diffusion_cli.errors import FormatError, examples
from diffusion_cli.formats import HighDepthImage, Original, Range, Shape, image_form
from diffusion_cli.formats.pixel_readers import depth_of
from diffusion_cli.formats.ranged import Dtype
from diffusion_cli.system.untrusted import reason

BYTES = [0.0, 255.0]


class MaskedDecoder(NamedTuple):
    """Decodes an image and its mask to float32 [C + 1, H, W] in [-1, 1], with the mask as the last channel.

    Both are cropped alike. The mask is resized by nearest neighbour, so that labels are never mixed.
    """

    image: ImageDecoder | HighDepthDecoder
    mask: HighDepthImage
    form: HighDepthImage
    """Format of image and mask together."""

    @property
    def shape(self) -> Shape:
        """Shape of the arrays, [C + 1, H, W]."""
        channels, *sizes = self.image.shape
        return (channels + 1, *sizes)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arrays, float32."""
        return np.dtype(np.float32)

    def __call__(self, data: bytes, mask: bytes) -> np.ndarray:
        """Return image and mask; FormatError if one is undecodable, sizes differ, or a label is out of range."""
        pixels = torch.tensor(self.image(data))
        x = pixels if pixels.is_floating_point() else pixels / 127.5 - 1
        try:
            labels = self._labels(mask)
        except ValueError as error:
            raise FormatError(f"its mask: {reason(error)}") from error
        if (found := tuple(labels.shape)) != (wanted := (1, *self.image.size(data))):
            raise FormatError(f"its mask has shape {found}; expected {wanted}")
        labels = center_crop_resize(labels, self.mask, self.shape, Image.Resampling.NEAREST)
        return self.form.quantize(torch.cat([x, labels])).numpy()

    def original(self, data: bytes, mask: bytes) -> Original | None:
        """Return the values of image and mask before clipping and resizing; None for images that are not clipped."""
        if not isinstance(self.image, HighDepthDecoder):
            return None
        image, labels = self.image.original(data), self.mask.original(mask)
        return Original(np.concatenate([image.values, labels.values]), {})

    def _labels(self, mask: bytes) -> torch.Tensor:
        """Return the labels of a mask file in [-1, 1]; FormatError for labels outside the range, never clipped."""
        numbers, low, high = self.mask.held(mask), self.mask.low[0], self.mask.high[0]
        if numbers.min() < low or numbers.max() > high:
            raise FormatError(
                f"has labels {numbers.min()} to {numbers.max()}, but dataset.range limits masks to [{low:g},{high:g}]; "
                "extend this range"
            )
        return self.mask.samples(numbers)


def masked_decoder(
    image: ImageDecoder | HighDepthDecoder, first: bytes, given: Range | None
) -> MaskedDecoder:
    """Return the decoder of images with masks like the file `first`.

    `given` is the range of the labels; None: all values of their dtype. Raises FormatError, about the mask or
    `dataset.range`, if there is no such format.
    """
    depth = depth_of(first)
    if depth not in ("uint8", "uint16"):
        raise FormatError(f"has dtype {depth}; masks must be label images of 8 or 16 bits")
    mask = _raster(depth, [given or [0.0, float(np.iinfo(depth).max)]])
    own = image.form if isinstance(image, HighDepthDecoder) else _raster("uint8", [BYTES])
    both = np.promote_types(own.dtype, depth).name
    if both not in get_args(Dtype):
        raise FormatError(f"has dtype {depth}, but the images {own.dtype}; save masks in 8 bits")
    pairs = [list(pair) for pair in zip(own.low, own.high, strict=True)]
    pairs *= image.shape[0] // len(pairs)  # one pair per channel
    return MaskedDecoder(image, mask, _raster(both, [*pairs, [mask.low[0], mask.high[0]]]))


def decoder_of_run(
    node: Mapping[str, Any], rules: int, form: HighDepthImage, shape: Shape, image: bytes, mask: bytes
) -> MaskedDecoder:
    """Return the decoder of an image and its mask for a model trained with masks.

    Args:
        node: configuration node of the run's dataset.
        rules: version of its rules.
        form: format of image and mask together.
        shape: shape of the model's images, [C + 1, H, W].
        image: content of the image file.
        mask: content of the mask file.

    Raises:
        UsageError or FormatError: for files of another kind than those of training.
    """
    channels, height, width = shape[0] - 1, *shape[1:]
    own, _ = divided(node.get("range"), channels)
    depth, background = node.get("depth", "auto"), node.get("background", "white")
    decoder = image_decoder(image, (channels, height, width), own, depth, background, rules)
    return MaskedDecoder(decoder, _raster(depth_of(mask), [[form.low[-1], form.high[-1]]]), form)


def _raster(dtype: str, pairs: list[Range]) -> HighDepthImage:
    form = image_form(dtype, len(pairs), pairs)
    assert isinstance(form, HighDepthImage)  # always, if a range is given
    return form


GivenRange = Range | list[Range] | Literal["window"] | None


def divided(given: GivenRange, channels: int) -> tuple[GivenRange, Range | None]:
    """Split a range into that of the images and that of their masks; None if it has no extra pair for the masks."""
    if isinstance(given, list) and len(given) == channels + 1 and isinstance(given[-1], list):
        return given[:-1], given[-1]  # pyright: ignore[reportReturnType]
    return given, None


def mask_files(images: list[str], masks: Sequence[str], noun: str = "mask") -> list[str]:
    """Return the mask, or another partner, of every image: the one with the same name up to the suffix.

    Names are relative to the folder of the images, or to a folder below that contains all of them: the one that
    matches most images. Raises FormatError if an image has no mask, or more than one.
    """
    stems = Counter(_stem(name) for name in masks)
    tops = range(common_depth([PurePosixPath(name).parts[:-1] for name in images]) + 1)
    named = max(
        ([_stem(name, top) for name in images] for top in tops), key=lambda row: sum(s in stems for s in row)
    )
    for wrong, problem in ((0, f"no {noun} for"), (2, f"more than one {noun} for")):
        found = [name for name, stem in zip(images, named, strict=True) if min(stems[stem], 2) == wrong]
        if found:
            raise FormatError(f"has {problem} {examples(found)}; give each image one {noun} with its name")
    files = {_stem(name): name for name in masks}
    return [files[stem] for stem in named]


def _stem(name: str, top: int = 0) -> str:
    """Return a name without its suffix and first folders, in NFC form."""
    path = PurePosixPath(*PurePosixPath(name).parts[top:])
    return composed(path.with_name(stem(path)).as_posix())
