"""The denoiser's linear map, and the objective on top of it."""

import pytest
import torch
from torch import nn

from diffusion_cli.diffusion.denoiser import Denoiser, clip_x0
from diffusion_cli.diffusion.objectives import Simple
from diffusion_cli.diffusion.parameterizations import EDMPreconditioning, Eps, Score
from diffusion_cli.diffusion.schedules import VE
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import UNet

F64 = torch.float64


class Oracle(nn.Module):
    """A network that returns a fixed output and records its inputs."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, c_noise, y):
        self.told = (x, c_noise, y)
        return self.output


def test_the_true_noise_gives_back_the_image(schedules):
    x0, eps = torch.randn(2, 6, 3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 2, 10, 500, 900, 1000], dtype=F64) / 1000
    for schedule in (schedules[tag] for tag in ("linear", "scaled_linear", "cosine", "sigmoid")):
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in schedule(t))
        network = Oracle(eps)
        prediction = Denoiser(network, schedule, Eps())(alpha * x0 + sigma * eps, t)
        torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-10)
        torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            network.told[1], torch.tensor([0, 1, 9, 499, 899, 999.0], dtype=F64), rtol=0, atol=1e-9
        )


def test_one_time_for_all_equals_one_an_image(schedules):
    x, output = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(Oracle(output), schedules["cosine"], Eps())
    one, many = denoiser(x, torch.tensor(0.3, dtype=F64)), denoiser(x, torch.full((5,), 0.3, dtype=F64))
    assert one.x0.dtype == torch.float32
    torch.testing.assert_close(one.x0, many.x0)
    torch.testing.assert_close(one.eps, many.eps)


def test_half_precision_output_keeps_the_image_in_full_precision(schedules):
    """At small sigma x_0 is nearly x_t: a bfloat16 network must not round x_t itself."""
    x = torch.rand(4, 1, 8, 8)
    output = torch.randn(4, 1, 8, 8).bfloat16()
    denoiser = Denoiser(Oracle(output), schedules["linear"], Eps())
    t = torch.tensor(1e-3, dtype=F64)
    wide = Denoiser(Oracle(output.double()), schedules["linear"], Eps())(x.double(), t)
    torch.testing.assert_close(denoiser(x, t).x0.double(), wide.x0, rtol=0, atol=1e-6)


def test_variance_head_is_split_off(schedules):
    eps, variance = torch.randn(2, 3, 1, 4, 4)
    denoiser = Denoiser(Oracle(torch.cat([eps, variance], 1)), schedules["linear"], Eps())
    prediction = denoiser(torch.zeros(3, 1, 4, 4), torch.tensor(0.5, dtype=F64))
    torch.testing.assert_close(prediction.eps, eps)
    assert torch.equal(prediction.variance, variance)


def test_a_network_that_divides_by_sigma_must_get_its_logarithm(schedules):
    network = UNet((1, 8, 8), None, embedding_layout="fourier", scale_by_sigma=True)
    Denoiser(network, VE(), Score())
    for schedule, parameterization in ((schedules["linear"], Score()), (VE(), EDMPreconditioning())):
        with pytest.raises(UsageError, match=r"model.scale_by_sigma=true: .* use schedule=ve and param"):
            Denoiser(network, schedule, parameterization)


def test_clipped_pair_stays_consistent(schedules):
    schedule = schedules["linear"]
    denoiser = Denoiser(Oracle(torch.randn(4, 1, 4, 4)), schedule, Eps())
    x, t = 3 * torch.randn(4, 1, 4, 4), torch.tensor(0.6, dtype=F64)
    prediction = clip_x0(denoiser, schedule)(x, t)
    alpha, sigma = schedule(t)
    assert prediction.x0.abs().max() == 1
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x)


def test_simple_objective_is_the_mean_squared_error_on_eps(schedules):
    generator = torch.Generator().manual_seed(0)
    x0, eps, output = torch.randn(3, 4, 1, 8, 8, generator=generator)
    u = torch.tensor([0.0, 0.2, 0.7, 0.99], dtype=F64)
    network = Oracle(output)
    denoiser = Denoiser(network, schedules["cosine"], Eps())
    t = Uniform()(denoiser.schedule, u).t
    loss = Simple(label_dropout=0.0)(denoiser, x0, None, t, eps)
    torch.testing.assert_close(loss, (output - eps).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(t, torch.tensor([1, 201, 701, 991], dtype=F64) / 1000)
    alpha, sigma = (level.float().view(-1, 1, 1, 1) for level in schedules["cosine"](t))
    torch.testing.assert_close(network.told[0], alpha * x0 + sigma * eps)


def test_clipping_takes_one_time_an_image(schedules):
    schedule = schedules["linear"]
    output = torch.randn(3, 1, 4, 4)
    denoiser = Denoiser(Oracle(output), schedule, Eps())
    x, t = 3 * torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    many = clip_x0(denoiser, schedule)(x, t)
    for i in range(3):
        alone = clip_x0(Denoiser(Oracle(output[i : i + 1]), schedule, Eps()), schedule)
        torch.testing.assert_close(many.eps[i : i + 1], alone(x[i : i + 1], t[i]).eps)
