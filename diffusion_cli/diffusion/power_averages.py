"""Power-function averages of weights, and their reconstruction at any length after the training.

The average of the weights theta at time t has weights in proportion to a power of the time:

    average(t) = int_0^t tau^gamma theta(tau) dtau / int_0^t tau^gamma dtau

Its relative length is the standard deviation of this profile, in units of t. With n as the number of updates, theta is
constant within each update. This module does not import torch.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Sec. 3 and App. C.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Profile(NamedTuple):
    """The weights of an average over time: `(gamma + 1) tau^gamma / time^(gamma + 1)` for tau in [0, time]."""

    time: float
    """End of the average, above 0, in any unit."""
    length: float
    """Relative length, above 0 and below 12^-1/2."""


class Fit(NamedTuple):
    """The sum of stored profiles that is nearest to another one."""

    coefficients: NDArray[np.float64]
    """Factor of each stored average, [N]."""
    residual: float
    """Distance of the sum from the profile, relative to the norm of the profile: 0 is exact, 1 is no agreement."""


@cache
def exponent(length: float) -> float:
    """Return gamma of a relative length: the positive root of `(gamma + 2)^2 (gamma + 3) = (gamma + 1) / length^2`.

    There is one root, because the coefficients of this cubic change their sign once.

    Args:
        length: above 0 and below 12^-1/2 = 0.2887, the length for gamma = 0.
    """
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def relative_length(gamma: float) -> float:
    """Return the standard deviation of a profile with exponent gamma, relative to its time.

    `((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))^(1/2)`
    """
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def decay_at(update: int, gamma: float) -> float:
    """Return the decay of the average at update n = 1, 2, ...: `(1 - 1/n)^(gamma + 1)`.

    The weights of update k in the average are then `(k^(gamma + 1) - (k - 1)^(gamma + 1)) / n^(gamma + 1)`, the
    integral of the profile over this update.
    """
    return (1 - 1 / update) ** (gamma + 1)


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> NDArray[np.float64]:
    """Return the integrals of the products of profiles, [M, N].

    For exponents a and b and ends s <= t it is the integral up to s:

        (a + 1) (b + 1) / (s^(a + 1) t^(b + 1)) int_0^s tau^(a + b) dtau = (a + 1) (b + 1) / (a + b + 1) (s / t)^b / t

    The power of s / t is the exponent of the profile with the later end.
    """
    times, powers = _columns(first)
    other_times, other_powers = (column[None] for column in _columns(second))
    times, powers = times[:, None], powers[:, None]
    early, late = np.minimum(times, other_times), np.maximum(times, other_times)
    of_late = np.where(times > other_times, powers, other_powers)
    scale = (powers + 1) * (other_powers + 1) / (powers + other_powers + 1)
    return scale * (early / late) ** of_late / late


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """Return the coefficients x of the sum of stored profiles p_i that is nearest to a profile p.

    They solve `A x = b` with `A_ij = <p_i, p_j>` and `b_i = <p_i, p>`. The profiles are scaled to norm 1 for the
    solution in float64: its condition number is then below 1e9 even if two snapshots are one update apart.

    Args:
        stored: profiles of different ends or lengths, one or more.
        wanted: profile to approximate.
    """
    products = inner_products(stored, stored)
    norms = np.sqrt(np.diag(products))
    norm = np.sqrt(inner_products([wanted], [wanted])[0, 0])
    products /= np.outer(norms, norms)
    right = inner_products(stored, [wanted])[:, 0] / (norms * norm)
    scaled = np.linalg.solve(products, right)
    squared = 1 - 2 * scaled @ right + scaled @ products @ scaled
    return Fit(scaled * norm / norms, float(np.sqrt(max(0.0, squared))))


def lengths_within(stored: Sequence[Profile], time: float, residual: float) -> list[float]:
    """Return the relative lengths in steps of 0.005 that the stored profiles approximate at a time.

    Args:
        stored: profiles of different ends or lengths.
        time: end of the reconstructed averages.
        residual: largest residual of `fit`.
    """
    lengths = [number / 200 for number in range(1, 58)]
    return [length for length in lengths if fit(stored, Profile(time, length)).residual <= residual]


def _columns(profiles: Sequence[Profile]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the times and the exponents of profiles, [N] each."""
    times = np.array([profile.time for profile in profiles], dtype=np.float64)
    return times, np.array([exponent(profile.length) for profile in profiles])
