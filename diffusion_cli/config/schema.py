"""The keys of each command, with their types and ranges; the YAML files hold the values and the comments."""

import re
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from diffusion_cli.config import plugins
from diffusion_cli.config.averages import EMACommandConfig, EMAConfig, check_ema_length
from diffusion_cli.config.evaluation import CompareConfig, EvalConfig
from diffusion_cli.config.sampling import Generation, SamplingSettings
from diffusion_cli.config.values import (
    STRICT,
    Duration,
    Length,
    License,
    Name,
    Node,
    Precision,
    Step,
    Weights,
)
from diffusion_cli.errors import NO_VALUE, UsageError, class_name, option_name


class InitConfig(BaseModel):
    """`init.*`: the weights that training starts from, and those that it leaves unchanged."""

    model_config = STRICT
    run: str | None = None
    pretrained: str | None = None
    step: Step = None
    weights: Weights = "ema"
    freeze: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.run is not None and self.pretrained is not None:
            raise UsageError(
                "init.pretrained", self.pretrained, "conflicts with init.run", "leave one of them out"
            )
        if self.freeze is not None and self.run is self.pretrained is None:
            patterns, remedy = (
                f"[{','.join(self.freeze)}]",
                "set init.run or init.pretrained, or leave it out",
            )
            raise UsageError("init.freeze", patterns, "would freeze random weights", remedy)
        for key, default in {"step": None, "weights": "ema"}.items():
            if self.run is None and (value := getattr(self, key)) != default:
                raise UsageError(f"init.{key}", value, "applies only with init.run=", "set init.run")
        return self


class LoraConfig(BaseModel):
    """`lora.*`: low-rank adapters, which train a few weights beside the frozen ones of `init`."""

    model_config = STRICT
    rank: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    targets: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        set_without_effect = {
            "alpha": self.alpha,
            "targets": None if self.targets == "auto" else f"[{','.join(self.targets)}]",
        }
        for key, value in set_without_effect.items():
            if self.rank is None and value is not None:
                raise UsageError(f"lora.{key}", value, "applies only with lora.rank=", "set lora.rank")
        return self


class LatentConfig(BaseModel):
    """`latent.*`: the autoencoder that makes the latents of a denoiser."""

    model_config = STRICT
    run: str | None
    pretrained: str | None

    @property
    def key(self) -> str | None:
        """The one that is given, as on the command line; None for pixels."""
        given = [f"latent.{name}={value}" for name, value in self if value is not None]
        return given[0] if given else None


class TrainConfig(BaseModel):
    """The keys of `conf/train.yaml`."""

    model_config = STRICT
    seed: NonNegativeInt
    name: Name | None
    run: str | None = None  # loading replaces another value by the configuration of that run
    batch_size: PositiveInt
    coupling: Literal["none", "ot"] = "none"  # runs of earlier versions have none
    progressive: Annotated[list[PositiveInt], Field(min_length=2)] | None
    stage_steps: list[PositiveInt] | None
    stage_batch: list[PositiveInt] | None
    accumulate_grad_batches: PositiveInt
    precision: Precision
    compile: Literal["auto"] | bool
    max_steps: PositiveInt | None
    max_epochs: PositiveInt | None
    max_time: Duration | None
    checkpoint_every: PositiveInt
    checkpoint_period: Duration | None
    keep_last: PositiveInt
    log_every: PositiveInt
    validate_every: PositiveInt
    preview_every: PositiveInt | None
    preview_real: bool = True
    preview_steps: PositiveInt
    eval_every: PositiveInt | None
    eval_samples: Annotated[int, Field(ge=2)]
    eval_steps: PositiveInt
    keep_best: str | None
    objective_metric: str | Annotated[list[str], Field(min_length=1)] = "val_loss"
    data_dir: str
    cache_dir: str | None
    output_dir: str
    init: InitConfig = InitConfig()
    lora: LoraConfig = LoraConfig()
    latent: LatentConfig
    ema: EMAConfig
    dataset: Node
    schedule: Node | None = None  # without noise there are none of these four
    parameterization: Node | None = None
    time_sampling: Node | None = None
    sampler: Node | None = None
    model: Node
    condition: Node | None = None  # runs of earlier versions have none
    text: Node | None = None  # runs of earlier versions have none
    augmentation: Node | None = None  # runs of earlier versions have none
    objective: Node
    optimizer: Node
    lr_schedule: Node
    clip_norm: PositiveFloat | None
    trainer: Node
    metric: dict[str, Node]
    features: Node
    reference: Node
    logger: dict[str, Node] = {}
    callback: dict[str, Node] = {}
    derived: list[str] = []
    """Keys with values that a recipe derived, and `model=` with the chosen option; no key of a command line."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_steps is self.max_epochs is self.max_time is None:
            raise UsageError("max_steps", NO_VALUE, "no budget", "set max_steps, max_epochs or max_time")
        if self.latent.run is not None and self.latent.pretrained is not None:
            raise UsageError(
                "latent.pretrained",
                self.latent.pretrained,
                "conflicts with latent.run",
                "leave one of them out",
            )
        if self.latent.key is not None and self.schedule is None:
            raise UsageError(self.latent.key, NO_VALUE, "autoencoders are trained on pixels", "leave it out")
        if self.latent.key is not None and "ImageCondition" in str((self.condition or {}).get("_target_")):
            problem = f"needs pixels, and {self.latent.key} trains on latents"
            raise UsageError("condition", "image", problem, "leave one of them out")
        if self.latent.key is not None and self.progressive is not None:
            raise UsageError(
                "progressive",
                self.progressive,
                "latents have one fixed size",
                f"leave it out, or {self.latent.key}",
            )
        if self.keep_best is not None and self.eval_every is None:
            raise UsageError("keep_best", self.keep_best, "no evaluations during training", "set eval_every")
        if self.keep_best is not None and self.keep_best not in self.metric:
            raise UsageError(
                "keep_best", self.keep_best, f"not in metric=[{','.join(self.metric)}]", "add it to metric"
            )
        noising = {
            key: getattr(self, key) for key in ("schedule", "parameterization", "time_sampling", "sampler")
        }
        if None in noising.values() and any(noising.values()):
            named = ", ".join(key for key, node in noising.items() if node)
            raise UsageError(named, NO_VALUE, "does not apply to task=autoencoder", "leave it out")
        for key, sizes in {"batch_size": [self.batch_size], "stage_batch": self.stage_batch or []}.items():
            for size in sizes:
                if size % self.accumulate_grad_batches:
                    raise UsageError(
                        "accumulate_grad_batches",
                        self.accumulate_grad_batches,
                        f"does not divide {key}={size}",
                        "use a divisor",
                    )
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if (rank := self.lora.rank) is None:
            return self
        if self.init == InitConfig():
            raise UsageError(
                "lora.rank", rank, "adapters change trained weights", "set init.run or init.pretrained"
            )
        if self.init.freeze is not None:
            problem = "conflicts with lora.rank, which freezes all weights of the source"
            patterns = f"[{','.join(self.init.freeze)}]"
            raise UsageError("init.freeze", patterns, problem, "leave one of them out")
        if self.schedule is None:
            raise UsageError("lora.rank", rank, "does not apply to task=autoencoder", "leave it out")
        if self.trainer.get("strategy") == "fsdp":
            problem = "not supported with lora.rank, which trains few weights"
            raise UsageError("trainer.strategy", "fsdp", problem, "use trainer.strategy=ddp")
        return self

    @model_validator(mode="after")
    def _stages(self) -> Self:
        sizes = self.progressive
        for key, values in {"stage_steps": self.stage_steps, "stage_batch": self.stage_batch}.items():
            if values is not None and sizes is None:
                raise UsageError(key, values, "applies only with progressive=", "set progressive")
            if values is not None and sizes is not None and len(values) != len(sizes) - 1:
                raise UsageError(
                    key, values, "must have one value for each size except the last", f"give {len(sizes) - 1}"
                )
        if sizes is None:
            return self
        if sorted(set(sizes)) != sizes:
            raise UsageError("progressive", sizes, "sizes must increase")
        if self.stage_steps is None and (self.max_steps or 0) < len(sizes):
            raise UsageError(
                "stage_steps",
                None,
                f"cannot be derived from max_steps={self.max_steps or 'null'}",
                "give the steps at each size except the last",
            )
        return self


class SampleConfig(Generation):
    """The keys of `conf/sample.yaml`."""

    num_samples: PositiveInt
    layout: Literal["flat", "imagefolder"] = "flat"
    compile: bool
    processes: PositiveInt | None
    strip: bool
    gif: bool
    frames: Annotated[int, Field(ge=2)]
    captions: bool
    output: str | None

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_samples)


class DataPaths(BaseModel):
    """`dataset.*` of `conf/edit.yaml`: where the run's own dataset lies."""

    model_config = STRICT
    path: str | None
    masks: str | None
    source: str | None
    factory: str | None


class EditConfig(Generation):
    """The keys of `conf/edit.yaml`."""

    dataset: DataPaths

    input: str | Annotated[list[str], Field(min_length=1)] | None
    num_images: PositiveInt | None
    variations: PositiveInt
    fit: bool
    captions: bool
    output: str | None
    data_dir: str
    edit: Node
    restoration: Node | None = None
    measurement: Node | None = None

    @property
    def edit_name(self) -> str:
        """The option name of the edit, such as super_resolution for SuperResolution."""
        return option_name(class_name(self.edit))

    @property
    def sampling(self) -> SamplingSettings:
        of_split = self.edit_name == "translate" and self.input in ("val", "train")
        return replace(
            super().sampling,
            null_label="none",
            of_images=self.edit_name == "reconstruct" or of_split,
            finds_conditions=self.edit.get("to") is not None,
            brings_images=self.edit_name == "translate",
        )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        named = [key for key in ("label", "prompt", "prompts") if getattr(self, key) is not None]
        if self.edit.get("to") is not None and named:
            problem = f"conflicts with {named[0]}="
            raise UsageError("edit.to", NO_VALUE, problem, "leave one of them out")
        return self

    @property
    def data_paths(self) -> Node:
        """The paths that the command names for the run's own dataset."""
        return self.dataset.model_dump(exclude_none=True)


class ReportConfig(BaseModel):
    """The keys of `conf/report.yaml`."""

    model_config = STRICT
    run: str | Annotated[list[str], Field(min_length=1)] | None
    output: str | None
    output_dir: str


class PlotConfig(BaseModel):
    """The keys of `conf/plot.yaml`."""

    model_config = STRICT
    run: str | None
    image: NonNegativeInt
    output: str | None
    force: bool
    data_dir: str
    output_dir: str
    figure: Node
    schedule: Node


class RunsConfig(BaseModel):
    """The keys of `conf/runs.yaml`."""

    model_config = STRICT
    format: Literal["table", "json"]
    output_dir: str


class DataConfig(BaseModel):
    """The keys of `conf/data.yaml`."""

    model_config = STRICT
    format: Literal["table", "json"]
    output: str | None
    data_dir: str
    output_dir: str
    action: Node
    dataset: Node | None = None
    features: Node | None = None
    text: Node | None = None
    metric: dict[str, Node] = {}


class NewConfig(BaseModel):
    """The keys of `conf/new.yaml`."""

    model_config = STRICT
    group: Literal[*plugins.BASES]  # pyright: ignore[reportInvalidTypeForm]
    name: str
    plugin: str | None
    output: str


class ImportConfig(BaseModel):
    """The keys of `conf/import.yaml`."""

    model_config = STRICT
    source: str
    name: Name | None
    data_dir: str
    output_dir: str
    preset: Node | None = None
    dataset: Node | None = None
    schedule: Node | None = None
    parameterization: Node | None = None


class ExportConfig(BaseModel):
    """The keys of `conf/export.yaml`."""

    model_config = STRICT
    run: str | None
    step: Step
    weights: Weights
    ema_length: Length | None = None
    license: License | None
    output: str | None
    force: bool
    output_dir: str
    format: Node

    @model_validator(mode="after")
    def _averaged(self) -> Self:
        check_ema_length(self.ema_length, self.weights)
        return self


class PushConfig(BaseModel):
    """The keys of `conf/push.yaml`."""

    model_config = STRICT
    run: str | None
    step: Step
    weights: Weights
    ema_length: Length | None = None
    repo: str
    private: bool
    license: License | None
    force: bool
    dry_run: bool
    output_dir: str
    format: Node

    @model_validator(mode="after")
    def _averaged(self) -> Self:
        check_ema_length(self.ema_length, self.weights)
        return self


class SlurmConfig(BaseModel):
    """The keys of `conf/hydra/launcher/slurm.yaml`."""

    model_config = STRICT
    name: str
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gres: str | None
    gpus_per_node: NonNegativeInt | None
    cpus_per_task: PositiveInt | None
    mem_gb: PositiveInt | None
    timeout_min: PositiveInt | Duration
    signal_delay_s: NonNegativeInt
    max_num_timeout: NonNegativeInt
    array_parallelism: PositiveInt
    setup: list[str] | None
    additional_parameters: dict[str, str | int]


Config = (
    TrainConfig
    | SampleConfig
    | EvalConfig
    | CompareConfig
    | EditConfig
    | ReportConfig
    | PlotConfig
    | DataConfig
    | EMACommandConfig
    | RunsConfig
    | NewConfig
    | ImportConfig
    | ExportConfig
    | PushConfig
)
COMMANDS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "edit": EditConfig,
    "eval": EvalConfig,
    "compare": CompareConfig,
    "report": ReportConfig,
    "plot": PlotConfig,
    "data": DataConfig,
    "ema": EMACommandConfig,
    "runs": RunsConfig,
    "new": NewConfig,
    "import": ImportConfig,
    "export": ExportConfig,
    "push": PushConfig,
}
# Commands that take a list of values where one is due, and get the product of all lists.
GRIDS = frozenset(["plot", "compare"])
UNSWEPT = GRIDS | {"ema", "new", "import", "export", "push"}
"""Commands without `-m`."""
FIRST_WORDS = {"plot": ("figure",), "data": ("action",), "new": ("group", "name")}
"""Groups and keys of the bare first words of a command: `diffuse plot loss` is `diffuse plot figure=loss`."""


def seconds(duration: str | None) -> float | None:
    """The seconds of a duration such as 2h30m, or None."""
    if duration is None:
        return None
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", duration)))
