"""A guided denoiser of a mixture in closed form."""

import torch
from torch import Tensor, nn

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.diffusion.guidance import ClassifierFree, ClassifierGuidance

OFF = {"interval": None, "dynamic_threshold": None, "max_threshold": None}
T = 1000


class Exact(nn.Module):
    """The perfect eps of the mixture as a class-conditional network; class 3 is the null class."""

    num_classes = 3

    def __init__(self, mixture, schedule, gain=1.0):
        super().__init__()
        self.mixture, self.schedule, self.gain = mixture, schedule, gain
        self.batches: list[int] = []

    def levels(self, c_noise):
        return self.schedule((c_noise.double() + 1) / T)

    def forward(self, x, c_noise, y):
        self.batches.append(len(x))
        alpha, sigma = self.levels(c_noise)
        x0 = self.mixture.denoise(x, alpha, sigma)
        if y is not None:
            told = self.mixture.denoise(x, alpha, sigma, y.clamp(max=2))
            x0 = torch.where((y < 3).view(-1, 1, 1, 1), told, x0)
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in (alpha, sigma))
        return self.gain * (x.double() - alpha * x0) / sigma


class Bayes(nn.Module):
    """The perfect classifier of the mixture's components."""

    task = "classifier"

    def __init__(self, mixture, schedule):
        super().__init__()
        self.exact = Exact(mixture, schedule)

    def forward(self, x, c_noise):
        mixture = self.exact.mixture
        alpha, sigma = self.exact.levels(c_noise)
        density = [mixture.log_prob(x, alpha, sigma, label) for label in range(3)]
        return torch.stack(density, dim=-1) + mixture.weights.log()


class Given:
    """Guides that are at hand."""

    def __init__(self, denoiser: Denoiser | None = None, classifier: NoisyClassifier | None = None) -> None:
        self.one, self.other = denoiser, classifier

    def denoiser(self, run: str | None, step: int | None) -> Denoiser:
        assert self.one is not None
        return self.one

    def classifier(self, run: str) -> NoisyClassifier:
        assert self.other is not None
        return self.other


def cfg(scale: float, rescale: float = 0.0, **options) -> ClassifierFree:
    return ClassifierFree(Given(), scale=scale, rescale=rescale, **{**OFF, **options})


def by(classifier, scale: float, **options) -> ClassifierGuidance:
    return ClassifierGuidance(Given(classifier=classifier), run="", scale=scale, **{**OFF, **options})


def labels(k: int, count: int = 4) -> Tensor:
    return torch.full((count,), k)


def classes(k: int, count: int = 4) -> Condition:
    return Condition.of(labels(k, count))


class Untold(Exact):
    """The perfect eps of the mixture as a network that takes no notice of classes."""

    num_classes = None  # type: ignore[assignment]

    def forward(self, x, c_noise, y):
        return super().forward(x, c_noise, None)
