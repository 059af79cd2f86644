"""Linear multistep methods on eps, with one network call per step."""

from abc import abstractmethod
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.schedules import NO_SIGNAL, Schedule, Spacing
from diffusion_cli.samplers.base import NoiseFn, Sampler

# Gauss-Legendre quadrature on [-1, 1]: exact for polynomials, and up to rounding for their products with exp.
NODES, SHARES = np.polynomial.legendre.leggauss(32)


class Slope(NamedTuple):
    """eps of a step, with its node of the interpolation."""

    place: float
    eps: Tensor


class _AdamsBashforth(Sampler):
    """Base class of Adams-Bashforth methods in r = sigma / alpha.

    `x_s / alpha_s = x_t / alpha_t + sum_j eps_j int l_j(phi(r)) dr` from r_t to r_s, where l_j are the Lagrange
    polynomials of the last `order` steps in a variable phi(r).

    Args:
        schedule: noise schedule.
        order: number of steps that are interpolated, 1 to 4.
        spacing: spacing of the times, see `Schedule.grid`.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        order: Annotated[int, Field(ge=1, le=4)] = 4,
        spacing: Spacing = "trailing",
    ) -> None:
        super().__init__(schedule, spacing=spacing)
        self.order = order

    def start(self, times: Tensor) -> tuple[Slope, ...]:
        return ()

    @abstractmethod
    def place(self, ratio: float) -> float:
        """Return phi(r)."""

    @abstractmethod
    def slope_of_ratio(self, places: np.ndarray) -> np.ndarray:
        """Return dr / dphi at values of phi."""

    @abstractmethod
    def reaches(self, s: Tensor) -> bool:
        """Return whether phi is finite at s."""

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: tuple[Slope, ...]
    ) -> tuple[Tensor, tuple[Slope, ...]]:
        prediction = denoise(x, t)
        (alpha_t, _), (alpha_s, _) = self.schedule(t), self.schedule(s)
        if alpha_t == 0:
            return self.euler_step(prediction, s), ()
        start = self.place(self.ratio(t).item())
        history = (Slope(start, prediction.eps), *state)[: self.order]
        if not self.reaches(s):
            return self.euler_step(prediction, s), history
        weights = self._weights([slope.place for slope in history], start, self.place(self.ratio(s).item()))
        x = alpha_s / alpha_t * x
        for weight, slope in zip(weights, history, strict=True):
            x = x + alpha_s * weight * slope.eps
        return x, history

    def _weights(self, places: list[float], start: float, end: float) -> list[float]:
        """Return the integrals of the Lagrange polynomials of `places`, from start to end."""
        points = start + (NODES + 1) / 2 * (end - start)
        measure = SHARES * (end - start) / 2 * self.slope_of_ratio(points)
        return [
            float(
                measure
                @ np.prod(
                    [(points - other) / (place - other) for other in places if other != place]
                    or [np.ones_like(points)],
                    axis=0,
                )
            )
            for place in places
        ]


class LMS(_AdamsBashforth):
    """Linear multistep method with polynomials in sigma / alpha (`lms` of k-diffusion)."""

    def place(self, ratio: float) -> float:
        return ratio

    def slope_of_ratio(self, places: np.ndarray) -> np.ndarray:
        return np.ones_like(places)

    def reaches(self, s: Tensor) -> bool:
        return True


class DEIS(_AdamsBashforth):
    """DEIS, with polynomials in log(sigma / alpha) ("log-rho AB"; Zhang and Chen 2023, Eq. 15-16); last step Euler."""

    omits_cleanest = True

    def __init__(
        self,
        schedule: Schedule,
        *,
        order: Annotated[int, Field(ge=1, le=4)] = 3,
        spacing: Spacing = "trailing",
    ) -> None:
        super().__init__(schedule, order=order, spacing=spacing)

    def place(self, ratio: float) -> float:
        return float(np.log(ratio))

    def slope_of_ratio(self, places: np.ndarray) -> np.ndarray:
        return np.exp(places)

    def reaches(self, s: Tensor) -> bool:
        return bool(s > 0)


class PLMS(Sampler):
    """Pseudo linear multistep method: a DDIM step with an Adams-Bashforth mean of eps, as if all steps were equal.

    The mean covers the last four network calls, or fewer at the start. The first step is repeated with the mean of
    eps at both ends, which costs one more call, unless it is the last. It converges at order 2 on grids that are
    uniform in time or log-SNR. Source: Liu et al. 2022, Eq. 9-13, with the start of diffusers.
    """

    order = 2
    WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def start(self, times: Tensor) -> tuple[Tensor, ...]:
        return ()

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        prediction = denoise(x, t)
        (alpha_t, _), (alpha_s, _) = self.schedule(t), self.schedule(s)
        if self.ratio(t) > NO_SIGNAL:  # eps at pure noise is no usable slope
            return self.euler_step(prediction, s), ()
        history = (prediction.eps, *state)[:4]
        if len(history) == 1 and s > 0:
            eps = (prediction.eps + denoise(self.euler_step(prediction, s), s).eps) / 2
        else:
            eps = sum(w * e for w, e in zip(self.WEIGHTS[len(history) - 1], history, strict=True))
        return alpha_s / alpha_t * x + alpha_s * (self.ratio(s) - self.ratio(t)) * eps, history
