"""A sampler with a memory of one step."""

from typing import Any

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.schedules import Schedule, Spacing
from diffusion_cli.samplers.base import NoiseFn, Sampler
from torch import Tensor


class Example(Sampler):
    """DDIM along `gamma eps_t + (1 - gamma) eps_previous` (Permenter and Yuan 2024, Alg. 2).

    A sampler steps from time t to the next smaller time s. Its state goes from step to step.

    Args:
        schedule: noise schedule; the program passes it.
        gamma: weight of the newest prediction of the noise; 1 is DDIM
        spacing: time grid: leading, trailing, linspace, quadratic, karras, log_snr or time
    """

    order = 1

    def __init__(self, schedule: Schedule, *, gamma: float = 2.0, spacing: Spacing = "trailing") -> None:
        super().__init__(schedule, spacing=spacing)
        self.gamma = gamma

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        """Return the images at time s, and the new state.

        `denoise(x, t)` returns the predicted `x0` and `eps`, and `draw()` noise of the shape of x.
        """
        prediction = denoise(x, t)
        x = self.euler_step(prediction, s)
        if state is not None:  # eps of the step before
            alpha, _ = self.schedule(s)
            weight = (self.gamma - 1) * alpha * (self.ratio(s) - self.ratio(t))
            x = x + weight * (prediction.eps - state)
        return x, prediction.eps
