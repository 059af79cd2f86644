"""Variance-preserving schedules with T timesteps, defined by betas."""

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.diffusion.schedules.base import Schedule, Spacing
from diffusion_cli.errors import UsageError

Fraction = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(gt=0, le=1)]
KNOWN = 8  # times with cached levels


class Discrete(Schedule):
    """Variance-preserving process with T timesteps (Ho et al. 2020, Eq. 2-4).

    A table of log alpha_bar at t = i/T for i = 0..T, with alpha_bar_0 = 1, interpolated linearly. At t = i/T it is
    the published process exactly; entry i is timestep i - 1 of DDPM's code.

    Args:
        betas: the T betas, each in (0, 1); the last may be 1 with zero_terminal_snr.
        zero_terminal_snr: whether to shift and scale sqrt(alpha_bar) such that the last entry is 0 and the first is
            unchanged (Lin et al. 2024, Alg. 1); the last interval is then linear in sqrt(alpha_bar).
        rescale_timesteps: whether networks get timesteps times 1000 / T, as in the code of Nichol and Dhariwal 2021.

    Raises:
        UsageError: a beta is outside (0, 1).
    """

    def __init__(self, betas: Tensor, zero_terminal_snr: bool, rescale_timesteps: bool = False) -> None:
        below_one = betas[:-1] if zero_terminal_snr else betas
        if not (betas.gt(0).all() and betas.le(1).all() and below_one.lt(1).all()):
            raise UsageError(
                "schedule.num_timesteps",
                len(betas),
                f"betas must be in (0, 1), but range from {betas.min():.3g} to {betas.max():.3g}",
                "use more timesteps, smaller betas or (for sigmoid) a larger tau",
            )
        alpha_bar = torch.cumprod(1 - betas.double(), 0)
        if zero_terminal_snr:
            if len(betas) == 1:
                raise UsageError("schedule.zero_terminal_snr", True, "needs at least 2 timesteps")
            roots = alpha_bar.sqrt()
            alpha_bar = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        self.num_timesteps = len(betas)
        self._timestep_scale = 1000 / len(betas) if rescale_timesteps else 1
        self.t_min = self.grid_t_min = 1 / len(betas)
        self.zero_terminal_snr = zero_terminal_snr
        table = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar]).log()
        self._log_alpha_bar = {torch.device("cpu"): table}
        self._known: dict[float, Tensor] = {}  # a sampling step evaluates its two times repeatedly

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._log_alpha_bar:
            with torch.inference_mode(False):  # cached tensors may be used with autograd later
                self._log_alpha_bar[device] = self._log_alpha_bar[torch.device("cpu")].to(device)
        return self._log_alpha_bar[device]

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the position of t in its interval (i, i + 1] / T, in [0, 1]; log alpha_bar at the start; its increase
        over the interval, 0 if infinite; and whether it is infinite."""
        table = self._table(t.device)
        position = t.double() * self.num_timesteps
        # Times i / T belong to the interval that they end, regardless of rounding.
        below = ((position - 1e-9).ceil() - 1).clamp(0, self.num_timesteps - 1)
        left, right = table[below.long()], table[below.long() + 1]
        endless = right.isinf()
        return position - below, left, torch.where(endless, left, right) - left, endless

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """Return log alpha_bar_t, float64."""
        if t.ndim == 0 and t.device.type == "cpu" and not t.requires_grad:
            return self._of_time(t.item())
        return self._between_entries(t)

    def _of_time(self, t: float) -> Tensor:
        found = self._known.get(t)
        if found is None:
            with torch.inference_mode(False):  # cached tensors may be used with autograd later
                found = self._between_entries(torch.tensor(t, dtype=torch.float64, device="cpu"))
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[t] = found
        return found.clone()

    def _between_entries(self, t: Tensor) -> Tensor:
        place, left, rise, endless = self._interval(t)
        return left + torch.where(endless, 2 * torch.log1p(-place.clamp(max=1)), place * rise)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = self.log_alpha_bar(t)
        return torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _, left, rise, endless = self._interval(t)
        alpha, sigma = self(t)
        d_alpha = self.num_timesteps * torch.where(endless, -torch.exp(left / 2), alpha * rise / 2)
        return d_alpha, -alpha * d_alpha / sigma

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha_bar = self.log_alpha_bar(t)
        return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))

    def time_of(self, log_snr: Tensor) -> Tensor:
        log_alpha_bar = -torch.logaddexp(torch.zeros_like(log_snr, dtype=torch.float64), -log_snr.double())
        table = self._table(log_snr.device)
        below = (torch.searchsorted(-table, -log_alpha_bar) - 1).clamp(0, self.num_timesteps - 1)
        left, right = table[below], table[below + 1]
        rise = log_alpha_bar - left
        place = torch.where(right.isinf(), -torch.expm1(rise / 2), rise / (right - left))
        return (below + place.clamp(0, 1)) / self.num_timesteps

    def time(self, u: Tensor) -> Tensor:
        """Map uniform numbers u in [0, 1) to times i / T, i = 1..T, float64."""
        return ((u.double() * self.num_timesteps).floor() + 1) / self.num_timesteps

    def timestep(self, t: Tensor) -> Tensor:
        return (t * self.num_timesteps - 1) * self._timestep_scale

    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """Return the decreasing times of `steps` steps of the T-step process, and then 0.

        With timesteps numbered 1..T: `leading` is 1 + k floor(T / steps) (DDIM's "uniform", which does not start at T
        unless steps divides T), `trailing` T - k T / steps, `linspace` a uniform grid on 1..T, and `quadratic` squares
        of a uniform grid up to 0.8 T (Song et al. 2021a, D.3). These need 1 <= steps <= T. For the other spacings see
        `Schedule.grid`.

        Raises:
            UsageError: there is no such grid.
        """
        T = self.num_timesteps
        if steps <= 1 or spacing in ("karras", "log_snr", "time"):
            return super().grid(steps, spacing)
        if steps > T:
            raise UsageError(
                "steps",
                steps,
                f"exceeds the {T} timesteps of the schedule",
                f"use 1 to {T}, or set sampler.spacing=karras, log_snr or time, which have no such limit",
            )
        k = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            entries = 1 + k * (T // steps)
        elif spacing == "trailing":
            entries = torch.round(T - k * (T / steps)).flip(0)
        elif spacing == "linspace":
            entries = 1 + torch.round(k * ((T - 1) / (steps - 1)))
        else:
            squares = 1 + torch.floor((k * (math.sqrt(0.8 * T) / (steps - 1))) ** 2)
            # Squares near the data coincide: increase entries until all are distinct.
            entries = torch.cummax(squares - k, 0).values + k
        return torch.cat([entries.flip(0) / T, torch.zeros(1, dtype=torch.float64)])


class Betas(Discrete):
    """Given betas, as `trained_betas` of diffusers.

    Args:
        betas: the betas of the timesteps 1..T, each in (0, 1); the last may be 1 with zero_terminal_snr.
        zero_terminal_snr: see `Discrete`.
    """

    def __init__(
        self, *, betas: Annotated[list[Beta], Field(min_length=1)], zero_terminal_snr: bool = False
    ) -> None:
        if 1 in (betas[:-1] if zero_terminal_snr else betas):
            raise UsageError("schedule.betas", 1, "only the last beta may be 1, with zero_terminal_snr=true")
        super().__init__(torch.tensor(betas, dtype=torch.float64), zero_terminal_snr)


class Linear(Discrete):
    """Betas that increase linearly (Ho et al. 2020, Sec. 4).

    Args:
        num_timesteps: number of timesteps T; betas are multiplied by 1000 / T.
        beta_start: first beta, for T = 1000.
        beta_end: last beta, for T = 1000.
        zero_terminal_snr: see `Discrete`.
        rescale_timesteps: see `Discrete`.
    """

    def __init__(
        self,
        *,
        num_timesteps: PositiveInt = 1000,
        beta_start: PositiveFloat = 0.0001,
        beta_end: PositiveFloat = 0.02,
        zero_terminal_snr: bool = False,
        rescale_timesteps: bool = False,
    ) -> None:
        scale = 1000 / num_timesteps
        betas = torch.linspace(scale * beta_start, scale * beta_end, num_timesteps, dtype=torch.float64)
        super().__init__(betas, zero_terminal_snr, rescale_timesteps)


class ScaledLinear(Discrete):
    """Betas with square roots that increase linearly ("linear" in the code of latent diffusion).

    Args:
        num_timesteps: number of timesteps T; betas are multiplied by 1000 / T.
        beta_start: first beta, for T = 1000.
        beta_end: last beta, for T = 1000.
        zero_terminal_snr: see `Discrete`.
    """

    def __init__(
        self,
        *,
        num_timesteps: PositiveInt = 1000,
        beta_start: PositiveFloat = 0.00085,
        beta_end: PositiveFloat = 0.012,
        zero_terminal_snr: bool = False,
    ) -> None:
        scale = 1000 / num_timesteps
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
        super().__init__(scale * roots**2, zero_terminal_snr)


class Cosine(Discrete):
    """Squared-cosine alpha_bar (Nichol and Dhariwal 2021, Eq. 17).

    Args:
        num_timesteps: number of timesteps T.
        offset: the paper's s, which keeps the first betas from being tiny.
        max_beta: largest beta, in (0, 1).
        zero_terminal_snr: see `Discrete`.
        rescale_timesteps: see `Discrete`.
    """

    def __init__(
        self,
        *,
        num_timesteps: PositiveInt = 1000,
        offset: PositiveFloat = 0.008,
        max_beta: Fraction = 0.999,
        zero_terminal_snr: bool = False,
        rescale_timesteps: bool = False,
    ) -> None:
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
        super().__init__(
            (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta), zero_terminal_snr, rescale_timesteps
        )


class Sigmoid(Discrete):
    """Sigmoid alpha_bar, scaled to [0, 1] (Jabri et al. 2023, App. B).

    alpha_bar(t) = (sigmoid(end / tau) - sigmoid((start + t (end - start)) / tau)) / (sigmoid(end / tau) -
    sigmoid(start / tau))

    Args:
        num_timesteps: number of timesteps T.
        start: start of the sigmoid.
        end: end of the sigmoid, more than `start`.
        tau: temperature of the sigmoid.
        max_beta: largest beta, in (0, 1).
        zero_terminal_snr: see `Discrete`.
    """

    def __init__(
        self,
        *,
        num_timesteps: PositiveInt = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: PositiveFloat = 1.0,
        max_beta: Fraction = 0.999,
        zero_terminal_snr: bool = False,
    ) -> None:
        if start >= end:
            raise UsageError("schedule.start", start, f"must be less than schedule.end={end}")
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        first, *_, last = fall = torch.sigmoid(-(start + t * (end - start)) / tau)
        alpha_bar = (fall - last) / (first - last)
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta), zero_terminal_snr)
