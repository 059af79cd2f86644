"""What an edit is, and what it is given to work with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.latents import Space
from diffusion_cli.editing.operators import LinearOperator
from diffusion_cli.samplers import NoiseFn, Sampler

Shape = tuple[int, ...]

ReadMask = Callable[[str], Tensor]
"""Gives a gray image file as uint8 [H, W]."""


@dataclass(frozen=True)
class EditProcess:
    """How images are sampled in an edit of a batch."""

    sampler: Sampler
    times: Tensor
    """The falling grid of the sampler."""
    labels: Tensor | None
    """The classes of the B results, int64 [B], or None."""
    guided: Callable[[Tensor | None], Denoise]
    """Returns the guided denoiser conditioned on labels."""
    unguided: Callable[[int | str | None], Denoise]
    """Returns the unguided denoiser conditioned on one class, by name or number; None: unconditional."""
    method: "RestorationMethod | None"
    draw: NoiseFn
    """Noise of the shape of the states of the results, one stream an image."""
    space: Space
    """Where sampling happens: edits are given images and give images."""

    def start(self) -> Tensor:
        """Return noise as sampling starts from it."""
        return self.sampler.schedule.prior_std(self.times[0]) * self.draw()

    def denoise(self, repeat: int = 1) -> Denoise:
        """Return the guided denoiser for `repeat` images in a row of each result."""
        return self.guided(None if self.labels is None else self.labels.repeat_interleave(repeat))


class RestorationMethod(ABC):
    """A way to sample images that agree with a measurement."""

    differentiates = False
    """Whether it takes the gradient through the network, which then keeps all that it computes."""

    @abstractmethod
    def restore(self, process: EditProcess, operator: LinearOperator, y: Tensor) -> Iterator[Tensor]:
        """Take noise to images [B, C, H, W] whose measurement is about y, and yield the states on the way."""


@dataclass(frozen=True)
class EditResult:
    """B edited images, or as many series of them."""

    images: Tensor
    """[B, N, C, H, W], around [-1, 1]."""
    before: list[Tensor]
    """Images [B, C, H, W] that the edit started from, shown before the results."""
    residual: Callable[[Tensor], Tensor] | None = None
    """Maps images [B, C, H, W] to A x - y, or to x minus the input: [B, ...]."""
    found: Tensor | None = None
    """The sampled images [B, C, H, W], before they were projected onto the measurement."""


class Edit(ABC):
    """A change of images by a trained model; `shape` is that of the model's images."""

    inputs_each = 1
    """Images that go into one result."""
    restores = False
    """Whether it takes a method of restoration."""
    masks = False
    """Whether what it restores is known pixel by pixel."""
    starts_from_noise = False
    """Whether results of unlike seeds differ with any sampler."""
    deterministic = False
    """Whether it needs a sampler that adds no noise."""
    results_each = 1
    """Images that a result is a series of."""
    seeds: list[int] | None = None
    """Seeds whose noise is the input, instead of images."""

    def __init__(self, shape: Shape, read_mask: ReadMask) -> None:
        self.shape = shape

    def check(self, labelled: bool, number: Callable[[int | str | None], int | None]) -> None:  # noqa: B027
        """Raise UsageError if it lacks a label for the results, or names a class of which there is no `number`."""

    def content(self) -> dict[str, Tensor]:
        """Return by name what it read from files, on which the results depend."""
        return {}

    @property
    def results(self) -> Shape:
        """Channels, height and width of the results."""
        return self.shape

    def accepts(self) -> list[Shape]:
        """Return the shapes that input may have, that which `fit` gives it first."""
        return [self.shape]

    @abstractmethod
    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        """Edit images [B, C, H, W] in [-1, 1], each `inputs_each` of which give a result."""
