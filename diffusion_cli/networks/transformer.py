"""Building blocks of transformers: embeddings, attention, and blocks conditioned on time and class."""

from collections.abc import Callable

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.errors import UsageError
from diffusion_cli.networks.condition_embedding import ConditionEmbedding, TextTokens
from diffusion_cli.networks.layers import (
    NORM_EPS,
    Checkpointed,
    SinusoidalLayout,
    class_rows,
    timestep_embedding,
    used_conditions,
    zero_init,
)
from diffusion_cli.networks.token_layers import MLP, CrossAttention, XavierLinear

TIME_FEATURES = 256  # Peebles and Xie 2023
EMBEDDING_STD = 0.02


class TimeEmbedding(nn.Module):
    """MLP of sinusoidal embeddings of c_noise: [B] to [B, width]."""

    def __init__(self, width: int, layout: SinusoidalLayout) -> None:
        super().__init__()
        self.layout: SinusoidalLayout = layout
        first, last = XavierLinear(TIME_FEATURES, width), XavierLinear(width, width)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=EMBEDDING_STD)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, c_noise: Tensor) -> Tensor:
        features = timestep_embedding(c_noise, TIME_FEATURES, self.layout)
        return self.mlp(features.to(next(self.parameters()).dtype))


class ClassEmbedding(nn.Module):
    """Embedding of classes 0..num_classes - 1 and the null class num_classes: [B] to [B, width]."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=EMBEDDING_STD)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Modulation(nn.Sequential):
    """Linear map of silu(c) to `parts` vectors, initially zero: [B, width] to `parts` tensors [B, 1, width]."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), XavierLinear(width, parts * width))
        self.parts = parts
        zero_init(self)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return super().forward(input)[:, None].chunk(self.parts, dim=2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `x (1 + scale) + shift`."""
    return torch.addcmul(shift, x, 1 + scale)


class TransformerBlock(nn.Module):
    """Transformer block with adaLN-zero conditioning (Peebles and Xie 2023, Section 3.2).

    `x + gate1 attention(norm(x) (1 + scale1) + shift1)`, followed by `x + gate2 MLP(norm(x) (1 + scale2) + shift2)`,
    with shifts, scales and gates from c. These are initially zero, so that the block is the identity.

    With `text_width`, `x + cross_attention(norm(x), text)` in between, also initially the identity (Chen et al. 2024,
    Section 2.3).

    Inputs are tokens x [B, N, width], the condition c [B, width], and tokens of a text of `text_width` features.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        *,
        mlp_ratio: float,
        dropout: float,
        mlp_norm_eps: float = NORM_EPS,
        num_heads: int = 1,
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=mlp_norm_eps)
        self.mlp = MLP(width, round(mlp_ratio * width), dropout)
        self.adaLN_modulation = Modulation(width, 6)
        self.text_attn = None
        if text_width is not None:
            self.text_norm = nn.LayerNorm(width, eps=NORM_EPS)
            self.text_attn = CrossAttention(width, num_heads, text_width)
            zero_init(self.text_attn.proj)

    def forward(self, x: Tensor, c: Tensor, text: TextTokens | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        if self.text_attn is not None:
            assert text is not None
            x = x + self.text_attn(self.text_norm(x), *text)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Output layer, linear in `norm(x) (1 + scale) + shift`, and initially zero."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)
        self.linear = XavierLinear(width, outputs)
        self.adaLN_modulation = Modulation(width, 2)
        zero_init(self.linear)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Transformer(Checkpointed):
    """Base class of transformers: embedding of time and condition, blocks and output layer.

    Args:
        conditions: classes and other conditions that the data offer, or a number of classes, or None.
        attention: factory of the attention of a block from features and heads.
        outputs: outputs per token, doubled with `learn_variance`.
        embedding_layout: layout of the timestep features, see `timestep_embedding`.
        mlp_norm_eps: constant that the normalization before each MLP adds to the variance.
        hidden_size: see `DiT`, likewise the others.

    Raises:
        UsageError: the number of heads does not divide the number of features.
    """

    outer_layers = ("x_embedder", "final_layer")
    """Names of the input and output layers, which `optimizer=muon` leaves to AdamW."""

    output_layers = ("final_layer.linear",)
    """Names of the layers with a row for each output."""

    pixels_first = True
    """Whether the outputs of a patch are ordered by pixel, then channel; those of other networks by channel first."""

    takes_conditions = takes_augmentation = True

    def __init__(
        self,
        conditions: Conditions | int | None,
        attention: Callable[[int, int], nn.Module],
        outputs: int,
        *,
        embedding_layout: SinusoidalLayout = "cos_sin",
        mlp_norm_eps: float = NORM_EPS,
        hidden_size: PositiveInt,
        depth: PositiveInt,
        num_heads: PositiveInt,
        mlp_ratio: PositiveFloat,
        dropout: float,
        class_conditional: bool,
        learn_variance: bool,
        gradient_checkpointing: bool,
    ) -> None:
        if hidden_size % num_heads:
            raise UsageError(
                "num_heads", num_heads, f"does not divide hidden_size={hidden_size}", "use a divisor"
            )
        super().__init__()
        self.conditions = used_conditions(conditions, class_conditional)
        self.num_classes = self.conditions.num_classes
        self.learn_variance = learn_variance
        self.gradient_checkpointing = gradient_checkpointing
        self.t_embedder = TimeEmbedding(hidden_size, embedding_layout)
        if self.num_classes is not None:
            self.y_embedder = ClassEmbedding(self.num_classes, hidden_size)
        text = self.conditions.text
        self.blocks = nn.ModuleList(
            TransformerBlock(
                hidden_size,
                attention(hidden_size, num_heads),
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                mlp_norm_eps=mlp_norm_eps,
                num_heads=num_heads,
                text_width=None if text is None else text.width,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, (2 if learn_variance else 1) * outputs)
        self.condition_embedding = ConditionEmbedding.of(self.conditions, hidden_size)

    def transform(self, tokens: Tensor, c_noise: Tensor, y: Condition | Tensor | None) -> Tensor:
        """Return the outputs [B, N, outputs] for tokens [B, N, width] at noise levels c_noise [B]."""
        c, text = self._embed(c_noise, y)
        for block in self.blocks:
            tokens = self.run(block, tokens, c, text)
        return self.final_layer(tokens, c)

    def _embed(self, c_noise: Tensor, y: Condition | Tensor | None) -> tuple[Tensor, TextTokens | None]:
        # Not in bfloat16: its 8 bits do not distinguish neighbouring timesteps.
        with torch.autocast(c_noise.device.type, enabled=False):
            c = self.t_embedder(c_noise)
            if self.num_classes is not None:
                c = c + self.y_embedder(class_rows(y, self.num_classes, c_noise))
            text = None
            if self.condition_embedding is not None:
                vector, text = self.condition_embedding(Condition.of(y), c_noise)
                c = c + vector
            return c, text
