"""Magnitude-preserving U-Net of EDM2."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions
from diffusion_cli.conditions.condition import AUGMENTATION, IMAGE, is_missing
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.networks.condition_embedding import AugmentationEmbedding, module_name, with_image
from diffusion_cli.networks.encoder import check_levels
from diffusion_cli.networks.layers import Checkpointed, crop, pad_to_multiple, used_conditions, widened
from diffusion_cli.networks.magnitude import FourierFeatures, MPBlock, MPConv, MPLinear, mp_silu, mp_sum

NUMBER_FEATURES = 64
"""Fourier features of a number, such as an age."""


class EDM2UNet(Checkpointed):
    """U-Net F(x, c_noise, y) with layers that preserve the variance, for signals, images and volumes.

    All weights are normalized; there are no biases and group norms. Level l works at 1 / 2^l of each size. The last
    layer has a gain that is zero at first, so that F = 0 before training.

    A class-conditional network has classes 0..num_classes - 1 and the null class num_classes, with an embedding of
    zero; otherwise its attribute `num_classes` is None.

    Args:
        shape: data shape: signals [C, L], images [C, H, W] or volumes [C, D, H, W].
        conditions: classes, other attributes and a condition image that the data offer, or a number of classes, or
            None.
        channels: feature maps of the first level.
        channel_mult: multiplier of `channels` per level.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        attention_resolutions: levels with attention after the residual blocks, by their first size (height). The
            block between encoder and decoder has attention, too.
        head_channels: channels per attention head, a divisor of the channels of each level with attention.
        dropout: dropout probability in residual blocks.
        class_conditional: whether to condition on classes and attributes.
        gradient_checkpointing: whether to recompute activations in the backward pass to save memory.

    Raises:
        UsageError: arguments contradict each other, or the data have captions.

    Source: Karras et al. 2024, config G: Sec. 2, Fig. 21 and Table 6.
    """

    outer_layers = ("stem", "augmentation", "out_conv")
    """Names of the input and output layers, which `optimizer=muon` leaves to AdamW."""

    output_layers = ("out_conv", "out_gain")
    """Names of what depends on the number of output channels."""

    takes_conditions = takes_augmentation = True

    largest_c_noise = 10.0
    """Largest |c_noise|: Fourier features of larger noise levels, as of timesteps, differ between neighbours."""

    def __init__(
        self,
        shape: tuple[int, ...],
        conditions: Conditions | int | None,
        *,
        channels: PositiveInt = 32,
        channel_mult: Sequence[PositiveInt] = (1, 2, 2),
        num_res_blocks: PositiveInt = 1,
        attention_resolutions: Sequence[PositiveInt] = (),
        head_channels: PositiveInt = 32,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_conditional: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        used = used_conditions(conditions, class_conditional)
        if used.text is not None:
            problem = "EDM2UNet reads no texts"
            raise UsageError("text", NO_VALUE, problem, "use text=none, or another model=")
        sizes = check_levels(shape, channel_mult, attention_resolutions=attention_resolutions)
        self.conditions, self.num_classes = used, used.num_classes
        self.gradient_checkpointing = gradient_checkpointing
        self.ndim = len(shape) - 1
        self.dropout, self.head_channels = dropout, head_channels
        self.multiple = 2 ** (len(channel_mult) - 1)
        widths = [mult * channels for mult in channel_mult]
        self.embedding_width = max(widths)
        given = 0 if used.image is None else used.image + 1
        self.stem = MPConv(shape[0] + given + 1, widths[0], ndim=self.ndim)
        self.noise_features = FourierFeatures(widths[0])
        self.noise_embedding = MPLinear(widths[0], self.embedding_width)
        self.condition_embedding = (
            MPConditionEmbedding(used, self.embedding_width) if used.attributes else None
        )
        self.augmentation = None
        if used.augmentation is not None:
            self.augmentation = AugmentationEmbedding(used.augmentation, self.embedding_width)
        attends = [size in attention_resolutions for size in sizes]
        self.down, self.up = self._blocks(widths, num_res_blocks, attends)
        self.out_conv = MPConv(widths[0], shape[0], ndim=self.ndim)
        self.out_gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, c_noise: Tensor, y: Condition | Tensor | None = None) -> Tensor:
        """Return F [B, C, *sizes] in the dtype of x.

        Args:
            x: input [B, C, *sizes] of any sizes, padded to multiples that the levels need.
            c_noise: noise levels [B], such as `log(sigma / alpha) / 4`.
            y: condition, or labels, int64 [B]; None: all values are missing. Ignored by unconditional networks.
        """
        condition = Condition.of(y)
        emb = self.embed(c_noise, condition)
        inputs = x
        if self.conditions.image is not None:
            inputs = with_image(x, condition.get(IMAGE), self.conditions.image)
        inputs = pad_to_multiple(inputs, self.multiple)
        # The channel of ones is in place of biases.
        h = self.stem(torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1))
        skips = [h]
        for block in self.down:
            h = self.run(block, h, emb)
            skips.append(h)
        for block in self.up:
            h = self.run(block, h, emb, skips.pop() if block.skip_channels else None)
        return crop(self.out_gain * self.out_conv(h), x.shape[2:]).to(x.dtype)

    def embed(self, c_noise: Tensor, condition: Condition) -> Tensor:
        """Return the embedding of noise level and condition, [B, embedding_width]."""
        # Not in bfloat16: its 8 bits do not distinguish neighbouring noise levels.
        with torch.autocast(c_noise.device.type, enabled=False):
            emb = self.noise_embedding(self.noise_features(c_noise))
            if self.condition_embedding is not None:
                emb = mp_sum(emb, self.condition_embedding(condition, emb))
            if self.augmentation is not None:
                emb = emb + self.augmentation(condition.get(AUGMENTATION), emb)
            return mp_silu(emb)

    def _blocks(
        self, widths: Sequence[int], per_level: int, attends: Sequence[bool]
    ) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Return the blocks of the encoder and of the decoder."""
        down, up, skips = nn.ModuleList(), nn.ModuleList(), [widths[0]]
        for level, width in enumerate(widths):
            if level:
                down.append(self._block("encoder", skips[-1], skips[-1], resample="down"))
                skips.append(skips[-1])
            for _ in range(per_level):
                down.append(self._block("encoder", skips[-1], width, attends=attends[level]))
                skips.append(width)
        h = widths[-1]
        up.append(self._block("decoder", h, h, attends=True))
        up.append(self._block("decoder", h, h))
        for level, width in reversed([*enumerate(widths)]):
            if level < len(widths) - 1:
                up.append(self._block("decoder", h, h, resample="up"))
            for _ in range(per_level + 1):
                up.append(self._block("decoder", h, width, attends=attends[level], skip_channels=skips.pop()))
                h = width
        return down, up

    def _block(
        self,
        part: Literal["encoder", "decoder"],
        in_channels: int,
        out_channels: int,
        *,
        attends: bool = False,
        **options: Any,
    ) -> MPBlock:
        if attends and out_channels % self.head_channels:
            problem = f"does not divide the {out_channels} channels of an attention layer"
            raise UsageError("head_channels", self.head_channels, problem, "use a divisor")
        heads = out_channels // self.head_channels if attends else None
        return MPBlock(
            in_channels, out_channels, emb_channels=self.embedding_width, part=part, dropout=self.dropout,
            num_heads=heads, ndim=self.ndim, **options,
        )  # fmt: skip


class MPConditionEmbedding(nn.Module):
    """Embedding of the attributes of a `Condition`, with the class: their sum, [B, width], of unit variance.

    The vector of a missing value is zero.

    Args:
        conditions: description of the values, with at least one attribute.
        width: features of the vector.
    """

    def __init__(self, conditions: Conditions, width: int) -> None:
        super().__init__()
        self.names = [attribute.name for attribute in conditions.attributes]
        self.attributes = nn.ModuleDict(
            {module_name(each): _attribute_embedding(each, width) for each in conditions.attributes}
        )

    def forward(self, condition: Condition, like: Tensor) -> Tensor:
        """Return the vector; `like` is any tensor [B, ...] on the same device."""
        vectors = [
            embedding(condition.get(name), like)
            for name, embedding in zip(self.names, self.attributes.values(), strict=True)
        ]
        return torch.stack(vectors).sum(0) / math.sqrt(len(vectors))


class MPChoice(nn.Module):
    """Embedding of a category, or of yes or no: its number, int64 [B], to [B, width]; zero for other numbers.

    A linear layer gets a vector of zeros with `sqrt(choices)` at the number, which has unit variance.
    """

    outer_layers = ("linear",)
    """Names of the input layers, which `optimizer=muon` leaves to AdamW."""

    def __init__(self, choices: int, width: int) -> None:
        super().__init__()
        self.choices = choices
        self.linear = MPLinear(choices, width)

    def forward(self, values: Tensor | None, like: Tensor) -> Tensor:
        if values is None:
            values = like.new_full((len(like),), -1, dtype=torch.int64)
        chosen = values[:, None] == torch.arange(self.choices, device=values.device)
        return self.linear(chosen.to(self.linear.weight.dtype) * math.sqrt(self.choices))


class MPNumber(nn.Module):
    """Embedding of a number by its Fourier features: [B], NaN for missing, to [B, width].

    The features are those of s = 2 (value - low) / (high - low) - 1.
    """

    outer_layers = ("linear",)
    """Names of the input layers, which `optimizer=muon` leaves to AdamW."""

    def __init__(self, low: float, high: float, width: int) -> None:
        super().__init__()
        self.low, self.range = low, high - low or 1.0
        self.features = FourierFeatures(NUMBER_FEATURES)
        self.linear = MPLinear(NUMBER_FEATURES, width)

    def forward(self, values: Tensor | None, like: Tensor) -> Tensor:
        if values is None:
            values = like.new_full((len(like),), math.nan, dtype=torch.float32)
        missing = is_missing(values)
        scaled = 2 * (widened(values).masked_fill(missing, self.low) - self.low) / self.range - 1
        vectors = self.linear(self.features(scaled).to(self.linear.weight.dtype))
        return vectors.masked_fill(missing[:, None], 0)


def _attribute_embedding(attribute: AttributeDescription, width: int) -> nn.Module:
    if attribute.kind == "number":
        return MPNumber(attribute.low, attribute.high, width)
    return MPChoice(len(attribute.values), width)
