"""Edits that take an image part of the way to noise and back by another path."""

from collections import deque
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, noised
from diffusion_cli.editing.base import Edit, EditProcess, EditResult, ReadMask, Shape
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers import NoiseFn, integrate, invert, start_grid_at

Seed = Annotated[int, Field(ge=0, le=4294967295)]
Strength = Annotated[float, Field(ge=0.001, le=1)]


def decode(process: EditProcess, x: Tensor, times: Tensor, draw: NoiseFn, repeat: int = 1) -> Tensor:
    """Sample images from the state x at times[0], `repeat` in a row of each result."""
    (x,) = deque(integrate(process.sampler, process.denoise(repeat), x, times, draw), maxlen=1)
    return process.space.decode(x)


def encode(process: EditProcess, denoise: Denoise, images: Tensor, times: Tensor) -> Tensor:
    """Encode images to the state at times[0] by DDIM inversion."""
    (x,) = deque(invert(process.sampler.schedule, denoise, process.space.encode(images), times), maxlen=1)
    return x


class PartialNoising(Edit):
    """An edit that goes to the time `strength` and back."""

    def __init__(self, shape: Shape, read_mask: ReadMask, *, strength: Strength = 0.9) -> None:
        super().__init__(shape, read_mask)
        self.strength = strength


class Img2Img(PartialNoising):
    """Noise an image to the time `strength` and sample from there: SDEdit (Meng et al. 2022, Alg. 1).

    A source drawn in another style, as strokes, comes back in the style of the model's data.
    """

    starts_from_noise = True

    def __init__(self, shape: Shape, read_mask: ReadMask, *, strength: Strength = 0.5) -> None:
        super().__init__(shape, read_mask, strength=strength)

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        times = start_grid_at(process.times, self.strength)
        x = noised(process.sampler.schedule, process.space.encode(images), times[0], process.draw())
        return EditResult(decode(process, x, times, process.draw)[:, None], [images, process.space.decode(x)])


class Reconstruct(PartialNoising):
    """Encode an image to the time `strength` by DDIM inversion, and decode it again, without noise."""

    deterministic = True

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        times = start_grid_at(process.times, self.strength)
        x = encode(process, process.denoise(), images, times)
        back = decode(process, x, times, process.draw)
        return EditResult(back[:, None], [images, process.space.decode(x)], lambda x: x - images)


class Attribute(Edit):
    """Turn an image of the class `source` into one of the class that `label` names (Su et al. 2023).

    It is encoded to the time `strength` by DDIM inversion, conditioned on the source class, and decoded by the
    guided denoiser, conditioned on the other.
    """

    def __init__(
        self, shape: Shape, read_mask: ReadMask, *, source: int | str | None = None, strength: Strength = 0.7
    ) -> None:
        super().__init__(shape, read_mask)
        self.source, self.strength = source, strength

    def check(self, labelled: bool, number: Callable[[int | str | None], int | None]) -> None:
        if not labelled:
            raise UsageError("label", None, "edit=attribute leads to a class", "name it")
        number(self.source)

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        times = start_grid_at(process.times, self.strength)
        x = encode(process, process.unguided(self.source), images, times)
        return EditResult(decode(process, x, times, process.draw)[:, None], [images, process.space.decode(x)])


class Interpolate(Edit):
    """The way from one image to the next in `frames` images, both ends included.

    Both are encoded to the time `strength` by DDIM inversion, or are the noise of two seeds, and what lies between is
    taken on the great circle: `sin((1 - u) w) / sin(w) x_1 + sin(u w) / sin(w) x_2`, w the angle between them
    (Song et al. 2021a, Sec. 5.3). The input is taken in pairs.
    """

    inputs_each = 2

    def __init__(
        self,
        shape: Shape,
        read_mask: ReadMask,
        *,
        frames: Annotated[int, Field(ge=2)] = 9,
        seeds: list[Seed] | None = None,
        strength: Strength = 0.9,
    ) -> None:
        super().__init__(shape, read_mask)
        self.seeds, self.strength = seeds, strength
        self.results_each = frames
        if seeds is not None and (len(seeds) < 2 or len(seeds) % 2):
            raise UsageError("edit.seeds", seeds, "should be pairs of seeds, as [0,1]")

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        if self.seeds is None:
            times = start_grid_at(process.times, self.strength)
            x = encode(process, process.denoise(2), images, times)
        else:
            times = process.times
            x = process.sampler.schedule.prior_std(times[0]) * images
        first, second = x[0::2], x[1::2]
        path = torch.stack(
            [slerp(first, second, u) for u in torch.linspace(0, 1, self.results_each).tolist()], dim=1
        )

        def draw() -> Tensor:  # all frames of a series share their noise
            return process.draw().repeat_interleave(self.results_each, dim=0)

        frames = decode(process, path.flatten(0, 1), times, draw, self.results_each)
        return EditResult(frames.unflatten(0, path.shape[:2]), [])


def slerp(first: Tensor, second: Tensor, u: float) -> Tensor:
    """The point a share u of the way from one to the other of two states [B, ...] on the great circle between them."""
    a, b = first.flatten(1).double(), second.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1)).clamp(min=1e-6)[:, None]  # parallel ends: a straight line
    point = torch.sin((1 - u) * angle) / torch.sin(angle) * a + torch.sin(u * angle) / torch.sin(angle) * b
    return point.view_as(first).to(first)
