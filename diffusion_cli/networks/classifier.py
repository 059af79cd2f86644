"""Classifier of noisy images for classifier guidance."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffusion_cli.conditions import Conditions
from diffusion_cli.errors import UsageError
from diffusion_cli.networks.encoder import EmbeddingLayout, Resample, UNetConfig, UNetEncoder
from diffusion_cli.networks.group_norm import GroupNorm
from diffusion_cli.networks.layers import NORM_EPS


class Classifier(UNetEncoder):
    """Class scores F(x, c_noise), [B, K], of noisy images: the encoder of a U-Net, average pooling and a linear layer.

    See `UNet` for the arguments. The published network pools with attention.

    Raises:
        UsageError: arguments contradict each other, or there are no classes.

    Source: Dhariwal and Nichol 2021, Sec. 4 and Appendix H.
    """

    task = "classifier"
    outer_layers = ("stem", "head")
    """Names of the input and output layers, which `optimizer=muon` leaves to AdamW."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        channels: PositiveInt = 32,
        channel_mult: Sequence[PositiveInt] = (1, 2, 2),
        num_res_blocks: PositiveInt = 1,
        attention_resolutions: Sequence[PositiveInt] = (),
        num_heads: PositiveInt | None = None,
        head_channels: PositiveInt | None = 32,
        norm_groups: PositiveInt = 8,
        time_embedding: Literal["additive", "scale_shift"] = "scale_shift",
        embedding_layout: EmbeddingLayout = "cos_sin",
        fourier_scale: PositiveFloat = 16.0,
        resample: Resample = "conv",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        gradient_checkpointing: bool = False,
    ) -> None:
        if num_classes is None:
            raise UsageError(
                "task", "classifier", "the dataset has no classes to learn", "use a labelled dataset"
            )
        config = UNetConfig(
            shape, channels=channels, channel_mult=channel_mult, num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions, num_heads=num_heads, head_channels=head_channels,
            norm_groups=norm_groups, time_embedding=time_embedding, embedding_layout=embedding_layout,
            fourier_scale=fourier_scale, resample=resample, dropout=dropout,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        super().__init__(config, Conditions())
        self.out_norm = GroupNorm(norm_groups, config.widths[-1], eps=NORM_EPS)
        self.head = nn.Linear(config.widths[-1], num_classes)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Return the logits [B, K] of images x [B, C, *sizes] at noise levels c_noise [B]."""
        emb, _ = self.embed(c_noise)
        *_, h = self.encode(x, emb)
        return self.head(self.out_norm(h, activation=True).flatten(2).mean(2)).to(x.dtype)
