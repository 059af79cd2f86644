"""The model of a run with its sampling settings, and its dataset."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusion_cli.batch_size import images_that_fit, network_call
from diffusion_cli.captions import class_name, readable
from diffusion_cli.commands.class_labels import class_number, is_null
from diffusion_cli.commands.guides import GuidanceRuns, other_space
from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.commands.plugin_checks import check_guidance
from diffusion_cli.commands.sample_conditions import conditions_of, lead_away
from diffusion_cli.conditions.condition import IMAGE
from diffusion_cli.conditions.rows import Row, row_name
from diffusion_cli.config import SamplingSettings, build
from diffusion_cli.data import Dataset, with_rules
from diffusion_cli.data.conditioned import image_conditioned
from diffusion_cli.diffusion.guidance import ClassifierGuidance, Guidance, Guided
from diffusion_cli.diffusion.objectives import ProgressiveDistillation
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.generate import SamplingPipeline
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.load import Loaded, LoadedDenoiser, load_model
from diffusion_cli.runs.schema import check_dataset, not_built
from diffusion_cli.samplers import ConsistencySampler, Sampler
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.precision import device_of, emulated_format, resolve
from diffusion_cli.system.trusted_paths import remember, unnamed

FRUGAL = {"in_memory": None, "num_workers": 0}
"""Dataset settings that change only time and memory; they replace those of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel(SamplingPipeline):
    """The model of a run with the sampler, guidance and labels of the command line."""

    folder: Path
    """Run folder."""
    record: dict[str, Any]
    """Everything that an image depends on except its seed, as plain data for manifests and protocols."""
    batch_limit: int | Literal["auto"]
    """Largest batch; auto: the largest that fits in memory."""
    rows: list[Row] | None = None
    """Values of the conditions by name; None for class labels alone, and without conditions."""
    chosen: bool = False
    """Whether the command names the conditions, instead of the default."""

    @property
    def row_names(self) -> list[str] | None:
        """Names of the conditions of consecutive images, repeated; None without conditions."""
        if self.rows is not None:
            conditions = self.model.info.conditions
            attributes = () if conditions is None else conditions.attributes
            return [readable(row_name(row, attributes)) for row in self.rows]
        labels, names = self.labels, self.model.info.class_names
        return None if labels is None else [class_name(label, names) for label in labels]

    def number(self, label: int | str | None, key: str) -> int | None:
        """Return the index of a class given by name or index, None for null; UsageError for an unknown class."""
        if label is None or is_null(label, self.model.info.class_names):
            refuse_untrained_null(self.model, key)
            return None
        known = self.model.num_classes is not None and self.model.info.class_names
        return class_number(label, known or (), key)

    def dataset(self, data_dir: str, paths: Mapping[str, Any]) -> Dataset:
        """Return the training dataset of the model; UsageError as `dataset_of`."""
        return dataset_of(self.folder, self.model, data_dir, paths)

    def batch_size(self, count: int, each: int = 1, gradient: bool = False) -> int:
        """Return the batch size for `count` results; `auto` measures and prints it.

        All processes must call this method; they get the same value.

        Args:
            count: number of results.
            each: images per result.
            gradient: whether sampling differentiates the network.
        """
        if self.sampler.per_image or count == 0:
            return 1
        if self.batch_limit != "auto":
            return min(self.batch_limit, count)
        call = network_call(self, each=each, gradient=gradient)
        ranks = Distributed()
        share = math.ceil(count / ranks.world)
        size = ranks.broadcast(images_that_fit(call, share, self.device) if ranks.is_main else 1)
        if ranks.is_main:
            print(f"batch_size={size}", file=sys.stderr)
        return size

    def check(self) -> None:
        """Raise UsageError if the sampler cannot sample the model in this number of steps."""
        self.sampler.check(self.model.denoiser)
        self.sampler.grid(self.steps)


def with_condition_images(dataset: Dataset, trained: Loaded) -> Dataset:
    """Return a dataset whose splits have the condition images of a run."""
    return image_conditioned(dataset, build(trained.info.config.condition))


def dataset_of(folder: Path, trained: Loaded, data_dir: str, paths: Mapping[str, Any]) -> Dataset:
    """Return the training dataset of a run, with `paths` of the command line instead of those of its checkpoint.

    Its splits have the condition images of the run.

    Raises UsageError if a path of the checkpoint was never used on this machine, if the dataset is too large or cannot
    be built, or if progressive resolution has not reached its last stage.
    """
    node = trained.info.config.dataset
    if node is None:
        raise UsageError(
            folder, NO_VALUE, "was imported without a dataset", "import it again with dataset=, or give files"
        )
    unknown = [key for key in paths if node.get(key) is None]
    if unknown:
        raise UsageError(
            f"dataset.{unknown[0]}",
            paths[unknown[0]],
            f"the run in {folder} was trained without it",
            "leave it out",
        )
    node = {**node, **paths}
    refused = {key: path for key, path in unnamed(node).items() if key not in paths}
    if refused:
        arguments = f" with {node['arguments']}" if "factory" in refused and node.get("arguments") else ""
        named = " ".join(f"dataset.{key}={path}" for key, path in refused.items())
        raise UsageError(
            named,
            NO_VALUE,
            f"this path comes from the checkpoint in {folder}, and you have never used it{arguments} on this machine",
            "if you trust the checkpoint, add the path to the command",
        )
    if problems := check_dataset(node, trained.shape):
        raise not_built(folder, problems[0])
    node |= {key: value for key, value in FRUGAL.items() if key in node}
    dataset: Dataset = build(with_rules(node, trained.info.data_rules), data_dir)
    if dataset.shape != trained.shape:
        raise UsageError(
            "run",
            folder,
            f"is trained for size {min(trained.shape[1:])} at step {trained.step}, but its dataset has size "
            f"{min(dataset.shape[1:])}",
            "continue training, or choose a later step=",
        )
    if trained.info.text is not None:  # recipes of judges have the flips of the training
        dataset.serve_captions()
    remember({**paths, "arguments": node.get("arguments")})
    return with_condition_images(dataset, trained)


def open_run(settings: SamplingSettings, model: LoadedDenoiser | None = None) -> LoadedModel:
    """Load the model of a run unless `model` is given, and prepare it for sampling.

    Raises UsageError if there is no such run, and as `prepare`.
    """
    folder = find_run(settings.run, settings.output_dir)
    if model is None:
        device = device_of(settings.device)
        model = load_model(folder, settings.weights, device, settings.step, settings.ema_length)
    return prepare(settings, folder, model)


def prepare(settings: SamplingSettings, folder: Path, model: LoadedDenoiser) -> LoadedModel:
    """Build the sampler, guidance and labels for the model of a run; UsageError if they are incompatible."""
    device = device_of(settings.device)
    precision = resolve(settings.precision, device)
    if line := emulated_format(precision, device):
        show_remarks([line])
    sampler: Sampler = build(settings.sampler, model.denoiser.schedule)
    show_remarks(sampler_remarks(sampler, settings.steps, model))
    guides = GuidanceRuns(
        model, folder, output_dir=settings.output_dir, weights=settings.weights, device=device
    )
    guidance: Guidance = build(settings.guidance, guides)
    check_guidance(settings.guidance, guidance)
    if isinstance(guidance, ClassifierGuidance):  # its gradient is added to the score, so to the mean
        model.info.require_mean("guidance", "classifier", "use guidance=none")
    conditions = conditions_of(settings, model, guidance, guides.trained_classes)
    of_images = settings.of_images and model.info.conditions is not None and not conditions.chosen
    found_later = of_images or settings.finds_conditions
    has_image = model.denoiser.conditions.image is not None
    brought = [IMAGE] if has_image and settings.brings_images else []
    # The edit itself refuses to run a model without its condition image.
    if conditions.condition is None and not found_later and not has_image:
        refuse_untrained_null(model, "label")
    given = model.denoiser.conditions.names if found_later else [*conditions.given, *brought]
    guidance.check(model.denoiser, model.info.dropouts, given)
    lead_away(guidance, settings.negative_prompt, model, given)
    if isinstance(guidance, Guided) and guidance.quantile is not None and not model.space.bounded:
        raise other_space(f"guidance.dynamic_threshold={guidance.quantile}", "pixels", "leave it null")
    if settings.compile:
        # In place, because torch.compile(network) would rename every weight.
        mode = "reduce-overhead" if device.type == "cuda" else None  # uses CUDA graphs
        model.denoiser.network.compile(dynamic=False, mode=mode)
    # Earlier versions lacked the key, and names of folders must not change.
    guidance_node = {
        key: value for key, value in settings.guidance.items() if (key, value) != ("scales", None)
    }
    record = {
        "weights": settings.weights,
        **length_record(model),
        "weights_sha256": model.digest,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance": {**guidance_node, **guides.digests},
        **conditions.record,
        "clip_x0": settings.clip_x0,
        "precision": precision,
        **sampler.grid_settings(settings.steps),
    }
    return LoadedModel(
        model=model,
        sampler=sampler,
        steps=settings.steps,
        guidance=guidance,
        condition=conditions.condition,
        clip=settings.clip_x0,
        precision=precision,
        folder=folder,
        record=record,
        batch_limit=settings.batch_size,
        rows=conditions.rows,
        chosen=conditions.chosen,
    )


def length_record(model: Loaded) -> dict[str, float]:
    """Return the length of reconstructed weights for records; empty for stored weights, as in earlier versions."""
    return {} if model.ema_length is None else {"ema_length": model.ema_length}


def sampler_remarks(sampler: Sampler, steps: int, model: LoadedDenoiser) -> Iterator[str]:
    """Yield remarks on a sampler or a number of steps that does not suit the training of a model."""
    config = model.info.config
    objective = model.info.objective_name
    trained = model.info.is_consistency_model
    if objective == ProgressiveDistillation.__name__ and (most := config.objective["steps"]) < steps:
        yield f"steps={steps}: the model was distilled to take 1 to {most} steps of sampler=ddim"
    if trained and not isinstance(sampler, ConsistencySampler):
        yield "sampler: the model was trained for sampler=consistency"
    if isinstance(sampler, ConsistencySampler) and not trained:
        yield "sampler=consistency: the model was not trained for it, as objective=trajectory_distillation does"
    if sampler.stochastic and config.coupling == "ot":
        yield "sampler: adds noise, but the model was trained with coupling=ot, for deterministic samplers"


def refuse_untrained_null(model: LoadedDenoiser, key: str) -> None:
    """Raise UsageError if a model with conditions was never trained without them."""
    if model.denoiser.conditions.names and model.info.label_dropout == 0:
        raise UsageError(
            key,
            None,
            "unconditional sampling needs a model trained with objective.label_dropout > 0",
            "choose a class" if model.info.conditions is None else "give a condition",
        )
