"""Embeddings of conditions beside the class: numbers, categories, yes or no, images, texts and augmentations."""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription
from diffusion_cli.conditions.condition import AUGMENTATION, TEXT, is_missing
from diffusion_cli.errors import UsageError
from diffusion_cli.networks.layers import NORM_EPS, widened, zero_init
from diffusion_cli.networks.token_layers import FOURIER_FEATURES, MLP, SelfAttention, fourier_features


class TextTokens(NamedTuple):
    """Vectors of the tokens of texts, to which a network attends."""

    vectors: Tensor
    """float [B, L, width]."""
    given: Tensor
    """Whether a token is present, bool [B, L]; at least one of each text is."""


class ConditionEmbedding(nn.Module):
    """Embedding of the attributes, the text and the augmentation of a `Condition`, without its class.

    The vector is the sum of those of each attribute, of the text and of the augmentation. Attributes and texts have a
    learned vector for a missing value. All are initially zero, so that a network with the weights of one without these
    conditions has the same output.

    Args:
        conditions: description of the values, with attributes, a text or an augmentation.
        width: features of the vector.

    Raises:
        UsageError: the heads of the transformer of texts do not divide its width.
    """

    outer_layers = ("augmentation",)
    """Names of the input layers, which `optimizer=muon` leaves to AdamW."""

    def __init__(self, conditions: Conditions, width: int) -> None:
        super().__init__()
        described = conditions.other_attributes
        self.names = [attribute.name for attribute in described]
        self.attributes = nn.ModuleDict(
            {module_name(attribute): _attribute_embedding(attribute, width) for attribute in described}
        )
        self.text = None if conditions.text is None else TextEmbedding(conditions.text, width)
        self.augmentation = None
        if conditions.augmentation is not None:
            self.augmentation = AugmentationEmbedding(conditions.augmentation, width)

    @classmethod
    def of(cls, conditions: Conditions, width: int) -> "ConditionEmbedding | None":
        """Return the embedding; None for conditions without attributes, text and augmentation."""
        given = conditions.other_attributes or conditions.text or conditions.augmentation
        return cls(conditions, width) if given else None

    def forward(self, condition: Condition, like: Tensor) -> tuple[Tensor, TextTokens | None]:
        """Return the vector [B, width] and the tokens of the text, None for models without text.

        Args:
            condition: values; those that it lacks are missing.
            like: any tensor [B, ...] on the same device.
        """
        vectors = [
            embedding(condition.get(name), like)
            for name, embedding in zip(self.names, self.attributes.values(), strict=True)
        ]
        tokens = None
        if self.text is not None:
            vector, tokens = self.text(condition.get(TEXT), like)
            vectors.append(vector)
        if self.augmentation is not None:
            vectors.append(self.augmentation(condition.get(AUGMENTATION), like))
        return torch.stack(vectors).sum(0), tokens


class ChoiceEmbedding(nn.Module):
    """Embedding of a category, or of yes or no: its number, int64 [B], -1 for missing, to [B, width]."""

    def __init__(self, choices: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(choices + 1, width)
        nn.init.zeros_(self.table.weight)

    def forward(self, values: Tensor | None, like: Tensor) -> Tensor:
        missing = self.table.num_embeddings - 1
        if values is None:
            values = like.new_full((len(like),), -1, dtype=torch.int64)
        return self.table(values.masked_fill(is_missing(values), missing))


class NumberEmbedding(nn.Module):
    """Embedding of a number by an MLP of Fourier features: [B], NaN for missing, to [B, width].

    The features are those of s = 2 (value - low) / (high - low) - 1, see `fourier_features`.
    """

    outer_layers = ("mlp.0",)
    """Names of the input layers, which `optimizer=muon` leaves to AdamW."""

    def __init__(self, low: float, high: float, width: int) -> None:
        super().__init__()
        self.low, self.range = low, high - low or 1.0
        self.mlp = nn.Sequential(nn.Linear(FOURIER_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        zero_init(self.mlp[2])
        self.missing = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor | None, like: Tensor) -> Tensor:
        if values is None:
            values = like.new_full((len(like),), math.nan, dtype=torch.float32)
        missing = is_missing(values)
        # The gradient of an unused NaN would be NaN, too.
        scaled = 2 * (widened(values).masked_fill(missing, self.low) - self.low) / self.range - 1
        features = fourier_features(scaled).to(self.missing.dtype)
        return torch.where(missing[:, None], self.missing, self.mlp(features))


class AugmentationEmbedding(nn.Module):
    """Linear embedding of the parameters of an augmentation, without bias: [B, N] to [B, width].

    It is zero for an unchanged image, with parameters 0 or missing (Karras et al. 2022, Appendix F.2), and initially.
    """

    def __init__(self, parameters: int, width: int) -> None:
        super().__init__()
        # Not random, so that the other weights of a network are the same with and without augmentation.
        self.weight = nn.Parameter(torch.zeros(width, parameters))

    def forward(self, values: Tensor | None, like: Tensor) -> Tensor:
        if values is None:
            values = like.new_zeros(len(like), self.weight.shape[1])
        return linear(values.to(self.weight.dtype), self.weight)


class TextEmbedding(nn.Module):
    """Embedding of texts: vectors of their tokens, and a vector [B, width], linear in the mean of these.

    A learned token that is always present precedes the others, so that a missing text has one token.

    Args:
        text: form of the texts: tokens, int64 [B, L], -1 for missing; or features, float [B, L, D], NaN for missing.
        width: features of the vector.

    Raises:
        UsageError: the heads do not divide the width of the tokens.
    """

    def __init__(self, text: TextDescription, width: int) -> None:
        super().__init__()
        if text.width % text.heads:
            raise UsageError(
                "text.heads", text.heads, f"does not divide text.width={text.width}", "use a divisor"
            )
        self.length = text.length
        self.first = nn.Parameter(torch.randn(1, 1, text.width))
        self.read = FeatureReader(text) if text.vocabulary is None else TokenReader(text)
        depth = 0 if text.vocabulary is None else text.depth
        self.blocks = nn.ModuleList(TextBlock(text.width, text.heads) for _ in range(depth))
        self.norm = nn.LayerNorm(text.width, eps=NORM_EPS)
        self.pooled = nn.Linear(text.width, width)
        zero_init(self.pooled)

    def forward(self, values: Tensor | None, like: Tensor) -> tuple[Tensor, TextTokens]:
        if values is None:
            values = self.read.missing(like)
        if values.shape[1] > self.length:
            raise ValueError(f"a text of {values.shape[1]} tokens, but the network reads {self.length}")
        vectors, missing = self.read(values)
        vectors = torch.cat([self.first.to(vectors.dtype).expand(len(vectors), -1, -1), vectors], dim=1)
        given = torch.cat([missing.new_ones(len(missing), 1), ~missing], dim=1)
        for block in self.blocks:
            vectors = block(vectors, given)
        vectors = self.norm(vectors)
        weights = given.to(vectors.dtype) / given.sum(1, keepdim=True)
        return self.pooled((vectors * weights[..., None]).sum(1)), TextTokens(vectors, given)


class TokenReader(nn.Module):
    """Vectors of tokens at their positions: int64 [B, L] to [B, L, width], and where they are missing."""

    def __init__(self, text: TextDescription) -> None:
        super().__init__()
        assert text.vocabulary is not None
        self.tokens = nn.Embedding(text.vocabulary, text.width)
        self.positions = nn.Parameter(torch.randn(text.length, text.width))

    def missing(self, like: Tensor) -> Tensor:
        """Return missing texts, one for each row of a tensor."""
        return like.new_full((len(like), 1), -1, dtype=torch.int64)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokens(values.clamp(min=0)) + self.positions[: values.shape[1]], is_missing(values)


class FeatureReader(nn.Module):
    """Linear map of the features of a frozen encoder: [B, L, D] to [B, L, width], and where they are missing."""

    outer_layers = ("linear",)
    """Names of the input layers, which `optimizer=muon` leaves to AdamW."""

    def __init__(self, text: TextDescription) -> None:
        super().__init__()
        assert text.features is not None
        self.linear = nn.Linear(text.features, text.width)

    def missing(self, like: Tensor) -> Tensor:
        """Return missing texts, one for each row of a tensor."""
        return like.new_full((len(like), 1, self.linear.in_features), math.nan, dtype=torch.float32)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        missing = is_missing(values).any(2)
        known = values.masked_fill(missing[..., None], 0)
        return self.linear(known.to(self.linear.weight.dtype)), missing


class TextBlock(nn.Module):
    """Transformer block for texts, `x + attention(norm(x))` followed by `x + MLP(norm(x))`: [B, L, width].

    Tokens attend to all tokens that are present, in both directions (Xiong et al. 2020, with the norms first). The
    block is initially the identity (Zhang et al. 2019): random blocks mix the words, and training had not separated
    rare ones again.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, 4 * width, 0.0)
        zero_init(self.attn.proj)
        zero_init(self.mlp.fc2)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), given)
        return x + self.mlp(self.norm2(x))


def with_image(x: Tensor, image: Tensor | None, channels: int) -> Tensor:
    """Return noised images with a condition image as further channels, and one that is 1 where it is given.

    Where a pixel of the condition image is missing, all its channels and the last one are 0.

    Args:
        x: noised images [B, C, *sizes].
        image: condition images [B, channels, *sizes] in [-1, 1], NaN for missing; None: all missing.
        channels: channels of the condition images.

    Raises:
        ValueError: the condition images have another shape.

    Source: Saharia et al. 2021, Section 2, for the channels.
    """
    expected = (len(x), channels, *x.shape[2:])
    if image is None:
        return torch.cat([x, x.new_zeros(len(x), channels + 1, *x.shape[2:])], dim=1)
    if tuple(image.shape) != expected:
        raise ValueError(f"condition images of shape {[*image.shape]}, but the network expects {[*expected]}")
    missing = is_missing(image).any(1, keepdim=True)
    return torch.cat([x, image.to(x).masked_fill(missing, 0), (~missing).to(x)], dim=1)


def module_name(attribute: AttributeDescription) -> str:
    """Return a name of a module without dots, which differs for other attributes and other kinds of values."""
    return f"{attribute.kind}_" + re.sub(r"[^\w-]", lambda found: f"%{ord(found[0]):x};", attribute.name)


def _attribute_embedding(attribute: AttributeDescription, width: int) -> nn.Module:
    if attribute.kind == "number":
        return NumberEmbedding(attribute.low, attribute.high, width)
    choices = len(attribute.values) if attribute.kind == "category" else 2
    return ChoiceEmbedding(choices, width)
