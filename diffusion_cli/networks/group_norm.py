"""Group norm with modulation, SiLU and dropout, in one pass on CPUs."""

import ctypes
import math
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu

from diffusion_cli.networks.dropout import Dropout
from diffusion_cli.system.compat import is_transformed
from diffusion_cli.system.native import library

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory formats by number of dimensions of features [B, C, *sizes]."""
MOST_CHANNELS = 2048  # on the stack of a thread: 100 kB
LARGEST_DROPOUT = 1 - 2.0**-16


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu and He 2018), and the parts of residual blocks around it, each optional.

    `dropout(silu(norm(x + added) * (1 + scale) + shift))`, where Ho et al. 2020 have `added`, and Nichol and Dhariwal
    2021 `scale` and `shift`.

    On CPUs in bfloat16 or float32 this is one pass of compiled C in channels-last order, in bfloat16 with a single
    rounding. Second derivatives, and everything without a C compiler or elsewhere, are operations of torch.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        *,
        added: Tensor | None = None,
        scale_shift: Tensor | None = None,
        activation: bool = False,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Return features [B, C, *sizes] like the input.

        Args:
            input: features [B, C, *sizes].
            added: [B, C], added to all pixels before the norm.
            scale_shift: [B, 2C], scale and shift.
            activation: whether SiLU follows.
            dropout: dropout that follows.
        """
        if self._is_fused(input, added, scale_shift):
            given = [None if part is None else part.to(input.dtype) for part in (added, scale_shift)]
            call = _Arguments.of(input, self, activation, dropout)
            x = input.contiguous(memory_format=CHANNELS_LAST[input.dim()])
            return _Fused.apply(call, x, self.weight, self.bias, *given)
        x = _composed(
            input, self.weight, self.bias, added, scale_shift,
            groups=self.num_groups, eps=self.eps, activation=activation,
        )  # fmt: skip
        return x if dropout is None else dropout(x)

    def _is_fused(self, x: Tensor, added: Tensor | None, scale_shift: Tensor | None) -> bool:
        """Whether the C code takes these inputs; torch names what is wrong with others."""
        if not is_fused(x):  # before its length, which would be a constant of an exported program
            return False
        channels = self.num_channels
        shapes = [(added, (len(x), channels)), (scale_shift, (len(x), 2 * channels))]
        return (
            x.shape[1] == channels <= MOST_CHANNELS
            and self.weight.dtype == self.bias.dtype == torch.float32
            and self.weight.device == self.bias.device == x.device
            and all(
                part is None or (part.shape == shape and part.device == x.device) for part, shape in shapes
            )
        )


def is_fused(x: Tensor) -> bool:
    """Return whether norms of features [B, C, *sizes] are one pass in channels-last order, which layers then keep."""
    return (
        type(x) is Tensor  # one with memory
        and x.device.type == "cpu"
        and x.dim() in CHANNELS_LAST
        and not torch.compiler.is_compiling()
        and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and _prefers_channels_last()))
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not is_transformed()
        and _functions(x.dtype) is not None
    )


@cache
def _prefers_channels_last() -> bool:
    """Return whether convolutions in float32 are faster in channels-last order: those of oneDNN on x86."""
    return torch.backends.mkldnn.is_available() and platform.machine() in {"x86_64", "AMD64"}


def channels_last(x: Tensor) -> Tensor:
    """Return features in channels-last order if their norms are fused, else as they are."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if is_fused(x) else x


def _composed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, added: Tensor | None, scale_shift: Tensor | None, *,
    groups: int, eps: float, activation: bool,
) -> Tensor:  # fmt: skip
    """Return a norm of operations of torch, without dropout."""
    ones = (1,) * (x.dim() - 2)
    x = x if added is None else x + added.unflatten(1, (-1, *ones))
    x = group_norm(x, groups, weight, bias, eps)
    if scale_shift is not None:
        scale, shift = scale_shift.unflatten(1, (-1, *ones)).chunk(2, dim=1)
        x = torch.addcmul(shift, x, 1 + scale)
    return silu(x) if activation else x


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "pixels", "channels", "groups", "threads", "parts")),
        ("seed", ctypes.c_uint64),
        ("eps", ctypes.c_float),
        ("dropout", ctypes.c_float),
        ("activation", ctypes.c_int32),
    )

    @classmethod
    def of(cls, x: Tensor, norm: GroupNorm, activation: bool, dropout: Dropout | None) -> "_Arguments":
        threads = torch.get_num_threads()
        call = cls(
            samples=len(x), pixels=math.prod(x.shape[2:]), channels=norm.num_channels, groups=norm.num_groups,
            threads=threads, parts=min(norm.num_groups, -(-threads // max(len(x), 1))), eps=norm.eps,
            activation=activation,
        )  # fmt: skip
        if dropout is not None and dropout.training and dropout.p > 0:
            call.seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
            call.dropout = min(dropout.p, LARGEST_DROPOUT)
        return call


@cache
def _functions(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the functions of `group_norm.c` for bfloat16 or float32; None where they cannot be compiled."""
    found = library(
        Path(__file__).with_name("group_norm.c"), *(["FLOAT32"] if dtype == torch.float32 else [])
    )
    if found is not None:
        call = ctypes.POINTER(_Arguments)
        found.group_norm_forward.argtypes = [call, *[ctypes.c_void_p] * 7]
        found.group_norm_backward.argtypes = [call, *[ctypes.c_void_p] * 13]
        found.group_norm_forward.restype = found.group_norm_backward.restype = None
    return found


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, call: _Arguments, x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        inputs = (x, *(None if part is None else part.contiguous() for part in parameters))
        y, stats = _forward(call, *inputs)
        ctx.save_for_backward(*inputs, stats)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *parameters, stats = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return None, *_differentiable_backward(ctx.call, x, parameters, dy)
        # Hooks of saved tensors may return them in another order.
        x, dy = (part.contiguous(memory_format=CHANNELS_LAST[dy.dim()]) for part in (x, dy))
        parameters = [None if part is None else part.contiguous() for part in parameters]
        gradients = [None if part is None else torch.empty_like(part) for part in (x, *parameters)]
        sums = torch.empty(2, *x.shape[:2], device="cpu", dtype=torch.float32)
        functions = _functions(x.dtype)
        assert functions is not None
        functions.group_norm_backward(
            ctx.call, *map(_address, (x, dy, *parameters, stats.contiguous(), *gradients, sums))
        )
        return None, *gradients


def _forward(call: _Arguments, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output, and mean and 1 / sqrt(variance + eps) of each group."""
    y = torch.empty_like(x)
    stats = torch.empty(call.samples, call.groups, 2, device="cpu", dtype=torch.float32)
    functions = _functions(x.dtype)
    assert functions is not None
    functions.group_norm_forward(call, *map(_address, (x, *parameters, y, stats)))
    return y, stats


def _differentiable_backward(
    call: _Arguments, x: Tensor, parameters: Sequence[Tensor | None], dy: Tensor
) -> list[Tensor | None]:
    """Return gradients of the inputs that need them, by operations of torch."""
    y = _composed(x, *parameters, groups=call.groups, eps=call.eps, activation=bool(call.activation))
    if call.dropout > 0:
        dy = dy * _mask(call, dy)
    inputs = [part if part is not None and part.requires_grad else None for part in (x, *parameters)]
    found = iter(torch.autograd.grad(y, [part for part in inputs if part is not None], dy, create_graph=True))
    return [None if part is None else next(found) for part in inputs]


def _mask(call: _Arguments, like: Tensor) -> Tensor:
    """Return what the dropout multiplies features by: a norm of weight 0 and bias 1."""
    linear = _Arguments.from_buffer_copy(call)
    linear.activation = 0
    x = torch.zeros_like(like, memory_format=CHANNELS_LAST[like.dim()])
    weight, bias = (torch.full((call.channels,), value, device="cpu") for value in (0.0, 1.0))
    return _forward(linear, x, weight, bias, None, None)[0]
