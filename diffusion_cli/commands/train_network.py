"""Networks of `diffuse train`, with initial weights and low-rank adapters."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_cli.commands.plugin_checks import check_network
from diffusion_cli.commands.train_conditions import described
from diffusion_cli.commands.train_data import TrainingData
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.data import TextEncoder
from diffusion_cli.diffusion.denoiser import NoisyClassifier
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.runs.lora import BASE, read_base
from diffusion_cli.runs.schema import CheckpointInfo, InitInfo, LoraInfo
from diffusion_cli.system.seeding import mix
from diffusion_cli.training.lora import add_adapters


def network_of(
    config: TrainConfig, data: TrainingData, trains: type[Any], encoder: TextEncoder | None
) -> nn.Module:
    """Build the network with initial weights from the seed; UsageError if it is incompatible with the data."""
    dataset, train_data = data.dataset, data.train_data
    classifies = trains is NoisyClassifier
    conditional = config.model.get("class_conditional") and not dataset.attributes
    if dataset.missing_classes and (classifies or conditional):
        key = "task=classifier" if classifies else "model.class_conditional=true"
        problem = f"the dataset has no classes: {dataset.missing_classes}"
        raise UsageError(key, NO_VALUE, problem, "use a dataset with classes, or train without them")
    conditions = described(config, dataset, trains, None if encoder is None else encoder.description)
    torch.manual_seed(mix(config.seed, "weights"))
    try:
        network = build(config.model, train_data.shape, conditions)
    except UsageError as error:  # about an argument of the network
        keys = [problem.key for problem in error.problems]
        own = {key: f"model.{key}" for key in keys if str(key).partition("=")[0] in config.model}
        raise error.renamed(own) from error
    if getattr(network, "ordered", True) and not train_data.form.ordered:
        raise UsageError(
            "model",
            NO_VALUE,
            "this network is not permutation invariant, so it cannot model point clouds",
            "use model=set_tiny with task=diffusion",
        )
    if train_data.form.ordered and not getattr(network, "ordered", True):
        raise UsageError(
            "model",
            NO_VALUE,
            "this network ignores the order of values, so it cannot model signals",
            "use model=unet1d_tiny",
        )
    check_network(config.model, network, train_data.shape)
    return network


def add_lora(
    config: TrainConfig,
    network: nn.Module,
    init: InitInfo | None,
    folder: Path,
    before: CheckpointInfo | None,
) -> LoraInfo:
    """Add low-rank adapters to a network; a resumed run gets its frozen weights.

    Raises UsageError if the frozen weights cannot be read, and as `add_adapters`.
    """
    rank, alpha, targets = config.lora.rank, config.lora.alpha, config.lora.targets
    assert rank is not None
    assert init is not None
    if before is not None and before.lora is not None:
        with suppress(RuntimeError):  # of other shapes, which the comparison below finds
            network.load_state_dict(read_base(folder, before.lora), strict=False)
    torch.manual_seed(mix(config.seed, "lora"))
    lora = add_adapters(network, rank, alpha, targets, init.new)
    if before is not None and before.lora != lora:
        problem = "has other frozen weights than this run"
        raise UsageError(folder / BASE, NO_VALUE, problem, "restore it, or start again with another name=")
    return lora
