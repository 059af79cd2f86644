"""The U-Net of improved-diffusion and guided-diffusion, restated by functions of torch."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv1d, conv2d, group_norm, interpolate, linear, silu


@dataclass(kw_only=True)
class PublishedUNet:
    """A network with the published names of its tensors, which get random values when they are first used."""

    multiples: tuple[float, ...] = (1, 2)
    blocks: int = 1
    strides: tuple[int, ...] = (2,)
    heads: int | None = 2
    head_channels: int = 0
    new_order: bool = False
    scale_shift: bool = True
    updown: bool = False
    classes: int = 0
    outputs: int = 6
    channels: int = 32
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        width = self.channels
        frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        angles = timesteps[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = self.linear("time_embed.2", silu(self.linear("time_embed.0", features, 4 * width)), 4 * width)
        if self.classes:
            assert y is not None
            emb = emb + self.tensor("label_emb.weight", self.classes, 4 * width)[y]
        widths = [int(multiple * width) for multiple in self.multiples]
        skips = [self.conv("input_blocks.0.0", x, widths[0])]
        for level, channels in enumerate(widths):
            for _ in range(self.blocks):
                skips.append(self.stage(f"input_blocks.{len(skips)}", skips[-1], emb, channels, level))
            if level < len(self.multiples) - 1:
                name = f"input_blocks.{len(skips)}.0"
                if self.updown:
                    skips.append(self.res(name, skips[-1], emb, channels, "down"))
                else:
                    skips.append(self.conv(f"{name}.op", skips[-1], channels, stride=2))
        h = self.res("middle_block.0", skips[-1], emb, skips[-1].shape[1])
        h = self.res("middle_block.2", self.attention("middle_block.1", h), emb, h.shape[1])
        number = 0
        for level in reversed(range(len(self.multiples))):
            channels = widths[level]
            for block in range(self.blocks + 1):
                name = f"output_blocks.{number}"
                h = self.stage(name, torch.cat([h, skips.pop()], dim=1), emb, channels, level)
                if level and block == self.blocks:
                    name = f"{name}.{1 + (2**level in self.strides)}"
                    if self.updown:
                        h = self.res(name, h, emb, channels, "up")
                    else:
                        h = self.conv(f"{name}.conv", interpolate(h, scale_factor=2.0), channels)
                number += 1
        return self.conv("out.2", silu(self.norm("out.0", h)), self.outputs)

    def stage(self, name: str, h: Tensor, emb: Tensor, channels: int, level: int) -> Tensor:
        h = self.res(f"{name}.0", h, emb, channels)
        return self.attention(f"{name}.1", h) if 2**level in self.strides else h

    def res(self, name: str, x: Tensor, emb: Tensor, channels: int, way: str = "") -> Tensor:
        h = silu(self.norm(f"{name}.in_layers.0", x))
        if way == "down":
            h, x = avg_pool2d(h, 2), avg_pool2d(x, 2)
        elif way == "up":
            h, x = interpolate(h, scale_factor=2.0), interpolate(x, scale_factor=2.0)
        h = self.conv(f"{name}.in_layers.2", h, channels)
        modulation = self.linear(f"{name}.emb_layers.1", silu(emb), (1 + self.scale_shift) * channels)
        modulation = modulation[..., None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + modulation)
        h = self.conv(f"{name}.out_layers.3", silu(h), channels)
        if x.shape[1] != channels:
            x = self.conv(f"{name}.skip_connection", x, channels, size=1)
        return x + h

    def attention(self, name: str, x: Tensor) -> Tensor:
        batch, channels, *sizes = x.shape
        heads = self.heads or channels // self.head_channels
        weight = self.tensor(f"{name}.qkv.weight", 3 * channels, channels, 1)
        h = self.norm(f"{name}.norm", x).flatten(2)
        qkv = conv1d(h, weight, self.tensor(f"{name}.qkv.bias", 3 * channels))
        if self.new_order:
            q, k, v = (part.reshape(batch * heads, channels // heads, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch * heads, 3 * channels // heads, -1).split(channels // heads, dim=1)
        scores = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(channels // heads)
        h = torch.einsum("bts,bcs->bct", scores.softmax(2), v).reshape(batch, channels, -1)
        weight = self.tensor(f"{name}.proj_out.weight", channels, channels, 1)
        return x + conv1d(h, weight, self.tensor(f"{name}.proj_out.bias", channels)).unflatten(2, sizes)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.tensor(f"{name}.{kind}", x.shape[1]) for kind in ("weight", "bias"))
        return group_norm(x, 32, weight, bias, eps=1e-5)

    def conv(self, name: str, x: Tensor, channels: int, *, size: int = 3, stride: int = 1) -> Tensor:
        weight = self.tensor(f"{name}.weight", channels, x.shape[1], size, size)
        return conv2d(x, weight, self.tensor(f"{name}.bias", channels), stride, size // 2)

    def linear(self, name: str, x: Tensor, channels: int) -> Tensor:
        return linear(
            x, self.tensor(f"{name}.weight", channels, x.shape[1]), self.tensor(f"{name}.bias", channels)
        )

    def tensor(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            inputs = math.prod(shape[1:])
            self.state[name] = torch.randn(shape, generator=self.generator) / math.sqrt(inputs)
        return self.state[name]
