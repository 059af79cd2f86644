"""The inputs and the targets of the network have unit variance with `example`."""

import diffusion_cli as diffuse
import torch

diffuse.allow_plugins("example_package")


def test_inputs_and_targets_have_unit_variance() -> None:
    schedule = diffuse.option("schedule", "cosine")
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    alpha, sigma = schedule(t)
    c_skip, c_out, c_in, _ = diffuse.option("parameterization", "example", data_std=0.7)(schedule, t)
    one = torch.ones_like(t)
    torch.testing.assert_close(c_in**2 * (alpha**2 * 0.7**2 + sigma**2), one)
    error = (1 - c_skip * alpha) ** 2 * 0.7**2 + c_skip**2 * sigma**2  # variance of x_0 - c_skip x_t
    torch.testing.assert_close(error / c_out**2, one)
