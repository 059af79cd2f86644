"""Exact denoisers, consistency functions and paths of Gaussian data, for the tests of few-step objectives."""

import torch
from torch import nn

from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.parameterizations import EDMPreconditioning, Flow, V
from diffusion_cli.diffusion.schedules import VE, VP, Cosine, EDMSchedule, Linear, Rectified

F64 = torch.float64
MEAN, STD = 0.3, 0.5
"""Mean and standard deviation of the data, independent Gaussian pixels."""
PROCESSES = {
    "cosine": (Cosine(), V()),
    "linear": (Linear(), V()),
    "vp": (VP(), V()),
    "ve": (VE(), EDMPreconditioning()),
    "edm": (EDMSchedule(), EDMPreconditioning()),
    "rectified": (Rectified(), Flow()),
}


class Answers(nn.Module):
    """A network with the output F that gives a prediction of x_0, a function of x_t, alpha and sigma."""

    def __init__(self, schedule, parameterization, x0):
        super().__init__()
        self.schedule, self.parameterization, self.x0 = schedule, parameterization, x0
        self.t = None

    def at(self, t):
        self.t = t
        return self

    def forward(self, x, c_noise, y):
        c_skip, c_out, c_in, _ = (
            value.view(-1, 1, 1, 1) for value in self.parameterization(self.schedule, self.t)
        )
        x_t = x / c_in
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in self.schedule(self.t))
        return (self.x0(x_t, alpha, sigma) - c_skip * x_t) / c_out


class Exact(Denoiser):
    """A denoiser with a given prediction of x_0."""

    def __init__(self, process, x0):
        schedule, parameterization = PROCESSES[process]
        super().__init__(Answers(schedule, parameterization, x0), schedule, parameterization)

    def forward(self, x_t, t, y=None):
        assert isinstance(self.network, Answers)
        self.network.at(t.reshape(-1).expand(len(x_t)) if t.ndim == 0 else t)
        return super().forward(x_t, t, y)


def consistent(x_t, alpha, sigma):
    """The end of the probability flow from x_t, exactly."""
    return MEAN + STD * (x_t - alpha * MEAN) / torch.sqrt((alpha * STD) ** 2 + sigma**2)


def expected(x_t, alpha, sigma):
    """The mean of x_0 given x_t, exactly."""
    return MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x_t - alpha * MEAN)


def batch(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = MEAN + STD * torch.randn(count, 1, 4, 4, dtype=F64, generator=generator)
    return x0, torch.randn(x0.shape, dtype=F64, generator=generator)


def no_noise():
    raise AssertionError("DDIM asked for noise")


def times(schedule, count=64):
    return schedule.time((torch.arange(count, dtype=F64) + 0.5) / count)
