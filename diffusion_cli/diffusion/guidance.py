"""Guidance: denoisers that wrap a denoiser and lean towards a class.

Everywhere a scale w multiplies the step from a weaker prediction to a stronger one. What is mixed is the network's
output F; x_0 and eps are both linear in it, so that they are mixed alike.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Protocol, runtime_checkable

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from diffusion_cli.diffusion.denoiser import (
    Denoise,
    Denoiser,
    NoiseConditioned,
    NoisyClassifier,
    Prediction,
    add_score,
    threshold_x0,
)
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.errors import NO_VALUE, UsageError

Quantile = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Threshold = Annotated[float, Field(ge=1)]


@runtime_checkable
class Guides(Protocol):
    """Gives the trained networks that a guidance names; UsageError where one does not go with the denoiser."""

    def denoiser(self, run: str | None, step: int | None) -> Denoiser:
        """The denoiser of another run, or of another checkpoint of the same run."""
        ...

    def classifier(self, run: str) -> NoisyClassifier:
        """The classifier of a run."""
        ...


class Guidance(ABC):
    """A way to condition a denoiser on classes; without labels it is unconditional."""

    def guides(self) -> Sequence[NoiseConditioned]:
        """Return the networks that it calls in addition to the guided one."""
        return ()

    uses_labels = False
    """Whether it uses labels even with an unconditional denoiser."""

    def check(self, denoiser: Denoiser, label_dropout: float, labelled: bool) -> None:  # noqa: B027
        """Raise UsageError if a denoiser, trained with such label dropout, cannot be guided so."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, y: Tensor | None) -> Denoise:
        """Return the guided denoiser for images of the classes y, int64 [B]."""


class NoGuidance(Guidance):
    """The denoiser as it was trained, conditioned on the class if it is class-conditional."""

    def __init__(self, guides: Guides | None = None) -> None:
        pass

    def __call__(self, denoiser: Denoiser, y: Tensor | None) -> Denoise:
        return lambda x_t, t: denoiser(x_t, t, y)


class Guided(Guidance):
    """Guidance of some scale, where the noise level lies within an interval.

    `interval` = [low, high] acts where low < sigma / alpha <= high (Kynkaanniemi et al. 2024, Eq. 5); outside it, and
    at the scale that is off, the denoiser alone is asked, once. `dynamic_threshold` is the quantile of
    `threshold_x0`, `max_threshold` its largest value, both null: none.
    """

    off: float
    """The scale that changes nothing."""

    def __init__(
        self,
        scale: float,
        interval: list[float] | None,
        dynamic_threshold: float | None,
        max_threshold: float | None,
    ) -> None:
        if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
            raise UsageError(
                "guidance.interval",
                interval,
                "should be two levels of sigma / alpha, the lower first, as [0.3,3]",
            )
        if max_threshold is not None and dynamic_threshold is None:
            raise UsageError(
                "guidance.max_threshold",
                max_threshold,
                "bounds a threshold that is not taken",
                "set guidance.dynamic_threshold too",
            )
        self.scale = scale
        self.low, self.high = interval or (0.0, math.inf)
        self.quantile = dynamic_threshold
        self.largest = math.inf if max_threshold is None else max_threshold

    def active(self, schedule: Schedule, t: Tensor) -> bool:
        """Whether there is guidance at time t."""
        return self.scale != self.off and self.low < math.exp(-float(schedule.log_snr(t)) / 2) <= self.high

    @abstractmethod
    def guided(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        """Return the prediction for images x_t [B, C, H, W] at the one time t, where there is guidance."""

    def __call__(self, denoiser: Denoiser, y: Tensor | None) -> Denoise:
        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            if self.active(denoiser.schedule, t):
                return self.guided(denoiser, x_t, t, y)
            return denoiser(x_t, t, y)

        if self.quantile is None:
            return guided
        return threshold_x0(guided, denoiser.schedule, self.quantile, self.largest)


class LinearGuidance(Guided):
    """`F_weak + w (F_strong - F_weak)` of two predictions, of which w = 1 leaves the strong one.

    `rescale` = phi goes a share phi of the way from there to `F std(F_strong) / std(F)`, each image by itself (Lin
    et al. 2024, Eq. 15-16, with the unbiased std of diffusers).
    """

    off = 1.0

    def __init__(
        self,
        guides: Guides | None = None,
        *,
        scale: NonNegativeFloat = 2.0,
        interval: list[NonNegativeFloat] | None = None,
        rescale: Share = 0.0,
        dynamic_threshold: Quantile | None = None,
        max_threshold: Threshold | None = None,
    ) -> None:
        super().__init__(scale, interval, dynamic_threshold, max_threshold)
        self.rescale = rescale

    def mix(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Return the guided F of two outputs [B, C, H, W]."""
        mixed = weak + self.scale * (strong - weak)
        if not self.rescale:
            return mixed
        dims = list(range(1, mixed.ndim))
        ratio = strong.std(dims, keepdim=True) / mixed.std(dims, keepdim=True)
        return mixed * (self.rescale * ratio + (1 - self.rescale))


class ClassifierFree(LinearGuidance):
    """`F_null + w (F_class - F_null)`, both in one batch (Ho & Salimans 2022, Eq. 6, whose w is ours less 1)."""

    def check(self, denoiser: Denoiser, label_dropout: float, labelled: bool) -> None:
        if denoiser.num_classes is None:
            raise UsageError(
                "guidance",
                "cfg",
                "the model is not class-conditional",
                "train one with model.class_conditional=true, or take guidance=classifier",
            )
        if not labelled:
            raise UsageError(
                "label",
                NO_VALUE,
                "guidance=cfg leads to a class, and none is named",
                "name one, or take guidance=none",
            )
        if self.scale != self.off and label_dropout == 0:
            raise UsageError(
                "guidance",
                "cfg",
                "the model was trained with objective.label_dropout=0, never without a label",
                "train it with 0.1, or take guidance=auto",
            )

    def guided(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        assert y is not None
        assert denoiser.num_classes is not None
        labels = torch.cat([y, torch.full_like(y, denoiser.num_classes)])
        output, variance, coefficients = denoiser.output(torch.cat([x_t, x_t]), t, labels)
        cond, uncond = output.chunk(2)
        variance = None if variance is None else variance.chunk(2)[0]
        return denoiser.read(x_t, t, self.mix(uncond, cond), variance, coefficients)


class AutoGuidance(LinearGuidance):
    """`F_guide + w (F - F_guide)`, the guide a weaker version of the model (Karras et al. 2024, Eq. 3)."""

    def __init__(
        self,
        guides: Guides,
        *,
        run: str | None = None,
        step: NonNegativeInt | None = None,
        scale: NonNegativeFloat = 2.0,
        interval: list[NonNegativeFloat] | None = None,
        rescale: Share = 0.0,
        dynamic_threshold: Quantile | None = None,
        max_threshold: Threshold | None = None,
    ) -> None:
        super().__init__(
            scale=scale,
            interval=interval,
            rescale=rescale,
            dynamic_threshold=dynamic_threshold,
            max_threshold=max_threshold,
        )
        self.guide = guides.denoiser(run, step)

    def guides(self) -> Sequence[NoiseConditioned]:
        return (self.guide,)

    def guided(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        weak, _, _ = self.guide.output(x_t, t, y)
        strong, variance, coefficients = denoiser.output(x_t, t, y)
        return denoiser.read(x_t, t, self.mix(weak, strong), variance, coefficients)


class ClassifierGuidance(Guided):
    """Add s times the gradient of a classifier's log p(y | x_t) to the score (Dhariwal & Nichol 2021, Alg. 2).

    s = 0 is off; s = 1 turns an unconditional denoiser into the class-conditional one by Bayes' rule. The denoiser
    itself gets the class if it is class-conditional. A step of DDPM moves by v / a times the gradient, where their
    Alg. 1 moves its mean by the variance times the gradient: the same in the limit of small steps.
    """

    off = 0.0
    uses_labels = True

    def __init__(
        self,
        guides: Guides,
        *,
        run: str,
        scale: NonNegativeFloat = 1.0,
        interval: list[NonNegativeFloat] | None = None,
        dynamic_threshold: Quantile | None = None,
        max_threshold: Threshold | None = None,
    ) -> None:
        super().__init__(scale, interval, dynamic_threshold, max_threshold)
        self.classifier = guides.classifier(run)

    def check(self, denoiser: Denoiser, label_dropout: float, labelled: bool) -> None:
        if not labelled:
            raise UsageError(
                "label", "none", "guidance=classifier leads to a class", "name one, or take guidance=none"
            )

    def guides(self) -> Sequence[NoiseConditioned]:
        return (self.classifier,)

    def guided(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, y: Tensor | None) -> Prediction:
        assert y is not None
        gradient = self.scale * self.classifier.gradient(x_t, t, y)
        return add_score(denoiser(x_t, t, y), gradient, denoiser.schedule, t)
