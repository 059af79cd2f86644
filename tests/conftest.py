"""Shared fixtures: reference arrays, and a denoiser that is known in closed form."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.data import GaussianMixture
from diffusion_cli.denoiser import Prediction
from diffusion_cli.schedules import Cosine, Linear, ScaledLinear, Schedule

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Arrays of independent implementations; see tests/reference/README.md."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(REFERENCE / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def mixture(reference) -> GaussianMixture:
    arrays = reference("gmm")
    means, stds, weights = (arrays[key].tolist() for key in ("means", "stds", "weights"))
    return GaussianMixture("", means=means, stds=stds, weights=weights, shape=[1, 2, 2], size=64, seed=0)


@pytest.fixture(scope="session")
def schedules() -> dict[str, Schedule]:
    return {
        "linear": Linear(num_timesteps=1000, beta_start=1e-4, beta_end=0.02),
        "scaled_linear": ScaledLinear(num_timesteps=1000, beta_start=0.00085, beta_end=0.012),
        "cosine": Cosine(num_timesteps=1000, offset=0.008, max_beta=0.999),
    }


@pytest.fixture(scope="session")
def exact(mixture) -> Callable:
    """The perfect denoiser of the mixture; `gain` scales its eps, so that clipping has something to do."""

    def build(schedule: Schedule, gain: float = 1.0) -> Callable[[Tensor, Tensor], Prediction]:
        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = schedule(t)
            eps = gain * (x_t - alpha * mixture.denoise(x_t, alpha, sigma)) / sigma
            return Prediction((x_t - sigma * eps) / alpha, eps)

        return denoise

    return build
