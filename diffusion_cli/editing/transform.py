"""Edits that noise or invert an image partially, and sample from there."""

from collections import deque
from copy import copy
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.rows import in_turn
from diffusion_cli.diffusion.denoiser import Denoise, noised
from diffusion_cli.editing.base import Edit, EditProcess, EditResult, Shape
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers import NoiseFn, integrate, invert, reporting, start_grid_at

Seed = Annotated[int, Field(ge=0, le=4294967295)]
Strength = Annotated[float, Field(ge=0.001, le=1)]
AttributeValue = bool | int | float | str | None
"""Value of an attribute in a command: yes or no, a number, or the name of a category; None: missing."""


def decode(process: EditProcess, x: Tensor, times: Tensor, draw: NoiseFn, repeat: int = 1) -> Tensor:
    """Sample images from the states x at times[0], with `repeat` consecutive images per result."""
    denoise = reporting(process.denoise(repeat), times, process.advance)
    (x,) = deque(integrate(process.sampler, denoise, x, times, draw), maxlen=1)
    return process.space.decode(x)


def encode(process: EditProcess, denoise: Denoise, images: Tensor, times: Tensor) -> Tensor:
    """Encode images to states at times[0] by DDIM inversion."""
    denoise = reporting(denoise, times.flip(0), process.advance)
    (x,) = deque(invert(process.sampler.schedule, denoise, process.space.encode(images), times), maxlen=1)
    return x


class PartialNoising(Edit):
    """Base class of edits that start sampling at an intermediate time.

    Args:
        shape: shape of the model's images.
        strength: the time, in [0.001, 1].
    """

    def __init__(self, shape: Shape, *, strength: Strength = 0.9) -> None:
        super().__init__(shape)
        self.strength = strength


class Img2Img(PartialNoising):
    """SDEdit: noises an image to the time `strength`, and samples from there (Meng et al. 2022, Alg. 1).

    Turns images of another style, such as drawings, into the style of the training data. See `PartialNoising` for the
    arguments.
    """

    starts_from_noise = True
    before_names = ("given", "noised")

    def __init__(self, shape: Shape, *, strength: Strength = 0.5) -> None:
        super().__init__(shape, strength=strength)

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        times = start_grid_at(process.times, self.strength)
        x = noised(process.sampler.schedule, process.space.encode(images), times[0], process.draw())
        return EditResult(decode(process, x, times, process.draw)[:, None], [images, process.space.decode(x)])


class Reconstruct(PartialNoising):
    """Reconstruction by DDIM inversion to the time `strength` and sampling; see `PartialNoising` for the arguments."""

    deterministic = True
    before_names = ("given", "encoded")
    inverts = True
    passes = 2

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        times = start_grid_at(process.times, self.strength)
        x = encode(process, process.denoise(), images, times)
        back = decode(process, x, times, process.draw)
        return EditResult(back[:, None], [images, process.space.decode(x)], lambda x: x - images)


class Attribute(Edit):
    """Attribute change: turns images with some classes or attributes into images with others (Su et al. 2023).

    Encodes by DDIM inversion with the attributes of the input, and decodes by the guided denoiser with those of the
    result. Where the variance does not depend on the attributes, only the mean changes.

    Args:
        shape: shape of the model's images.
        source: class of the inputs, by index or name, or their attributes by name, such as `{species: cat}`; None:
            those of their split or table with `to`, else unconditional.
        to: attributes that change, by name, such as `{glasses: true}`; the others stay. None: results have the classes
            and attributes of `label`.
        strength: time of the inversion, in [0.001, 1].
    """

    before_names = ("given", "encoded")
    inverts = True
    passes = 2

    def __init__(
        self,
        shape: Shape,
        *,
        source: int | str | dict[str, AttributeValue] | None = None,
        to: dict[str, AttributeValue] | None = None,
        strength: Strength = 0.7,
    ) -> None:
        super().__init__(shape)
        if to == {}:
            raise UsageError("edit.to", "{}", "names no attribute", "name one, or set null for label=")
        self.source, self.to, self.strength = source, to, strength
        self.given: Condition | None = None
        """Conditions of the inputs in turn; None: unconditional."""

    def of_inputs(self, given: Condition | None) -> Self:
        """Return this edit for inputs with conditions `given`, repeated; None: unconditional."""
        edit = copy(self)
        edit.given = given
        return edit

    def of(self, places: list[int]) -> Self:
        if self.given is None:
            return self
        return self.of_inputs(self.given.rows(in_turn(places, len(self.given))))

    def content(self) -> dict[str, Tensor]:
        given = {} if self.to is None or self.given is None else self.given.values
        return {f"given_{name}": value for name, value in given.items()}

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        times = start_grid_at(process.times, self.strength)
        given = None if self.given is None else self.given.to(images.device)
        x = encode(process, process.unguided(given), images, times)
        return EditResult(decode(process, x, times, process.draw)[:, None], [images, process.space.decode(x)])


class Interpolate(Edit):
    """Interpolation between pairs of images, or between the noise of pairs of seeds.

    Images are encoded by DDIM inversion. Intermediate states lie on the great circle between the ends:
    `sin((1 - u) w) / sin(w) x_1 + sin(u w) / sin(w) x_2`, where w is the angle between them.

    Args:
        shape: shape of the model's images.
        frames: images per series, including both ends.
        seeds: pairs of seeds, instead of input images; None: input images.
        strength: time of the inversion, in [0.001, 1].

    Source: Song et al. 2021a, Sec. 5.3.
    """

    inputs_each = 2

    def __init__(
        self,
        shape: Shape,
        *,
        frames: Annotated[int, Field(ge=2)] = 9,
        seeds: list[Seed] | None = None,
        strength: Strength = 0.9,
    ) -> None:
        super().__init__(shape)
        self.seeds, self.strength = seeds, strength
        self.inverts = seeds is None
        self.passes = 2 if self.inverts else 1
        self.results_each = frames
        if seeds is not None and (len(seeds) < 2 or len(seeds) % 2):
            raise UsageError("edit.seeds", seeds, "must be pairs of seeds", "use for example [0,1]")

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

        def draw() -> Tensor:  # all frames of a series share noise
            return process.draw().repeat_interleave(self.results_each, dim=0)

        frames = decode(process, path.flatten(0, 1), times, draw, self.results_each)
        return EditResult(frames.unflatten(0, path.shape[:2]), [])


def slerp(first: Tensor, second: Tensor, u: float) -> Tensor:
    """Return the point at fraction u of the great circle between two states [B, ...]."""
    a, b = first.flatten(1).double(), second.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1)).clamp(min=1e-6)[:, None]  # parallel states: a straight line
    point = torch.sin((1 - u) * angle) / torch.sin(angle) * a + torch.sin(u * angle) / torch.sin(angle) * b
    return point.view_as(first).to(first)
