"""The laws of a schedule hold for `example`."""

import diffusion_cli as diffuse
import torch
from torch.autograd.functional import jvp

diffuse.allow_plugins("example_package")
TIMES = torch.linspace(0.01, 1, 50, dtype=torch.float64)


def test_it_goes_from_the_data_to_noise() -> None:
    schedule = diffuse.option("schedule", "example")
    alpha, sigma = schedule(torch.zeros(1, dtype=torch.float64))
    assert (alpha, sigma) == (1, 0)
    assert (schedule.log_snr(TIMES).diff() < 0).all()


def test_the_log_snr_and_its_inverse_agree_with_alpha_and_sigma() -> None:
    schedule = diffuse.option("schedule", "example")
    alpha, sigma = schedule(TIMES)
    torch.testing.assert_close(schedule.log_snr(TIMES), torch.log(alpha**2 / sigma**2))
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(TIMES)), TIMES)


def test_the_derivatives_are_those_of_alpha_and_sigma() -> None:
    schedule = diffuse.option("schedule", "example")
    _, slopes = jvp(schedule, TIMES, torch.ones_like(TIMES))
    torch.testing.assert_close(schedule.derivatives(TIMES), slopes)
