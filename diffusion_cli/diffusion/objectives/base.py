"""Base class of training objectives."""

from abc import ABC, abstractmethod
from typing import Annotated, Generic, TypeVar

from pydantic import Field
from torch import Tensor, nn

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import UsageError, option_name

Dropout = Annotated[float, Field(ge=0, lt=1)]
Model = TypeVar("Model", bound=NoiseConditioned, contravariant=True)


class Objective(ABC, Generic[Model]):
    """Base class of objectives: the loss of a network on noisy images."""

    trains: type[NoiseConditioned] = Denoiser
    label_dropout: float = 0.0
    """Probability of dropping all conditions of an image in training (Ho and Salimans 2022, Alg. 1)."""
    single_dropout: float = 0.0
    """With several conditions: probability of dropping each one alone."""
    step: int | None = None
    """Optimizer step of the batch, from 0, for objectives that change with it; None in validation."""
    part: int = 0
    """Part of the batch of an optimizer step, from 0, with gradient accumulation."""
    repeats: int = 1
    """Number of optimizer steps in a row that get the same images and noise, at other times."""
    most_val_images: int | None = None
    """Largest number of images in a validation, for objectives with an expensive loss; None: all."""
    compares_to_zero: bool = True
    """Whether the loss of a trained network is well below that of predicting zero.

    False for objectives with most of their weight at low noise, where no network can predict much.
    """

    @abstractmethod
    def __call__(self, model: Model, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        """Noise x0 [B, C, H, W] with eps to times t [B], and return the loss of each image, [B]."""

    @property
    def learned(self) -> nn.Module | None:
        """Learned part of the loss that training minimizes, not of the model; checkpoints store it."""
        return None

    def minimized(self, loss: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
        """Return the losses that training minimizes, [B], from those of the images at times t, [B]."""
        return loss

    @abstractmethod
    def check(self, model: Model, times: Times) -> None:
        """Raise UsageError if the objective cannot train the model at these times, or would leave a part untrained."""


def require_uniform(times: Times, problem: str, remedy: str) -> None:
    """Raise UsageError with a problem and a remedy unless the weighted times are uniform."""
    if not times.uniform:
        raise UsageError("time_sampling", option_name(type(times).__name__), problem, remedy)
