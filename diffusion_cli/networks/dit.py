"""Diffusion transformer (DiT)."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import pad

from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.conditions.condition import IMAGE
from diffusion_cli.networks.condition_embedding import with_image
from diffusion_cli.networks.layers import (
    NORM_EPS,
    Conv,
    SinusoidalLayout,
    crop,
    from_patches,
    pad_to_multiple,
    timestep_embedding,
)
from diffusion_cli.networks.token_layers import SelfAttention
from diffusion_cli.networks.transformer import Transformer


class DiT(Transformer):
    """Diffusion transformer F(x, c_noise, y) with adaLN-zero conditioning, for signals, images and volumes.

    Tokens are linear embeddings of patches plus a sinusoidal `position_embedding`. F = 0 before training. Weights
    have the published names and shapes, except `pos_embed`, which is computed. Positions count tokens, so that with
    progressive resolution those of larger images must be learned anew.

    A class-conditional network has classes 0..num_classes - 1 and the null class num_classes; otherwise its
    attribute `num_classes` is None.

    Args:
        shape: data shape [C, *sizes] with one to three sizes.
        conditions: classes and other conditions that the data offer, or a number of classes, or None.
        hidden_size: features per token.
        depth: number of transformer blocks.
        num_heads: attention heads, a divisor of `hidden_size`.
        mlp_ratio: hidden features of the MLPs relative to `hidden_size`.
        patch_size: pixels per side of a patch.
        embedding_layout: layout of the timestep features, see `timestep_embedding`; diffusers has `cos_sin_inclusive`.
        mlp_norm_eps: constant that the normalization before each MLP adds to the variance; 1e-5 in diffusers.
        dropout: dropout probability in the MLPs; the published network has none.
        class_conditional: whether to condition on classes and attributes.
        learn_variance: whether to also predict the variance of a step.
        gradient_checkpointing: whether to recompute activations in the backward pass to save memory.

    Raises:
        UsageError: arguments contradict each other.

    Source: Peebles and Xie 2023, and code.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        conditions: Conditions | int | None,
        *,
        hidden_size: PositiveInt = 128,
        depth: PositiveInt = 6,
        num_heads: PositiveInt = 4,
        mlp_ratio: PositiveFloat = 4.0,
        patch_size: PositiveInt = 2,
        embedding_layout: SinusoidalLayout = "cos_sin",
        mlp_norm_eps: PositiveFloat = NORM_EPS,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_conditional: bool = False,
        learn_variance: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        channels, axes = shape[0], len(shape) - 1
        super().__init__(
            conditions, SelfAttention, channels * patch_size**axes,
            embedding_layout=embedding_layout, mlp_norm_eps=mlp_norm_eps,
            hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout,
            class_conditional=class_conditional, learn_variance=learn_variance,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        self.patch_size = patch_size
        image = self.conditions.image
        given = 0 if image is None else image + 1
        self.x_embedder = PatchEmbedding(channels + given, hidden_size, patch_size, axes)

    def forward(self, x: Tensor, c_noise: Tensor, y: Condition | Tensor | None = None) -> Tensor:
        """Return F [B, C, *sizes], or [B, 2C, *sizes] with the variance output last, in the dtype of x.

        Args:
            x: input [B, C, *sizes] of any sizes, padded to multiples of patch_size.
            c_noise: noise levels [B], as defined by the parameterization.
            y: condition, or labels, int64 [B]; None: all values are missing. Ignored by unconditional networks.
        """
        sizes, patch = x.shape[2:], self.patch_size
        grid = [-(-size // patch) for size in sizes]
        inputs = x
        if self.conditions.image is not None:
            inputs = with_image(x, Condition.of(y).get(IMAGE), self.conditions.image)
        tokens = self.x_embedder(pad_to_multiple(inputs, patch))
        places = position_embedding(grid, tokens.shape[2], tokens.device)
        tokens = self.transform(tokens + places.to(tokens.dtype), c_noise, y)
        pixels = tokens.unflatten(2, (patch ** len(grid), -1)).permute(0, 3, 2, 1)  # [B, C, of a patch, N]
        h = from_patches(pixels.flatten(1, 2).unflatten(2, grid), patch)
        return crop(h, sizes).to(x.dtype)


class PatchEmbedding(nn.Module):
    """Linear embedding of patches: [B, C, *sizes] to [B, N, width]; patch_size must divide the sizes."""

    def __init__(self, channels: int, width: int, patch_size: int, axes: int) -> None:
        super().__init__()
        self.proj = Conv(channels, width, patch_size, stride=patch_size, padding=0, ndim=axes)
        nn.init.xavier_uniform_(self.proj.weight.detach().flatten(1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def position_embedding(grid: Sequence[int], dim: int, device: torch.device) -> Tensor:
    """Return sinusoidal embeddings of the positions of a grid, float [prod(grid), dim], in [-1, 1].

    Each axis has 2 m features, m = dim // (2 axes): [sin | cos] of position * 10000^(-i / m) for i = 0..m - 1. The
    last axis comes first, as published; remaining features are zero.
    """
    places = torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid)).view(-1, len(grid))
    features = timestep_embedding(places.flip(1).flatten(), 2 * (dim // (2 * len(grid))), "cos_sin")
    cos, sin = features.chunk(2, dim=1)
    together = torch.cat([sin, cos], dim=1).view(math.prod(grid), -1)
    return pad(together, (0, dim - together.shape[1]))
