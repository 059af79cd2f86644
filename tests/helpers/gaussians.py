"""The perfect denoiser of images of four pixels that are Gaussian together with their conditions."""

import torch
from torch import Tensor, nn

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions
from diffusion_cli.diffusion.schedules import VP, Schedule

F64 = torch.float64
PIXELS, AGE, SIZE, IMAGE = slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 10)
PLACES = {"age": AGE, "size": SIZE, "image": IMAGE}
"""Places in the vector of all values: pixels, two numbers, and the pixels of a condition image."""


def number(name: str) -> AttributeDescription:
    return AttributeDescription(name=name, kind="number", low=-3.0, high=3.0)


MEAN = torch.tensor([0.3, -0.2, 0.1, 0.4, 1.0, -0.5, 0.2, 0.0, -0.3, 0.1], dtype=F64)
FACTOR = 0.5 * torch.eye(10, dtype=F64) + 0.2 * torch.randn(
    10, 10, dtype=F64, generator=torch.Generator().manual_seed(0)
)
COVARIANCE = FACTOR @ FACTOR.T


def moments_given(condition: Condition) -> tuple[Tensor, Tensor]:
    """The mean [4] and covariance of the pixels, given those values of one image that are not missing."""
    values = torch.full((10,), float("nan"), dtype=F64)
    for name, value in condition.values.items():
        values[PLACES[name]] = value.double().flatten()
    known = ~values.isnan()
    gain = torch.linalg.solve(COVARIANCE[known][:, known], COVARIANCE[known][:, PIXELS]).T
    mean = MEAN[PIXELS] + gain @ (values[known] - MEAN[known])
    return mean, COVARIANCE[PIXELS, PIXELS] - gain @ COVARIANCE[known][:, PIXELS]


def noised_moments(schedule: Schedule, t: Tensor, moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and covariance of x_t for those of x_0."""
    alpha, sigma = schedule(t)
    return alpha * moments[0], alpha**2 * moments[1] + sigma**2 * torch.eye(4, dtype=F64)


class JointGaussian(nn.Module):
    """The perfect x_0 given x_t and a condition, for `schedule=vp parameterization=x0`."""

    takes_conditions = True
    num_classes = None
    conditions = Conditions(attributes=(number("age"), number("size")), image=1)

    def __init__(self) -> None:
        super().__init__()
        self.schedule = VP()
        self.batches: list[int] = []
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, c_noise: Tensor, y: Condition | None) -> Tensor:
        self.batches.append(len(x))
        rows = Condition.of(y)
        moments = [self.moments(rows.rows(torch.tensor([i])) if len(rows) else rows) for i in range(len(x))]
        mean, covariance = (torch.stack(each) for each in zip(*moments, strict=True))
        alpha, sigma = (level[:, None] for level in self.schedule(c_noise / 999))
        spread = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(4, dtype=F64)
        deviation = torch.linalg.solve(spread, x.flatten(1) - alpha * mean)
        return (mean + alpha * (covariance @ deviation[..., None])[..., 0]).view_as(x)

    def moments(self, given: Condition) -> tuple[Tensor, Tensor]:
        """The moments of x_0, computed once for each condition."""
        key = str({name: value.tolist() for name, value in given.values.items()})
        if key not in self.found:
            self.found[key] = moments_given(given)
        return self.found[key]
