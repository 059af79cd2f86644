"""Frechet and kernel distances, their moments, extrapolation and intervals, against references and closed forms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.metrics import (
    FeatureBatch,
    FrechetDistance,
    KernelDistance,
    Moments,
    SampleBatch,
    frechet_distance,
    gaussian_mmd,
    polynomial_mmd,
)
from helpers.metrics import AsSeen, array_rows, distance, moments_of, number, pixels

CPU = torch.device("cpu")


def covariance(dim: int, seed: int) -> Tensor:
    root = torch.randn(dim, 2 * dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / dim


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(
        torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )[0]


# --- The Frechet distance ------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 64])
def test_frechet_distance_of_full_rank_equals_the_reference(reference, agree, dim) -> None:
    arrays = reference("metrics")
    value = number(distance(arrays[f"fake_d{dim}"], arrays[f"real_d{dim}"]))
    agree(f"metrics/fid_d{dim}_exact", value, arrays[f"fid_d{dim}_exact"], 1e-9, relative=True)
    assert arrays[f"fid_d{dim}"].numpy() == pytest.approx(
        float(value), rel=1e-9
    )  # six published implementations


@pytest.mark.parametrize(("case", "count"), [("both", 20), ("n2", 2)])
def test_frechet_distance_of_too_few_samples_is_exact(reference, case, count) -> None:
    arrays = reference("metrics")
    fake, real = arrays["fake_d64_first20"][:count], arrays["real_d64_first20"][:count]
    assert distance(fake, real) == pytest.approx(float(arrays[f"fid_degenerate_{case}_exact"]), rel=1e-11)


def test_frechet_distance_to_itself_is_zero_and_never_negative(reference) -> None:
    arrays = reference("metrics")
    for name in ("real_d16", "real_d64_first20"):  # the second has no full rank
        assert 0 <= distance(arrays[name], arrays[name]) < 1e-11


def test_frechet_distance_of_diagonal_gaussians(reference) -> None:
    mu1, mu2, var1, var2 = reference("metrics")["fid_analytic_inputs"]
    value = frechet_distance(mu1, var1.diag(), mu2, var2.diag())
    assert value == pytest.approx(float(reference("metrics")["fid_analytic"]), rel=1e-13)


def test_frechet_distance_of_commuting_covariances() -> None:
    """In a common basis the distance is |mu1 - mu2|^2 + sum (sqrt(l1) - sqrt(l2))^2."""
    dim, basis = 12, rotation(12)
    first, second = torch.rand(2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    second[:3] = 0  # a singular covariance
    mu = torch.linspace(-1, 2, dim, dtype=torch.float64)
    expected = mu.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    sigmas = [basis @ values.diag() @ basis.T for values in (first, second)]
    value = frechet_distance(mu, sigmas[0], torch.zeros_like(mu), sigmas[1])
    assert value == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_is_symmetric_and_blind_to_a_common_rotation() -> None:
    dim, basis = 10, rotation(10)
    mu1, mu2 = torch.randn(2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigma1, sigma2 = covariance(dim, 4), covariance(dim, 5)
    value = frechet_distance(mu1, sigma1, mu2, sigma2)
    rotated = frechet_distance(basis @ mu1, basis @ sigma1 @ basis.T, basis @ mu2, basis @ sigma2 @ basis.T)
    assert value > 1
    assert rotated == pytest.approx(value, rel=1e-12)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(value, rel=1e-12)


# --- Moments ------------------------------------------------------------


def test_moments_taken_in_pieces_equal_those_of_the_whole() -> None:
    values = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)) + 1e3
    streamed = Moments(6)
    for part in values.split([1, 299, 0, 699, 1]):
        streamed.update(part)
    whole = values.double().numpy()
    assert streamed.n == 1000
    assert streamed.mean.numpy() == pytest.approx(whole.mean(0), rel=1e-14)
    assert streamed.covariance.numpy() == pytest.approx(np.cov(whole, rowvar=False), rel=1e-10, abs=1e-12)


def test_merging_moments_is_associative_and_blind_to_order() -> None:
    parts = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).split([10, 20, 30])

    def merged(order: list[int]) -> Moments:
        total = Moments(4)
        for index in order:
            total.merge(moments_of(parts[index]))
        return total

    pair = moments_of(parts[1])
    pair.merge(moments_of(parts[2]))
    nested = moments_of(parts[0])
    nested.merge(pair)
    for other in (merged([0, 1, 2]), merged([2, 0, 1])):
        assert other.n == nested.n == 60
        assert torch.allclose(other.mean, nested.mean, rtol=0, atol=1e-14)
        assert torch.allclose(other.covariance, nested.covariance, rtol=0, atol=1e-14)


def test_saved_moments_come_back_and_go_on(tmp_path) -> None:
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    moments_of(values[:30]).save(tmp_path / "m.npz")
    loaded = Moments.load(tmp_path / "m.npz", 3)
    loaded.update(values[30:])
    assert torch.allclose(loaded.covariance, moments_of(values).covariance, rtol=1e-12)
    with pytest.raises(ValueError, match="4 features"):
        Moments.load(tmp_path / "m.npz", 4)


# --- Kernel distances ------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize(
    ("name", "subsets", "size", "seed"), [("s20x100_seed2020", 20, 100, 2020), ("s10x250_seed7", 10, 250, 7)]
)
def test_kernel_distance_equals_the_reference(
    reference, agree, tmp_path, dim, name, subsets, size, seed
) -> None:
    arrays = reference("metrics")
    seen = AsSeen(arrays[f"fake_d{dim}"], arrays[f"real_d{dim}"])
    (found,) = KernelDistance(subsets=subsets, subset_size=size, seed=seed).init_state(seen).compute()
    mean, std = arrays[f"kid_d{dim}_{name}"]
    agree(f"metrics/kid_d{dim}_{name}", number(found.value), mean, 1e-12)
    agree(f"metrics/kid_d{dim}_{name}_std", number(found.details["std"]), std, 1e-12)


@pytest.mark.parametrize("dim", [16, 64])
def test_polynomial_mmd_of_whole_sets_equals_the_reference(reference, agree, dim) -> None:
    arrays = reference("metrics")
    fake, real = arrays[f"fake_d{dim}"], arrays[f"real_d{dim}"]
    for name, x in (("kid_full", real), ("kid_equal", real[:400])):
        agree(f"metrics/{name}_d{dim}", number(polynomial_mmd(fake, x)), arrays[f"{name}_d{dim}"], 1e-12)


def test_the_standard_error_of_the_kernel_distance_is_its_spread() -> None:
    """Over independent sets: the error given for one of them is the deviation of the estimates."""
    values, errors = [], []
    for seed in range(100):
        x = torch.randn(2, 80, 4, generator=torch.Generator().manual_seed(seed)).double()
        (found,) = (
            KernelDistance(subsets=20, subset_size=40, seed=seed)
            .init_state(AsSeen(x[0], 1.3 * x[1] + 0.5))
            .compute()
        )
        values.append(found.value)
        errors.append(found.details["standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_gaussian_mmd_is_that_of_its_definition_and_zero_for_equal_sets() -> None:
    x, y = (torch.randn(30, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def k(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(-(p - b).double().square().sum(1) / (2 * 1.5**2)).exp() for p in a]).mean()

    expected = float(k(x, x) + k(y, y) - 2 * k(x, y))
    assert gaussian_mmd(array_rows(x), array_rows(y), 1.5, CPU) == pytest.approx(expected, rel=1e-6)
    assert gaussian_mmd(array_rows(x), array_rows(x), 1.5, CPU) == pytest.approx(0, abs=1e-14)


# --- Extrapolation and intervals ------------------------------------------------------------


def test_the_distance_at_infinity_comes_nearer_to_that_of_the_distributions() -> None:
    """Of N(0, I) and N(m, I) in 20 dimensions it is |m|^2; with 400 samples it is more."""
    metric = FrechetDistance(reference_distance=False, infinity=15, bootstrap=0)
    finite, infinite = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        real, fake = (
            torch.randn(200000, 20, generator=generator),
            torch.randn(400, 20, generator=generator) + 0.1,
        )
        measurement = metric.init_state(AsSeen(fake, real))
        measurement.update(SampleBatch(pixels(400, 0), None, FeatureBatch(fake, None)))
        (found,) = measurement.compute()
        assert found.value is not None
        finite.append(found.value)
        infinite.append(found.details["at_infinity"])
    assert np.mean(finite) > 0.4
    assert np.mean(infinite) == pytest.approx(0.2, abs=0.06)


def test_the_interval_holds_the_expected_distance_nearly_always() -> None:
    metric = FrechetDistance(reference_distance=False, infinity=0, bootstrap=60)
    real = torch.randn(50000, 4, generator=torch.Generator().manual_seed(99))
    found = []
    for seed in range(40):
        fake = 1.2 * torch.randn(150, 4, generator=torch.Generator().manual_seed(seed)) + 0.3
        measurement = metric.init_state(AsSeen(fake, real))
        measurement.update(SampleBatch(pixels(150, 0), None, FeatureBatch(fake, None)))
        found += measurement.compute()
    expected = np.mean([finding.value for finding in found])
    inside = [finding.details["low"] < expected < finding.details["high"] for finding in found]
    assert 0.8 <= np.mean(inside) <= 1
    errors = [finding.details["standard_error"] for finding in found]
    assert np.mean(errors) == pytest.approx(np.std([finding.value for finding in found]), rel=0.3)


@pytest.mark.parametrize(("key", "value"), [("infinity", 2), ("bootstrap", 5)])
def test_too_few_points_or_resamples_are_refused(key, value) -> None:
    with pytest.raises(ValueError, match=rf"metric.fid.{key}={value}: is too small"):
        FrechetDistance(**{"reference_distance": False, "infinity": 0, "bootstrap": 0, key: value})
