"""Samplers of the reverse SDE: Euler-Maruyama, reverse diffusion and predictor-corrector (Song et al. 2021b)."""

from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, per_image
from diffusion_cli.diffusion.schedules import Schedule, Spacing
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers.base import NoiseFn, Sampler
from diffusion_cli.samplers.ddim import DDIM
from diffusion_cli.samplers.ddpm import DDPM


class EulerMaruyama(Sampler):
    """Euler-Maruyama: `x_s = x - (f x - g^2 score) (t - s) + g sqrt(t - s) z` (Song et al. 2021b, Eq. 6, App. D).

    See `Sampler` for the arguments.

    Raises:
        UsageError: the drift is infinite at the first time, as for alpha = 0.
    """

    order = 1
    stochastic = True

    def __init__(self, schedule: Schedule, *, spacing: Spacing = "time") -> None:
        super().__init__(schedule, spacing=spacing)

    def grid(self, steps: int) -> Tensor:
        times = super().grid(steps)
        f, g2 = self.schedule.sde(times[0])
        if not (f.isfinite() and g2.isfinite()):
            raise UsageError(
                "sampler",
                "euler_maruyama",
                f"the SDE of the {self.schedule.name} schedule has an infinite drift at t = 1, where "
                "alpha is 0",
                "use ddpm or euler_ancestral",
            )
        return times

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        f, g2 = self.schedule.sde(t)
        x = x - (f * x - g2 * denoise(x, t).score) * (t - s)
        return (x if s <= 0 else x + (g2 * (t - s)).sqrt() * draw()), None


class ReverseDiffusion(Sampler):
    """Reverse diffusion: `x_s = (2 - a) x + v score + sqrt(v) z` (Song et al. 2021b, App. E).

    a and v are those of the transition from s to t. See `Sampler` for the arguments.
    """

    order = 1
    stochastic = True

    def __init__(self, schedule: Schedule, *, spacing: Spacing = "time") -> None:
        super().__init__(schedule, spacing=spacing)

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        a, v = self.schedule.transition(t, s)
        x = (2 - a) * x + v * denoise(x, t).score
        return (x if s == 0 else x + v.sqrt() * draw()), None


class PC(Sampler):
    """Predictor-corrector sampling: Langevin steps at each time, followed by a step of another sampler.

    A corrector step is `x + d score + sqrt(2 d) z` with a = alpha_t / alpha_s. `langevin` has
    `d = 2 a^2 (snr |z| / |score|)^2`, and `ald` (annealed Langevin dynamics) `d = 2 a^2 (snr sigma_t)^2`. Norms are per
    image; the published code averages them over the batch, which makes images depend on each other.

    Args:
        schedule: noise schedule.
        predictor: sampler of the predictor steps.
        corrector: type of the corrector steps.
        corrector_steps: corrector steps per time.
        snr: signal-to-noise ratio of the corrector steps.
        spacing: spacing of the times, see `Schedule.grid`.

    Source: Song et al. 2021b, Alg. 1, 4 and 5.
    """

    order = 1
    stochastic = True

    def __init__(
        self,
        schedule: Schedule,
        *,
        predictor: Literal[
            "reverse_diffusion", "euler_maruyama", "ddpm", "ddim", "none"
        ] = "reverse_diffusion",
        corrector: Literal["langevin", "ald"] = "langevin",
        corrector_steps: PositiveInt = 1,
        snr: PositiveFloat = 0.16,
        spacing: Spacing = "time",
    ) -> None:
        super().__init__(schedule, spacing=spacing)
        self.predictor: Sampler | None = {
            "reverse_diffusion": lambda: ReverseDiffusion(schedule, spacing=spacing),
            "euler_maruyama": lambda: EulerMaruyama(schedule, spacing=spacing),
            "ddpm": lambda: DDPM(schedule, variance="small", spacing=spacing),
            "ddim": lambda: DDIM(schedule, eta=0.0, spacing=spacing),
            "none": lambda: None,
        }[predictor]()
        self.corrector, self.corrector_steps, self.snr = corrector, corrector_steps, snr

    def grid(self, steps: int) -> Tensor:
        return super().grid(steps) if self.predictor is None else self.predictor.grid(steps)

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        for _ in range(self.corrector_steps):
            x = self.correct(denoise, x, t, s, draw)
        return (x, None) if self.predictor is None else self.predictor.step(denoise, x, t, s, draw, state)

    def correct(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn) -> Tensor:
        """Return x after one Langevin step at time t."""
        score, noise = denoise(x, t).score, draw()
        a, _ = self.schedule.transition(t, s)
        if self.corrector == "langevin":
            scale = per_image(self.norm(noise) / self.norm(score), x)
        else:
            _, scale = self.schedule(t)
        d = 2 * a**2 * (self.snr * scale) ** 2
        return x + d * score + torch.sqrt(2 * d) * noise

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        """Return the Euclidean norm of each image, [B]."""
        return x.flatten(1).norm(dim=1)
