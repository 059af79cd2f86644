"""A restoration method that corrects predictions."""

from collections.abc import Iterator
from typing import Annotated

from diffusion_cli.diffusion.denoiser import Prediction, per_image
from diffusion_cli.editing import EditProcess, LinearOperator, RestorationMethod
from diffusion_cli.samplers import integrate, reporting
from pydantic import Field
from torch import Tensor


class Example(RestorationMethod):
    """DDNM: moves each predicted image to the nearest one with the measurement (Wang et al. 2023, Eq. 13).

    A restoration method samples images x with a measurement `y = A x`, for any linear operator A of an edit.

    Args:
        weight: share of the way to the nearest image, 0 to 1
    """

    def __init__(self, *, weight: Annotated[float, Field(ge=0, le=1)] = 1.0) -> None:
        self.weight = weight

    def restore(self, process: EditProcess, operator: LinearOperator, y: Tensor) -> Iterator[Tensor]:
        """Yield the states after each step; `operator(x)` is A x, and `operator.project` the nearest image."""
        sampler, times = process.sampler, process.times
        denoise = reporting(process.denoise(), times, process.advance)

        def corrected(x: Tensor, t: Tensor) -> Prediction:
            prediction = denoise(x, t)
            x0 = prediction.x0 + self.weight * (operator.project(prediction.x0, y) - prediction.x0)
            alpha, sigma = (per_image(level, x) for level in sampler.schedule(t))
            return prediction._replace(x0=x0, eps=(x - alpha * x0) / sigma)

        yield from integrate(sampler, corrected, process.start(), times, process.draw)
