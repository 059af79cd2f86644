"""Base classes of edits and restoration methods."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, cast

from torch import Tensor

from diffusion_cli.conditions import Condition, ImageCondition
from diffusion_cli.conditions.operators import LinearOperator, Measurement
from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.latents import Space
from diffusion_cli.samplers import Advance, NoiseFn, Sampler, unreported

Shape = tuple[int, ...]


@dataclass(frozen=True)
class EditProcess:
    """Sampling settings and functions for an edit of a batch."""

    sampler: Sampler
    times: Tensor
    """Decreasing times of the sampler."""
    condition: Condition | None
    """Condition of the B results, or None."""
    guided: Callable[[Condition | None], Denoise]
    """Returns the guided denoiser with a condition."""
    unguided: Callable[[Condition | None], Denoise]
    """Returns the unguided denoiser with a condition; None: unconditional."""
    method: "RestorationMethod | None"
    draw: NoiseFn
    """Returns noise in the shape of the states of the results, with one stream per image."""
    space: Space
    """State space of sampling; edits convert from and to images."""
    advance: Advance = unreported
    """Takes each share of a pass through the times that is done; an edit has `Edit.passes`."""
    seeds: Sequence[int] = ()
    """Seeds of random choices about the B inputs, which are independent of the noise of `draw`."""
    input_seeds: Sequence[int] = ()
    """Seeds of the B inputs; the variations of an input have the same seed."""
    sigma_y: Tensor | float = 0.0
    """Standard deviation of the noise of the measurement, common or one per image [B, 1, ...]."""

    def start(self) -> Tensor:
        """Return the initial noise of sampling."""
        return self.sampler.schedule.prior_std(self.times[0]) * self.draw()

    def denoise(self, repeat: int = 1) -> Denoise:
        """Return the guided denoiser for `repeat` consecutive images per result."""
        return self.guided(None if self.condition is None else self.condition.repeat_interleave(repeat))

    def restored(self, operator: Measurement, y: Tensor) -> Tensor:
        """Return images that are sampled by the method with a measurement y of states by the operator."""
        assert self.method is not None
        assert isinstance(operator, self.method.takes)
        taken = cast(LinearOperator, operator)  # or what the method takes beyond
        (x,) = deque(self.method.restore(self, taken, y), maxlen=1)
        return self.space.decode(x)


class RestorationMethod(ABC):
    """Base class of restoration methods, which sample images that agree with a measurement."""

    differentiates = False
    """Whether it needs gradients through the network, which increases memory use."""
    takes: type[Measurement] = LinearOperator
    """Base class of the measurements that it takes."""

    def check(self, sampler: Sampler) -> None:
        """Raise UsageError for a sampler with which the method has no meaning; none by default."""
        del sampler

    @abstractmethod
    def restore(self, process: EditProcess, operator: LinearOperator, y: Tensor) -> Iterator[Tensor]:
        """Sample states of images with a measurement of about y, and yield the state after each step."""


@dataclass(frozen=True)
class EditResult:
    """B edited images, or B series of images."""

    images: Tensor
    """Edited images [B, N, C, H, W] in about [-1, 1]."""
    before: list[Tensor]
    """Images [B, C, H, W] to show before the results, such as the input."""
    residual: Callable[[Tensor], Tensor] | None = None
    """Function from images [B, C, H, W] to A x - y, or to x minus the input: [B, ...]."""
    found: Tensor | None = None
    """Sampled images [B, C, H, W] before the projection onto the measurement, or None."""
    maps: Tensor | None = None
    """Map of the anomalies of each image [B, *sizes], in units of x, or None."""


class LargerShapes(list[Shape]):
    """Shapes of inputs that may also be larger: each stands for all shapes of its channels with no smaller size."""

    def __contains__(self, shape: object) -> bool:
        return isinstance(shape, tuple) and any(
            len(shape) == len(least)
            and shape[0] == least[0]
            and all(size >= smallest for size, smallest in zip(shape[1:], least[1:], strict=True))
            for least in self
        )


class Edit(ABC):
    """Base class of edits.

    Args:
        shape: shape of the model's images.
    """

    inputs_each = 1
    """Number of input images per result."""
    restores = False
    """Whether it uses a restoration method."""
    measures = False
    """Whether it needs a measurement, which `measured_by` takes."""
    noise_key: str | None = None
    """Key of the noise of the measurement; None for an exact one."""
    starts_from_noise = False
    """Whether results depend on the seed even with a deterministic sampler."""
    deterministic = False
    """Whether it needs a deterministic sampler."""
    inverts = False
    """Whether it encodes images by DDIM inversion."""
    passes = 1
    """Number of passes through the times that it reports by `EditProcess.advance`."""
    results_each = 1
    """Number of images of a result; more than 1 for a series that is evenly spaced from 0 to 1."""
    before_names: tuple[str, ...] = ()
    """Names of the images in `EditResult.before`; the last ones, if an input has fewer images."""
    before_of_seed = 0
    """Number of the last images in `EditResult.before` that depend on the seed, so on the variation of an input."""
    seeds: list[int] | None = None
    """Seeds of noise that replaces input images, or None."""
    mask_path: str | None = None
    """Mask file, or folder or ZIP of masks, that must be read for `masked`; None if the edit needs none."""

    unrecorded: tuple[str, ...] = ()
    """Names of options on which the results do not depend."""
    takes_condition_image = False
    """Whether the inputs are condition images of the model, which `conditioned` describes."""
    most_at_once: int | None = None
    """Largest number of images of the model's size in a network call; None: unlimited."""

    known: Tensor | None = None
    """Region of the results that does not change, bool [1 or N, 1, *sizes], if the measurement is a mask of pixels."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def masked(self, painted: Tensor) -> Self:
        """Return this edit with the regions that `mask_path` marks, such as those to paint.

        Args:
            painted: bool [1 or N, 1, *sizes], one region per input, or one for all.

        Raises:
            UsageError: the regions do not suit the edit.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no mask")

    def measured_by(self, measurement: Measurement) -> Self:
        """Return this edit with a measurement of the inputs; UsageError if its noise does not suit the options."""
        raise NotImplementedError(f"{type(self).__name__} takes no measurement")

    def conditioned(self, image: ImageCondition, channels: int) -> Self:
        """Return this edit for a model with a condition image of this number of channels.

        Raises:
            UsageError: the model has another condition image than the options of the edit need.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no condition image")

    def of_rows(self) -> Self:
        """Return this edit for images of a dataset, which have their condition images as further channels."""
        raise NotImplementedError(f"{type(self).__name__} takes no condition image")

    def sized(self, shape: Shape) -> Self:
        """Return this edit for inputs of one of the accepted shapes; UsageError if it does not suit the options."""
        return self

    def of(self, places: list[int]) -> Self:
        """Return this edit for the inputs with these indices, one per result of a batch."""
        return self

    def content(self) -> dict[str, Tensor]:
        """Return the data read from files that the results depend on, by name."""
        return {}

    @property
    def results(self) -> Shape:
        """Shape of the results, [C, H, W]."""
        return self.shape

    def accepts(self) -> list[Shape]:
        """Return the valid shapes of input images, with that of `fit` first."""
        return [self.shape]

    @abstractmethod
    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        """Edit images [B, C, H, W] in [-1, 1]; every `inputs_each` consecutive images give one result."""
