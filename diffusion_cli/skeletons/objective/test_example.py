"""The weights of `example` have the limits of the formula."""

import diffusion_cli as diffuse
import torch

diffuse.allow_plugins("example_package")


def test_gamma_0_is_the_simple_objective() -> None:
    schedule, t = diffuse.option("schedule", "cosine"), torch.linspace(0.1, 1, 10, dtype=torch.float64)
    simple = diffuse.option("objective", "simple").weight(schedule, t)
    torch.testing.assert_close(diffuse.option("objective", "example", gamma=0.0).weight(schedule, t), simple)


def test_low_noise_counts_less_than_in_the_simple_objective() -> None:
    schedule, t = diffuse.option("schedule", "cosine"), torch.linspace(0.1, 1, 10, dtype=torch.float64)
    share = diffuse.option("objective", "example").weight(schedule, t) / torch.exp(schedule.log_snr(t))
    assert (share.diff() > 0).all()
