"""Schema of the `diffuse` entry of a checkpoint. It is validated before anything is built from it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    model_validator,
)

from diffusion_cli.conditions import Conditions
from diffusion_cli.config.catalogue import PACKAGE
from diffusion_cli.config.schema import LatentConfig
from diffusion_cli.config.validate import NOT_ALLOWED, check_node, validate
from diffusion_cli.config.values import Weights
from diffusion_cli.data import ResolutionSchedule
from diffusion_cli.data.progressive import Stage
from diffusion_cli.data.text import LONGEST_STATE
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.guidance import Dropouts
from diffusion_cli.diffusion.objectives import Consistency, TrajectoryDistillation
from diffusion_cli.errors import NO_VALUE, Problem, UsageError, class_name
from diffusion_cli.formats import SampleFormat, Shape, form_of
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.migrate import FORMAT
from diffusion_cli.system.precision import NumberFormat
from diffusion_cli.system.untrusted import LARGEST_NUMBER, MOST_PIXELS, plain, whole_numbers

MOST_MADE = 2**27
"""Most values of a generated dataset; in float64 they take 1 GiB."""
MOST_FRESH = 6
"""Most names of new tensors in a line."""
BUILT = ("schedule", "parameterization", "model", "condition")
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
OPEN = ConfigDict(strict=True, extra="allow", frozen=True)

AS_TUPLE = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sizes = Annotated[
    tuple[PositiveInt, ...],
    Field(min_length=2, max_length=4),
    AS_TUPLE,
    PlainSerializer(list),
]
"""Channels, then the spatial sizes; stored as a list."""
StoredFormat = Annotated[
    InstanceOf[SampleFormat],
    BeforeValidator(lambda value: form_of(value) if isinstance(value, Mapping) else value),
    PlainSerializer(lambda form: form.to_dict()),
]


class LatentInfo(BaseModel):
    """The latent space of a denoiser."""

    model_config = STRICT
    shape: Sizes
    mean: list[Finite]
    """Mean of each channel over the training images."""
    std: list[Annotated[Finite, Field(gt=0)]]
    autoencoder: dict[str, Any]
    """Configuration of the autoencoder."""
    sha256: str
    """SHA-256 of the autoencoder's weights."""
    source: str
    """Run or folder of the autoencoder."""
    cache: dict[Literal["train", "val"], Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]
    """Cache name of the encoded images of each split."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise UsageError(
                "latent.mean", NO_VALUE, f"must have {self.shape[0]} numbers, as must latent.std"
            )
        return self


class InitInfo(BaseModel):
    """The source of the first weights of a run."""

    model_config = STRICT
    source: str
    """Run or folder, as the user named it."""
    kind: str
    """`run`, or class and program of another model."""
    step: NonNegativeInt | None
    """Step of the run; None for another model."""
    weights: Weights | None
    """Weights of the run; None for another model."""
    sha256: str
    """SHA-256 of all weights of the source."""
    taken: PositiveInt
    """Number of tensors of the network that come from the source."""
    total: PositiveInt
    """Number of tensors of the network."""
    fresh: list[str]
    """Names of the other tensors, which have random values; in parentheses, the classes or the condition concerned."""
    adapted: list[str] = []
    """Names of the tensors that come from tensors of another shape, as for other channels."""
    commit: str | None = None
    """Commit of the source, if it is a repository."""

    @property
    def new(self) -> set[str]:
        """Names of the tensors that the source does not have as a whole."""
        return {name.partition(" ")[0] for name in self.fresh} | {*self.adapted}

    def __str__(self) -> str:
        key = "init.run" if self.kind == "run" else "init.pretrained"
        origin = f"step {self.step}, {self.weights}" if self.kind == "run" else self.kind
        origin += f", commit {self.commit}" if self.commit else ""
        named = ", ".join(self.fresh[:MOST_FRESH])
        more = f" and {len(self.fresh) - MOST_FRESH} more" if len(self.fresh) > MOST_FRESH else ""
        return f"{key}={self.source} ({origin}): {self.taken} of {self.total} tensors" + (
            f"; new: {named}{more}" if self.fresh else ""
        )


class LoraInfo(BaseModel):
    """The low-rank adapters of a run; its checkpoints have them in place of the weights that they change."""

    model_config = STRICT
    rank: PositiveInt
    alpha: Annotated[Finite, Field(gt=0)]
    frozen: PositiveInt
    """Number of frozen parameters, which are in a file of the run folder."""
    sha256: str
    """SHA-256 of the frozen parameters."""


class StageInfo(BaseModel):
    """One stage of progressive resolution."""

    model_config = STRICT
    first: NonNegativeInt
    shape: Sizes
    batch_size: PositiveInt


class OriginInfo(BaseModel):
    """The program and the files that an imported model comes from."""

    model_config = STRICT
    kind: str
    """Class and program, such as "DDPMPipeline of diffusers"."""
    source: str
    """Folder or repository, as the user named it."""
    sha256: dict[str, str]
    """SHA-256 of the files with weights, by their path in the source."""
    licence: str | None = None
    """Licence that its model card states."""
    commit: str | None = None
    """Commit of a repository; None for a folder."""
    numbered_classes: bool = False
    """Whether the names of the classes are only their numbers, because the source has none."""


class StoredConfig(BaseModel):
    """The training configuration in a checkpoint, with types for the keys that `diffuse` reads."""

    model_config = OPEN
    max_steps: PositiveInt | None
    ema: dict[str, Any]
    dataset: dict[str, Any] | None
    """None for an imported model without a dataset."""
    objective: dict[str, Any]
    schedule: dict[str, Any] | None
    parameterization: dict[str, Any] | None
    model: dict[str, Any]
    latent: LatentConfig
    condition: dict[str, Any] | None = None
    """Condition image; None for runs of earlier versions, which have none."""
    text: dict[str, Any] | None = None
    """None for early versions."""
    coupling: Literal["none", "ot"] = "none"
    """Coupling of images and noise; none for early versions."""


class CheckpointInfo(BaseModel):
    """The `diffuse` entry of a checkpoint: the information to build its model and identify its data."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    format: int = FORMAT
    task: str
    num_images: NonNegativeInt
    """Number of training images."""
    config: StoredConfig
    shape: Sizes
    """Shape of the dataset's images; with progressive resolution, of the last stage."""
    form: StoredFormat
    latent: LatentInfo | None = None
    """None for pixel space."""
    num_classes: PositiveInt | None = None
    class_names: Annotated[tuple[str, ...], AS_TUPLE, PlainSerializer(list)] | None = None
    """Class names, in the order of the labels."""
    init: InitInfo | None = None
    """None for random first weights."""
    lora: LoraInfo | None = None
    """None for weights without adapters."""
    conditions: Conditions | None = None
    """Conditions of the network; None for classes alone, and for an unconditional network."""
    augmentation: PositiveInt | None = None
    """Number of parameters of an augmentation, an input of the network in training; None without augmentation."""
    text: str | None = None
    """State of the text encoder: a learned tokenizer, or the SHA-256 of frozen weights; None without texts."""
    class_counts: list[NonNegativeInt] | None = None
    """Training images per class; None without classes, or for early versions."""
    stages: Annotated[list[StageInfo], Field(min_length=1)] | None = None
    """Stages of progressive resolution; None for one size."""
    data_rules: PositiveInt = 1
    """Version of the rules that select and convert files."""
    data_sha256: str | None = None
    """SHA-256 of the fingerprints of the images; None for early versions."""
    labels_sha256: str | None = None
    missing_conditions: Annotated[tuple[str, ...], AS_TUPLE, PlainSerializer(list)] = ()
    """Conditions that some training images lack."""
    precision: NumberFormat | None = None
    """Number format of the training; None for early versions."""
    origin: OriginInfo | None = None
    """Where an imported model comes from; None for a trained one."""

    @property
    def stated_class_names(self) -> tuple[str, ...] | None:
        """Class names that the data or an imported model state; None if they are only numbers."""
        return None if self.origin is not None and self.origin.numbered_classes else self.class_names

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := [*self._problems()]:
            raise UsageError.several(problems)
        return self

    def _problems(self) -> Iterator[Problem]:
        """Yield the inconsistencies between entries."""
        config, names, counts = self.config, self.class_names, self.class_counts
        if math.prod(self.shape) > MOST_PIXELS:
            yield Problem("shape", list(self.shape), "is too large for an image")
        if self.stages is not None and not _lead_to(self.shape, self.stages):
            yield Problem("stages", NO_VALUE, "contradict the shape")
        if (None if names is None else len(names)) != self.num_classes:
            yield Problem("num_classes", self.num_classes, "is not the number of class_names")
        if counts is not None and (len(counts) != self.num_classes or not any(counts)):
            yield Problem("class_counts", NO_VALUE, "must be one number per class, not all 0")
        if "_target_" not in (config.dataset or {}) and (config.dataset is not None or self.origin is None):
            yield Problem("dataset", NO_VALUE, "has no _target_")
        if (self.latent is None) != (config.latent.key is None):
            yield Problem("latent", NO_VALUE, "contradicts latent.run and latent.pretrained")
        if len(self.text or "") > LONGEST_STATE:
            yield Problem("text", NO_VALUE, f"has more than {LONGEST_STATE} characters")
        has_text = self.conditions is not None and self.conditions.text is not None
        if has_text != (self.text is not None) or (has_text and config.text is None):
            yield Problem("text", NO_VALUE, "contradicts the conditions")
        for key, node in {"schedule": config.schedule, "parameterization": config.parameterization}.items():
            if (node is None) != (self.task == AutoencoderKL.task):
                yield Problem(key, NO_VALUE, f"contradicts task={self.task}")
        is_ours = str(config.objective.get("_target_")).startswith(f"{PACKAGE}.")
        needs_dropout = is_ours and self.objective_name != TrajectoryDistillation.__name__
        if self.task == Denoiser.task and (needs_dropout or "label_dropout" in config.objective):
            yield from validate(_Objective, config.objective, "objective")[1]

    @property
    def network_shape(self) -> Shape:
        """Shape of the network's input, an image or a latent."""
        return self.shape if self.latent is None else self.latent.shape

    @property
    def network_conditions(self) -> Conditions | int | None:
        """Argument of the network for samples: its conditions, or the number of classes."""
        return self.num_classes if self.conditions is None else self.conditions

    @property
    def trained_conditions(self) -> Conditions | int | None:
        """Argument of the network in training: also with the parameters of the augmentation."""
        if self.augmentation is None:
            return self.network_conditions
        conditions = Conditions.of(self.network_conditions)
        return conditions.model_copy(update={"augmentation": self.augmentation})

    @property
    def objective_name(self) -> str:
        """Class name of the objective."""
        return class_name(self.config.objective)

    @property
    def is_consistency_model(self) -> bool:
        """Whether the network predicts the end of a path, in place of the mean of x_0."""
        return trains_consistency(self.config.objective)

    def require_mean(self, key: str, value: str, remedy: str) -> None:
        """Raise UsageError for `key=value`, which needs the mean of x_0, with a consistency model."""
        if self.is_consistency_model:
            problem = "needs the mean of x_0, but a consistency model predicts the end of a path"
            raise UsageError(key, value, problem, remedy)

    @property
    def label_dropout(self) -> float:
        """Probability of training without the label, for classifier-free guidance; 0 for an objective without it."""
        return self.config.objective.get("label_dropout", 0.0)

    @property
    def dropouts(self) -> Dropouts:
        """Probabilities of training without conditions, for classifier-free guidance."""
        alone = self.config.objective.get("single_dropout", 0.0)
        return Dropouts(self.label_dropout, alone)

    @property
    def trained_classes(self) -> list[int]:
        """Classes with training images; all classes if `class_counts` is None."""
        if self.class_counts is None:
            return list(range(self.num_classes or 0))
        return [label for label, count in enumerate(self.class_counts) if count]

    @property
    def resolution_schedule(self) -> ResolutionSchedule | None:
        """Stages of progressive resolution; None for one size."""
        if self.stages is None:
            return None
        return ResolutionSchedule(
            [Stage(stage.first, stage.shape, stage.batch_size) for stage in self.stages]
        )


def trains_consistency(objective: Mapping[str, Any]) -> bool:
    """Return whether the objective of a node trains consistency models, which predict the end of a path."""
    return class_name(objective) in (Consistency.__name__, TrajectoryDistillation.__name__)


class _Objective(BaseModel):
    model_config = OPEN
    label_dropout: Annotated[float, Field(ge=0, lt=1)]
    single_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


def parse_info(entry: Mapping[str, Any]) -> CheckpointInfo:
    """Validate the `diffuse` entry of a checkpoint.

    Raises FormatError if it is not plain data, and UsageError with all problems.
    """
    plain(entry)
    info, problems = validate(CheckpointInfo, entry)
    if info is None:
        raise UsageError.several(problems)
    return info


def _lead_to(shape: Shape, stages: Sequence[StageInfo]) -> bool:
    """Return whether stages start at step 0, are in order, and are not larger than a shape of the same channels."""
    firsts = [stage.first for stage in stages]
    alike = all(len(stage.shape) == len(shape) and stage.shape[0] == shape[0] for stage in stages)
    return (
        firsts[0] == 0
        and sorted(firsts) == firsts
        and alike
        and all(side <= most for stage in stages for side, most in zip(stage.shape, shape, strict=True))
    )


def check_built(info: CheckpointInfo) -> list[Problem]:
    """Return the problems of the configuration nodes that the model of a checkpoint is built from."""
    nodes = [(key, node) for key in BUILT if (node := getattr(info.config, key)) is not None]
    nodes += [] if info.latent is None else [("model", info.latent.autoencoder)]
    nodes += [] if info.text is None or info.config.text is None else [("text", info.config.text)]
    problems = [problem for key, node in nodes for problem in check_node(key, node)]
    # An untrusted checkpoint can ask for a table or network of any size.
    large = {
        (key, number) for key, node in nodes for number in whole_numbers(node) if number > LARGEST_NUMBER
    }
    return problems + [
        Problem(key, number, f"is larger than {LARGEST_NUMBER}") for key, number in sorted(large)
    ]


def not_built(where: Path, problem: Problem) -> UsageError:
    """Return the error of a checkpoint with a problem of `check_built` or `check_dataset`."""
    part = str(problem.key).partition(".")[0]
    if problem.problem == NOT_ALLOWED:
        return UsageError(where, NO_VALUE, f"its {part} {problem.value} {NOT_ALLOWED}", problem.remedy)
    problem_line = f"this version of diffuse cannot build its {part} ({problem.cause})"
    return UsageError(where, NO_VALUE, problem_line, "choose another run, or use the version that made it")


def check_dataset(node: Mapping[str, Any], shape: Sequence[int]) -> list[Problem]:
    """Return the problems of the dataset of a checkpoint, for samples of a shape."""
    mistakes = check_node("dataset", node)
    # A generated dataset allocates memory in proportion to its size.
    if not mistakes and node.get("size", 0) * math.prod(shape) > MOST_MADE:
        mistakes.append(
            Problem("dataset.size", node["size"], f"needs more than {MOST_MADE} numbers in total")
        )
    return mistakes
