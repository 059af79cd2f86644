"""What a checkpoint says of its run, checked before anything is made of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from diffusion_cli.config.schema import STRICT, LatentConfig
from diffusion_cli.config.validate import check_node, validate
from diffusion_cli.errors import NO_VALUE, Problem, UsageError
from diffusion_cli.system.untrusted import plain

LARGEST_NUMBER = 10**6
MOST_PIXELS = 2**28
MOST_MADE = 2**27
"""Numbers of a dataset that is made on the spot; a float64 copy of them is 1 GiB."""
BUILT = ("schedule", "parameterization", "model")


class _Latent(BaseModel):
    """The `latent` entry: the space of a denoiser of latents."""

    model_config = STRICT
    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=4)]
    mean: list[Annotated[float, Field(allow_inf_nan=False)]]
    std: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    autoencoder: dict[str, Any]
    sha256: str
    source: str
    cache: dict[Literal["train", "val"], Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise UsageError(
                "latent.mean", NO_VALUE, f"should have {self.shape[0]} numbers, as should latent.std"
            )
        return self


class _Stage(BaseModel):
    """One of the `stages` of a run that grows."""

    model_config = ConfigDict(strict=True, extra="forbid")
    first: NonNegativeInt
    shape: list[PositiveInt]
    batch_size: PositiveInt


class _Stored(BaseModel):
    """The `diffuse` entry, as far as anything depends on it."""

    model_config = ConfigDict(strict=True, extra="allow")
    task: str
    num_images: NonNegativeInt
    config: dict[str, Any]
    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=4)]
    form: dict[str, Any]
    latent: _Latent | None
    num_classes: PositiveInt | None
    class_names: list[str] | None
    stages: Annotated[list[_Stage], Field(min_length=1)] | None
    data_rules: PositiveInt = 1
    class_counts: list[NonNegativeInt] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None


class _Config(BaseModel):
    """Those keys of a run's configuration that are read from its checkpoint."""

    model_config = ConfigDict(strict=True, extra="allow")
    max_steps: PositiveInt | None
    ema: dict[str, Any]
    dataset: dict[str, Any]
    objective: dict[str, Any]
    schedule: dict[str, Any] | None
    parameterization: dict[str, Any] | None
    model: dict[str, Any]
    latent: LatentConfig


class _Objective(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    label_dropout: Annotated[float, Field(ge=0, lt=1)]


def check_stored(about: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the `diffuse` entry of a checkpoint, one line each; ValueError if it is no plain data."""
    plain(about)
    stored, mistakes = validate(_Stored, about)
    if stored is None:
        return mistakes
    if math.prod(stored.shape) > MOST_PIXELS:
        mistakes.append(Problem("shape", stored.shape, "is too large for an image"))
    if stored.stages is not None and not _lead_to(stored.shape, stored.stages):
        mistakes.append(Problem("stages", NO_VALUE, "do not lead to the shape step by step"))
    names = stored.class_names
    if (None if names is None else len(names)) != stored.num_classes:
        mistakes.append(Problem("num_classes", stored.num_classes, "is not the number of class_names"))
    counts = stored.class_counts
    if counts is not None and (len(counts) != stored.num_classes or not any(counts)):
        mistakes.append(
            Problem("class_counts", NO_VALUE, "should be the images of each class, some of them not 0")
        )
    config, wrong = validate(_Config, stored.config)
    mistakes += wrong
    if config is not None:
        mistakes += [] if "_target_" in config.dataset else [Problem("dataset", NO_VALUE, "names no class")]
        if (stored.latent is None) != (config.latent.key is None):
            mistakes.append(Problem("latent", NO_VALUE, "does not go with latent.run and latent.pretrained"))
        for key in ("schedule", "parameterization"):
            if (getattr(config, key) is None) != (stored.task == "autoencoder"):
                mistakes.append(Problem(key, NO_VALUE, f"does not go with task={stored.task}"))
        mistakes += (
            validate(_Objective, config.objective, "objective")[1] if stored.task == "diffusion" else []
        )
    return mistakes


def _lead_to(shape: list[int], stages: list[_Stage]) -> bool:
    """Whether stages follow each other, of images like those of a shape and not larger."""
    firsts = [stage.first for stage in stages]
    alike = all(len(stage.shape) == len(shape) and stage.shape[0] == shape[0] for stage in stages)
    return (
        firsts[0] == 0
        and sorted(firsts) == firsts
        and alike
        and all(side <= most for stage in stages for side, most in zip(stage.shape, shape, strict=True))
    )


def check_built(about: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the nodes of a checkpoint that its model is built of, one line each."""
    nodes = [(key, about["config"][key]) for key in BUILT if about["config"][key] is not None]
    nodes += [("model", about["latent"]["autoencoder"])] if about["latent"] else []
    mistakes = [line for key, node in nodes for line in check_node(key, node)]
    # A larger table or network could not be trained, but it could be asked for.
    large = {f"{key}={number}" for key, node in nodes for number in _numbers(node) if number > LARGEST_NUMBER}
    return mistakes + [
        Problem(words, NO_VALUE, f"is larger than {LARGEST_NUMBER}") for words in sorted(large)
    ]


def check_dataset(node: Mapping[str, Any], shape: Sequence[int]) -> list[Problem]:
    """What is wrong with the dataset of a checkpoint, of samples of a shape, one line each."""
    mistakes = check_node("dataset", node)
    # A dataset that is made, not read, takes the memory that its size asks for.
    if not mistakes and node.get("size", 0) * math.prod(shape) > MOST_MADE:
        mistakes.append(Problem("dataset.size", node["size"], f"is more than {MOST_MADE} numbers in all"))
    return mistakes


def _numbers(node: Any) -> Iterator[int]:
    """The whole numbers in plain data."""
    if isinstance(node, int):
        yield node
    elif isinstance(node, Mapping | list):
        for item in node.values() if isinstance(node, Mapping) else node:
            yield from _numbers(item)
