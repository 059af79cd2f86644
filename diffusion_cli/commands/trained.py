"""What `sample`, `eval` and `edit` begin with: a trained model, how it is sampled and guided, and a record of it."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.batch_size import images_that_fit, network_call
from diffusion_cli.commands.class_labels import class_number, is_null, labels_named, warn_of_untrained
from diffusion_cli.config import EditConfig, EvalConfig, SampleConfig, build
from diffusion_cli.data import Dataset, as_begun
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.diffusion.guidance import Guidance, Guided
from diffusion_cli.errors import NO_VALUE, UsageError, format_value
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.load import LoadedClassifier, LoadedDenoiser, Origin, load_classifier, load_model
from diffusion_cli.runs.schema import check_dataset
from diffusion_cli.samplers import Sampler
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.precision import device_of, resolve
from diffusion_cli.system.trusted_paths import remember, unnamed

FRUGAL = {"in_memory": None, "num_workers": 0}
"""Settings of a dataset that change time and memory, but no image: those of a checkpoint are not used."""
SCALE = 1e-3  # by which the scales of the same latents may differ


@dataclass(frozen=True)
class LoadedModel:
    """A run's model with what the command line chose for it."""

    folder: Path
    model: LoadedDenoiser
    sampler: Sampler
    guidance: Guidance
    labels: list[int] | None
    """The classes to make in turn, or None for no label."""
    device: torch.device
    precision: str
    """fp32, bf16 or fp16."""
    settings: dict[str, Any]
    """All that an image depends on, its seed apart, as plain data."""
    chosen_labels: bool = False
    """Whether `label=` gives the labels, rather than the default."""

    def number(self, label: int | str | None, key: str) -> int | None:
        """The number of a class by its name or index, None for null; ValueError, about a key, if there is none."""
        if label is None or is_null(label, self.model.class_names):
            _refuse_untrained_null(self.model, key)
            return None
        known = self.model.num_classes is not None and self.model.class_names
        return class_number(label, known or (), key)

    def dataset(self, data_dir: str, paths: Mapping[str, Any]) -> Dataset:
        """The dataset that the model was trained on; ValueError as `dataset_of`."""
        return dataset_of(self.folder, self.model, data_dir, paths)

    def batch_size(
        self,
        config: SampleConfig | EvalConfig | EditConfig,
        count: int,
        each: int = 1,
        gradient: bool = False,
    ) -> int:
        """Results at a time, `each` of so many images, of `count` in all; found and said here for `auto`.

        All of several processes have to ask, and get the same.
        """
        if self.sampler.per_image or count == 0:
            return 1
        if config.batch_size != "auto":
            return min(config.batch_size, count)
        call = network_call(
            self.model, self.sampler, config.steps, guidance=self.guidance, labels=self.labels, clip=config.clip_x0,
            precision=self.precision, each=each, gradient=gradient,
        )  # fmt: skip
        ranks = Distributed()
        share = math.ceil(count / ranks.world)
        size = ranks.broadcast(images_that_fit(call, share, self.device) if ranks.is_main else 1)
        if ranks.is_main:
            print(f"batch_size={size}", file=sys.stderr)
        return size

    def check(self, steps: int) -> None:
        """Raise ValueError if the sampler cannot sample the model in so many steps."""
        self.sampler.check(self.model.denoiser)
        self.sampler.grid(steps)


def dataset_of(folder: Path, trained: Origin, data_dir: str, paths: Mapping[str, Any]) -> Dataset:
    """The dataset that a run was trained on, at the `paths` that the user names, or at those of its checkpoint.

    Raises ValueError if a path of the checkpoint is not the user's own, if the dataset is too large or cannot be built,
    or if the model still grows.
    """
    node = trained.config["dataset"]
    unknown = [key for key in paths if node.get(key) is None]
    if unknown:
        raise UsageError(
            f"dataset.{unknown[0]}",
            paths[unknown[0]],
            f"the run in {folder} was trained without it",
            "leave it out",
        )
    node = node | paths
    refused = {key: path for key, path in unnamed(node).items() if key not in paths}
    if refused:
        named = " ".join(f"dataset.{key}={path}" for key, path in refused.items())
        raise UsageError(
            named,
            NO_VALUE,
            f"is named by the checkpoint in {folder}, and you have never used it here",
            "if you trust the checkpoint, add these words to the command",
        )
    mistakes = check_dataset(node, trained.shape)
    if mistakes:
        raise UsageError(
            folder,
            NO_VALUE,
            f"was made by another version of diffuse: {'; '.join(map(str, mistakes))}",
            "name another run",
        )
    node |= {key: value for key, value in FRUGAL.items() if key in node}
    dataset: Dataset = build(as_begun(node, trained.data_rules), data_dir)
    if dataset.shape != trained.shape:
        raise UsageError(
            "run",
            folder,
            f"knows images of size {min(trained.shape[1:])} at step {trained.step}, and those of its "
            f"dataset are of {min(dataset.shape[1:])}",
            "train on, or name a later step=",
        )
    remember(paths)
    return dataset


def open_run(
    config: SampleConfig | EvalConfig | EditConfig, model: LoadedDenoiser | None = None
) -> LoadedModel:
    """Load what a command names, or take its loaded `model`; UsageError if there is none, and as `prepare`."""
    folder = find_run(config.run, config.output_dir)
    if model is None:
        model = load_model(folder, config.weights, device_of(config.device), config.step)
    return prepare(config, folder, model)


def prepare(
    config: SampleConfig | EvalConfig | EditConfig, folder: Path, model: LoadedDenoiser
) -> LoadedModel:
    """Choose how the model of a run is sampled and guided; UsageError if parts do not go together."""
    device = device_of(config.device)
    precision = resolve(config.precision, device)
    sampler: Sampler = build(config.sampler, model.denoiser.schedule)
    guides = GuidanceRuns(model, folder, config, device)
    guidance: Guidance = build(config.guidance, guides)
    labels = labels_named(
        config.label, model, guidance, guides.trained_classes,
        unnamed="none" if isinstance(config, EditConfig) else "all",
    )  # fmt: skip
    warn_of_untrained("label", labels or [], guides.trained_classes, model)
    dropout = model.config["objective"]["label_dropout"]
    if labels is None:
        _refuse_untrained_null(model, "label")
    guidance.check(model.denoiser, dropout, labels is not None)
    if isinstance(guidance, Guided) and guidance.quantile is not None and not model.space.bounded:
        raise UsageError(
            "guidance.dynamic_threshold",
            guidance.quantile,
            "keeps pixels in [-1, 1], and the model works in latents, which have no such bounds",
            "leave it null",
        )
    if not isinstance(config, EditConfig) and config.compile:
        # In place: torch.compile(network) would rename every weight.
        mode = "reduce-overhead" if device.type == "cuda" else None  # by CUDA graphs
        model.denoiser.network.compile(dynamic=False, mode=mode)
    settings = {
        "weights": config.weights,
        "weights_sha256": model.digest,
        "sampler": config.sampler,
        "steps": config.steps,
        "guidance": {**config.guidance, **guides.digests},
        "labels": labels,
        "clip_x0": config.clip_x0,
        "precision": precision,
        **sampler.grid_settings(config.steps),
    }
    chosen = config.label is not None and not is_null(config.label, model.class_names)
    return LoadedModel(folder, model, sampler, guidance, labels, device, precision, settings, chosen)


class GuidanceRuns:
    """The networks that a guidance names, loaded and held against the model that they are to guide."""

    def __init__(
        self,
        model: LoadedDenoiser,
        folder: Path,
        config: SampleConfig | EvalConfig | EditConfig,
        device: torch.device,
    ) -> None:
        self.model, self.folder, self.config, self.device = model, folder, config, device
        self.trained_classes = model.trained_classes
        """The classes of which the model, or the classifier that guides it, has seen images."""
        self.digests: dict[str, str] = {}
        """SHA-256 of the weights of each."""

    def denoiser(self, run: str | None, step: int | None) -> Denoiser:
        """The denoiser of a checkpoint, null standing for the model's own run."""
        key = f"guidance.run={run}" if run else f"guidance.step={format_value(step)}"
        folder = self.folder if run is None else find_run(run, self.config.output_dir, "guidance.run")
        try:
            guide = load_model(folder, self.config.weights, self.device, step)
        except UsageError as error:
            raise error.renamed({"step": "guidance.step"}) from error
        if guide.digest == self.model.digest:
            raise UsageError(
                key,
                NO_VALUE,
                "these are the weights of the model itself",
                "name a weaker one by guidance.run, or an earlier checkpoint by guidance.step",
            )
        self._compare(key, guide, "parameterization")
        if guide.num_classes is not None and (
            self.model.num_classes is None or guide.class_names != self.model.class_names
        ):
            known = (
                "no classes" if self.model.num_classes is None else f"the classes {self.model.class_names}"
            )
            raise UsageError(
                key,
                NO_VALUE,
                f"knows the classes {guide.class_names}, and the model {known}",
                "take another guide",
            )
        self.digests = {"guide_sha256": guide.digest}
        return guide.denoiser

    def classifier(self, run: str) -> NoisyClassifier:
        """The classifier of a run."""
        key = f"guidance.run={run}"
        guide = load_classifier(find_run(run, self.config.output_dir, "guidance.run"), self.device)
        self._compare(key, guide)
        if guide.class_names != self.model.class_names:
            raise UsageError(
                key, NO_VALUE, f"tells {guide.class_names}", f"the model's data has {self.model.class_names}"
            )
        self.digests = {"classifier_sha256": guide.digest}
        if self.model.num_classes is None:
            self.trained_classes = guide.trained_classes
        return guide.classifier

    def _compare(self, key: str, guide: LoadedDenoiser | LoadedClassifier, *parts: str) -> None:
        """Raise ValueError unless a guide sees images of the same shape in the same space at the same noise levels."""
        if guide.shape != self.model.shape:
            raise UsageError(
                key, NO_VALUE, f"is for images {guide.shape}, the model makes {self.model.shape}"
            )
        if not _same_latents(guide.latent, self.model.latent):
            theirs, ours = ("latents" if origin.latent else "pixels" for origin in (guide, self.model))
            if theirs == ours:
                raise UsageError(
                    key,
                    NO_VALUE,
                    "works in other latents than the model",
                    "take one trained with the same latent.run",
                )
            raise UsageError(
                key,
                NO_VALUE,
                f"works in {theirs}, and the model in {ours}",
                f"take one trained as the model, in {ours}",
            )
        for part in ("schedule", *parts):
            if guide.config[part] != self.model.config[part]:
                raise UsageError(
                    key, NO_VALUE, f"has another {part} than the model", "take one trained with the same"
                )


def _same_latents(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two models see the same latents; their scales, measured on two machines, may differ by rounding."""
    if one is None or other is None:
        return one is other
    scales = zip(one["mean"] + one["std"], other["mean"] + other["std"], strict=False)
    alike = all(math.isclose(a, b, rel_tol=SCALE, abs_tol=SCALE) for a, b in scales)
    return alike and all(one[key] == other[key] for key in ("shape", "sha256"))


def _refuse_untrained_null(model: LoadedDenoiser, key: str) -> None:
    if model.num_classes is not None and model.config["objective"]["label_dropout"] == 0:
        raise UsageError(
            key,
            None,
            "the model was trained with objective.label_dropout=0, never without a label",
            "name a class",
        )
