"""Gaussian mixture data with a closed-form density, score and posterior mean at every noise level."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from diffusion_cli.data.base import Dataset, Split
from diffusion_cli.data.memory import GENERATED, MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.system.seeding import mix


class GaussianMixture(Dataset):
    """Points x_0 ~ sum_k w_k N(m_k, s_k^2 I), as real-valued images with the component k as label.

    At x_t = alpha x_0 + sigma eps the mixture has the means alpha m_k and the variances
    v_k = alpha^2 s_k^2 + sigma^2. `log_prob`, `score` and the optimal denoiser `denoise` follow from these. They
    accept any number of points [..., C, H, W], with scalar or [...]-shaped alpha, sigma and labels; they compute and
    return float64, and are differentiable.

    Args:
        data_dir: unused.
        means: means m_k, each of C*H*W numbers.
        stds: standard deviations s_k > 0.
        weights: weights w_k > 0, normalized to sum 1.
        shape: [C, H, W] of the points.
        size: number of points of each split.
        seed: seed of the points.

    Raises:
        UsageError: `means`, `stds` and `weights` differ in length, or have invalid values.
    """

    name = "gaussian_mixture"
    flip = False

    def __init__(
        self,
        data_dir: str,
        *,
        means: Sequence[Sequence[float]] = (
            (-0.6, -0.2, 0.3, 0.5),
            (0.5, 0.4, -0.4, 0.1),
            (0.1, -0.7, 0.6, -0.5),
        ),
        stds: Sequence[float] = (0.1, 0.2, 0.15),
        weights: Sequence[float] = (0.5, 0.3, 0.2),
        shape: Sequence[int] = (1, 2, 2),
        size: Annotated[int, Field(ge=1, le=10**7)] = 10000,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(data_dir)
        if len(shape) != 3 or min(shape) < 1:
            raise UsageError("dataset.shape", list(shape), "must be channels, height and width")
        channels, height, width = shape
        self.shape = (channels, height, width)
        if any(len(mean) != math.prod(shape) for mean in means):
            raise UsageError(
                "dataset.means", means, f"every mean needs {math.prod(shape)} numbers, one per pixel"
            )
        for key, values in {"stds": stds, "weights": weights}.items():
            if len(values) != len(means) or not min(values, default=0) > 0:
                raise UsageError(
                    f"dataset.{key}", values, f"must be {len(means)} positive numbers, one per mean"
                )
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.weights /= self.weights.sum()
        self.class_names = tuple(str(component) for component in range(len(means)))
        self.size = size
        self.seed = seed

    def load(self, split: Split) -> MemoryImages:
        """Return `size` points, drawn independently for each split."""
        generator = torch.Generator().manual_seed(mix(self.seed, split))
        labels = torch.multinomial(self.weights, self.size, replacement=True, generator=generator)
        noise = torch.randn((self.size, self.means.shape[1]), generator=generator, dtype=torch.float64)
        points = self.means[labels] + self.stds[labels, None] * noise
        return MemoryImages(points.reshape(-1, *self.shape).float(), labels, GENERATED)

    def mean(self) -> Tensor:
        """Return the mean E[x_0] = sum_k w_k m_k, float64 [C, H, W]."""
        return (self.weights @ self.means).reshape(self.shape)

    def covariance(self) -> Tensor:
        """Return Cov[x_0] = sum_k w_k (s_k^2 I + m_k m_k^T) - m m^T, float64 [C*H*W, C*H*W]."""
        centred = self.means - self.weights @ self.means
        within = (self.weights * self.stds**2).sum() * torch.eye(self.means.shape[1], dtype=torch.float64)
        return within + (self.weights[:, None] * centred).T @ centred

    def log_prob(
        self,
        x: Tensor,
        alpha: float | Tensor = 1.0,
        sigma: float | Tensor = 0.0,
        label: int | Tensor | None = None,
    ) -> Tensor:
        """Return log p_t(x), or log p_t(x | label), in nats, float64 [...]."""
        return torch.logsumexp(self._components(x, alpha, sigma, label)[0], -1)

    def score(
        self, x_t: Tensor, alpha: float | Tensor, sigma: float | Tensor, label: int | Tensor | None = None
    ) -> Tensor:
        """Return the score, the gradient of log p_t at x_t: sum_k r_k (alpha m_k - x_t) / v_k, float64 [..., C, H, W].

        r_k is the posterior probability of component k.
        """
        log_joint, offset, variance, _ = self._components(x_t, alpha, sigma, label)
        weight = torch.softmax(log_joint, -1) / variance
        return -(weight[..., None] * offset).sum(-2).reshape(x_t.shape)

    def denoise(
        self, x_t: Tensor, alpha: float | Tensor, sigma: float | Tensor, label: int | Tensor | None = None
    ) -> Tensor:
        """Return E[x_0 | x_t] = sum_k r_k (m_k + alpha s_k^2 / v_k (x_t - alpha m_k)), float64 [..., C, H, W]."""
        log_joint, offset, variance, alpha = self._components(x_t, alpha, sigma, label)
        gain = alpha * self.stds.to(x_t.device) ** 2 / variance
        means = self.means.to(x_t.device) + gain[..., None] * offset
        return (torch.softmax(log_joint, -1)[..., None] * means).sum(-2).reshape(x_t.shape)

    def _components(
        self, x_t: Tensor, alpha: float | Tensor, sigma: float | Tensor, label: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log(w_k N(x_t; alpha m_k, v_k I)), x_t - alpha m_k, v_k and alpha, broadcastable.

        Their shapes are [..., K], [..., K, d], [..., K] and [..., 1]. With a label, its component has weight 1 and
        the others 0.
        """
        means, stds, weights = (value.to(x_t.device) for value in (self.means, self.stds, self.weights))
        alpha = torch.as_tensor(alpha, dtype=torch.float64, device=x_t.device)[..., None]
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x_t.device)[..., None]
        offset = x_t.to(means).flatten(-3)[..., None, :] - alpha[..., None] * means
        variance = alpha**2 * stds**2 + sigma**2
        log_weights = weights.log()
        if label is not None:
            components = torch.arange(len(means), device=x_t.device)
            chosen = torch.as_tensor(label, device=x_t.device)[..., None] == components
            log_weights = torch.where(chosen, 0.0, -math.inf).to(means)
        squares = offset.square().sum(-1) / variance
        log_joint = log_weights - 0.5 * (squares + means.shape[1] * torch.log(2 * math.pi * variance))
        return log_joint, offset, variance, alpha
