"""Power averages: exponents, decays, inner products by numerical integration, and the fit of a profile."""

import numpy as np
import pytest

from diffusion_cli.diffusion.power_averages import (
    Profile,
    decay_at,
    exponent,
    fit,
    inner_products,
    lengths_within,
    relative_length,
)

TRACKED = (0.05, 0.1)


def density(profile: Profile, times: np.ndarray) -> np.ndarray:
    """A profile at some times, zero after its end."""
    gamma = exponent(profile.length)
    return np.where(times <= profile.time, (gamma + 1) * (times / profile.time) ** gamma / profile.time, 0.0)


def integral(values: np.ndarray, times: np.ndarray) -> float:
    """The integral by the midpoint rule."""
    return float(values.sum() * (times[1] - times[0]))


def averages(path: np.ndarray, profiles: list[Profile]) -> np.ndarray:
    """The averages of a path of weights [T, K], which is constant in each update, [N, K]."""
    rows = []
    for time, length in profiles:
        updates = np.arange(int(time) + 1)
        rows.append(np.diff((updates / time) ** (exponent(length) + 1)) @ path[: int(time)])
    return np.stack(rows)


@pytest.mark.parametrize("length", [1e-3, 0.02, 0.05, 0.1, 0.2, 0.287])
def test_an_exponent_and_its_length_belong_together(length):
    gamma = exponent(length)
    assert gamma > 0
    assert relative_length(gamma) == pytest.approx(length, rel=1e-12)


def test_a_relative_length_is_the_standard_deviation_of_the_profile():
    times = (np.arange(400_000) + 0.5) / 400_000
    for length in (0.03, 0.1, 0.25):
        weights = density(Profile(1.0, length), times)
        mean = integral(weights * times, times)
        assert integral(weights * (times - mean) ** 2, times) ** 0.5 == pytest.approx(length, rel=1e-6)


def test_equal_weights_have_the_longest_length():
    assert relative_length(0) == pytest.approx(12**-0.5, rel=1e-15)
    assert exponent(12**-0.5 * (1 - 1e-9)) == pytest.approx(0, abs=1e-6)
    assert decay_at(4, 0) == pytest.approx(3 / 4)  # the plain mean


def test_updates_give_the_integral_of_the_profile_over_each_update():
    gamma, path = exponent(0.1), np.random.default_rng(0).normal(size=50)
    average = 123.0  # the first weights are forgotten at the first update
    for update, value in enumerate(path, start=1):
        decay = decay_at(update, gamma)
        average = decay * average + (1 - decay) * value
    assert average == pytest.approx(averages(path[:, None], [Profile(50, 0.1)]).item(), rel=1e-12)


def test_inner_products_equal_numerical_integrals():
    """For ends and exponents in every order."""
    profiles = [Profile(time, length) for time in (0.4, 0.7, 1.0) for length in (0.05, 0.1, 0.28)]
    times = (np.arange(100_000) + 0.5) / 100_000
    shapes = [density(profile, times) for profile in profiles]
    wanted = [[integral(one * other, times) for other in shapes] for one in shapes]
    found = inner_products(profiles, profiles)
    np.testing.assert_allclose(found, wanted, rtol=2e-4)
    np.testing.assert_array_equal(found, found.T)


def test_a_stored_profile_is_its_own_fit():
    profiles = [Profile(time, length) for time in (75, 150, 225) for length in TRACKED]
    found = fit(profiles, Profile(225, 0.1))
    np.testing.assert_allclose(found.coefficients, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert found.residual < 1e-7


def test_a_residual_is_the_distance_of_the_profiles():
    profiles = [Profile(time, length) for time in (0.25, 0.5, 0.75, 1.0) for length in TRACKED]
    wanted, times = Profile(1.0, 0.2), (np.arange(200_000) + 0.5) / 200_000
    found, goal = fit(profiles, wanted), density(wanted, times)
    total = sum(
        factor * density(profile, times) for factor, profile in zip(found.coefficients, profiles, strict=True)
    )
    distance = integral((total - goal) ** 2, times) ** 0.5 / integral(goal**2, times) ** 0.5
    assert found.residual == pytest.approx(distance, rel=1e-3)
    assert 0.01 < found.residual < 0.5


@pytest.mark.parametrize(("length", "error"), [(0.03, 1e-3), (0.075, 1e-4), (0.15, 2e-4), (0.2, 2e-3)])
def test_the_fit_gives_the_average_of_a_random_walk(length, error):
    """Relative errors of weights with 32 snapshots in half precision, over a start of unequal weights."""
    random = np.random.default_rng(0)
    path = np.cumsum(random.normal(size=(2400, 200)), 0) * 0.002 + random.normal(size=200) * 0.1
    profiles = [Profile(step, each) for step in range(75, 2401, 75) for each in TRACKED]
    stored = averages(path, profiles)
    stored[:-2] = stored[:-2].astype(np.float16)  # the last are those of the checkpoint
    found = fit(profiles, Profile(2400, length)).coefficients @ stored
    wanted = averages(path, [Profile(2400, length)])[0]
    assert np.linalg.norm(found - wanted) < error * np.linalg.norm(wanted)


def test_a_fit_stays_exact_with_snapshots_one_update_apart():
    """The plain solution in float64: the coefficients stay small, although the profiles are almost equal."""
    profiles = [Profile(step, each) for step in (*range(75, 1501, 75), 1501) for each in TRACKED]
    found = fit(profiles, Profile(1501, 0.075))
    assert np.abs(found.coefficients).sum() < 3
    assert found.residual < 5e-3


def test_more_snapshots_reach_more_lengths():
    few, many = (
        lengths_within(
            [Profile(k / number, each) for k in range(1, number + 1) for each in TRACKED], 1.0, 0.1
        )
        for number in (4, 32)
    )
    assert {*few} < {*many}
    assert {0.05, 0.1} <= {*few}
