"""Restoration of images from noisy measurements of any kind."""

from copy import copy
from dataclasses import replace
from typing import Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from diffusion_cli.conditions.degradations import generators, white_noise
from diffusion_cli.conditions.operators import LinearOperator, Measurement
from diffusion_cli.editing.base import Edit, EditProcess, EditResult, Shape
from diffusion_cli.editing.latent import known_of
from diffusion_cli.errors import UsageError


class Restore(Edit):
    """Restoration of clean images that are measured first, with noise: `y = A(x) + sigma_y z`.

    All variations of an input have the same noise of the measurement. With Poisson noise, the images (x + 1) / 2 have
    the expected photons `photons (A(x) - A(-1)) / 2`, and methods get the mean of the variances of an image.

    Args:
        shape: shape of the model's images.
        sigma_y: standard deviation of the Gaussian noise of the measurement, in units of the model's range [-1, 1].
        photons: expected photons of a white value, for Poisson noise; None: no Poisson noise.
    """

    restores = True
    measures = True
    starts_from_noise = True
    before_names = ("given", "measured")

    def __init__(
        self, shape: Shape, *, sigma_y: NonNegativeFloat = 0.02, photons: PositiveFloat | None = None
    ) -> None:
        super().__init__(shape)
        self.sigma_y, self.photons = sigma_y, photons
        if sigma_y or photons is not None:
            self.noise_key = "edit.sigma_y" if photons is None else "edit.photons"
        self._measurement: Measurement | None = None

    def measured_by(self, measurement: Measurement) -> Self:
        if self.photons is not None and not measurement.counts:
            problem = "the measurement can be negative, so it counts no photons"
            raise UsageError("edit.photons", self.photons, problem, "use edit.sigma_y")
        edit = copy(self)
        edit._measurement = measurement
        return edit

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        measurement = self._measurement
        assert measurement is not None
        y, variance = self._noisy(measurement, images, process)
        process = replace(process, sigma_y=variance.sqrt())
        x = process.restored(*known_of(process.space, measurement, y))
        result, found = x, None
        if isinstance(measurement, LinearOperator) and self.noise_key is None:
            result, found = measurement.nearest_image(x, y), x
        shown = [images, measurement.picture(y)]
        return EditResult(result[:, None], shown, lambda x: measurement(x) - y, found)

    def _noisy(self, measurement: Measurement, images: Tensor, process: EditProcess) -> tuple[Tensor, Tensor]:
        """Return the measurement with noise, and the variance of the noise of each image, [B, 1, ...]."""
        y = measurement(images)
        variance = y.new_full((len(y), *[1] * (y.dim() - 1)), self.sigma_y**2)
        if self.photons is not None:
            dark = measurement(-torch.ones_like(images))
            expected = self.photons / 2 * (y - dark).clamp(min=0).cpu()
            counts = torch.stack(
                [
                    torch.poisson(each, generator)
                    for each, generator in zip(expected, generators(process.input_seeds), strict=True)
                ]
            ).to(y)
            y = dark + 2 / self.photons * counts
            mean = counts.flatten(1).mean(1).view_as(variance)
            variance = variance + (2 / self.photons) ** 2 * mean
        if self.sigma_y:
            y = y + self.sigma_y * white_noise(y, process.input_seeds)
        return y, variance
