"""The posterior in closed form, against weighted samples of the mixture."""

import torch

import compare_posteriors
from diffusion_cli.data import GaussianMixture


def test_the_posterior_is_that_of_weighted_samples():
    mixture = GaussianMixture("", shape=(1, 2, 2), size=1)
    matrix = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    y, sigma_y = torch.tensor([0.1, 0.2], dtype=torch.float64), 0.4
    mean, covariance = compare_posteriors.moments(*compare_posteriors.posterior(mixture, matrix, y, sigma_y))
    generator, count = torch.Generator().manual_seed(0), 400_000
    component = torch.multinomial(mixture.weights, count, replacement=True, generator=generator)
    x = mixture.means[component] + mixture.stds[component, None] * torch.randn(
        count, 4, dtype=torch.float64, generator=generator
    )
    weights = (-0.5 * ((x @ matrix.T - y) / sigma_y).square().sum(1)).softmax(0)
    torch.testing.assert_close(weights @ x, mean, atol=0.005, rtol=0)
    found = (weights[:, None] * (x - mean)).T @ (x - mean)
    torch.testing.assert_close(found, covariance, atol=0.005, rtol=0)
