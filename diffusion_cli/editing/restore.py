"""Edits that complete what is known of an image: its pixels in places, its gray values, its coarse shape."""

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor
from torch.nn.functional import pad

from diffusion_cli.editing.base import Edit, EditProcess, EditResult, ReadMask, Shape
from diffusion_cli.editing.latent import known_of
from diffusion_cli.editing.operators import BlockMean, LinearOperator, Luma, Mask
from diffusion_cli.errors import UsageError


class Restoration(Edit):
    """Sample the images whose measurement is that of the input."""

    restores = True
    starts_from_noise = True

    @abstractmethod
    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        """Return the operator and the measurement of the input."""

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        operator, y = self.measure(images)
        assert process.method is not None
        (x,) = deque(process.method.restore(process, *known_of(process.space, operator, y)), maxlen=1)
        x = process.space.decode(x)
        known = operator.picture(y)
        before = [images, known] if tuple(images.shape[1:]) == self.results else [known]
        return EditResult(operator.nearest_image(x, y)[:, None], before, lambda x: operator(x) - y, x)


class Inpaint(Restoration):
    """Paint a part of the image anew: a box [left, top, right, bottom], the centre, or a mask file's part.

    `read_mask` returns what a file has painted, uint8 [H, W], 128 or more where to paint.

    Of a volume a box is [left, top, front, right, bottom, back], and a mask that of every slice. Raises UsageError for
    a mask of another size, a box beyond the image, or one that leaves nothing to paint.
    """

    masks = True

    def __init__(
        self, shape: Shape, read_mask: ReadMask, *, mask: str | list[NonNegativeInt] = "centre"
    ) -> None:
        super().__init__(shape, read_mask)
        _, *sizes = shape
        self.known = torch.ones(1, 1, *sizes, dtype=torch.bool)
        if isinstance(mask, str) and mask not in ("centre", "center"):
            pixels = read_mask(mask)
            if list(pixels.shape) != sizes[-2:]:
                raise UsageError(
                    "edit.mask",
                    mask,
                    f"is {described(pixels.shape)} pixels and the images are {described(sizes[-2:])}",
                    "give a mask of their size",
                )
            self.known[..., pixels >= 128] = False
        else:
            self.known[(..., *_box(mask, sizes))] = False
        if self.known.all():
            raise UsageError(
                "edit.mask", mask, "has no white pixel, and so leaves nothing to paint", "draw one"
            )

    def content(self) -> dict[str, Tensor]:
        return {"mask": self.known}

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        operator = Mask(self.known.to(images.device))
        return operator, operator(images)


def _box(mask: str | list[int], sizes: list[int]) -> list[slice]:
    """What a box has of each axis; it names the last axis first, and the middle half of each for the centre."""
    ndim = len(sizes)
    starts, ends = [size // 4 for size in sizes], [size - size // 4 for size in sizes]
    if isinstance(mask, list):
        starts, ends = ([*map(int, reversed(part))] for part in (mask[:ndim], mask[ndim:]))
    sides = [*zip(starts, ends, sizes, strict=False)]
    if len(starts) != ndim or len(ends) != ndim or not all(start < end <= size for start, end, size in sides):
        names = "left,top,front,right,bottom,back" if ndim == 3 else "left,top,right,bottom"
        raise UsageError(
            "edit.mask",
            mask,
            f"should be [{names}] in pixels within {described(sizes)}, centre, or an image file",
        )
    return [slice(start, end) for start, end, _ in sides]


def described(sizes: Sequence[int]) -> str:
    """Sizes in the order of image files, the width first."""
    return " x ".join(map(str, reversed(sizes)))


class Outpaint(Restoration):
    """Continue the image beyond its sides, by so many pixels on each; of a volume every slice.

    With canvas=grow images of the model's size become larger, which the network was not trained on; with canvas=keep
    those that lack these margins are completed to the model's size, and those of that size lose them first.
    Raises UsageError where there is nothing to add, or nothing left.
    """

    masks = True

    def __init__(
        self,
        shape: Shape,
        read_mask: ReadMask,
        *,
        left: NonNegativeInt = 0,
        right: NonNegativeInt = 0,
        top: NonNegativeInt = 0,
        bottom: NonNegativeInt = 0,
        canvas: Literal["grow", "keep"] = "grow",
    ) -> None:
        super().__init__(shape, read_mask)
        self.sides = (left, right, top, bottom)
        self.canvas = canvas
        *front, height, width = shape
        if not any(self.sides):
            raise UsageError(
                "edit.left", 0, "no side is to be continued", "set edit.left, right, top or bottom"
            )
        self.inner = shape
        if canvas == "keep":
            self.inner = (*front, height - top - bottom, width - left - right)
            if min(self.inner) < 1:
                raise UsageError(
                    "edit.canvas",
                    "keep",
                    f"margins of {self.sides} leave nothing of {width} x {height} pixels",
                    "take less",
                )

    @property
    def results(self) -> Shape:
        *front, height, width = self.inner
        left, right, top, bottom = self.sides
        return *front, height + top + bottom, width + left + right

    def accepts(self) -> list[Shape]:
        return list(dict.fromkeys([self.shape, self.inner]))

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        known = pad(torch.ones(1, 1, *self.inner[1:], dtype=torch.bool, device=images.device), self.sides)
        operator = Mask(known)
        whole = tuple(images.shape[1:]) == self.results
        return operator, operator(images) if whole else pad(images, self.sides)


class Colorize(Restoration):
    """Colour gray images; of colour images the luma is taken first. UsageError for a model of gray images."""

    def __init__(self, shape: Shape, read_mask: ReadMask) -> None:
        super().__init__(shape, read_mask)
        if shape[0] != 3:
            raise UsageError("edit", "colorize", "the model makes gray images", "take one trained on colour")

    def accepts(self) -> list[Shape]:
        return [self.shape, (1, *self.shape[1:])]

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        operator = Luma()
        return operator, operator(images) if images.shape[1] == 3 else images


class SuperResolution(Restoration):
    """Enlarge images `factor` times, to the model's size; images of that size are reduced first."""

    def __init__(self, shape: Shape, read_mask: ReadMask, *, factor: Annotated[int, Field(ge=2)] = 2) -> None:
        super().__init__(shape, read_mask)
        _, *sizes = shape
        if any(size % factor for size in sizes):
            raise UsageError(
                "edit.factor", factor, f"does not divide {described(sizes)} pixels", "take a divisor"
            )
        self.factor = factor

    def accepts(self) -> list[Shape]:
        channels, *sizes = self.shape
        return [self.shape, (channels, *(size // self.factor for size in sizes))]

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        operator = BlockMean(self.factor)
        return operator, operator(images) if images.shape[1:] == self.shape else images
