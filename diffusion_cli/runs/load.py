"""Load models from the checkpoints of a run."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffusion_cli.config import build, is_allowed
from diffusion_cli.config.values import Step, Weights
from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned, NoisyClassifier
from diffusion_cli.diffusion.latents import Latents, Pixels, Space
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.formats import Shape
from diffusion_cli.networks import ImageAutoencoder
from diffusion_cli.runs.checkpoint import BEST, LAST, Checkpoint, numbered, read
from diffusion_cli.runs.find import newest
from diffusion_cli.runs.lora import merged, read_base
from diffusion_cli.runs.schema import CheckpointInfo, check_built, not_built
from diffusion_cli.runs.snapshots import StoredAverages
from diffusion_cli.runs.weights import check_fit
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.tensors import digest, read_tensors
from diffusion_cli.system.untrusted import reason

AUTOENCODER = "autoencoder.safetensors"


@dataclass(frozen=True)
class Loaded:
    """A model loaded from a checkpoint."""

    info: CheckpointInfo
    step: int
    digest: str
    """SHA-256 of the weights."""
    run: Path | None = field(default=None, kw_only=True)
    """Run folder; None for a model that was built in this process."""
    ema_length: float | None = field(default=None, kw_only=True)
    """Relative length of reconstructed averages of the weights; None for stored weights."""

    @property
    def shape(self) -> Shape:
        """Shape of the images at this step: the stage's shape, with progressive resolution."""
        stages = self.info.resolution_schedule
        return self.info.shape if stages is None else stages.after(self.step).shape


@dataclass(frozen=True)
class LoadedDenoiser(Loaded):
    """A trained denoiser."""

    denoiser: Denoiser
    space: Space
    """Pixel space or latent space of the denoiser."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes of a conditional denoiser; None for an unconditional one."""
        return self.denoiser.num_classes

    def on_cpu(self) -> "LoadedDenoiser":
        """Return the model on the CPU: itself, or a copy."""
        if next(self.denoiser.parameters()).device.type == "cpu":
            return self
        copy = deepcopy(self)
        copy.denoiser.cpu()
        if isinstance(copy.space, Latents):
            copy.space.autoencoder.cpu()
        return copy


@dataclass(frozen=True)
class LoadedClassifier(Loaded):
    """A trained classifier of noised images."""

    classifier: NoisyClassifier


@dataclass(frozen=True)
class LoadedAutoencoder(Loaded):
    """A trained autoencoder."""

    network: ImageAutoencoder


@dataclass(frozen=True)
class LoadedWeights(Loaded):
    """The weights of the network of a run, which is not built; adapters are merged."""

    state: dict[str, Tensor]
    """Tensors by name."""


def load_model(
    run: Path, weights: Weights, device: torch.device, step: Step = None, ema_length: float | None = None
) -> LoadedDenoiser:
    """Load the denoiser of a run from its newest checkpoint, or that of a step, in evaluation mode."""
    loaded = load_weights(run, weights, step, Denoiser.task, ema_length)
    denoiser = _rebuild(Denoiser, loaded, device)
    space = Pixels(loaded.shape) if loaded.info.latent is None else load_latents(run, loaded.info, device)
    return LoadedDenoiser(
        loaded.info, loaded.step, loaded.digest, denoiser, space, run=run, ema_length=ema_length
    )


def load_classifier(run: Path, device: torch.device) -> LoadedClassifier:
    """Load the classifier of a run with its EMA weights, in evaluation mode."""
    loaded = load_weights(run, "ema", None, NoisyClassifier.task)
    classifier = _rebuild(NoisyClassifier, loaded, device)
    return LoadedClassifier(loaded.info, loaded.step, loaded.digest, classifier)


def load_autoencoder(
    run: Path,
    device: torch.device,
    weights: Weights = "ema",
    step: Step = None,
    ema_length: float | None = None,
) -> LoadedAutoencoder:
    """Load the autoencoder of a run from its newest checkpoint, or that of a step, in evaluation mode."""
    loaded = load_weights(run, weights, step, ImageAutoencoder.task, ema_length)
    network = _build_network(loaded)
    if not isinstance(network, ImageAutoencoder):
        raise UsageError(run, NO_VALUE, "its model is not an autoencoder", "give a run of task=autoencoder")
    network = network.to(device).eval().requires_grad_(False)
    return LoadedAutoencoder(loaded.info, loaded.step, loaded.digest, network, ema_length=ema_length)


def load_weights(
    run: Path, weights: Weights, step: Step, task: str, ema_length: float | None = None
) -> LoadedWeights:
    """Load the weights of a run of a task from its newest checkpoint, or that of a step.

    With `ema_length` they are a power average of this length, reconstructed from snapshots up to the checkpoint.
    Adapters are merged into the weights. The digest is of what is stored, because a sum can round otherwise elsewhere.

    Raises UsageError if there is no such checkpoint, it is of another task, its weights do not fit its model, or the
    average cannot be reconstructed.
    """
    path, checkpoint = find_checkpoint(run, step)
    info = checkpoint.info
    if info.task != task:
        raise UsageError(run, NO_VALUE, f"was trained with task={info.task}", f"give a run of task={task}")
    if problems := check_built(info):
        raise not_built(path, problems[0])
    if not checkpoint.has_weights(weights):
        raise UsageError(path, NO_VALUE, f"weights={weights} are missing or incomplete", "choose another run")
    stored = state = checkpoint.weights(weights)
    identity = ""
    if ema_length is not None:
        state, identity = StoredAverages(run, checkpoint).reconstruct(ema_length)
    if info.lora is not None:
        base = read_base(run, info.lora)
        try:
            stored, state = {**base, **stored}, merged(state, base, info.lora)
        except FormatError as error:
            raise _not_buildable(path, error) from error
    _check_fit(path, info, state)
    loaded = LoadedWeights(info, checkpoint.step, identity or digest(stored), state, ema_length=ema_length)
    if loaded.shape != info.shape and Distributed().is_main:
        print(
            f"diffuse: {path}: progressive resolution has reached size {min(loaded.shape[1:])} of "
            f"{min(info.shape[1:])}",
            file=sys.stderr,
        )
    return loaded


def named_weights(weights: str, ema_length: float | None) -> str:
    """Return the kind of weights, with the length of a reconstructed average, such as "ema (length 0.1)"."""
    return weights if ema_length is None else f"{weights} (length {ema_length})"


def load_latents(run: Path, info: CheckpointInfo, device: torch.device) -> Latents:
    """Return the latent space of a run; UsageError if the run folder lacks its autoencoder or it cannot be read."""
    path, shape, latent = run / AUTOENCODER, info.shape, info.latent
    assert latent is not None
    try:
        state = read_tensors(path)
        # Check the size on the meta device first, because an untrusted configuration can ask for any size.
        with torch.device("meta"), limit_tensors(len(state)):
            network = build(latent.autoencoder, shape, None)
            if not isinstance(network, ImageAutoencoder) or network.latent_shape(shape) != latent.shape:
                raise FormatError("its latents have another shape than the model's")
            check_fit(path, network, state)
        if digest(state) != latent.sha256:
            raise FormatError("is not the autoencoder that the run was trained with")
        autoencoder = build(latent.autoencoder, shape, None)
        autoencoder.load_state_dict(state)
        return Latents(autoencoder.to(device), shape, latent.mean, latent.std)
    except (OSError, ValueError, RuntimeError) as error:  # untrusted sizes cause many types of errors
        raise UsageError(
            path,
            NO_VALUE,
            f"the autoencoder of the run cannot be read ({reason(error)})",
            "restore it, or choose another run",
        ) from error


def find_checkpoint(run: Path, step: Step) -> tuple[Path, Checkpoint]:
    """Return the newest intact checkpoint of a run, or the one of a step; UsageError if there is none."""
    if step is None and (found := newest(run)) is not None:
        if found.remark is not None and Distributed().is_main:
            print(f"diffuse: {found.remark}", file=sys.stderr)
        return found.path, found.checkpoint
    path = run / (LAST if step is None else BEST if step == "best" else LAST.with_name(numbered(step)))
    if step == "best" and not path.is_file():
        raise UsageError(
            "step",
            "best",
            f"{run} has no best checkpoint",
            "train with eval_every= and keep_best=, or choose a step",
        )
    if step is not None and not path.is_file():
        kept = ", ".join(str(int(file.stem[5:])) for file in sorted(path.parent.glob("step_*.ckpt")))
        if not kept:
            raise UsageError(
                "step", step, f"{run} has no checkpoints of earlier steps", "leave step out for the last one"
            )
        raise UsageError("step", step, f"{run} has no such checkpoint", f"choose a step from: {kept}")
    return path, read(path)


def _check_fit(path: Path, info: CheckpointInfo, state: Mapping[str, Tensor]) -> None:
    """Raise UsageError unless the weights fit the model; the model is built on the meta device for this check."""
    try:
        network = _on_meta_device(info, len(state))
        wanted = {key: (value.shape, value.dtype) for key, value in network.state_dict().items()}
        if wanted != {key: (value.shape, value.dtype) for key, value in state.items()}:
            raise FormatError("the weights do not fit the model")
        build(info.config.schedule)
        build(info.config.parameterization)
    except Exception as error:  # untrusted sizes cause many types of errors
        raise _not_buildable(path, error) from error


def _not_buildable(path: Path, error: Exception) -> UsageError:
    return UsageError(path, NO_VALUE, f"its model cannot be built ({reason(error)})", "choose another run")


def _on_meta_device(info: CheckpointInfo, tensors: int) -> nn.Module:
    """Build the network without memory for its weights; a plugin's on the CPU if it computes with its tensors."""
    arguments = (info.config.model, info.network_shape, info.trained_conditions)
    try:
        with torch.device("meta"), limit_tensors(tensors):
            return build(*arguments)
    except (RuntimeError, NotImplementedError):
        if not is_allowed(info.config.model["_target_"]):
            raise
        return build(*arguments)


@contextlib.contextmanager
def limit_tensors(tensors: int) -> Iterator[None]:
    """Raise FormatError if a network with more tensors is built, because untrusted options can ask for any number."""
    built = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal built
        built += parameter is not None
        if built > tensors:
            raise FormatError(f"the model needs more than the {tensors} stored tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


ModelT = TypeVar("ModelT", bound=NoiseConditioned)


def _rebuild(kind: type[ModelT], loaded: LoadedWeights, device: torch.device) -> ModelT:
    config = loaded.info.config
    model = kind(_build_network(loaded), build(config.schedule), build(config.parameterization))
    return model.to(device).eval().requires_grad_(False)


def _build_network(loaded: LoadedWeights) -> nn.Module:
    """Return the network of a checkpoint, with its weights; without those of an augmentation, which samples lack."""
    info = loaded.info
    network = build(info.config.model, info.network_shape, info.network_conditions)
    network.load_state_dict({name: loaded.state[name] for name in network.state_dict()})
    return network
