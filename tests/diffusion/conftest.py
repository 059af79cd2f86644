""""""

import pytest

from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import Linear
from helpers.guidance import Bayes, Exact, T


@pytest.fixture(scope="session")
def schedule() -> Linear:
    return Linear(num_timesteps=T)


@pytest.fixture(scope="session")
def denoiser(mixture, schedule) -> Denoiser:
    return Denoiser(Exact(mixture, schedule), schedule, Eps())


@pytest.fixture(scope="session")
def classifier(mixture, schedule) -> NoisyClassifier:
    return NoisyClassifier(Bayes(mixture, schedule), schedule, Eps())
