"""Tiles of one size that cover a larger image, and means over them (Bar-Tal et al. 2023)."""

from collections.abc import Sequence
from functools import cached_property
from itertools import product
from math import ceil

import torch
from torch import Tensor


class Tiles:
    """Tiles that cover an image of any number of axes.

    Along each axis, the tiles are evenly spaced from one border to the other, as few as the overlap allows. Each pixel
    of a tile has a weight that falls linearly towards the neighbouring tiles, so that the weights of all tiles change
    smoothly over the image. The weights at a pixel are divided by their sum.

    Args:
        image: sizes of the image in pixels, such as (height, width).
        tile: sizes of a tile, each at most that of the image.
        overlap: smallest overlap of neighbouring tiles along each axis, in pixels; less than the size of a tile.
    """

    def __init__(self, image: Sequence[int], tile: Sequence[int], overlap: Sequence[int]) -> None:
        self.image, self.tile = tuple(image), tuple(tile)
        self.starts = [_starts(*axis) for axis in zip(self.image, self.tile, overlap, strict=True)]

    @cached_property
    def places(self) -> list[tuple[slice, ...]]:
        """The slices of each tile in the axes of the image, in row-major order."""
        return [
            tuple(slice(start, start + size) for start, size in zip(corner, self.tile, strict=True))
            for corner in product(*self.starts)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def cut(self, images: Tensor) -> Tensor:
        """Return the tiles of images [B, C, *image]: [B * T, C, *tile], all T tiles of the first image first."""
        return torch.stack([images[(..., *place)] for place in self.places], 1).flatten(0, 1)

    def join(self, tiles: Tensor) -> Tensor:
        """Return the images [B, C, *image] whose pixels are the weighted means of tiles [B * T, C, *tile].

        `sum_k w_k(p) y_k(p) / sum_k w_k(p)` at pixel p, over the tiles k that contain it (Bar-Tal et al. 2023, Eq. 5).
        """
        if len(self) == 1:
            return tiles
        each = tiles.unflatten(0, (-1, len(self)))
        joined = each.new_zeros(len(each), tiles.shape[1], *self.image)
        for place, weight, tile in zip(self.places, self.weights.to(tiles), each.unbind(1), strict=True):
            joined[(..., *place)] += weight * tile
        return joined

    @cached_property
    def weights(self) -> Tensor:
        """Weights of the pixels of each tile, which sum to 1 at each pixel of the image: float64 [T, *tile]."""
        own = torch.stack([self._own_weights(place) for place in self.places])
        total = own.new_zeros(self.image)
        for place, weight in zip(self.places, own, strict=True):
            total[place] += weight
        return torch.stack([weight / total[place] for place, weight in zip(self.places, own, strict=True)])

    def _own_weights(self, place: Sequence[slice]) -> Tensor:
        """Return the weights of a tile before the division by their sum: the product of one ramp per axis."""
        weights = torch.ones(self.tile, dtype=torch.float64)
        for axis, (span, starts) in enumerate(zip(place, self.starts, strict=True)):
            ramp = _ramp(span, starts)
            weights = weights * ramp.view(*(-1 if other == axis else 1 for other in range(len(self.tile))))
        return weights


def _starts(whole: int, part: int, overlap: int) -> list[int]:
    """Return the first pixels of the tiles along an axis."""
    if whole == part:
        return [0]
    last = ceil((whole - part) / (part - overlap))
    return [round(number * (whole - part) / last) for number in range(last + 1)]


def _ramp(span: slice, starts: Sequence[int]) -> Tensor:
    """Return the weights of a tile along an axis: 1, falling linearly to the far side of each overlap."""
    size, number = span.stop - span.start, starts.index(span.start)
    pixels = torch.arange(size, dtype=torch.float64) + 0.5
    weights = torch.ones(size, dtype=torch.float64)
    if number > 0:
        before = starts[number - 1] + size - span.start
        weights = torch.minimum(weights, pixels / max(before, 1))
    if number + 1 < len(starts):
        after = span.stop - starts[number + 1]
        weights = torch.minimum(weights, (size - pixels) / max(after, 1))
    return weights
