"""DPM-Solver++, its SDE variants and UniPC: exponential integrators of x_0 in lambda = log(alpha / sigma)."""

from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.schedules import Schedule, Spacing
from diffusion_cli.samplers.base import AncestralSampler, NoiseFn, Sampler, Share

History = tuple[tuple[Tensor, Tensor], ...]
"""(lambda, x_0) of previous steps, newest first."""


class DPMSolverMultistep(Sampler):
    """DPM-Solver++ multistep (2M, 3M) and its SDE variants, with one network call per step.

    With h = lambda_s - lambda_t, H = (1 + eta) h, and D_0 the predicted x_0,

    x_s = sigma_s / sigma_t exp(-eta h) x_t + alpha_s ((1 - exp(-H)) D_0 + w_1 D_1 - w_2 D_2)
    + sigma_s sqrt(1 - exp(-2 eta h)) z,

    where D_1 and D_2 are differences of previous x_0 in units of h. w_1 = (1 - exp(-H)) / 2 for `midpoint` of order 2,
    else 1 - (1 - exp(-H)) / H; w_2 = w_1 / H - 1/2. The first steps and the last one have a lower order.

    Args:
        schedule: noise schedule.
        order: number of predictions used per step.
        eta: amount of noise, at least 0; 0: ODE, 1: reverse SDE.
        solver_type: `midpoint` or `heun` as published; the published step of order 3 uses half of the second
            difference of Taylor's theorem, and converges at order 2. `taylor` uses all of it, and converges at order 3.
        spacing: spacing of the times, see `Schedule.grid`.

    Source: Lu et al. 2022b, Alg. 2, Sec. 5.
    """

    omits_cleanest = True

    def __init__(
        self,
        schedule: Schedule,
        *,
        order: Literal[1, 2, 3] = 2,
        eta: NonNegativeFloat = 0.0,
        solver_type: Literal["midpoint", "heun", "taylor"] = "midpoint",
        spacing: Spacing = "trailing",
    ) -> None:
        super().__init__(schedule, spacing=spacing)
        self.eta, self.solver_type = eta, solver_type
        self.stochastic = eta > 0
        self.points = order
        self.order = order if solver_type == "taylor" else min(order, 2)

    def start(self, times: Tensor) -> History:
        return ()

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: History
    ) -> tuple[Tensor, History]:
        x0 = denoise(x, t).x0
        now, then = self.half_log_snr(t), self.half_log_snr(s)
        (_, sigma_t), (alpha_s, sigma_s) = self.schedule(t), self.schedule(s)
        # lambda = -inf (no signal) is no node of a polynomial.
        history: History = ((now, x0), *state)[: self.points] if now.isfinite() else ()
        if s == 0:
            return x0, history
        h = then - now
        H = (1 + self.eta) * h
        decay = torch.exp(-self.eta * h) if self.eta > 0 else 1.0  # h may be infinite
        x = sigma_s / sigma_t * decay * x - alpha_s * torch.expm1(-H) * x0
        if len(history) > 1:
            first, second = self._differences(history, h)
            w_1 = torch.expm1(-H) / H + 1
            if len(history) == 2 and self.solver_type == "midpoint":
                x = x - alpha_s * torch.expm1(-H) / 2 * first
            else:
                x = x + alpha_s * w_1 * first
            if second is not None:
                whole = 2 if self.solver_type == "taylor" else 1
                x = x - alpha_s * (w_1 / H - 0.5) * whole * second
        if self.eta > 0:
            x = x + sigma_s * torch.sqrt(-torch.expm1(-2 * self.eta * h)) * draw()
        return x, history

    @staticmethod
    def _differences(history: History, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the first and second derivative of x_0, times h and h^2, as far as the history allows."""
        (l0, d0), (l1, d1), *rest = history
        r0 = (l0 - l1) / h
        newer = (d0 - d1) / r0
        if not rest:
            return newer, None
        ((l2, d2),) = rest
        r1 = (l1 - l2) / h
        older = (d1 - d2) / r1
        second = (newer - older) / (r0 + r1)
        return newer + r0 * second, second


class DPMSolver2S(AncestralSampler):
    """DPM-Solver++(2S): two network calls per step, the second at the midpoint in lambda; one in the last step.

    With eta > 0, each step ends below s, and fresh noise raises it to s (k-diffusion). See `AncestralSampler` for the
    arguments. Source: Lu et al. 2022b, Alg. 1.
    """

    order = 2

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        alpha_s, _ = self.schedule(s)
        kept, fresh = self.ancestral(t, s)
        noise = fresh * draw() if self.eta > 0 and s > 0 else 0.0
        end = (alpha_s / kept).log()  # lambda at the end of the step; infinite if nothing is kept
        middle = self.schedule.time_of(self.half_log_snr(t) + end)
        return self.through(denoise, x, t, middle, alpha_s, kept) + noise, None

    def through(
        self, denoise: Denoise, x: Tensor, t: Tensor, middle: Tensor, alpha_s: Tensor, sigma_s: Tensor
    ) -> Tensor:
        """Step from t to the levels of s, with a second prediction at time `middle`."""
        first = denoise(x, t)
        alpha_t, sigma_t = self.schedule(t)
        if sigma_s == 0 or alpha_t == 0:
            return alpha_s * first.x0 + sigma_s * first.eps
        second = denoise(self.euler_step(first, middle), middle)
        start, end = self.half_log_snr(t), (alpha_s / sigma_s).log()
        share = (self.half_log_snr(middle) - start) / (end - start)
        x0 = first.x0 + (second.x0 - first.x0) / (2 * share)
        return sigma_s / sigma_t * x - alpha_s * torch.expm1(start - end) * x0


class DPMSolverSDE(AncestralSampler):
    """DPM-Solver++ SDE: two ancestral stages per step, the first to the midpoint in lambda (k-diffusion).

    Both stages add noise, scaled by eta. The last step is an Euler step. See `AncestralSampler` for the arguments.
    """

    order = 1  # weak order; the second stage reduces the error of each path

    def __init__(self, schedule: Schedule, *, eta: Share = 1.0, spacing: Spacing = "trailing") -> None:
        super().__init__(schedule, eta=eta, spacing=spacing)

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        first = denoise(x, t)
        if s == 0:
            return first.x0, None
        middle = self.schedule.time_of(self.half_log_snr(t) + self.half_log_snr(s))
        if not self.half_log_snr(t).isfinite():
            return self._stage(x, first.x0, t, s, draw), None
        second = denoise(self._stage(x, first.x0, t, middle, draw), middle)
        return self._stage(x, second.x0, t, s, draw), None

    def _stage(self, x: Tensor, x0: Tensor, t: Tensor, s: Tensor, draw: NoiseFn) -> Tensor:
        """Return the exact step for constant x_0 to the kept part of sigma_s, plus fresh noise."""
        (alpha_t, sigma_t), (alpha_s, _) = self.schedule(t), self.schedule(s)
        kept, fresh = self.ancestral(t, s)
        shrink = kept / sigma_t
        x = shrink * x + (alpha_s - shrink * alpha_t) * x0
        return x + fresh * draw() if self.eta > 0 else x


class UniPC(Sampler):
    """UniPC: a multistep predictor with a corrector that reuses the next network call, one call per step.

    The last step has order 1.

    Args:
        schedule: noise schedule.
        order: order of the predictor.
        variant: B(h) of the paper: `bh1` is h, `bh2` is exp(h) - 1.
        spacing: spacing of the times, see `Schedule.grid`.

    Source: Zhao et al. 2023, Alg. 5-8.
    """

    omits_cleanest = True

    def __init__(
        self,
        schedule: Schedule,
        *,
        order: Literal[1, 2, 3] = 2,
        variant: Literal["bh1", "bh2"] = "bh2",
        spacing: Spacing = "trailing",
    ) -> None:
        super().__init__(schedule, spacing=spacing)
        self.predictor_order, self.variant = order, variant
        self.order = min(order + 1, 3)  # limited by the first steps, which have a lower order

    def start(self, times: Tensor) -> tuple[History, Tensor | None]:
        """Return the empty history, and the state before the last step (none)."""
        return (), None

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        draw: NoiseFn,
        state: tuple[History, Tensor | None],
    ) -> tuple[Tensor, tuple[History, Tensor | None]]:
        x0 = denoise(x, t).x0
        now = self.half_log_snr(t)
        history, before = state
        if history and before is not None:
            x = self._update(before, history, t, corrector=x0)
        history: History = ((now, x0), *history)[: self.predictor_order] if now.isfinite() else ()
        if s == 0:
            return x0, (history, x)
        if not history:
            (_, sigma_t), (alpha_s, sigma_s) = self.schedule(t), self.schedule(s)
            return sigma_s / sigma_t * x + alpha_s * x0, ((), None)
        return self._update(x, history, s), (history, x)

    def _update(self, x: Tensor, history: History, s: Tensor, corrector: Tensor | None = None) -> Tensor:
        """Step x from the newest time of the history to s; `corrector` is the x_0 predicted at s, or None."""
        (now, x0), *older = history
        alpha_s, sigma_s = self.schedule(s)
        h = self.half_log_snr(s) - now
        (_, sigma_t) = self.schedule(self.schedule.time_of(2 * now))
        places = [(past - now) / h for past, _ in older]
        slopes = [(value - x0) / place for (_, value), place in zip(older, places, strict=True)]
        if corrector is not None:
            places.append(torch.ones_like(h))
            slopes.append(corrector - x0)
        x = sigma_s / sigma_t * x - alpha_s * torch.expm1(-h) * x0
        B = -h if self.variant == "bh1" else torch.expm1(-h)
        weights = self._weights(places, -h, B)
        for weight, slope in zip(weights, slopes, strict=True):
            x = x - alpha_s * B * weight * slope
        return x

    @staticmethod
    def _weights(places: list[Tensor], h: Tensor, B: Tensor) -> Tensor:
        """Return rho of Eq. 5-6; 1/2 for a single point, as in the paper."""
        if len(places) <= 1:
            return h.new_full((len(places),), 0.5)
        powers = torch.arange(len(places), dtype=h.dtype)
        rows = torch.stack(places) ** powers[:, None]
        phi, factorial, right = torch.expm1(h) / h - 1, 1.0, []
        for k in range(1, len(places) + 1):
            right.append(phi * factorial / B)
            factorial *= k + 1
            phi = phi / h - 1 / factorial
        return torch.linalg.solve(rows, torch.stack(right))
