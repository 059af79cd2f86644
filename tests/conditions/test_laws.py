"""Samples of the perfect denoiser have the exact distribution given their condition."""

import pytest
import torch
import yaml
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion.denoiser import Denoise, Denoiser
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.parameterizations import X0
from diffusion_cli.samplers import Sampler, integrate
from helpers.gaussians import COVARIANCE, MEAN, PIXELS, JointGaussian, moments_given

F64 = torch.float64
SAMPLERS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(CONF.glob("sampler/*.yaml"))}
SAMPLERS["edm"] |= {"s_churn": 0.0}
DETERMINISTIC = [
    "ddim", "euler", "heun", "edm", "dpm2", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "lms", "plms"
]  # fmt: skip
PAIR = torch.tensor([0.5, -0.4, 0.8, 0.1]).view(1, 1, 2, 2)
CONDITIONS = {
    "number": Condition({"age": torch.tensor([2.0])}),
    "numbers": Condition({"age": torch.tensor([-1.0]), "size": torch.tensor([0.5])}),
    "image": Condition({"image": PAIR}),
    "half image": Condition({"image": PAIR.masked_fill(torch.tensor([True, False]), torch.nan)}),
    "number and image": Condition({"age": torch.tensor([2.0]), "image": PAIR}),
    "dropped": Condition({"age": torch.tensor([2.0]), "image": PAIR}).dropped(),
}


@pytest.fixture
def denoiser() -> Denoiser:
    network = JointGaussian()
    return Denoiser(network, network.schedule, X0())


def moments(sampler: Sampler, denoise: Denoise, times: Tensor) -> tuple[Tensor, Tensor]:
    """The exact mean and covariance of samples, from five starts, because the samples are affine in their start."""
    starts = torch.cat([torch.zeros(1, 4), torch.eye(4)]).view(5, 1, 2, 2).to(F64)
    start = sampler.schedule.prior_std(times[0]) * starts
    *_, samples = integrate(sampler, denoise, start, times, lambda: torch.zeros_like(start))
    mean, *responses = samples.flatten(1)
    response = torch.stack(responses) - mean
    return mean, response.T @ response


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_samples_have_the_exact_moments_given_their_condition(denoiser, name, condition):
    sampler = build(SAMPLERS[name], denoiser.schedule)
    denoise = NoGuidance()(denoiser, condition.repeat_interleave(5))
    mean, covariance = moments(sampler, denoise, sampler.grid(50))
    expected_mean, expected_covariance = moments_given(condition)
    tolerance = 0.02 if sampler.order > 1 else 0.15
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(covariance, expected_covariance, rtol=0, atol=tolerance)


def test_each_condition_changes_the_distribution():
    """By more than the tolerance of higher orders, so that samples of the images alone would fail."""
    for name, condition in CONDITIONS.items():
        mean, covariance = moments_given(condition)
        difference = torch.cat([mean - MEAN[PIXELS], (covariance - COVARIANCE[PIXELS, PIXELS]).flatten()])
        assert (difference.abs().max() > 0.02) == (name != "dropped")
