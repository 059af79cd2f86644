"""Mean and covariance of features, computed incrementally."""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.data.array import read_arrays
from diffusion_cli.errors import FormatError
from diffusion_cli.system.files import atomic_write


class Moments:
    """Number, mean and scatter matrix of feature vectors, in float64 on the CPU, updated batch by batch.

    Two sets with means a, b and scatters A, B (sums of centred squares) merge as
    n = n_a + n_b, mean = a + d n_b / n, scatter = A + B + d d^T n_a n_b / n with d = b - a.

    Args:
        dim: number of features.

    Source: Chan, Golub, LeVeque 1979.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        """Mean, float64 [dim]."""
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)
        """Sum of (x - mean) (x - mean)^T, float64 [dim, dim]."""

    @property
    def covariance(self) -> Tensor:
        """Covariance scatter / (n - 1), float64 [dim, dim]; needs n > 1."""
        assert self.n > 1, self.n
        return self.scatter / (self.n - 1)

    def update(self, features: Tensor) -> None:
        """Add feature vectors [B, dim] of any dtype on any device."""
        if len(features) == 0:
            return
        values = features.detach().double()  # on their device: the product is as costly as a small network
        new = Moments(values.shape[1])
        mean = values.mean(0)
        centred = values - mean
        new.n, new.mean, new.scatter = len(values), mean.cpu(), (centred.T @ centred).cpu()
        self.merge(new)

    def merge(self, other: "Moments") -> None:
        """Add the vectors of another set."""
        total = self.n + other.n
        if total == 0:
            return
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.n / total)
        self.scatter = self.scatter + other.scatter
        self.scatter += torch.outer(difference, difference) * (self.n * other.n / total)
        self.n = total

    def save(self, path: Path) -> None:
        """Write `mu` [dim], `sigma` [dim, dim] and `n` as .npz, atomically."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy(), n=np.int64(self.n))

    @classmethod
    def load(cls, path: Path, dim: int) -> Self:
        """Read a file of `save`; FormatError, or an error of the parsers, if it is damaged or has another size."""
        mean, covariance, n = map(torch.from_numpy, read_arrays(path, "mu", "sigma", "n"))
        shapes = mean.shape, covariance.shape, n.shape
        if shapes != ((dim,), (dim, dim), ()) or not covariance.isfinite().all() or n < 2:
            raise FormatError(f"is not the mean and covariance of {dim} features")
        moments = cls(dim)
        moments.n, moments.mean, moments.scatter = int(n), mean, covariance * (int(n) - 1)
        return moments
