"""The transformer of point sets, to which the order of points has no meaning."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffusion_cli.errors import UsageError
from diffusion_cli.networks.layers import NORM_EPS, attend
from diffusion_cli.networks.transformer import SelfAttention, Transformer, XavierLinear


class SetTransformer(Transformer):
    """F(x, c_noise, y) of a point cloud: the blocks of `DiT` with a token for each point and no positions.

    `shape` is that of a set, [C, N]: N points with C coordinates each. Points in another order give the same F in
    that order, and a trained network takes any number of them. With M `inducing_points` the points attend to each
    other by way of M learned ones, at a cost of O(N M) instead of O(N^2). F = 0 before training.

    A class-conditional network knows the classes 0 .. num_classes - 1 and the null class num_classes, which
    stands for "no label"; otherwise its `num_classes` is None.

    Raises UsageError where two arguments do not go together, and for a shape that is none of a set.
    Sources: Lee et al. 2019 (sets); Peebles & Xie 2023 (the blocks).
    """

    ordered = False
    """As `SampleFormat.ordered`: it takes what lies in no order; networks that do not say so go by the order."""

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
                f"is for point clouds, not for data of shape {list(shape)}",
                "take dataset=points",
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
        """Return F [B, C, N], or [B, 2C, N] with the variance values last, in the dtype of x.

        x: [B, C, N] with any number N of points; c_noise: [B], the timestep number or what else the
        parameterization names; y: int64 [B], or None for the null class. An unconditional network takes no notice
        of y.
        """
        h = self.transform(self.x_embedder(x.transpose(1, 2)), c_noise, y)
        return h.transpose(1, 2).to(x.dtype)


class InducedAttention(nn.Module):
    """Attention by way of M learned points i: attend(x, norm(i + attend(i, x))), at a cost of O(N M).

    [B, N, width] to the same shape. Source: Lee et al. 2019, Eq. 9 and 10, without the MLP of the first attention.
    """

    def __init__(self, width: int, num_heads: int, inducing_points: int) -> None:
        super().__init__()
        self.inducing = nn.Parameter(torch.empty(1, inducing_points, width))
        nn.init.xavier_uniform_(self.inducing)
        self.gather = CrossAttention(width, num_heads)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.spread = CrossAttention(width, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        inducing = self.inducing.expand(len(x), -1, -1)
        return self.spread(x, self.norm(inducing + self.gather(inducing, x)))


class CrossAttention(nn.Module):
    """Attention of tokens x [B, N, width] to others [B, M, width]: [B, N, width]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = XavierLinear(width, width)
        self.kv = XavierLinear(width, 2 * width)
        self.proj = XavierLinear(width, width)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, d]
        kv = self.kv(others).unflatten(2, (2, self.num_heads, -1)).transpose(1, 3)  # [B, heads, 2, M, d]
        with torch.autocast(x.device.type, enabled=False):
            out = attend(q, *kv.unbind(2))
        return self.proj(out.transpose(1, 2).flatten(2))
