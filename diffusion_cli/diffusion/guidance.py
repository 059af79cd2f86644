"""Guidance: wrappers that steer a denoiser towards a class or away from a weaker model.

A scale w multiplies the difference between a weaker and a stronger prediction. Predictions are combined as network
outputs F; x_0 and eps are linear in F, so this equals combining them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.condition import LABEL, is_missing
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
    """Provides the additional trained networks that a guidance uses; UsageError if one does not fit the denoiser."""

    def denoiser(self, run: str | None, step: int | None) -> Denoiser:
        """Return the denoiser of another run, or of another checkpoint of this run."""
        ...

    def classifier(self, run: str) -> NoisyClassifier:
        """Return the classifier of a run."""
        ...


class Dropouts(NamedTuple):
    """Probabilities with which a network was trained without its conditions."""

    together: float
    """Probability of training without all conditions."""
    alone: float
    """Probability of training without each one of several conditions."""


class Guidance(ABC):
    """Base class of guidance of a denoiser by its condition; without a condition it is unconditional."""

    def guides(self) -> Sequence[NoiseConditioned]:
        """Return the networks called in addition to the guided one."""
        return ()

    uses_labels = False
    """Whether it uses labels even with an unconditional denoiser."""

    def check(self, denoiser: Denoiser, dropouts: Dropouts, given: Collection[str]) -> None:  # noqa: B027
        """Raise UsageError if a denoiser cannot be guided this way, for values with the names `given`."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, y: Condition | None) -> Denoise:
        """Return the guided denoiser for images with condition y."""


class NoGuidance(Guidance):
    """No guidance: the denoiser, conditioned on the class if class-conditional."""

    def __init__(self, guides: Guides | None = None) -> None:
        pass

    def __call__(self, denoiser: Denoiser, y: Condition | None) -> Denoise:
        return lambda x_t, t: denoiser(x_t, t, y)


class Guided(Guidance):
    """Base class of guidance with a scale, optionally restricted to an interval of noise levels.

    Outside the interval, or if the scale is `off`, only the denoiser itself is evaluated.

    Args:
        scale: guidance scale.
        interval: [low, high] in sigma / alpha, active for `low < sigma / alpha <= high` (Kynkäänniemi et al. 2024,
            Eq. 5); None: always.
        dynamic_threshold: quantile of `threshold_x0`; None: no thresholding.
        max_threshold: largest threshold of `threshold_x0`; None: unlimited.
    """

    off: float
    """Scale without effect."""

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
                "must be two increasing levels of sigma / alpha",
                "use for example [0.3,3]",
            )
        if max_threshold is not None and dynamic_threshold is None:
            raise UsageError(
                "guidance.max_threshold",
                max_threshold,
                "has no effect without guidance.dynamic_threshold",
                "set guidance.dynamic_threshold too",
            )
        self.scale = scale
        self.low, self.high = interval or (0.0, math.inf)
        self.quantile = dynamic_threshold
        self.largest = math.inf if max_threshold is None else max_threshold

    def active(self, schedule: Schedule, t: Tensor) -> bool:
        """Return whether guidance is active at time t."""
        return not self.is_off and self.low < math.exp(-float(schedule.log_snr(t)) / 2) <= self.high

    @property
    def is_off(self) -> bool:
        """Whether the scale has no effect."""
        return self.scale == self.off

    @abstractmethod
    def guided(self, denoiser: Denoiser, y: Condition | None) -> Denoise:
        """Return the denoiser, guided at all noise levels, for images with condition y at a common time."""

    def __call__(self, denoiser: Denoiser, y: Condition | None) -> Denoise:
        guided = None if self.is_off else self.guided(denoiser, y)

        def within_interval(x_t: Tensor, t: Tensor) -> Prediction:
            if guided is None or not self.active(denoiser.schedule, t):
                return denoiser(x_t, t, y)
            return guided(x_t, t)

        if self.quantile is None:
            return within_interval
        return threshold_x0(within_interval, denoiser.schedule, self.quantile, self.largest)


class LinearGuidance(Guided):
    """Linear guidance of two predictions, `F_weak + w (F_strong - F_weak)`; w = 1 gives F_strong.

    Args:
        scale: guidance scale w.
        interval: see `Guided`.
        rescale: fraction phi in [0, 1] by which the standard deviation of F is restored to that of F_strong, per
            image (Lin et al. 2024, Eq. 15-16, with the unbiased std of diffusers).
        dynamic_threshold: see `Guided`.
        max_threshold: see `Guided`.
    """

    off = 1.0

    def __init__(
        self,
        scale: float,
        interval: list[float] | None,
        rescale: float,
        dynamic_threshold: float | None,
        max_threshold: float | None,
    ) -> None:
        super().__init__(scale, interval, dynamic_threshold, max_threshold)
        self.rescale = rescale

    def mix(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Return the guided F from two outputs [B, C, H, W]."""
        return self.rescaled(weak + self.scale * (strong - weak), strong)

    def rescaled(self, mixed: Tensor, strong: Tensor) -> Tensor:
        """Return the guided F with its standard deviation restored to that of F_strong."""
        if not self.rescale:
            return mixed
        dims = list(range(1, mixed.ndim))
        ratio = strong.std(dims, keepdim=True) / mixed.std(dims, keepdim=True)
        return mixed * (self.rescale * ratio + (1 - self.rescale))


class ClassifierFree(LinearGuidance):
    """Classifier-free guidance, `F_0 + sum_k w_k (F_k - F_(k-1))`, evaluated in one batch.

    F_0 is the output without conditions, and F_k that with the first k ones; the last has all. The conditions with a
    scale of their own come first, in the order of `scales`. The others together have `scale`, and alone they give
    `F_0 + w (F_1 - F_0)`. Neighbours of the same scale are one.

    Args:
        guides: unused.
        scale: guidance scale w of all conditions that `scales` leaves out.
        scales: guidance scales by name of a condition; None: `scale` for all.
        interval: see `Guided`.
        rescale: see `LinearGuidance`, where F_strong has all conditions.
        dynamic_threshold: see `Guided`.
        max_threshold: see `Guided`.

    Source: Ho and Salimans 2022, Eq. 6, where w is smaller by 1; Brooks et al. 2023, Eq. 3, for two conditions.
    """

    negative: Condition | None = None
    """Values of one image for F_0, in place of missing ones, such as a negative prompt; None: all are missing."""

    def __init__(
        self,
        guides: Guides | None = None,
        *,
        scale: NonNegativeFloat = 2.0,
        scales: dict[str, NonNegativeFloat] | None = None,
        interval: list[NonNegativeFloat] | None = None,
        rescale: Share = 0.0,
        dynamic_threshold: Quantile | None = None,
        max_threshold: Threshold | None = None,
    ) -> None:
        super().__init__(scale, interval, rescale, dynamic_threshold, max_threshold)
        self.scales = scales or {}

    @property
    def is_off(self) -> bool:
        return all(scale == self.off for scale in (self.scale, *self.scales.values()))

    def check(self, denoiser: Denoiser, dropouts: Dropouts, given: Collection[str]) -> None:
        names = denoiser.conditions.names
        if not names:
            raise UsageError(
                "guidance",
                "cfg",
                "the model is not class-conditional",
                "train one with model.class_conditional=true, or use guidance=classifier",
            )
        if not given:
            kind = "a class" if denoiser.conditions.only_classes else f"a value of {' or '.join(names)}"
            raise UsageError(
                "label", NO_VALUE, f"guidance=cfg needs {kind}", "name one, or use guidance=none"
            )
        self._check_scales(names, given)
        if self.is_off:
            return
        if dropouts.together == 0:
            raise UsageError(
                "guidance",
                "cfg",
                "the model was trained with objective.label_dropout=0, so never without a label",
                "train it with 0.1, or use guidance=auto",
            )
        if len(self.groups([name for name in names if name in given])) > 1 and dropouts.alone == 0:
            raise UsageError(
                "guidance.scales",
                self.scales,
                "the model was trained with objective.single_dropout=0, so always with all of its conditions or none",
                "use one guidance.scale for all, or train it with objective.single_dropout=0.1",
            )

    def _check_scales(self, names: Sequence[str], given: Collection[str]) -> None:
        for name, scale in self.scales.items():
            key = f"guidance.scales.{name}"
            if name not in names:
                raise UsageError(
                    key, scale, "the model has no condition of this name", f"choose from {', '.join(names)}"
                )
            if name not in given:
                raise UsageError(
                    key, scale, f"no value of {name} is given", "give one, or leave the scale out"
                )

    def groups(self, names: Sequence[str]) -> list[tuple[list[str], float]]:
        """Return the conditions of these names that join the chain together, and their scales, in order."""
        single = [([name], scale) for name, scale in self.scales.items() if name in names]
        others = [name for name in names if name not in self.scales]
        groups: list[tuple[list[str], float]] = []
        for group, scale in [*single, *([(others, self.scale)] if others else [])]:
            if groups and groups[-1][1] == scale:
                groups[-1][0].extend(group)
            else:
                groups.append((group, scale))
        return groups

    def ignores_negative(self, name: str, names: Sequence[str]) -> bool:
        """Return whether a negative value of `name` has no effect, for values with these names in order.

        F_k has the negative value before the condition joins, and F_0 is left out if its scale is 1.
        """
        first, scale = self.groups(names)[0]
        return scale == self.off and name in first

    def guided(self, denoiser: Denoiser, y: Condition | None) -> Denoise:
        assert y is not None
        sides, scales = self._chain(denoiser.conditions.names, y)
        if not scales:
            return lambda x_t, t: denoiser(x_t, t, sides[-1])
        joined = Condition.cat(sides[::-1])

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            output, variance, coefficients = denoiser.output(torch.cat([x_t] * len(sides)), t, joined)
            strong, *_ = outputs = output.chunk(len(sides))
            mixed, *stronger = weaker = outputs[::-1]
            for scale, before, now in zip(scales, weaker, stronger, strict=False):
                mixed = mixed + scale * (now - before)
            variance = None if variance is None else variance.chunk(len(sides))[0]
            return denoiser.read(x_t, t, self.rescaled(mixed, strong), variance, coefficients)

        return guided

    def _chain(self, names: Sequence[str], y: Condition) -> tuple[list[Condition], list[float]]:
        """Return the conditions of F_0 to F_n, and the scales between neighbours; without F_0 if the first one is 1.

        Args:
            names: names of the conditions of the model.
            y: values of the images.
        """
        negative = Condition()
        if self.negative is not None:
            device = next(iter(y.values.values())).device
            negative = self.negative.repeat_interleave(len(y)).to(device)
        y = negative.dropped().replaced(y.values)  # other names of `negative` are missing on the strong side
        weakest = y.dropped().replaced(negative.values)
        groups = self.groups(_given(names, y, weakest))
        sides, scales = [weakest], [scale for _, scale in groups]
        for group, _ in groups:
            sides.append(sides[-1].replaced({name: y.values[name] for name in group}))
        if scales[0] == self.off:  # F_0 + (F_1 - F_0) is F_1
            return sides[1:], scales[1:]
        return sides, scales


def _given(names: Sequence[str], *sides: Condition) -> list[str]:
    """Return the names with a value for some image of some side; all that y has if there is none."""
    known = [name for name in names if name in sides[0].values]
    given = [name for name in known if not all(is_missing(side.values[name]).all() for side in sides)]
    return given or known


class AutoGuidance(LinearGuidance):
    """Autoguidance, `F_guide + w (F - F_guide)`, where the guide is a weaker version of the model.

    Args:
        guides: provider of the guide.
        run: run of the guide; None: this run.
        step: step of the guide's checkpoint; None: the last.
        scale: guidance scale w.
        interval: see `Guided`.
        rescale: see `LinearGuidance`.
        dynamic_threshold: see `Guided`.
        max_threshold: see `Guided`.

    Source: Karras et al. 2024, Eq. 3.
    """

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
        super().__init__(scale, interval, rescale, dynamic_threshold, max_threshold)
        self.guide = guides.denoiser(run, step)

    def guides(self) -> Sequence[NoiseConditioned]:
        return (self.guide,)

    def guided(self, denoiser: Denoiser, y: Condition | None) -> Denoise:
        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            weak, _, _ = self.guide.output(x_t, t, y)
            strong, variance, coefficients = denoiser.output(x_t, t, y)
            return denoiser.read(x_t, t, self.mix(weak, strong), variance, coefficients)

        return guided


class ClassifierGuidance(Guided):
    """Classifier guidance: adds s times the gradient of log p(y | x_t) to the score.

    s = 1 turns an unconditional denoiser into a class-conditional one by Bayes' rule. A class-conditional denoiser
    also gets the class. In a DDPM step, the gradient is multiplied by v / a instead of the variance of Alg. 1, which
    is the same in the limit of small steps.

    Args:
        guides: provider of the classifier.
        run: run of the classifier.
        scale: guidance scale s; 0: off.
        interval: see `Guided`.
        dynamic_threshold: see `Guided`.
        max_threshold: see `Guided`.

    Source: Dhariwal and Nichol 2021, Alg. 2.
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

    def check(self, denoiser: Denoiser, dropouts: Dropouts, given: Collection[str]) -> None:
        if denoiser.conditions.has_other_label:
            raise UsageError(
                "guidance", "classifier", "the label of this model is no class", "use guidance=cfg"
            )
        if LABEL not in given:
            raise UsageError(
                "label", "none", "guidance=classifier needs a class", "name one, or use guidance=none"
            )

    def guides(self) -> Sequence[NoiseConditioned]:
        return (self.classifier,)

    def guided(self, denoiser: Denoiser, y: Condition | None) -> Denoise:
        labels = Condition.of(y).get(LABEL)
        assert labels is not None

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            gradient = self.scale * self.classifier.gradient(x_t, t, labels)
            return add_score(denoiser(x_t, t, y), gradient, denoiser.schedule, t)

        return guided
