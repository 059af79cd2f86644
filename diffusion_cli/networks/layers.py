"""Layers of the networks: embeddings, resampling, attention, residual blocks.

`ndim` is the number of dimensions: 1 for signals [B, C, L], 2 for images [B, C, H, W], 3 for volumes [B, C, D, H, W].
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
    linear,
    pad,
    scaled_dot_product_attention,
)
from torch.utils.checkpoint import checkpoint

from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.errors import UsageError
from diffusion_cli.networks.dropout import Dropout
from diffusion_cli.networks.group_norm import GroupNorm, is_fused

# Operations of torch by number of dimensions.
CONV = {1: conv1d, 2: conv2d, 3: conv3d}
CONV_TRANSPOSE = {1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d}
AVG_POOL = {1: avg_pool1d, 2: avg_pool2d, 3: avg_pool3d}

NORM_EPS = 1e-6  # Ho et al. 2020
FirPadding = Literal["edge", "zeros"]
SinusoidalLayout = Literal["sin_cos", "cos_sin", "cos_sin_inclusive", "sin_cos_exclusive"]
SMALL = 2**24  # elements of all attention matrices of a layer: 32 MB in bfloat16


class Checkpointed(nn.Module):
    """Base class of networks with gradient checkpointing, which recomputes activations of blocks to save memory."""

    gradient_checkpointing: bool

    takes_conditions = False
    """Whether `y` may be a `Condition`; other networks get class labels."""

    takes_augmentation = False
    """Whether the `augmentation` of `Conditions` is an input; training with it is refused for other networks."""

    def run(self, block: nn.Module, *inputs: Tensor | tuple[Tensor, ...] | None) -> Tensor:
        """Apply a block, with checkpointing if enabled."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def timestep_embedding(c_noise: Tensor, dim: int, layout: SinusoidalLayout) -> Tensor:
    """Return sinusoidal embeddings of c_noise, [B, dim] in [-1, 1], computed in float64.

    angle[b, i] = c_noise[b] * 10000^(-i / n) for i = 0..dim // 2 - 1. An odd `dim` ends in a zero.

    Args:
        c_noise: noise levels [B], usually timesteps 0..T-1, may be fractional.
        dim: number of features.
        layout: `sin_cos`: [sin | cos], n = dim // 2 - 1 (code of Ho et al. 2020); `cos_sin`: [cos | sin],
            n = dim // 2 (code of Nichol and Dhariwal 2021); `cos_sin_inclusive`, `sin_cos_exclusive`: the same
            frequencies in the other order, where the last one is 1 / 10000 or not.
    """
    c_noise = widened(c_noise)
    half = dim // 2
    n = half if layout in ("cos_sin", "sin_cos_exclusive") else max(half - 1, 1)
    exponents = torch.arange(half, device=c_noise.device, dtype=c_noise.dtype) / n
    angles = c_noise[:, None] * torch.exp(-math.log(10000.0) * exponents)
    halves = (angles.sin(), angles.cos()) if layout.startswith("sin") else (angles.cos(), angles.sin())
    return pad(torch.cat(halves, dim=1), (0, dim % 2))


def fourier_embedding(c_noise: Tensor, frequencies: Tensor) -> Tensor:
    """Return random Fourier features [sin(2 pi w c_noise) | cos(2 pi w c_noise)], [B, 2n], computed in float64.

    Args:
        c_noise: noise levels [B], as published their logarithm.
        frequencies: frequencies w [n].

    Source: Tancik et al. 2020, Section 5; Song et al. 2021b, Appendix C.
    """
    c_noise = widened(c_noise)
    angles = 2 * math.pi * c_noise[:, None] * frequencies.to(c_noise.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def float64_device(device: torch.device) -> torch.device:
    """Return where the float64 numbers of a device are computed: on the CPU, if it has none, as MPS."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def widened(x: Tensor) -> Tensor:
    """Return a tensor in float64, or in float32 on a device without float64."""
    return x.to(torch.float64 if float64_device(x.device) == x.device else torch.float32)


def zero_init(layer: nn.Module) -> None:
    """Set all parameters of the last layer of a branch to zero, so that the branch is initially zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def used_conditions(conditions: Conditions | int | None, class_conditional: bool) -> Conditions:
    """Return the conditions of a network: with classes and attributes if `class_conditional`, else without.

    Raises UsageError if there are no classes or attributes to condition on.
    """
    given = Conditions.of(conditions)
    if class_conditional and not given.attributes:
        raise UsageError(
            "class_conditional", True, "the dataset has no classes", "use class_conditional=false"
        )
    return given if class_conditional else given.without_attributes()


def class_rows(y: Condition | Tensor | None, num_classes: int, c_noise: Tensor) -> Tensor:
    """Return the rows of a table of classes and the null class `num_classes`, int64 [B], for noise levels [B].

    The null class stands for missing labels.
    """
    labels = Condition.of(y).get(LABEL)
    if labels is None:
        return torch.full_like(c_noise, num_classes, dtype=torch.int64)
    return torch.where(labels < 0, num_classes, labels)


class Conv(nn.Module):
    """Convolution with bias in `ndim` dimensions, with a kernel of length `size`, initialized as in torch."""

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
        """Return [B, out_channels, *sizes], with the sizes of x unless stride or padding change them."""
        return CONV[self.ndim](x, self.weight, self.bias, self.stride, self.padding)


def to_patches(x: Tensor, size: int) -> Tensor:
    """Move patches of `size` pixels per axis to channels: [B, C, *sizes] to [B, C size^ndim, *sizes / size].

    Channels are ordered as by `torch.nn.functional.pixel_unshuffle`.
    """
    ndim = x.dim() - 2
    for axis in reversed(range(2, 2 + ndim)):
        x = x.unflatten(axis, (-1, size))
    coarse, fine = range(2, 2 + 2 * ndim, 2), range(3, 3 + 2 * ndim, 2)
    return x.permute(0, 1, *fine, *coarse).flatten(1, 1 + ndim)


def from_patches(x: Tensor, size: int) -> Tensor:
    """Invert `to_patches`: [B, C size^ndim, *sizes] to [B, C, *size sizes]."""
    ndim = x.dim() - 2
    x = x.unflatten(1, (-1, *[size] * ndim))
    pairs = [axis for k in range(2, 2 + ndim) for axis in (k + ndim, k)]
    x = x.permute(0, 1, *pairs)
    for axis in range(2, 2 + ndim):
        x = x.flatten(axis, axis + 1)
    return x


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad images [B, C, *sizes] at the end of each axis to multiples of `multiple` by repeating the last pixels."""
    beyond = [-size % multiple for size in x.shape[2:]]
    ends = [end for size in reversed(beyond) for end in (0, size)]  # last axis first
    return pad(x, ends, mode="replicate") if any(beyond) else x


def crop(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Invert `pad_to_multiple`: keep the first pixels along each axis."""
    return x if tuple(x.shape[2:]) == tuple(sizes) else x[(..., *(slice(size) for size in sizes))]


def halve(x: Tensor, *, fir: bool, padding: FirPadding = "edge") -> Tensor:
    """Halve the resolution: [B, C, *sizes] to [B, C, *sizes / 2], for even sizes.

    Averages pairs of pixels, or with `fir` applies the anti-aliasing filter (1, 3, 3, 1) / 8 along each axis. The
    filter repeats `edge` pixels, which preserves constants, or pads with `zeros` as the published code.

    Source: Karras et al. 2020; Song et al. 2021b, Appendix H.
    """
    if not fir:
        return AVG_POOL[x.dim() - 2](x, 2)
    return _along_axes(x, [_fir_matrix(size, x, padding) for size in x.shape[2:]])


def double(x: Tensor, *, fir: bool, padding: FirPadding = "edge") -> Tensor:
    """Double the resolution: [B, C, *sizes] to [B, C, *2 sizes], 2^ndim times the adjoint of `halve`.

    Uses nearest neighbours, or with `fir` linear interpolation with weights 3/4 and 1/4, with `padding` as in `halve`.
    """
    if not fir:
        return interpolate(x, scale_factor=2.0)
    return _along_axes(x, [2 * _fir_matrix(2 * size, x, padding).T for size in x.shape[2:]])


def _fir_matrix(size: int, like: Tensor, padding: FirPadding) -> Tensor:
    # [size / 2, size]; the product handles edges, and has deterministic gradients.
    pixels = torch.arange(size, device=like.device, dtype=torch.float32)
    distance = (pixels - (pixels[::2, None] + 0.5)).abs()  # 0.5, 1.5, ... from the centre of an output
    matrix = (2 - distance).clamp(min=0) / 4
    if padding == "edge":
        matrix[0, 0] += 1 / 8
        matrix[-1, -1] += 1 / 8
    return matrix.to(like.dtype)


def _along_axes(x: Tensor, matrices: list[Tensor]) -> Tensor:
    # Matrix products: depthwise convolutions in bfloat16 are ten times slower on CPUs. Small images use a single
    # product over all axes.
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
    """Return x + branch, with `rescale` divided by sqrt(2) to keep the variance (Song et al. 2021b, Appendix H)."""
    total = x + branch
    return total * math.sqrt(0.5) if rescale else total


class ProgressiveInput(nn.Module):
    """Progressive input: adds the downsampled image to a coarser level, `h + conv(halve(pyramid))`.

    This is the "residual" progressive input of Song et al. 2021b, Appendix H (the code applies a strided convolution
    after the filter). The pyramid is the image at the first level, and the output of this layer afterwards.

    Maps h [B, channels, *sizes] and pyramid [B, pyramid_channels, *2 sizes] to the shape of h.
    """

    def __init__(
        self,
        pyramid_channels: int,
        channels: int,
        *,
        fir: bool,
        fir_padding: FirPadding = "edge",
        skip_rescale: bool,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        self.fir = fir
        self.fir_padding: FirPadding = fir_padding
        self.skip_rescale = skip_rescale
        self.conv = Conv(pyramid_channels, channels, ndim=ndim)

    def forward(self, h: Tensor, pyramid: Tensor) -> Tensor:
        smaller = halve(pyramid, fir=self.fir, padding=self.fir_padding)
        return residual_sum(h, self.conv(smaller), rescale=self.skip_rescale)


class InputSkip(nn.Module):
    """Progressive input: adds a smaller copy of the image to a coarser level, `h + conv(pyramid)`.

    This is the "input skip" of Song et al. 2021b, Appendix H. The pyramid is the image, halved for each level.

    Maps h [B, channels, *sizes] and pyramid [B, pyramid_channels, *sizes] to the shape of h.
    """

    def __init__(self, pyramid_channels: int, channels: int, *, ndim: int = 2) -> None:
        super().__init__()
        self.conv = Pointwise(pyramid_channels, channels, ndim=ndim)

    def forward(self, h: Tensor, pyramid: Tensor) -> Tensor:
        return h + self.conv(pyramid)


class OutputSkip(nn.Module):
    """Progressive output: image of a level, `conv(silu(norm(h)))`, before the layer `up` to the finer level.

    This is the "output skip" of Song et al. 2021b, Appendix H. The network doubles the images and adds them.

    Maps h [B, channels, *sizes] to [B, out_channels, *sizes].
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        up: nn.Module,
        norm_groups: int,
        norm_eps: float = NORM_EPS,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=norm_eps)
        self.conv = Conv(channels, out_channels, ndim=ndim)
        zero_init(self.conv)
        self.up = up

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(self.norm(h, activation=True))


class Downsample(Conv):
    """Downsampling by a convolution of size 3 and stride 2: [B, C, *sizes] to [B, C, *sizes / 2], for even sizes.

    With `same`, zeros are padded at the end of each axis only, like "SAME" of TensorFlow (Ho et al. 2020); otherwise
    on both sides (Nichol and Dhariwal 2021).
    """

    def __init__(self, channels: int, *, same: bool, ndim: int = 2) -> None:
        super().__init__(channels, channels, stride=2, padding=0 if same else 1, ndim=ndim)
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, (0, 1) * self.ndim) if self.same else x)


class Upsample(Conv):
    """Upsampling by nearest neighbour and a convolution of size 3: [B, C, *sizes] to [B, C, *2 sizes].

    Computed as an equivalent transposed convolution of size 4, which is about twice as fast for images.
    """

    taps: Tensor

    def __init__(self, channels: int, *, ndim: int = 2) -> None:
        super().__init__(channels, channels, ndim=ndim)
        # Along one axis, a kernel (a, b, c) becomes (c, b + c, a + b, a): flipped, then summed in pairs.
        axis = [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
        # Kronecker product of all axes in plain Python: that of torch would import the compiler on the meta device.
        taps = reduce(_kronecker, [axis] * ndim)
        self.register_buffer("taps", torch.tensor(taps).T, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.transpose(0, 1).flatten(2) @ self.taps).unflatten(2, [4] * self.ndim)
        return CONV_TRANSPOSE[self.ndim](x, weight, self.bias, stride=2, padding=1)


def _kronecker(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    return [[a * b for a in one for b in other] for one in left for other in right]


def attend(q: Tensor, k: Tensor, v: Tensor, given: Tensor | None = None) -> Tensor:
    """Return `softmax(q k^T / sqrt(d)) v` for q [B, heads, N, d] and k, v [B, heads, M, d], in their dtype.

    `given`, bool [B, M], excludes keys from the softmax, at most M - 1 of each row; None includes all.
    """
    given = None if given is None else given[:, None, None]
    # On CPUs in bfloat16, the fused kernel is up to seven times slower than matrix products if the N x M matrices
    # are small.
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= SMALL
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and small:
        logits = q * q.shape[3] ** -0.5 @ k.transpose(2, 3)
        return (logits if given is None else logits.masked_fill(~given, -torch.inf)).softmax(3) @ v
    return scaled_dot_product_attention(q, k, v, given)


class Pointwise(Conv):
    """Convolution of size 1, on CPUs a matrix product for features in channels-last format and for large images.

    A convolution would copy large images. In channels-last format its weight and gradient would have different
    strides, and DDP warns of that.
    """

    def __init__(self, in_channels: int, out_channels: int, *, ndim: int = 2) -> None:
        super().__init__(in_channels, out_channels, 1, ndim=ndim)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if is_fused(x) and x.movedim(1, -1).is_contiguous():
            return linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        if math.prod(x.shape[2:]) < 256:
            return super().forward(x)
        weight = self.weight.flatten(1).expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    """Self-attention over pixels with residual connection: `x + proj(softmax(q k^T / sqrt(d)) v)`, for [B, C, *sizes].

    q, k, v are linear in norm(x), and d = channels / num_heads. `skip_rescale` divides the sum by sqrt(2).

    Source: Ho et al. 2020, Appendix B.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        norm_groups: int,
        norm_eps: float = NORM_EPS,
        skip_rescale: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.skip_rescale = skip_rescale
        self.norm = GroupNorm(norm_groups, channels, eps=norm_eps)
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
    """Residual block conditioned on the time embedding: `skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`.

    The embedding modulates norm2: norm2(h) * (1 + scale) + shift with `scale_shift` (Nichol and Dhariwal 2021), else
    norm2(h + shift) (Ho et al. 2020). `resample` changes the resolution of both branches (Dhariwal and Nichol 2021),
    filtered with `fir`. `skip` is a convolution of size 1 if the number of feature maps changes or with `project`.
    `skip_rescale` divides the sum by sqrt(2). Dropout follows the second SiLU, within `norm2`.

    Inputs are x [B, in_channels, *sizes] and emb [B, emb_channels] after silu.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        norm_groups: int,
        norm_eps: float = NORM_EPS,
        dropout: float,
        scale_shift: bool,
        skip_rescale: bool = False,
        resample: Literal["up", "down"] | None = None,
        fir: bool = False,
        fir_padding: FirPadding = "edge",
        project: bool = False,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.skip_rescale = skip_rescale
        self.resample = resample
        self.fir = fir
        self.fir_padding: FirPadding = fir_padding
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = Conv(in_channels, out_channels, ndim=ndim)
        self.emb = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.dropout = Dropout(dropout)
        self.conv2 = Conv(out_channels, out_channels, ndim=ndim)
        zero_init(self.conv2)
        same = in_channels == out_channels and not project
        self.skip = nn.Identity() if same else Pointwise(in_channels, out_channels, ndim=ndim)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm1(x, activation=True)
        if self.resample is not None:
            h, x = self._resample(h), self._resample(x)
        h = self.conv1(h)
        modulation = {"scale_shift" if self.scale_shift else "added": self.emb(emb)}
        h = self.norm2(h, **modulation, activation=True, dropout=self.dropout)
        return residual_sum(self.skip(x), self.conv2(h), rescale=self.skip_rescale)

    def _resample(self, x: Tensor) -> Tensor:
        change = halve if self.resample == "down" else double
        return change(x, fir=self.fir, padding=self.fir_padding)
