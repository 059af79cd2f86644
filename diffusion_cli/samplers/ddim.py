"""DDIM and its inversion."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.samplers.base import AncestralSampler, NoiseFn, integrate


class DDIM(AncestralSampler):
    """DDIM: `x_s = alpha_s x_0 + sqrt(sigma_s^2 - sigma_eta^2) eps + sigma_eta z` (Song et al. 2021a, Eq. 12).

    `sigma_eta^2 = eta^2 v sigma_s^2 / sigma_t^2` (Eq. 16). eta = 0 is deterministic, eta = 1 is DDPM with small
    variance. In terms of x / alpha and sigma / alpha this is the Euler method and its ancestral variant (Karras et al.
    2022; k-diffusion), and for rectified flows the Euler method in t. See `AncestralSampler` for the arguments.
    """

    order = 1

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        prediction = denoise(x, t)
        if self.eta == 0 or s == 0:
            return self.euler_step(prediction, s), None
        alpha_s, _ = self.schedule(s)
        kept, fresh = self.ancestral(t, s)
        return alpha_s * prediction.x0 + kept * prediction.eps + fresh * draw(), None


def invert(schedule: Schedule, denoise: Denoise, x: Tensor, times: Tensor) -> Iterator[Tensor]:
    """Encode images by reversed DDIM, and yield the state after each step.

    Each step uses the prediction at its start, while sampling uses that at its other end, so the round trip is exact
    to first order. At time 0 there is no noise to predict, so the first step uses the prediction at its end.

    Args:
        schedule: noise schedule.
        denoise: denoiser.
        x: images at the last of the times.
        times: decreasing times, as for sampling.

    Source: Song et al. 2021a, Sec. 4.3 and 5.4; Dhariwal and Nichol 2021 (code, which starts at the least noise).
    """

    def draw() -> Tensor:
        raise AssertionError("DDIM with eta 0 adds no noise")

    rising = times.flip(0)
    if rising[0] == 0:
        alpha, sigma = schedule(rising[1])
        x = alpha * x + sigma * denoise(x, rising[1]).eps
        rising = rising[1:]
        yield x
    yield from integrate(DDIM(schedule, eta=0.0, spacing="trailing"), denoise, x, rising, draw)
