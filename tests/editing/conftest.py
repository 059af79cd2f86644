"""Runs that the tests of commands sample from, edit with and evaluate."""

import pytest

from diffusion_cli.data import GaussianMixture


@pytest.fixture(scope="session")
def wide() -> GaussianMixture:
    means = [[-0.6, -0.2, 0.3, 0.5], [0.5, 0.4, -0.4, 0.1], [0.1, -0.7, 0.6, -0.5]]
    return GaussianMixture(
        "", means=means, stds=[0.3] * 3, weights=[0.5, 0.3, 0.2], shape=[1, 2, 2], size=64, seed=0
    )
