"""Restoration edits: inpainting, outpainting, colorization and super-resolution."""

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor
from torch.nn.functional import pad

from diffusion_cli.conditions.operators import BlockMean, LinearOperator, Luma, Mask, middle_half
from diffusion_cli.editing.base import Edit, EditProcess, EditResult, Shape
from diffusion_cli.editing.latent import known_of
from diffusion_cli.errors import UsageError


class Restoration(Edit):
    """Base class of edits that sample images with the measurement of the input."""

    restores = True
    starts_from_noise = True
    before_names = ("given", "known")

    @abstractmethod
    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        """Return the operator, and the measurement of the input."""

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        operator, y = self.measure(images)
        x = process.restored(*known_of(process.space, operator, y))
        return EditResult(
            operator.nearest_image(x, y)[:, None], self.before(images), lambda x: operator(x) - y, x
        )

    def before(self, images: Tensor) -> list[Tensor]:
        """Return the images to show before the results: the input, if it has their size, and its measurement."""
        operator, y = self.measure(images)
        known = operator.picture(y)
        return [images, known] if tuple(images.shape[1:]) == self.results else [known]


class Inpaint(Restoration):
    """Inpainting: generates a part of the image again.

    Args:
        shape: shape of the model's images.
        mask: `centre`, a box [left, top, right, bottom] in pixels, or the path of masks, which `masked` takes. For
            volumes [C, D, H, W], a box is [left, top, front, right, bottom, back], along W, H and D. For signals
            [C, L], it is [start, end].

    Raises:
        UsageError: the box exceeds the image, or is empty.
    """

    def __init__(self, shape: Shape, *, mask: str | list[NonNegativeInt] = "centre") -> None:
        super().__init__(shape)
        _, *sizes = shape
        known = torch.ones(1, 1, *sizes, dtype=torch.bool)
        if isinstance(mask, str) and mask not in ("centre", "center"):
            self.mask_path = mask
        else:
            known[(..., *box_of(mask, sizes))] = False
        self.known = known

    def masked(self, painted: Tensor) -> Self:
        edit = copy(self)
        edit.known = ~painted
        return edit

    def of(self, places: list[int]) -> Self:
        assert self.known is not None
        return self if len(self.known) == 1 else self.masked(~self.known[places])

    def content(self) -> dict[str, Tensor]:
        assert self.known is not None
        return {"mask": self.known}

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        assert self.known is not None
        operator = Mask(self.known.to(images.device))
        return operator, operator(images)


def box_of(mask: str | list[int], sizes: list[int]) -> list[slice]:
    """Return the slices of a box, given with the last axis first; the middle half of each axis for the centre."""
    ndim = len(sizes)
    if isinstance(mask, str):
        return middle_half(sizes)
    starts, ends = ([*map(int, reversed(part))] for part in (mask[:ndim], mask[ndim:]))
    if not _lies_within(starts, ends, sizes):
        names, order = "[left,top,right,bottom] in pixels", ""
        if ndim == 1:
            names = "[start,end] in values"
        if ndim == 3:
            names = "[left,top,front,right,bottom,back] in voxels"
            order = "the order is width, height, depth, opposite to that of dataset.resolution"
        if ndim == 3 and _lies_within(starts[::-1], ends[::-1], sizes):
            order += f"; did you mean {[*starts, *ends]}?"
        raise UsageError(
            "edit.mask", mask, f"must be {names} within {described(sizes)}, centre, or a mask file", order
        )
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def _lies_within(starts: list[int], ends: list[int], sizes: list[int]) -> bool:
    """Return whether starts and ends are those of a box that is not empty, within the sizes."""
    return len(starts) == len(ends) == len(sizes) and all(
        start < end <= size for start, end, size in zip(starts, ends, sizes, strict=True)
    )


def described(sizes: Sequence[int]) -> str:
    """Return sizes as text in the order of image files, width first."""
    return " x ".join(map(str, reversed(sizes)))


class Outpaint(Restoration):
    """Outpainting: continues the image beyond its borders; for volumes, every slice.

    Args:
        shape: shape of the model's images.
        left: pixels to add on the left.
        right: pixels to add on the right.
        top: pixels to add at the top.
        bottom: pixels to add at the bottom.
        canvas: `grow`: images of the model's size become larger than those of training. `keep`: images without these
            margins are completed to the model's size; images of the model's size lose them first.

    Raises:
        UsageError: there is nothing to add, or nothing left.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        left: NonNegativeInt = 0,
        right: NonNegativeInt = 0,
        top: NonNegativeInt = 0,
        bottom: NonNegativeInt = 0,
        canvas: Literal["grow", "keep"] = "grow",
    ) -> None:
        super().__init__(shape)
        if len(shape) < 3:
            remedy = "use edit=inpaint edit.mask=[start,end] for a signal"
            raise UsageError("edit", "outpaint", "needs images or volumes", remedy)
        self.sides = (left, right, top, bottom)
        self.canvas = canvas
        *front, height, width = shape
        if not any(self.sides):
            raise UsageError(
                "edit.left", 0, "there is no side to extend", "set edit.left, right, top or bottom"
            )
        self.inner = shape
        if canvas == "keep":
            self.inner = (*front, height - top - bottom, width - left - right)
            if min(self.inner) < 1:
                raise UsageError(
                    "edit.canvas",
                    "keep",
                    f"margins of {self.sides} leave nothing of {width} x {height} pixels",
                    "use smaller margins",
                )
        self.known = pad(torch.ones(1, 1, *self.inner[1:], dtype=torch.bool), self.sides)

    @property
    def results(self) -> Shape:
        *front, height, width = self.inner
        left, right, top, bottom = self.sides
        return *front, height + top + bottom, width + left + right

    def accepts(self) -> list[Shape]:
        return list(dict.fromkeys([self.shape, self.inner]))

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        assert self.known is not None
        operator = Mask(self.known.to(images.device))
        whole = tuple(images.shape[1:]) == self.results
        return operator, operator(images) if whole else pad(images, self.sides)


class Colorize(Restoration):
    """Colorization of gray images; colour images are converted to gray first. UsageError for models of gray images."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        if len(shape) < 3:
            raise UsageError("edit", "colorize", "needs images", "use another edit")
        if shape[0] != 3:
            raise UsageError(
                "edit", "colorize", "the model generates gray images", "use one trained on colour images"
            )

    def accepts(self) -> list[Shape]:
        return [self.shape, (1, *self.shape[1:])]

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        operator = Luma()
        return operator, operator(images) if images.shape[1] == 3 else images


class SuperResolution(Restoration):
    """Super-resolution by an integer factor to the model's size; images of that size are reduced first.

    Args:
        shape: shape of the model's images.
        factor: upscaling factor, a divisor of the model's size.
    """

    def __init__(self, shape: Shape, *, factor: Annotated[int, Field(ge=2)] = 2) -> None:
        super().__init__(shape)
        _, *sizes = shape
        if any(size % factor for size in sizes):
            raise UsageError(
                "edit.factor", factor, f"does not divide {described(sizes)} pixels", "use a divisor"
            )
        self.factor = factor

    def accepts(self) -> list[Shape]:
        channels, *sizes = self.shape
        return [self.shape, (channels, *(size // self.factor for size in sizes))]

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        operator = BlockMean(self.factor)
        return operator, operator(images) if images.shape[1:] == self.shape else images
