"""The guidance `example` changes predictions as it says."""

import diffusion_cli as diffuse
import torch
from diffusion_cli.diffusion.denoiser import Denoiser
from torch import Tensor, nn

diffuse.allow_plugins("example_package")


class Zero(nn.Module):
    """A network that predicts no noise."""

    num_classes = None

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


def test_predicted_images_are_clipped_and_fit_the_noisy_ones() -> None:
    schedule = diffuse.option("schedule", "vp")
    denoiser = Denoiser(Zero(), schedule, diffuse.option("parameterization", "eps"))
    x, t = 3 * torch.randn(4, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    prediction = diffuse.option("guidance", "example", None, limit=0.8)(denoiser, None)(x, t)
    assert prediction.x0.abs().max() <= 0.8
    alpha, sigma = schedule(t)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x)


def test_a_wide_range_changes_nothing() -> None:
    denoiser = Denoiser(Zero(), diffuse.option("schedule", "vp"), diffuse.option("parameterization", "eps"))
    x, t = torch.randn(4, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    guided = diffuse.option("guidance", "example", None, limit=1e3)(denoiser, None)(x, t)
    torch.testing.assert_close(guided.x0, denoiser(x, t, None).x0)
