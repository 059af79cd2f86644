"""Descriptions of conditions: plain data to build a network, to explain values to users, and to store in runs."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    model_validator,
)

from diffusion_cli.conditions.condition import IMAGE, LABEL, TEXT, Condition

RESERVED = (IMAGE, TEXT)
"""Names of conditions that are not attributes."""
LARGEST_NUMBER = 1e37
"""Largest magnitude of a number, so that sums and differences of a few numbers are finite in float32."""
Bounded = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
PLAIN = ConfigDict(strict=True, extra="forbid", frozen=True)
Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    PlainSerializer(list),
]


class AttributeDescription(BaseModel):
    """One attribute of images: a category, yes or no, or a real number."""

    model_config = PLAIN
    name: str
    kind: Literal["category", "yes_no", "number"]
    values: Texts = ()
    """Names of the classes of a category, in the order of their indices; "no" and "yes"; empty for a number."""
    low: Bounded = 0.0
    """Smallest value of a number in the training images."""
    high: Bounded = 0.0
    """Largest value of a number in the training images."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name in RESERVED:
            raise ValueError(f"an attribute cannot have the name {self.name}")
        fits = {"category": len(self.values) > 0, "yes_no": len(self.values) == 2, "number": not self.values}
        if not fits[self.kind]:
            raise ValueError(f"{len(self.values)} values do not fit the kind {self.kind}")
        if self.low > self.high:
            raise ValueError("low is above high")
        return self

    def __str__(self) -> str:
        if self.kind == "number":
            return f"{self.name}: number, {self.low:.6g} to {self.high:.6g}"
        return f"{self.name}: yes/no" if self.kind == "yes_no" else f"{self.name}: {len(self.values)} classes"


class TextDescription(BaseModel):
    """The form of encoded texts: tokens of a vocabulary, or features of a frozen encoder."""

    model_config = PLAIN
    length: PositiveInt
    """Maximum number of tokens of a text."""
    vocabulary: PositiveInt | None = None
    """Number of tokens; None for features."""
    features: PositiveInt | None = None
    """Features of each token; None for tokens."""
    width: PositiveInt = 128
    """Features of each token within the network."""
    depth: NonNegativeInt = 2
    """Blocks of the transformer that reads tokens; unused for features."""
    heads: PositiveInt = 4
    """Attention heads of these blocks, a divisor of the width."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.vocabulary is None) == (self.features is None):
            raise ValueError("a text has either a vocabulary or features")
        return self


class Conditions(BaseModel):
    """Description of the inputs of a network besides the noised image."""

    model_config = PLAIN
    attributes: Annotated[
        tuple[AttributeDescription, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
        PlainSerializer(lambda value: [attribute.model_dump() for attribute in value]),
    ] = ()
    """Attributes of the images; a category named "label" is the class."""
    image: PositiveInt | None = None
    """Channels of the condition image; None without one."""
    text: TextDescription | None = None
    augmentation: Annotated[PositiveInt | None, Field(exclude=True)] = None
    """Number of parameters of an augmentation of training images; None without.

    Samples have no such condition, so it is not among `names`.
    """

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if len({*self.names}) < len(self.names):
            raise ValueError("two attributes have the same name")
        return self

    @classmethod
    def of(cls, conditions: "Conditions | int | None") -> "Conditions":
        """Return a description as it is, or one of a number of classes; None describes an unconditional network."""
        if isinstance(conditions, Conditions):
            return conditions
        return cls() if conditions is None else cls.of_classes([str(number) for number in range(conditions)])

    @classmethod
    def of_classes(cls, names: Sequence[str]) -> "Conditions":
        """Return the description of class labels with these names."""
        return cls(attributes=(AttributeDescription(name=LABEL, kind="category", values=tuple(names)),))

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without class labels."""
        found = next((attribute for attribute in self.attributes if attribute.name == LABEL), None)
        return None if found is None or found.kind != "category" else len(found.values)

    @property
    def has_other_label(self) -> bool:
        """Whether a number or yes/no has the name "label", so that values of this name are not classes."""
        return self.num_classes is None and LABEL in self.names

    @property
    def only_classes(self) -> bool:
        """Whether there are no conditions of samples, or only class labels."""
        return not self.other_attributes and self.image is None and self.text is None

    @property
    def other_attributes(self) -> tuple[AttributeDescription, ...]:
        """Attributes without the class."""
        is_class = self.num_classes is not None
        return tuple(attribute for attribute in self.attributes if not (is_class and attribute.name == LABEL))

    def without_attributes(self) -> Self:
        """Return the description without attributes and classes."""
        return self.model_copy(update={"attributes": ()})

    def example(self, count: int, sizes: Sequence[int], device: torch.device) -> Condition | None:
        """Return a condition of `count` images with these sizes, for measuring networks; None without conditions.

        No value is missing: classes and tokens have index 0, numbers and pixels are 0.
        """
        if not self.names:
            return None
        values = {
            attribute.name: torch.zeros(
                count, dtype=torch.float32 if attribute.kind == "number" else torch.int64, device=device
            )
            for attribute in self.attributes
        }
        if self.image is not None:
            values[IMAGE] = torch.zeros(count, self.image, *sizes, device=device)
        if self.text is not None:
            features = () if self.text.features is None else (self.text.features,)
            dtype = torch.int64 if self.text.features is None else torch.float32
            values[TEXT] = torch.zeros(count, self.text.length, *features, dtype=dtype, device=device)
        return Condition(values)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values of a `Condition`."""
        others = {IMAGE: self.image, TEXT: self.text}
        return (
            *(attribute.name for attribute in self.attributes),
            *(name for name, given in others.items() if given is not None),
        )
