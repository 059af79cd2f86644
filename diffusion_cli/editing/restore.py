"""Edits that complete what is known of an image: its pixels in places, its gray values, its coarse shape."""

from abc import abstractmethod
from collections import deque
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor
from torch.nn.functional import pad

from diffusion_cli.editing.base import Edit, Edited, Process, ReadMask, Shape
from diffusion_cli.editing.latent import known_of
from diffusion_cli.editing.operators import BlockMean, LinearOperator, Luma, Mask


class Restoration(Edit):
    """Sample the images whose measurement is that of the input."""

    restores = True
    starts_from_noise = True

    @abstractmethod
    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        """Return the operator and the measurement of the input."""

    def __call__(self, images: Tensor, process: Process) -> Edited:
        operator, y = self.measure(images)
        assert process.method is not None
        (x,) = deque(process.method.restore(process, *known_of(process.space, operator, y)), maxlen=1)
        x = process.space.decode(x)
        known = operator.picture(y)
        shown = [images, known] if tuple(images.shape[1:]) == self.results else [known]
        return Edited(operator.nearest_image(x, y)[:, None], shown, lambda x: operator(x) - y, x)


class Inpaint(Restoration):
    """Paint a part of the image anew: what is white in a mask file, a box [left, top, right, bottom], or the centre.

    Raises ValueError for a mask of another size, a box beyond the image, or one that leaves nothing to paint.
    """

    def __init__(self, shape: Shape, read_mask: ReadMask, *, mask: str | list[NonNegativeInt]) -> None:
        super().__init__(shape, read_mask)
        _, height, width = shape
        self.known = torch.ones(1, 1, height, width, dtype=torch.bool)
        centre = [width // 4, height // 4, width - width // 4, height - height // 4]
        if isinstance(mask, str) and mask not in ("centre", "center"):
            pixels = read_mask(mask)
            if tuple(pixels.shape) != (height, width):
                raise ValueError(
                    f"edit.mask={mask}: is {pixels.shape[1]} x {pixels.shape[0]} pixels and the images are {width} x "
                    f"{height}; give a mask of their size"
                )
            self.known = (pixels < 128)[None, None]
        else:
            box = mask if isinstance(mask, list) else centre
            if len(box) != 4 or not (box[0] < box[2] <= width and box[1] < box[3] <= height):
                raise ValueError(
                    f"edit.mask={mask}: should be [left,top,right,bottom] in pixels within {width} x {height}, centre, "
                    "or an image file"
                )
            left, top, right, bottom = map(int, box)
            self.known[:, :, top:bottom, left:right] = False
        if self.known.all():
            raise ValueError(
                f"edit.mask={mask}: has no white pixel, and so leaves nothing to paint; draw one"
            )

    def content(self) -> dict[str, Tensor]:
        return {"mask": self.known}

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        operator = Mask(self.known.to(images.device))
        return operator, operator(images)


class Outpaint(Restoration):
    """Continue the image beyond its sides, by so many pixels on each.

    With canvas=grow images of the model's size become larger, which the network was not trained on; with canvas=keep
    those that lack these margins are completed to the model's size, and those of that size lose them first.
    Raises ValueError where there is nothing to add, or nothing left.
    """

    def __init__(
        self,
        shape: Shape,
        read_mask: ReadMask,
        *,
        left: NonNegativeInt,
        right: NonNegativeInt,
        top: NonNegativeInt,
        bottom: NonNegativeInt,
        canvas: Literal["grow", "keep"],
    ) -> None:
        super().__init__(shape, read_mask)
        self.sides = (left, right, top, bottom)
        self.canvas = canvas
        channels, height, width = shape
        if not any(self.sides):
            raise ValueError("edit.left=0: no side is to be continued; set edit.left, right, top or bottom")
        self.inner = shape
        if canvas == "keep":
            self.inner = (channels, height - top - bottom, width - left - right)
            if min(self.inner) < 1:
                raise ValueError(
                    f"edit.canvas=keep: margins of {self.sides} leave nothing of {width} x {height} pixels; take less"
                )

    @property
    def results(self) -> Shape:
        channels, height, width = self.inner
        left, right, top, bottom = self.sides
        return channels, height + top + bottom, width + left + right

    def accepts(self) -> list[Shape]:
        return list(dict.fromkeys([self.shape, self.inner]))

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        known = pad(torch.ones(1, 1, *self.inner[1:], dtype=torch.bool, device=images.device), self.sides)
        operator = Mask(known)
        whole = tuple(images.shape[1:]) == self.results
        return operator, operator(images) if whole else pad(images, self.sides)


class Colorize(Restoration):
    """Colour gray images; of colour images the luma is taken first. ValueError for a model of gray images."""

    def __init__(self, shape: Shape, read_mask: ReadMask) -> None:
        super().__init__(shape, read_mask)
        if shape[0] != 3:
            raise ValueError("edit=colorize: the model makes gray images; take one trained on colour")

    def accepts(self) -> list[Shape]:
        return [self.shape, (1, *self.shape[1:])]

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        operator = Luma()
        return operator, operator(images) if images.shape[1] == 3 else images


class SuperResolution(Restoration):
    """Enlarge images `factor` times, to the model's size; images of that size are reduced first."""

    def __init__(self, shape: Shape, read_mask: ReadMask, *, factor: Annotated[int, Field(ge=2)]) -> None:
        super().__init__(shape, read_mask)
        _, height, width = shape
        if height % factor or width % factor:
            raise ValueError(
                f"edit.factor={factor}: does not divide {width} x {height} pixels; take a divisor"
            )
        self.factor = factor

    def accepts(self) -> list[Shape]:
        channels, height, width = self.shape
        return [self.shape, (channels, height // self.factor, width // self.factor)]

    def measure(self, images: Tensor) -> tuple[LinearOperator, Tensor]:
        operator = BlockMean(self.factor)
        return operator, operator(images) if images.shape[1:] == self.shape else images
