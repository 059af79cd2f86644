"""Permutation-equivariant transformer for point clouds."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffusion_cli.errors import UsageError
from diffusion_cli.networks.layers import NORM_EPS
from diffusion_cli.networks.token_layers import CrossAttention, SelfAttention, XavierLinear
from diffusion_cli.networks.transformer import Transformer


class SetTransformer(Transformer):
    """Transformer F(x, c_noise, y) for point clouds: the blocks of `DiT` with one token per point and no positions.

    Permuting the points permutes F. A trained network accepts any number of points. F = 0 before training.

    A class-conditional network has classes 0..num_classes - 1 and the null class num_classes; otherwise its
    attribute `num_classes` is None.

    Args:
        shape: data shape [C, N], N points with C coordinates.
        num_classes: number of classes of the data, or None.
        hidden_size: features per token.
        depth: number of transformer blocks.
        num_heads: attention heads, a divisor of `hidden_size`.
        mlp_ratio: hidden features of the MLPs relative to `hidden_size`.
        inducing_points: number M of learned inducing points through which points attend to each other, at cost
            O(N M); None: full attention at cost O(N^2).
        dropout: dropout probability in the MLPs.
        class_conditional: whether to condition on classes.
        learn_variance: whether to also predict the variance of a step.
        gradient_checkpointing: whether to recompute activations in the backward pass to save memory.

    Raises:
        UsageError: arguments contradict each other, or the data are not point clouds.

    Source: Lee et al. 2019 (sets); Peebles and Xie 2023 (blocks).
    """

    ordered = False
    """Whether the network depends on the order of elements, see `SampleFormat.ordered`; others do by default."""

    takes_conditions = takes_augmentation = False

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        hidden_size: PositiveInt = 64,
        depth: PositiveInt = 6,
        num_heads: PositiveInt = 4,
        mlp_ratio: PositiveFloat = 4.0,
        inducing_points: PositiveInt | None = 32,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_conditional: bool = False,
        learn_variance: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        if len(shape) != 2:
            raise UsageError(
                "model",
                "SetTransformer",
                f"needs point clouds, not data of shape {list(shape)}",
                "use dataset=points",
            )
        attention = SelfAttention
        if inducing_points is not None:
            attention = partial(InducedAttention, inducing_points=inducing_points)
        super().__init__(
            num_classes, attention, shape[0],
            hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout,
            class_conditional=class_conditional, learn_variance=learn_variance,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        self.x_embedder = XavierLinear(shape[0], hidden_size)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Return F [B, C, N], or [B, 2C, N] with the variance output last, in the dtype of x.

        Args:
            x: points [B, C, N], any number N.
            c_noise: noise levels [B], as defined by the parameterization.
            y: labels, int64 [B]; None: the null class. Ignored by unconditional networks.
        """
        h = self.transform(self.x_embedder(x.transpose(1, 2)), c_noise, y)
        return h.transpose(1, 2).to(x.dtype)


class InducedAttention(nn.Module):
    """Attention through M learned inducing points i, `attend(x, norm(i + attend(i, x)))`, at cost O(N M).

    Maps [B, N, width] to the same shape. Source: Lee et al. 2019, Eq. 9 and 10, without the MLP of the first attention.
    """

    def __init__(self, width: int, num_heads: int, inducing_points: int) -> None:
        super().__init__()
        self.inducing = nn.Parameter(torch.empty(1, inducing_points, width))
        nn.init.xavier_uniform_(self.inducing)
        self.gather = CrossAttention(width, num_heads)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.spread = CrossAttention(width, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        inducing = self.inducing.expand(x.shape[0], -1, -1)
        return self.spread(x, self.norm(inducing + self.gather(inducing, x)))
