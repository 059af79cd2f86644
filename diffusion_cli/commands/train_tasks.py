"""What `diffuse train` trains: a denoiser, a noisy classifier or an autoencoder."""

from typing import Any, NamedTuple

from torch import nn

from diffusion_cli.commands.train_conditions import stored_conditions
from diffusion_cli.conditions import Conditions
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.data import Dataset
from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned
from diffusion_cli.diffusion.objectives import (
    VLB,
    CrossEntropy,
    FewStep,
    Hybrid,
    Likelihood,
    Objective,
    TrajectoryDistillation,
)
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.networks.condition_embedding import AugmentationEmbedding
from diffusion_cli.samplers import Sampler
from diffusion_cli.training.autoencoder_loss import Autoencoding, ReconstructionLoss


class DenoisingTask(NamedTuple):
    """Model, objective, time distribution and sampler of a denoiser or noisy classifier."""

    model: NoiseConditioned
    objective: Objective[Any]
    times: Times
    sampler: Sampler


class AutoencoderTask(NamedTuple):
    """Model and objective of an autoencoder."""

    model: Autoencoding
    objective: ReconstructionLoss


Task = DenoisingTask | AutoencoderTask
Loss = Objective[Any] | ReconstructionLoss


def trained_class(objective: Loss) -> type[Any]:
    """Return the class of the models that an objective trains."""
    return Autoencoding if isinstance(objective, ReconstructionLoss) else objective.trains


def model_info(task: Task, network: nn.Module) -> dict[str, Any]:
    """Return the entries of a checkpoint about the model."""
    return {
        "task": task.model.task,
        "conditions": stored_conditions(network),
        "augmentation": _augmentation(network),
    }


def _augmentation(network: nn.Module) -> int | None:
    """Return the number of parameters of an augmentation that a network has as input; None without."""
    conditions: Conditions | None = getattr(network, "conditions", None)
    return None if conditions is None else conditions.augmentation


def task_of(config: TrainConfig, network: nn.Module, objective: Loss, dataset: Dataset) -> Task:
    """Return the task of a network; UsageError if its parts are incompatible."""
    if isinstance(objective, ReconstructionLoss):
        return _autoencoder_task(config, network, objective, dataset)
    return _denoising_task(config, network, objective)


def check_frozen(task: Task) -> None:
    """Raise UsageError if `init.freeze` leaves a layer unchanged that a discriminator or an augmentation needs."""
    if isinstance(task, DenoisingTask):
        for name, layer in task.model.network.named_modules():
            if isinstance(layer, AugmentationEmbedding) and not (
                layer.weight.requires_grad or layer.weight.any()
            ):
                problem = "augmentation=edm adds this layer, and samples would have the transforms without it"
                raise UsageError("init.freeze", name, problem, "do not freeze it, or set augmentation=none")
        return
    if task.model.discriminator is None:
        return
    if not task.model.network.decoder.conv_out.weight.requires_grad:
        problem = "objective.discriminator_start needs gradients of this layer"
        raise UsageError("init.freeze", "decoder.conv_out", problem, "do not freeze it")


def _autoencoder_task(
    config: TrainConfig, network: nn.Module, objective: ReconstructionLoss, dataset: Dataset
) -> AutoencoderTask:
    if config.eval_every is not None:
        raise UsageError("eval_every", config.eval_every, "an autoencoder makes no samples", "leave it out")
    if config.progressive is not None:
        raise UsageError(
            "progressive", config.progressive, "not supported for task=autoencoder", "leave it out"
        )
    if config.coupling != "none":
        raise UsageError("coupling", config.coupling, "an autoencoder adds no noise", "leave it out")
    if not isinstance(network, AutoencoderKL):
        problem = "has a codebook, which is not trained here"
        raise UsageError(
            "model", type(network).__name__, problem, "use model=kl_tiny, or another AutoencoderKL"
        )
    return AutoencoderTask(objective.model(network, dataset.shape), objective)


def _denoising_task(config: TrainConfig, network: nn.Module, objective: Objective[Any]) -> DenoisingTask:
    schedule = build(config.schedule)
    sampler: Sampler = build(config.sampler, schedule)
    model = objective.trains(network, schedule, build(config.parameterization))
    times: Times = build(config.time_sampling)
    times.check(schedule)
    objective.check(model, times)
    if config.coupling == "ot":
        if getattr(network, "window", None) is not None:
            problem = "a window of an image has noise of its own position alone"
            raise UsageError("coupling", "ot", problem, "leave it out, or set model.window=null")
        _check_coupling(objective, sampler)
    if isinstance(objective, FewStep) and objective.has_teacher and _augmentation(network) is not None:
        problem = "a student learns from its teacher, not from transformed images"
        raise UsageError("augmentation", NO_VALUE, problem, "set augmentation=none")
    if isinstance(model, Denoiser):
        try:  # fail now instead of at the first preview
            sampler.grid(config.preview_steps)
        except UsageError as error:
            raise error.renamed({"steps": "preview_steps"}) from error
        if config.eval_every is not None:
            try:
                sampler.grid(config.eval_steps)
            except UsageError as error:
                raise error.renamed({"steps": "eval_steps"}) from error
        sampler.check(model)
    return DenoisingTask(model, objective, times, sampler)


def _check_coupling(objective: Objective[Any], sampler: Sampler) -> None:
    """Raise UsageError if the objective or the sampler assumes noise that is independent of the image."""
    if isinstance(objective, TrajectoryDistillation):
        problem = "distillation of paths uses no images"
        raise UsageError("coupling", "ot", problem, "leave it out")
    if isinstance(objective, VLB | Hybrid | Likelihood | CrossEntropy):
        problem = f"the objective {type(objective).__name__} assumes independent noise"
        raise UsageError("coupling", "ot", problem, "use objective=target or simple")
    if sampler.stochastic:
        problem = f"the sampler {type(sampler).__name__} adds noise, which assumes independent noise"
        raise UsageError("coupling", "ot", problem, "use a deterministic sampler, such as ddim or heun")
