"""The settings by which a run's model is loaded and sampled; every command that samples has them."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, PositiveInt, model_validator

from diffusion_cli.config.averages import check_ema_length
from diffusion_cli.config.values import (
    STRICT,
    Clip,
    Device,
    Label,
    Length,
    Node,
    Precision,
    Prompt,
    Step,
    Weights,
)
from diffusion_cli.errors import NO_VALUE, UsageError


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Which model to load, and how to sample it."""

    run: str | None
    """Folder or name of the run; None for the newest."""
    step: Step
    weights: Weights
    ema_length: float | None = None
    """Relative length of a reconstructed average; None for the stored weights."""
    output_dir: str
    """Folder of the runs."""
    device: Device
    sampler: Node
    steps: int
    guidance: Node
    label: Label
    null_label: Literal["all", "none"] = "all"
    """Meaning of a label of None."""
    prompt: str | list[str] | None = None
    """Texts of the images in turn."""
    prompts: str | None = None
    """File with a text in each line, instead of `prompt`."""
    negative_prompt: str | None = None
    """Text from which guidance leads away."""
    of_images: bool = False
    """Whether conditions are those of real images, unless the command names some."""
    finds_conditions: bool = False
    """Whether the command finds the conditions of the images itself, as an edit of attributes."""
    brings_images: bool = True
    """Whether the command gives a model with condition images one for each sample."""
    clip_x0: Clip
    precision: Precision
    compile: bool = False
    batch_size: int | Literal["auto"]


class ComputeKeys(BaseModel):
    """The keys for the device of a command and the folder of its runs."""

    model_config = STRICT
    batch_size: PositiveInt | Literal["auto"]
    device: Device
    output_dir: str


class RunWeights(BaseModel):
    """The keys that choose weights of a run, and the number format to compute in."""

    model_config = STRICT
    run: str | None
    step: PositiveInt | Literal["best"] | None
    weights: Weights
    ema_length: Length | None = None
    precision: Precision

    @model_validator(mode="after")
    def _averaged(self) -> Self:
        check_ema_length(self.ema_length, self.weights)
        return self


class Generation(RunWeights, ComputeKeys):
    """The keys that sampling, evaluation and editing share."""

    sampler: Node
    steps: PositiveInt
    guidance: Node
    label: Label
    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1)] | None = None
    prompts: str | None = None
    negative_prompt: Prompt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    clip_x0: Clip

    @property
    def seeds(self) -> range:
        """Seeds of the images."""
        return range(self.seed, self.seed + 1)

    @property
    def sampling(self) -> SamplingSettings:
        """Settings of the run's model and its sampler."""
        names = {field.name for field in fields(SamplingSettings)}
        return SamplingSettings(**{name: value for name, value in self if name in names})

    @model_validator(mode="after")
    def _consistent_prompts(self) -> Self:
        texts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        for key, value in texts.items():
            if any(not text.strip() for text in ([value] if isinstance(value, str) else value or [])):
                raise UsageError(key, NO_VALUE, "contains an empty text", "leave it out for no text")
        if self.prompt is not None and self.prompts is not None:
            raise UsageError("prompts", self.prompts, "conflicts with prompt=", "leave one of them out")
        return self

    @model_validator(mode="after")
    def _seeds_in_range(self) -> Self:
        # The noise of an image comes from the low 32 bits of its seed: none may come round again.
        if self.seeds.stop > 2**32:
            raise UsageError(
                "seed", self.seed, f"the last image's seed exceeds {2**32 - 1}", "use a smaller one"
            )
        return self
