"""Runs of models that other programs trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from diffusion_cli.config import build
from diffusion_cli.config.catalogue import content, options
from diffusion_cli.config.continued import IMPORTED
from diffusion_cli.config.initial import PROCESS
from diffusion_cli.config.validate import NOT_ALLOWED, check_node
from diffusion_cli.convert import refusal
from diffusion_cli.convert.base import Autoencoder, Network, Node, PretrainedModel, Process, Weights
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats import SampleFormat, Shape
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.runs.checkpoint import LAST, save
from diffusion_cli.runs.load import AUTOENCODER, limit_tensors
from diffusion_cli.runs.schema import CheckpointInfo, LatentInfo, OriginInfo, check_built, parse_info
from diffusion_cli.runs.weights import check_fit, save_weights
from diffusion_cli.system.files import atomic_write, file_digest, new_folder
from diffusion_cli.system.tensors import digest
from diffusion_cli.system.untrusted import reason

AUTOENCODING = "autoencoder"
"""Option of `objective=` that continues the training of an autoencoder."""
SPARE = 1000
"""Tensors beyond those of a file with which a network is still built, to name one that is missing."""


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A pretrained model and what a run stores beside its weights."""

    model: PretrainedModel
    source: str
    """Source, as the user named it."""
    form: SampleFormat
    """Format of its images."""
    class_names: Sequence[str] | None
    """Names of the classes; None if they have none, or if it is unconditional."""
    dataset: Node | None = None
    """Dataset for class names and as reference; None for none."""
    data_rules: int = 1
    """Version of the rules of the dataset."""

    def write(self, folder: Path) -> CheckpointInfo:
        """Write the folder of a run at step 0, which is created complete or not at all, and return its information.

        The weights are checked before: they are untrusted, and a small file can describe a network of any size.

        Raises:
            FormatError: the weights do not fit the network, or the network cannot be built.
            FileExistsError: the folder exists.
        """
        check_nodes(self.model)
        model, (first, *_) = self.model, [Path(name) for name in self.model.files]
        state = checked_weights(first, model.network, model.weights(), _task(model))
        latent = None
        if model.autoencoder is not None:
            autoencoder = model.autoencoder
            latent = checked_weights(first, autoencoder.network, autoencoder.weights(), _task(autoencoder))
        info = self._info(latent)
        with new_folder(folder) as temporary:
            if latent is not None:
                save_weights(latent, temporary / AUTOENCODER)
            with atomic_write(temporary / "config.yaml") as file:
                file.write_text(yaml.safe_dump(info.config.model_dump(), sort_keys=False))
            save(_lightning_checkpoint(info, state), temporary / LAST)
        return info

    def _info(self, autoencoder: Weights | None) -> CheckpointInfo:
        """Return the entry of the checkpoint; FormatError for parts that this version cannot build."""
        model, names = self.model, self.class_names
        classes = model.network.num_classes
        if classes is not None and names is None:
            names = [str(number) for number in range(classes)]
        config = {
            IMPORTED: self.source,
            "max_steps": None,
            "ema": {},
            "dataset": self.dataset,
            **_process(model.process),
            "model": model.network.node,
            "latent": {"run": None, "pretrained": None if autoencoder is None else self.source},
        }
        origin = OriginInfo(
            kind=model.kind,
            source=self.source,
            sha256={name: file_digest(path) for name, path in model.files.items()},
            licence=model.licence,
            commit=model.commit,
            numbered_classes=classes is not None and self.class_names is None,
        )
        entry = {
            "task": _task(model),
            "num_images": 0,
            "config": config,
            "shape": list(image_shape(model)),
            "form": self.form.to_dict(),
            "latent": _latent(model, autoencoder, self.source),
            "num_classes": classes,
            "class_names": None if names is None else list(names),
            "data_rules": self.data_rules,
            "origin": origin.model_dump(),
        }
        try:
            info = parse_info(entry)
        except UsageError as error:  # its keys and remedies are those of a training
            raise FormatError(error.problems[0].cause) from error
        if problems := check_built(info):
            raise FormatError(problems[0].cause)
        return info


def _process(process: Process | None) -> dict[str, Any]:
    """Return the nodes of a denoiser's process; of an autoencoder, for None, its objective alone."""
    if process is None:
        nothing = {"schedule": None, "parameterization": None, "sampler": None}
        return {**nothing, "objective": content(options("objective")[AUTOENCODING])}
    return {name: getattr(process, name) for name in ("schedule", "parameterization", "objective", "sampler")}


def _task(model: PretrainedModel | Autoencoder) -> str:
    """Return the task of a model."""
    encodes = isinstance(model, Autoencoder) or model.process is None
    return ImageAutoencoder.task if encodes else Denoiser.task


def image_shape(model: PretrainedModel) -> Shape:
    """Return the shape of the images of a model, which its autoencoder decodes if it has one."""
    return (model.network if model.autoencoder is None else model.autoencoder.network).shape


def _latent(model: PretrainedModel, autoencoder: Weights | None, source: str) -> dict[str, Any] | None:
    """Return the entry of the latent space, whose statistics are those of the source."""
    if model.autoencoder is None or autoencoder is None:
        return None
    return LatentInfo(
        shape=model.network.shape,
        mean=list(model.autoencoder.mean),
        std=list(model.autoencoder.std),
        autoencoder=model.autoencoder.network.node,
        sha256=digest(autoencoder),
        source=source,
        cache={},
    ).model_dump()


def weights_of(model: PretrainedModel | Autoencoder, source: str, key: str) -> Weights:
    """Return the weights of a model of another program; UsageError, about `key`, unless they fit its network."""
    try:
        return checked_weights(Path(source), model.network, model.weights(), _task(model))
    except (FormatError, OSError) as error:
        raise refusal(key, source, error) from error


def check_nodes(model: PretrainedModel) -> None:
    """Raise FormatError for the first invalid node of a model: our own exports contain untrusted ones."""
    nodes = [("model", model.network.node)]
    nodes += [] if model.autoencoder is None else [("model", model.autoencoder.network.node)]
    if model.process is not None:
        nodes += [(key, getattr(model.process, key)) for key in PROCESS]
    for key, node in nodes:
        _check_node(key, node)


def _check_node(key: str, node: Node) -> None:
    """Raise FormatError for the first problem of a node. The user can allow a plugin, but not change the node."""
    for problem in check_node(key, node):
        raise FormatError(problem.cause, problem.remedy if problem.problem == NOT_ALLOWED else "")


def checked_weights(path: Path, network: Network, state: Weights, task: str) -> Weights:
    """Return weights in float32; FormatError, before they are copied, unless they fit the network of the task.

    The network is built on the meta device for this check.
    """
    _check_node("model", network.node)
    try:
        with torch.device("meta"), limit_tensors(len(state) + SPARE):
            built = build(network.node, network.shape, network.num_classes)
    except Exception as error:  # untrusted sizes cause many types of errors
        raise FormatError(f"its network cannot be built ({reason(error)})") from error
    if (found := getattr(built, "task", Denoiser.task)) != task:
        raise FormatError(f"its network is for task={found}, but its description has task={task}")
    check_fit(path, built, state)
    return {name: tensor.float() for name, tensor in state.items()}


def _lightning_checkpoint(info: CheckpointInfo, state: Weights) -> dict[str, Any]:
    """Return a checkpoint at step 0, whose average is equal to its weights."""
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": {f"model.network.{name}": tensor for name, tensor in state.items()},
        "callbacks": {"EMA": {"network": state, "updates": 0}},
        "diffuse": info.model_dump(),
    }
