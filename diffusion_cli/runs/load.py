"""Models built again from the checkpoints of a run."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffusion_cli.config import build
from diffusion_cli.data import ResolutionSchedule
from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned, NoisyClassifier
from diffusion_cli.diffusion.latents import Latents, Pixels, Space
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats import SampleFormat, Shape, form_of
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.checkpoint import BEST, LAST, has_weights, network_state, numbered, read
from diffusion_cli.runs.find import newest
from diffusion_cli.runs.schema import check_built
from diffusion_cli.runs.weights import check_fit, digest, read_weights
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.untrusted import reason

AUTOENCODER = "autoencoder.safetensors"

Step = int | Literal["best"] | None
"""Which checkpoint of a run: that of a step, the best, or the newest."""


@dataclass(frozen=True)
class Origin:
    """Where trained weights come from."""

    shape: Shape
    """Of the images that they were trained on."""
    form: SampleFormat
    """How the data is stored, and what is made."""
    class_names: tuple[str, ...] | None
    """Of the data, in the order of the labels, or None without classes."""
    config: dict[str, Any]
    latent: dict[str, Any] | None
    """The latents that they were trained on: shape, mean, std, and the autoencoder's sha256; None for pixels."""
    step: int
    digest: str
    """SHA-256 of the weights."""
    data_rules: int = field(default=1, kw_only=True)
    """The version of the rules by which the files of the data became images."""
    class_counts: tuple[int, ...] | None = field(default=None, kw_only=True)
    """Training images of each class, or None without classes, or of a run of an earlier version."""

    @property
    def trained_classes(self) -> list[int]:
        """The classes with training images; all classes if their images were not counted."""
        if self.class_counts is None:
            return list(range(len(self.class_names or ())))
        return [label for label, count in enumerate(self.class_counts) if count]


@dataclass(frozen=True)
class LoadedDenoiser(Origin):
    """A trained denoiser."""

    denoiser: Denoiser
    space: Space
    """Where the denoiser works."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the network is conditioned on, or None."""
        return self.denoiser.num_classes


@dataclass(frozen=True)
class LoadedClassifier(Origin):
    """A trained classifier of noised images."""

    classifier: NoisyClassifier


@dataclass(frozen=True)
class LoadedAutoencoder(Origin):
    """A trained autoencoder."""

    network: AutoencoderKL


def load_model(
    run: Path, weights: Literal["ema", "raw"], device: torch.device, step: Step = None
) -> LoadedDenoiser:
    """Build the denoiser of a run again from its newest checkpoint, or another one, in evaluation mode."""
    checkpoint, origin = _origin(run, step, weights, Denoiser.task)
    denoiser = _restored(Denoiser, checkpoint, weights, device)
    return LoadedDenoiser(
        **origin, denoiser=denoiser, space=_space(run, checkpoint["diffuse"], origin["shape"], device)
    )


def load_classifier(run: Path, device: torch.device) -> LoadedClassifier:
    """Build the classifier of a run again, with its averaged weights, in evaluation mode."""
    checkpoint, origin = _origin(run, None, "ema", NoisyClassifier.task)
    return LoadedClassifier(**origin, classifier=_restored(NoisyClassifier, checkpoint, "ema", device))


def load_autoencoder(
    run: Path, device: torch.device, weights: Literal["ema", "raw"] = "ema", step: Step = None
) -> LoadedAutoencoder:
    """Build the autoencoder of a run again from its newest checkpoint, or another one, in evaluation mode."""
    checkpoint, origin = _origin(run, step, weights, AutoencoderKL.task)
    network = _network(checkpoint, weights)
    if not isinstance(network, AutoencoderKL):
        raise UsageError(run, NO_VALUE, "its model is no autoencoder", "give a run of task=autoencoder")
    return LoadedAutoencoder(**origin, network=network.to(device).eval().requires_grad_(False))


def load_latents(run: Path, about: Mapping[str, Any], device: torch.device) -> Latents:
    """The latents that the network of a run works in; ValueError if their autoencoder is not beside it."""
    path, shape, latent = run / AUTOENCODER, tuple(about["shape"]), about["latent"]
    try:
        state = read_weights(path)
        with (
            torch.device("meta"),
            _at_most(len(state)),
        ):  # its size is that of its weights, or it is not built
            network = build(latent["autoencoder"], shape, None)
            if not isinstance(network, AutoencoderKL) or network.latent_shape(shape) != _seen_shape(about):
                raise FormatError("makes no such latents as the model works in")
            check_fit(path, network, state)
        if digest(state) != latent["sha256"]:
            raise FormatError("is not the one that the run was trained with")
        autoencoder = build(latent["autoencoder"], shape, None)
        autoencoder.load_state_dict(state)
        return Latents(autoencoder.to(device), shape, latent["mean"], latent["std"])
    except (OSError, ValueError, RuntimeError) as error:  # sizes of a stranger's fail in many ways
        raise UsageError(
            path,
            NO_VALUE,
            f"the autoencoder of the run cannot be read ({reason(error)})",
            "put it back, or name another run",
        ) from error


def _origin(
    run: Path, step: Step, weights: Literal["ema", "raw"], task: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint of a run, checked to be of the task, and what is known of it."""
    path = run / LAST
    if step == "best":
        path = run / BEST
        if not path.is_file():
            raise UsageError(
                "step", "best", f"{run} keeps none", "train with eval_every= and keep_best=, or name a step"
            )
    elif step is not None:
        path = path.with_name(numbered(step))
        if not path.is_file():
            kept = ", ".join(str(int(file.stem[5:])) for file in sorted(path.parent.glob("step_*.ckpt")))
            raise UsageError("step", step, f"{run} keeps no such checkpoint", f"it has those of steps {kept}")
    if step is None and (found := newest(run)) is not None:
        path, checkpoint, remark = found
        if remark is not None and Distributed().is_main:
            print(f"diffuse: {remark}", file=sys.stderr)
    else:
        checkpoint = read(path)
    about = checkpoint["diffuse"]
    if about["task"] != task:
        raise UsageError(
            run, NO_VALUE, f"was trained with task={about['task']}", f"give a run of task={task}"
        )
    mistakes = check_built(about)
    if mistakes:
        raise UsageError(
            path,
            NO_VALUE,
            f"was made by another version of diffuse: {'; '.join(map(str, mistakes))}",
            "name another run",
        )
    if not has_weights(checkpoint, weights, path.stat().st_size):
        raise UsageError(
            path, NO_VALUE, f"weights={weights}: are not there, or not whole", "name another run"
        )
    _check_fit(path, about, network_state(checkpoint, weights))
    names, latent = about["class_names"], about["latent"]
    return checkpoint, {
        "shape": _shape(path, checkpoint),
        "form": form_of(about["form"]),
        "class_names": None if names is None else tuple(names),
        "config": about["config"],
        "data_rules": about.get("data_rules", 1),
        "class_counts": tuple(counts) if (counts := about.get("class_counts")) else None,
        "latent": latent and {key: latent[key] for key in ("shape", "mean", "std", "sha256")},
        "step": checkpoint["global_step"],
        "digest": digest(network_state(checkpoint, weights)),
    }


def _shape(path: Path, checkpoint: Mapping[str, Any]) -> Shape:
    """The shape of the images that the weights of a checkpoint were trained on, said where others are to come."""
    about = checkpoint["diffuse"]
    whole = tuple(about["shape"])
    if about["stages"] is None:
        return whole
    stage = ResolutionSchedule.stored(about["stages"]).after(checkpoint["global_step"])
    if stage.shape != whole and Distributed().is_main:
        print(
            f"diffuse: {path}: is of a run that grows, and knows images of size {stage.size} so far",
            file=sys.stderr,
        )
    return stage.shape


def _check_fit(path: Path, about: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a checkpoint's weights are those of its model, which is built without any for that."""
    try:
        with torch.device("meta"), _at_most(len(state)):
            network = build(about["config"]["model"], _seen_shape(about), about["num_classes"])
        wanted = {key: (value.shape, value.dtype) for key, value in network.state_dict().items()}
        if wanted != {key: (value.shape, value.dtype) for key, value in state.items()}:
            raise FormatError("the model has other tensors than are there")
        for key in ("schedule", "parameterization"):
            build(about["config"][key])
    except Exception as error:  # sizes of a stranger's fail in many ways
        raise UsageError(
            path, NO_VALUE, f"its model cannot be built ({reason(error)})", "name another run"
        ) from error


@contextlib.contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Raise ValueError where a network of more tensors is built: a stranger's options may ask for one without end."""
    built = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal built
        built += parameter is not None
        if built > tensors:
            raise FormatError(f"the model has more than the {tensors} tensors that are there")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


ModelT = TypeVar("ModelT", bound=NoiseConditioned)


def _restored(
    kind: type[ModelT], checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"], device: torch.device
) -> ModelT:
    config = checkpoint["diffuse"]["config"]
    network = _network(checkpoint, weights)
    model = kind(network, build(config["schedule"]), build(config["parameterization"]))
    return model.to(device).eval().requires_grad_(False)


def _network(checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"]) -> nn.Module:
    """The network of a checkpoint, built and filled."""
    about = checkpoint["diffuse"]
    network = build(about["config"]["model"], _seen_shape(about), about["num_classes"])
    network.load_state_dict(network_state(checkpoint, weights))
    return network


def _seen_shape(about: Mapping[str, Any]) -> Shape:
    """The shape of what the network is shown: images, or their latents."""
    return tuple(about["latent"]["shape"] if about["latent"] else about["shape"])


def _space(run: Path, about: Mapping[str, Any], shape: Shape, device: torch.device) -> Space:
    """Where the network of a run works on images of a shape."""
    return Pixels(shape) if about["latent"] is None else load_latents(run, about, device)
