"""Restoration from noisy measurements: the exact posterior where a method reaches it, and the noise."""

from collections import deque
from dataclasses import replace

import pytest
import torch
import yaml

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.editing import (
    CT,
    DPS,
    MRI,
    Clipping,
    DiffPIR,
    GaussianFilter,
    LinearMeasurement,
    Mask,
    PiGDM,
    Restore,
)
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers import DDIM, Heun
from helpers.editing import F64, GRAY, matrix_of, noise, plain, process, shrinking

SAMPLERS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(CONF.glob("sampler/*.yaml"))}
SHAPE = (1, 2, 2)
MEAN = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=F64).view(SHAPE)


class Weighing(LinearMeasurement):
    """Three weighted sums of four pixels."""

    def __init__(self):
        super().__init__(SHAPE)
        self.matrix = noise(3, 4)

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.T


def gaussian(schedule, std):
    """The denoiser of pixels N(MEAN, std^2)."""

    def denoise(x, t):
        alpha, sigma = schedule(t)
        x0 = MEAN + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    return denoise


def moments(method, schedule, std, operator, y, sigma_y, steps=300):
    """Mean and covariance of the samples of a method, which are affine in the initial noise."""
    start = torch.cat([torch.zeros(1, 4, dtype=F64), torch.eye(4, dtype=F64)]).view(5, *SHAPE)
    sampler = Heun(schedule, spacing="log_snr")
    given = plain(sampler, gaussian(schedule, std), steps, lambda: start)
    (x,) = deque(method.restore(replace(given, sigma_y=sigma_y), operator, y.expand(5, -1)), maxlen=1)
    mean, *others = x.flatten(1)
    columns = torch.stack(others) - mean
    return mean, columns.T @ columns


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["vp", "ve", "edm", "rectified"])
@pytest.mark.parametrize(("std", "sigma_y"), [(1.0, 0.3), (0.5, 0.05)])
def test_pseudoinverse_guidance_is_exact_for_gaussian_images(schedules, tag, std, sigma_y):
    operator = Weighing()
    y, matrix = noise(1, 3, seed=5), operator.matrix
    spread = std**2 * matrix @ matrix.T + sigma_y**2 * torch.eye(3, dtype=F64)
    gain = std**2 * matrix.T @ torch.linalg.inv(spread)
    exact = MEAN.flatten() + gain @ (y[0] - matrix @ MEAN.flatten())
    covariance = std**2 * (torch.eye(4, dtype=F64) - gain @ matrix)
    mean, found = moments(PiGDM(data_std=std), schedules[tag], std, operator, y, sigma_y)
    torch.testing.assert_close(mean, exact, atol=0.02, rtol=0)
    torch.testing.assert_close(found, covariance, atol=0.02 * std**2, rtol=0)


def test_diffpir_is_exact_for_a_flat_prior(schedules):
    """The posterior of an orthogonal measurement is N(A^T y, sigma_y^2)."""
    operator, y, sigma_y = Weighing(), noise(1, 4, seed=5), 0.7
    operator.matrix = torch.linalg.qr(noise(4, 4)).Q
    mean, found = moments(DiffPIR(zeta=0.0), schedules["edm"], 1e4, operator, y, sigma_y)
    torch.testing.assert_close(mean, operator.matrix.T @ y[0], atol=0.01, rtol=0)
    torch.testing.assert_close(found, sigma_y**2 * torch.eye(4, dtype=F64), atol=0.01, rtol=0)


def test_a_large_prior_weight_leaves_the_prediction_and_a_small_one_the_measurement(schedules):
    operator, y = Mask(torch.tensor([[True, False], [True, False]])[None, None]), noise(1, *SHAPE)
    y = y * operator.known
    ends = []
    for weight in (1e9, 1e-9):
        method = DiffPIR(prior_weight=weight, zeta=0.0)
        given = plain(DDIM(schedules["vp"]), gaussian(schedules["vp"], 0.5), 20, lambda: noise(1, *SHAPE))
        ends.append(deque(method.restore(replace(given, sigma_y=0.1), operator, y), maxlen=1)[0])
    (free,) = deque(DiffPIR(zeta=0.0).restore(replace(given, sigma_y=1e9), operator, y), maxlen=1)
    torch.testing.assert_close(ends[0], free, atol=1e-4, rtol=0)
    torch.testing.assert_close(operator(ends[1]), y, atol=1e-4, rtol=0)


@pytest.mark.parametrize("zeta", [0.0, 0.4, 1.0])
def test_diffpir_renews_its_share_of_the_noise(schedules, zeta):
    schedule, shown, c = schedules["vp"], [], noise(1, *GRAY, seed=1)

    def denoise(x, t):
        shown.append((x, t))
        return shrinking(schedule)(x, t)

    operator = GaussianFilter(GRAY, sigma=1.0)
    y = operator(noise(1, *GRAY))
    given = replace(plain(DDIM(schedule), denoise, 3, lambda: c), sigma_y=0.2)
    list(DiffPIR(zeta=zeta).restore(given, operator, y))
    (x, t), (following, s) = shown[:2]
    matrix = matrix_of(operator, GRAY)
    alpha, sigma = schedule(t)
    x0 = shrinking(schedule)(x, t).x0.flatten()
    system = matrix.T @ matrix + (0.2 * alpha / sigma) ** 2 * torch.eye(64, dtype=F64)
    nearest = x0 + torch.linalg.solve(system, matrix.T @ (y.flatten() - matrix @ x0))
    eps = (x.flatten() - alpha * nearest) / sigma
    alpha_s, sigma_s = schedule(s)
    expected = alpha_s * nearest + sigma_s * ((1 - zeta) ** 0.5 * eps + zeta**0.5 * c.flatten())
    torch.testing.assert_close(following.flatten(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler_name", SAMPLERS)
@pytest.mark.parametrize("method", [PiGDM(), DiffPIR()], ids=["pigdm", "diffpir"])
def test_methods_approach_the_measurement_with_every_sampler(schedules, sampler_name, method):
    schedule = schedules["vp"]
    sampler = build(SAMPLERS[sampler_name], schedule)
    edit = Restore(GRAY, sigma_y=0.01).measured_by(CT(GRAY, angles=3))
    images = 0.5 * noise(2, *GRAY, seed=7)
    misfits = []
    for each in (method, DiffPIR(prior_weight=1e12)):
        given = process(schedule, sampler, shrinking(schedule), GRAY, each, steps=12)
        edited = edit(images, replace(given, input_seeds=[3, 4]))
        assert edited.images.shape == (2, 1, *GRAY)
        assert edited.residual is not None
        misfits.append(float(edited.residual(edited.images[:, 0]).square().mean().sqrt()))
    assert misfits[0] < 0.7 * misfits[1], misfits


def test_only_dps_takes_measurements_that_are_not_linear(schedules):
    edit = Restore(GRAY).measured_by(Clipping(GRAY))
    given = process(schedules["vp"], DDIM(schedules["vp"]), shrinking(schedules["vp"]), GRAY, DPS(), steps=5)
    edited = edit(noise(2, *GRAY), replace(given, input_seeds=[0, 1]))
    assert edited.images.isfinite().all()
    assert not isinstance(Clipping(GRAY), (PiGDM.takes, DiffPIR.takes))


def test_variations_of_an_input_share_its_noise_of_a_known_size(schedules):
    schedule = schedules["vp"]

    class Keep(DPS):
        """Keeps what it gets."""

        def restore(self, process, operator, y):
            self.y, self.sigma_y = y, process.sigma_y
            yield torch.zeros(len(y), *GRAY, dtype=F64)

    def measured(edit, count, seeds):
        method, images = Keep(), torch.full((count, *GRAY), 0.2, dtype=F64)
        given = process(schedule, DDIM(schedule), shrinking(schedule), GRAY, method, steps=2, count=count)
        edit(images, replace(given, input_seeds=seeds))
        return method.y, torch.as_tensor(method.sigma_y)

    blurred = Restore(GRAY, sigma_y=0.3).measured_by(GaussianFilter(GRAY))
    y, sigma_y = measured(blurred, 3, [5, 5, 6])
    assert torch.equal(y[0], y[1])
    assert not torch.equal(y[0], y[2])
    assert sigma_y.flatten().tolist() == pytest.approx([0.3] * 3)
    y, _ = measured(blurred, 200, range(200))
    assert float((y - 0.2).std()) == pytest.approx(0.3, rel=0.03)
    counted = Restore(GRAY, sigma_y=0.0, photons=50.0).measured_by(GaussianFilter(GRAY))
    y, sigma_y = measured(counted, 200, range(200))
    assert float(y.mean()) == pytest.approx(0.2, abs=0.01)
    deviation = 2 * (50 * 0.6) ** 0.5 / 50
    assert float(y.std()) == pytest.approx(deviation, rel=0.03)
    assert float(sigma_y.square().mean().sqrt()) == pytest.approx(deviation, rel=0.02)
    with pytest.raises(UsageError, match=r"edit.photons=50.*can be negative"):
        Restore(GRAY, photons=50.0).measured_by(MRI(GRAY))
