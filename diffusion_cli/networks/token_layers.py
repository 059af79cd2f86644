"""Layers of networks of tokens: linear maps, attention and MLPs."""

import torch
from torch import Tensor, nn

from diffusion_cli.networks.layers import NORM_EPS, Dropout, attend, zero_init


class XavierLinear(nn.Linear):
    """Linear layer with Xavier initialization (Glorot and Bengio 2010) and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SelfAttention(nn.Module):
    """Self-attention over all tokens, at cost O(N^2): [B, N, width] to the same shape.

    `given` [B, N] excludes tokens from being attended to, at most N - 1 of each row; None includes all.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = XavierLinear(width, 3 * width)
        self.proj = XavierLinear(width, width)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3)  # [B, heads, 3, N, d]
        with torch.autocast(x.device.type, enabled=False):
            out = attend(*qkv.unbind(2), given=given)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from tokens x [B, N, width] to others [B, M, others_width]: [B, N, width].

    `given` [B, M] excludes others, at most M - 1 of each row; None includes all.
    """

    def __init__(self, width: int, num_heads: int, others_width: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = XavierLinear(width, width)
        self.kv = XavierLinear(width if others_width is None else others_width, 2 * width)
        self.proj = XavierLinear(width, width)

    def forward(self, x: Tensor, others: Tensor, given: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, d]
        kv = self.kv(others).unflatten(2, (2, self.num_heads, -1)).transpose(1, 3)  # [B, heads, 2, M, d]
        with torch.autocast(x.device.type, enabled=False):
            out = attend(q, *kv.unbind(2), given=given)
        return self.proj(out.transpose(1, 2).flatten(2))


class PixelCrossAttention(nn.Module):
    """Attention from pixels to tokens with residual connection: `x + attend(norm(x), tokens)`, for [B, C, *sizes].

    The last layer is initially zero. Tokens are [B, L, width], and `given` [B, L] excludes some.

    Source: Rombach et al. 2022, Section 3.3.
    """

    def __init__(
        self, channels: int, width: int, *, num_heads: int, norm_groups: int, norm_eps: float = NORM_EPS
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=norm_eps)
        self.attn = CrossAttention(channels, num_heads, width)
        zero_init(self.attn.proj)

    def forward(self, x: Tensor, tokens: Tensor, given: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        return x + self.attn(pixels, tokens, given).transpose(1, 2).unflatten(2, x.shape[2:])


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh approximation) in between, applied per token."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = XavierLinear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.dropout = Dropout(dropout)
        self.fc2 = XavierLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.act(self.fc1(x))))
