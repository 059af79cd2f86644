"""Tiles of one size that cover a larger image, and means over them (Bar-Tal et al. 2023)."""

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
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
        self.places = [
            tuple(slice(start, start + size) for start, size in zip(corner, self.tile, strict=True))
            for corner in product(*self.starts)
        ]
        """The slices of each tile in the axes of the image, in row-major order."""
        self._ramps: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def cut(self, images: Tensor) -> Tensor:
        """Return the tiles of images [B, C, *image]: [B * T, C, *tile], all T tiles of the first image first."""
        return torch.stack([images[(..., *place)] for place in self.places], 1).flatten(0, 1)

    def join(self, tiles: Tensor) -> Tensor:
        """Return the images [B, C, *image] whose pixels are the weighted means of tiles [B * T, C, *tile].

        `sum_k w_k(p) y_k(p) / sum_k w_k(p)` at pixel p, over the tiles k that contain it (Bar-Tal et al. 2023, Eq. 5).
        """
        each = iter(tiles.unflatten(0, (-1, len(self))).unbind(1))
        return self.mean(lambda _: next(each))

    def mean(self, of_tile: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
        """Return the weighted means over tiles as `join`, of a function from the slices of a tile to [B, C, *tile].

        Only one tile is in memory at a time.
        """
        if len(self) == 1:
            return of_tile(self.places[0])
        joined: Tensor | None = None
        for place, ramps in zip(self.places, product(*self.ramps), strict=True):
            tile = of_tile(place)
            joined = tile.new_zeros(*tile.shape[:2], *self.image) if joined is None else joined
            joined[(..., *place)] += reduce(_outer, ramps).to(tile) * tile
        assert joined is not None
        return joined

    @property
    def ramps(self) -> list[Tensor]:
        """Weights of the tiles along each axis, float64 [tiles, size], which sum to 1 at each pixel of the axis.

        The weight of a pixel is their product over the axes.
        """
        if self._ramps is None:  # no cached_property, whose lock cannot be compiled
            self._ramps = [_ramps(*axis) for axis in zip(self.image, self.tile, self.starts, strict=True)]
        return self._ramps


def _outer(first: Tensor, second: Tensor) -> Tensor:
    return first[..., None] * second


def windows(image: tuple[int, ...], window: tuple[int, ...], overlap: int) -> Tiles:
    """Return the tiles of a network that sees a window at a time; an axis that is shorter has tiles of its size."""
    make = _windows.__wrapped__ if torch.compiler.is_compiling() else _windows
    return make(image, tuple(map(min, zip(image, window, strict=True))), overlap)


@lru_cache(maxsize=4)  # for their ramps
def _windows(image: tuple[int, ...], tile: tuple[int, ...], overlap: int) -> Tiles:
    return Tiles(image, tile, [overlap] * len(image))


def position(image: Sequence[int], corner: Sequence[int], tile: Sequence[int]) -> Tensor:
    """Return where a tile lies in an image: its first and last edge along each axis, float32 [2 ndim].

    -1 and 1 are the borders of the image.
    """
    edges = [
        2 * edge / size - 1
        for size, start, length in zip(image, corner, tile, strict=True)
        for edge in (start, start + length)
    ]
    return torch.tensor(edges)


def coordinates(positions: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the coordinates of the centres of the pixels of tiles, [B, ndim, *sizes].

    Args:
        positions: positions of the tiles, see `position`, [B, 2 ndim].
        sizes: sizes of the tiles.
    """
    axes = []
    for axis, size in enumerate(sizes):
        first, last = positions[:, 2 * axis, None], positions[:, 2 * axis + 1, None]
        share = (torch.arange(size, device=positions.device, dtype=positions.dtype) + 0.5) / size
        along = (first + (last - first) * share).view(
            -1, *(size if other == axis else 1 for other in range(len(sizes)))
        )
        axes.append(along.expand(-1, *sizes))
    return torch.stack(axes, 1)


def _starts(whole: int, part: int, overlap: int) -> list[int]:
    """Return the first pixels of the tiles along an axis."""
    if whole == part:
        return [0]
    last = ceil((whole - part) / (part - overlap))
    return [round(number * (whole - part) / last) for number in range(last + 1)]


def _ramps(whole: int, size: int, starts: Sequence[int]) -> Tensor:
    """Return the weights of the tiles along an axis, divided by their sum at each pixel."""
    own = torch.stack([_ramp(slice(start, start + size), starts) for start in starts])
    total = own.new_zeros(whole)
    for start, weight in zip(starts, own, strict=True):
        total[start : start + size] += weight
    return torch.stack(
        [weight / total[start : start + size] for start, weight in zip(starts, own, strict=True)]
    )


def _ramp(span: slice, starts: Sequence[int]) -> Tensor:
    """Return the weights of a tile before the division: 1, falling linearly to the far side of each overlap."""
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
