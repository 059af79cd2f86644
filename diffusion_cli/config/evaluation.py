"""The keys of `diffuse eval` and `diffuse compare`, and the modes of `diffuse eval`.

A mode evaluates a run's model, the samples that it makes, given samples or an autoencoder, or it shows earlier results.
It has keys of its own, and refuses every other key that is set.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PositiveInt, model_validator

from diffusion_cli.config.catalogue import CONF, content, defaults, lineage, options
from diffusion_cli.config.mapping_words import LABEL, as_mapping, encoded
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.sampling import ComputeKeys, Generation, RunWeights, SamplingSettings
from diffusion_cli.config.values import STRICT, Clip, Node, Prompt
from diffusion_cli.errors import NO_VALUE, Problem, UsageError, class_name

NUM_SAMPLES = 2000  # samples of an evaluation for num_samples=null
EXACT: Literal["fp32"] = "fp32"
"""Number format of metrics of a model itself: their small differences and their solvers need it."""


class Measuring(ComputeKeys):
    """The keys of everything that measures."""

    processes: PositiveInt | None
    force: bool
    data_dir: str
    cache_dir: str | None
    metric: dict[str, Node]
    features: Node
    dataset: Node | None = None

    @property
    def other_dataset(self) -> Node | None:
        """The dataset that the command names, or None for the run's own."""
        return self.dataset if self.dataset and "_target_" in self.dataset else None

    @property
    def data_paths(self) -> Node:
        """The paths that the command names for the run's own dataset."""
        return self.dataset if self.dataset and self.other_dataset is None else {}

    @property
    def model_metrics(self) -> list[str]:
        """Metrics of a model itself: they take a number of real images, and no samples."""
        return [name for name, node in self.metric.items() if "num_images" in node]

    @property
    def splits(self) -> dict[str, Any]:
        """Split of the dataset that each metric of reconstructions compares with."""
        return {
            name: node["split"]
            for name, node in self.metric.items()
            if "split" in node and name not in self.model_metrics
        }

    @property
    def makes_samples(self) -> bool:
        """Whether any metric measures samples."""
        return len(self.model_metrics) < len(self.metric)


class EvaluationConfig(Generation, Measuring):
    """The keys of `conf/evaluation.yaml`: what evaluating and comparing share."""

    num_samples: PositiveInt | None
    repeats: PositiveInt
    compile: bool
    reference: Node

    @property
    def seeds(self) -> range:
        """Seeds of a model's samples, of all repeats."""
        return range(self.seed, self.seed + self.repeats * (self.num_samples or NUM_SAMPLES))

    @property
    def sampling(self) -> SamplingSettings:
        return replace(super().sampling, of_images=True)


class EvalConfig(EvaluationConfig):
    """The keys of `conf/eval.yaml`."""

    samples: str | None
    compare: Annotated[list[str], Field(min_length=2)] | None
    keep: bool
    objective_metric: str | Annotated[list[str], Field(min_length=1)] | None

    @model_validator(mode="after")
    def _suits_its_mode(self) -> Self:
        # A named run may be an autoencoder: its mode is known once its checkpoint is read.
        if self.run is None or self.samples is not None or self.compare is not None:
            self.mode()
        return self

    def mode(self) -> "ModelEvaluation | SamplesEvaluation | SampleFilesEvaluation | HistoryComparison":
        """Validate the keys, and return the mode that they select if the run, if any, trained a denoiser.

        Raises:
            UsageError: for keys that the mode does not have, or values that do not suit it.
        """
        if self.compare is not None:
            return HistoryComparison.of(self)
        if self.samples is not None:
            return SampleFilesEvaluation.of(self)
        return SamplesEvaluation.of(self) if self.makes_samples else ModelEvaluation.of(self)


class CompareConfig(EvaluationConfig):
    """The keys of `conf/compare.yaml`."""

    # A list is an axis.
    prompt: Prompt | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    output: str | None


class Mode(BaseModel):
    """A mode of `diffuse eval`: its fields are the keys that it has."""

    model_config = STRICT
    remedy: ClassVar[str] = "leave it out"

    @classmethod
    def of(cls, config: EvalConfig) -> Self:
        """Return the mode with its part of a configuration; UsageError for other keys, or parts that do not suit."""
        mode = cls.model_construct(**{key: value for key, value in config if key in cls.model_fields})
        keys_of_other_modes = (
            Problem(key, value, mode.reason(), mode.remedy_for(key))
            for key, value in _changed(config, frozenset(cls.model_fields))
        )
        if problems := [*mode.problems(), *keys_of_other_modes]:
            raise UsageError.several(problems)
        return mode

    def reason(self) -> str:
        """Return why the mode refuses the keys that it does not have."""
        raise NotImplementedError

    def remedy_for(self, key: str) -> str:
        """Return what to do about a key that the mode does not have."""
        return self.remedy

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the mode's own keys."""
        yield from ()


def _changed(config: EvalConfig, keys_of_mode: AbstractSet[str]) -> Iterator[tuple[str, Any]]:
    """Yield the keys, except those of a mode, with other values than in the YAML files; an option by its class."""
    for key, value in config:
        default = _defaults()[key]
        if key in keys_of_mode or value in (default, "null"):  # null as a label is typed
            continue
        if not isinstance(value, dict):
            yield key, value
        elif key == LABEL:
            yield key, as_mapping(encoded(value))
        elif "_target_" not in value:
            yield key, ",".join(value)
        elif default is None or value["_target_"] != default["_target_"]:
            yield key, class_name(value)
        else:
            before = flatten({key: default})
            yield from ((name, new) for name, new in flatten({key: value}).items() if new != before.get(name))


@cache
def _defaults() -> Node:
    """The values of `conf/eval.yaml` with the options that it names."""
    values: Node = {}
    for file in lineage(CONF / "eval.yaml"):
        values |= content(file)
    for group, chosen in defaults("eval").items():
        names = chosen if isinstance(chosen, list) else [chosen]
        files = [part for name in names if name is not None for part in lineage(options(group)[name])]
        nodes = [content(file) for file in files]
        values[group] = {key: value for node in nodes for key, value in node.items()} or None
    return values


def metric_options(names: Iterable[str]) -> str:
    """Return the options that stand for metrics on the command line, separated by commas: one for those it brings."""
    left = list(names)
    for option, file in options("metric").items():
        first, *others = (part.stem for part in lineage(file)[:-1] or [file])
        if others and {first, *others} <= {*left}:
            left = [option if name == first else name for name in left if name not in others]
    return ",".join(left)


def _without_autoencoder(keys: Measuring) -> Iterator[Problem]:
    """Yield a problem with metrics of reconstructions, where no autoencoder is evaluated."""
    if keys.splits:
        yield Problem(
            "metric",
            ",".join(keys.splits),
            "evaluates an autoencoder",
            "set run= to a run of task=autoencoder",
        )


def _without_batch_size(keys: Measuring) -> Iterator[Problem]:
    """Yield a problem with batch_size=auto, where a metric measures the model itself."""
    if keys.model_metrics and keys.batch_size == "auto":
        yield Problem(
            "batch_size",
            "auto",
            f"applies only to samples, and metric={metric_options(keys.model_metrics)} evaluates the model itself",
            "use a number",
        )


class ModelEvaluation(Mode, Measuring, RunWeights):
    """A run's denoiser itself, on real images."""

    reference: Node
    seed: int
    clip_x0: Clip

    def reason(self) -> str:
        return f"applies only to samples, and metric={metric_options(self.metric)} uses none"

    def remedy_for(self, key: str) -> str:
        images = " ".join(f"metric.{name}.num_images=<number>" for name in self.model_metrics)
        return f"replace it by: {images}" if key == "num_samples" else self.remedy

    def problems(self) -> Iterator[Problem]:
        yield from _without_batch_size(self)
        if self.precision not in ("auto", EXACT):
            problem = f"metrics of the model itself are computed in {EXACT}"
            yield Problem("precision", self.precision, problem, self.remedy)


class SamplesEvaluation(Mode, EvaluationConfig):
    """Samples that a run's denoiser makes, and the denoiser itself if a metric measures it."""

    keep: bool

    def problems(self) -> Iterator[Problem]:
        yield from _without_batch_size(self)
        yield from _without_autoencoder(self)


class SampleFilesEvaluation(Mode, Measuring):
    """Samples in files, made by any program; the run, if any, names the dataset to compare with."""

    samples: str
    run: str | None
    num_samples: int | None
    reference: Node

    def reason(self) -> str:
        return f"applies only to a run's model, and samples={self.samples} are files"

    def problems(self) -> Iterator[Problem]:
        yield from _without_autoencoder(self)
        if self.model_metrics:
            yield Problem("metric", metric_options(self.model_metrics), self.reason(), self.remedy)
        if self.batch_size == "auto":
            yield Problem("batch_size", "auto", self.reason(), self.remedy)
        if self.run is not None and self.other_dataset is not None:
            yield Problem(
                "run", self.run, "sets the reference dataset, and so does dataset=", "leave one of them out"
            )


class ReconstructionEvaluation(Mode, Measuring, RunWeights):
    """An autoencoder's reconstructions of real images, compared with these images."""

    def reason(self) -> str:
        return f"applies only to denoisers, and run={self.run} is an autoencoder"

    def problems(self) -> Iterator[Problem]:
        others = [name for name in self.metric if name not in self.splits]
        if others or not self.metric:
            problem = f"does not evaluate autoencoders, and run={self.run} is one"
            yield Problem("metric", metric_options(others), problem, "use metric=[reconstruction,rfid]")
        if len(set(self.splits.values())) > 1:
            named = ", ".join(f"{name}.split={split}" for name, split in self.splits.items())
            yield Problem("metric", NO_VALUE, f"several splits: {named}", "use one split per evaluation")
        if self.precision not in ("auto", EXACT):
            problem = f"reconstructions are computed in {EXACT}"
            yield Problem("precision", self.precision, problem, self.remedy)


class HistoryComparison(Mode, EvaluationConfig):
    """Earlier results of several runs, side by side; no setting of a measurement matters."""

    compare: list[str]
    keep: bool

    def reason(self) -> str:
        return "has no effect on compare="
