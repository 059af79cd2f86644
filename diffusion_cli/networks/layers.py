"""Layers of the networks: timestep features, resampling, attention, residual block.

`ndim` is the number of a layer's dimensions: 1 for signals [B, C, L], 2 for images [B, C, H, W], 3 for volumes
[B, C, D, H, W].
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    interpolate,
    pad,
    scaled_dot_product_attention,
    silu,
)
from torch.utils.checkpoint import checkpoint

from diffusion_cli.errors import UsageError

# torch's operations by number of dimensions.
CONV = {1: conv1d, 2: conv2d, 3: conv3d}
CONV_TRANSPOSE = {1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d}
AVG_POOL = {1: avg_pool1d, 2: avg_pool2d, 3: avg_pool3d}

NORM_EPS = 1e-6  # Ho et al. 2020
SMALL = 2**24  # numbers of all attention matrices of a layer: 32 MB in bfloat16


class Checkpointed(nn.Module):
    """A network whose blocks keep their activations, or with `gradient_checkpointing` compute them a second time."""

    gradient_checkpointing: bool

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Apply a block."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def timestep_embedding(c_noise: Tensor, dim: int, layout: Literal["sin_cos", "cos_sin"]) -> Tensor:
    """Sinusoidal features of the timestep number, in float64 whatever the precision around it.

    angle[b, i] = c_noise[b] * 10000^(-i / n) for i = 0 .. dim // 2 - 1, with
    `sin_cos`: [sin | cos], n = dim // 2 - 1 (Ho et al. 2020's code) and
    `cos_sin`: [cos | sin], n = dim // 2 (Nichol & Dhariwal 2021's code). An odd `dim` ends in a zero.

    c_noise: [B], usually 0..T-1, fractions welcome. Returns [B, dim], in -1..1.
    """
    c_noise = _exact(c_noise)
    half = dim // 2
    n = half if layout == "cos_sin" else max(half - 1, 1)
    exponents = torch.arange(half, device=c_noise.device, dtype=c_noise.dtype) / n
    angles = c_noise[:, None] * torch.exp(-math.log(10000.0) * exponents)
    halves = (angles.sin(), angles.cos()) if layout == "sin_cos" else (angles.cos(), angles.sin())
    return pad(torch.cat(halves, dim=1), (0, dim % 2))


def fourier_embedding(c_noise: Tensor, frequencies: Tensor) -> Tensor:
    """Features [sin(2 pi w c_noise) | cos(2 pi w c_noise)] of the frequencies w, computed in float64.

    c_noise: [B], the logarithm of a noise level as published; frequencies: [n]. Returns [B, 2n], in -1..1.
    Source: Tancik et al. 2020, Section 5; Song et al. 2021b, Appendix C.
    """
    c_noise = _exact(c_noise)
    angles = 2 * math.pi * c_noise[:, None] * frequencies.to(c_noise.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # MPS has no float64


def zero_init(layer: nn.Module) -> None:
    """Set all parameters to zero, so that the branch that ends in the layer starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def conditioning_classes(num_classes: int | None, class_conditional: bool) -> int | None:
    """The number of classes of a class-conditional network, else None; UsageError for a data set without classes."""
    if class_conditional and num_classes is None:
        raise UsageError(
            "class_conditional", True, "the data set has no classes", "use class_conditional=false"
        )
    return num_classes if class_conditional else None


class Conv(nn.Module):
    """A convolution in `ndim` dimensions, `size` long in each, with bias; the weights are drawn as torch's own."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *[size] * ndim))
        self.bias = nn.Parameter(torch.empty(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(in_channels * size**ndim)
        nn.init.uniform_(self.bias, -bound, bound)
        self.ndim, self.stride, self.padding = ndim, stride, size // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out_channels, *sizes]: those of x, unless a stride or another padding changes them."""
        return CONV[self.ndim](x, self.weight, self.bias, self.stride, self.padding)


def to_patches(x: Tensor, size: int) -> Tensor:
    """Take patches of `size` pixels along each axis together: [B, C, *sizes] to [B, C size^ndim, *sizes / size].

    The order of the channels is that of `torch.nn.functional.pixel_unshuffle`.
    """
    ndim = x.dim() - 2
    for axis in reversed(range(2, 2 + ndim)):
        x = x.unflatten(axis, (-1, size))
    coarse, fine = range(2, 2 + 2 * ndim, 2), range(3, 3 + 2 * ndim, 2)
    return x.permute(0, 1, *fine, *coarse).flatten(1, 1 + ndim)


def from_patches(x: Tensor, size: int) -> Tensor:
    """Undo `to_patches`: [B, C size^ndim, *sizes] to [B, C, *size sizes]."""
    ndim = x.dim() - 2
    x = x.unflatten(1, (-1, *[size] * ndim))
    pairs = [axis for k in range(2, 2 + ndim) for axis in (k + ndim, k)]
    x = x.permute(0, 1, *pairs)
    for axis in range(2, 2 + ndim):
        x = x.flatten(axis, axis + 1)
    return x


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last pixels of images [B, C, *sizes] so that `multiple` divides every size."""
    beyond = [-size % multiple for size in x.shape[2:]]
    ends = [end for size in reversed(beyond) for end in (0, size)]  # of the last axis first
    return pad(x, ends, mode="replicate") if any(beyond) else x


def crop(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Undo `pad_to_multiple`: the first pixels of images along each axis."""
    return x if tuple(x.shape[2:]) == tuple(sizes) else x[(..., *(slice(size) for size in sizes))]


def halve(x: Tensor, *, fir: bool) -> Tensor:
    """Half the size along each axis: [B, C, *sizes] to [B, C, *sizes / 2], all sizes even.

    By means of 2 each, or with `fir` by the anti-aliasing filter (1, 3, 3, 1) / 8 along each axis, output i in the
    middle of inputs 2i and 2i + 1. Beyond the edge the last pixel goes on, so that constants stay constant (the
    published code continues with zeros). Source: Karras et al. 2020; Song et al. 2021b, Appendix H.
    """
    if not fir:
        return AVG_POOL[x.dim() - 2](x, 2)
    return _along_axes(x, [_fir_matrix(size, x) for size in x.shape[2:]])


def double(x: Tensor, *, fir: bool) -> Tensor:
    """Twice the size along each axis, 2^ndim times the adjoint of `halve`: [B, C, *sizes] to [B, C, *2 sizes].

    Nearest neighbour, or with `fir` weights of 3/4 and 1/4 along each axis, which is linear interpolation.
    """
    if not fir:
        return interpolate(x, scale_factor=2.0)
    return _along_axes(x, [2 * _fir_matrix(2 * size, x).T for size in x.shape[2:]])


def _fir_matrix(size: int, like: Tensor) -> Tensor:
    # [size / 2, size]; its products bring the edge with them and have gradients that add up in a fixed order.
    pixels = torch.arange(size, device=like.device, dtype=torch.float32)
    distance = (pixels - (pixels[::2, None] + 0.5)).abs()  # 0.5, 1.5, ... from the middle of an output
    matrix = (2 - distance).clamp(min=0) / 4
    matrix[0, 0] += 1 / 8
    matrix[-1, -1] += 1 / 8
    return matrix.to(like.dtype)


def _along_axes(x: Tensor, matrices: list[Tensor]) -> Tensor:
    # Matrix products rather than depthwise convolutions, which in bfloat16 take a CPU ten times as long; for
    # small images one product rather than one an image and feature map.
    if math.prod([matrix.numel() for matrix in matrices]) <= 2**14:
        together = reduce(_along_both, [matrix.T for matrix in matrices])
        return (x.flatten(2) @ together).unflatten(2, [len(matrix) for matrix in matrices])
    *others, last = matrices
    x = x @ last.T
    for axis, matrix in reversed([*enumerate(others, start=2)]):
        behind = x.shape[axis + 1 :]
        x = (matrix @ x.flatten(axis + 1)).unflatten(axis + 1, behind)
    return x


def _along_both(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.einsum("hi,wj->hwij", rows, columns).flatten(2).flatten(0, 1)


def residual_sum(x: Tensor, branch: Tensor, *, rescale: bool) -> Tensor:
    """x + branch, with `rescale` over sqrt(2), which keeps the variance (Song et al. 2021b, Appendix H)."""
    total = x + branch
    return total * math.sqrt(0.5) if rescale else total


class ProgressiveInput(nn.Module):
    """Feeds the image to a coarser level: h + conv(halve(pyramid)), a convolution of size 3.

    The pyramid is the image before the first level and this layer's output after, the "residual" progressive
    input of Song et al. 2021b, Appendix H (their code filters and then strides the convolution).

    h: [B, channels, *sizes]; pyramid: [B, pyramid_channels, *2 sizes]. Returns the shape of h.
    """

    def __init__(
        self, pyramid_channels: int, channels: int, *, fir: bool, skip_rescale: bool, ndim: int = 2
    ) -> None:
        super().__init__()
        self.fir = fir
        self.skip_rescale = skip_rescale
        self.conv = Conv(pyramid_channels, channels, ndim=ndim)

    def forward(self, h: Tensor, pyramid: Tensor) -> Tensor:
        return residual_sum(h, self.conv(halve(pyramid, fir=self.fir)), rescale=self.skip_rescale)


class Downsample(Conv):
    """Halves each axis by a convolution of size 3 and stride 2: [B, C, *sizes] to [B, C, *sizes / 2].

    `same`: zeros at the end of each axis only, as TensorFlow's "SAME" (Ho et al. 2020); otherwise on all sides
    (Nichol & Dhariwal 2021). All sizes are even.
    """

    def __init__(self, channels: int, *, same: bool, ndim: int = 2) -> None:
        super().__init__(channels, channels, stride=2, padding=0 if same else 1, ndim=ndim)
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, (0, 1) * self.ndim) if self.same else x)


class Upsample(Conv):
    """Doubles each axis: nearest neighbour, then a convolution of size 3. [B, C, *sizes] to [B, C, *2 sizes].

    Computed as the one transposed convolution of size 4 that equals the two: (2/3)^ndim of the multiplications and no
    enlarged copy of the input, for images about twice as fast.
    """

    taps: Tensor

    def __init__(self, channels: int, *, ndim: int = 2) -> None:
        super().__init__(channels, channels, ndim=ndim)
        # Along one axis a kernel (a, b, c) turns into (c, b + c, a + b, a): flipped, then summed in pairs.
        axis = [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
        # Of all axes, the Kronecker product; by torch's on the meta device its whole compiler would be imported.
        taps = reduce(_kronecker, [axis] * ndim)
        self.register_buffer("taps", torch.tensor(taps).T, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.transpose(0, 1).flatten(2) @ self.taps).unflatten(2, [4] * self.ndim)
        return CONV_TRANSPOSE[self.ndim](x, weight, self.bias, stride=2, padding=1)


def _kronecker(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    return [[a * b for a in one for b in other] for one in left for other in right]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, for q [B, heads, N, d] and k, v [B, heads, M, d]; in their dtype."""
    # A CPU's fused kernel takes up to seven times as long in bfloat16 as the products do, as long as their N x M
    # matrices are small.
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= SMALL
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and small:
        return (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v
    return scaled_dot_product_attention(q, k, v)


class Dropout(nn.Dropout):
    """Sets a share p of the features to zero in training and divides the others by 1 - p (Srivastava et al. 2014).

    On a CPU p is rounded to a multiple of 2^-16: masks of 16 random bits each cost a third of torch's. A compiled
    network has torch's own, because `Tensor.random_` would break its graph.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        return input * (bits >= dropped - 2**15).to(input.dtype).mul_(2**16 / (2**16 - dropped))


class Pointwise(Conv):
    """A convolution of size 1; for large images on a CPU as a matrix product, which needs no copy in another order."""

    def __init__(self, in_channels: int, out_channels: int, *, ndim: int = 2) -> None:
        super().__init__(in_channels, out_channels, 1, ndim=ndim)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or math.prod(x.shape[2:]) < 256:
            return super().forward(x)
        weight = self.weight.flatten(1).expand(len(x), -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    """Self-attention among all pixels, added to its input: x + proj(softmax(q k^T / sqrt(d)) v).

    q, k, v are linear in norm(x); d = channels / num_heads. [B, C, *sizes] to the same shape. `skip_rescale`
    divides the sum by sqrt(2). Source: Ho et al. 2020, Appendix B.
    """

    def __init__(
        self, channels: int, *, num_heads: int, norm_groups: int, skip_rescale: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.skip_rescale = skip_rescale
        self.norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        zero_init(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        qkv = self.qkv(pixels).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3)  # [B, heads, 3, N, d]
        with torch.autocast(x.device.type, enabled=False):
            out = attend(*qkv.unbind(2))
        out = self.proj(out.transpose(1, 2).flatten(2))
        out = out.transpose(1, 2).unflatten(2, x.shape[2:])
        return residual_sum(x, out, rescale=self.skip_rescale)


class ResBlock(nn.Module):
    """Residual block steered by the time embedding: skip(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    The embedding enters at norm2: norm2(h) * (1 + scale) + shift with `scale_shift` (Nichol & Dhariwal 2021),
    norm2(h + shift) without (Ho et al. 2020). `resample` changes the resolution of both branches inside
    the block (Dhariwal & Nichol 2021), filtered with `fir`. `skip` is a convolution of size 1 where the number of
    feature maps changes, and with `project` always. `skip_rescale` divides the sum by sqrt(2).

    x: [B, in_channels, *sizes]; emb: [B, emb_channels], already through silu, which all blocks share.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        norm_groups: int,
        dropout: float,
        scale_shift: bool,
        skip_rescale: bool = False,
        resample: Literal["up", "down"] | None = None,
        fir: bool = False,
        project: bool = False,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.skip_rescale = skip_rescale
        self.resample = resample
        self.fir = fir
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = Conv(in_channels, out_channels, ndim=ndim)
        self.emb = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.dropout = Dropout(dropout)
        self.conv2 = Conv(out_channels, out_channels, ndim=ndim)
        zero_init(self.conv2)
        same = in_channels == out_channels and not project
        self.skip = nn.Identity() if same else Pointwise(in_channels, out_channels, ndim=ndim)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = silu(self.norm1(x))
        if self.resample is not None:
            h, x = self._resample(h), self._resample(x)
        h = self.conv1(h)
        emb = self.emb(emb).unflatten(1, (-1, *[1] * (x.dim() - 2)))
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + emb)
        return residual_sum(self.skip(x), self.conv2(self.dropout(silu(h))), rescale=self.skip_rescale)

    def _resample(self, x: Tensor) -> Tensor:
        return halve(x, fir=self.fir) if self.resample == "down" else double(x, fir=self.fir)
