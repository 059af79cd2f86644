"""Checkpoints and the run folders they lie in: written whole or not at all, read without running code.

A checkpoint is Lightning's, with a plain `diffuse` entry that says how to build the model again:
`{"format": 4, "task": ..., "config": {...}, "shape": [C, H, W], "form": {...}, "num_classes": K | None,
"class_names": [...] | None, "latent": {...} | None, "stages": [{"first": step, "shape": [C, h, w], "batch_size": B},
...] | None, "data_rules": version, 1 if absent, "class_counts": [images, ...] | None if absent,
"data_sha256": of a fingerprint of the images, unknown if absent}`. A denoiser of latents
has its autoencoder beside it.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffusion_cli.config import build, check_built, check_stored
from diffusion_cli.data import Stages
from diffusion_cli.denoiser import Denoiser, NoiseConditioned, NoisyClassifier
from diffusion_cli.errors import NO_VALUE, FormatError, MachineError, Problem, UsageError
from diffusion_cli.foreign import check_tensors, reason, regular
from diffusion_cli.forms import Form, Shape, form_of
from diffusion_cli.latents import Latents, Pixels, Space
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.pretrained import check_fit, read_weights
from diffusion_cli.ranks import Ranks
from diffusion_cli.run_folder import own_folder
from diffusion_cli.temporary_files import temporary_path

FORMAT = 4
LAST = Path("checkpoints", "last.ckpt")
AUTOENCODER = "autoencoder.safetensors"
BEST = LAST.with_name("best.ckpt")
WRITTEN = ("checkpoints", "previews", "tensorboard")
"""The folders that training writes to."""
# Lightning rewrites the checkpoints of its versions before 2.0, without a look at what they hold.
VERSION = re.compile(
    r"(?:[2-9]|[1-9]\d)(?:\.\d{1,9}){1,3}(?:\.?(?:a|b|rc|dev|post)\d{0,9}){0,3}(?:\+[a-z0-9.]{1,40})?"
)
Step = int | Literal["best"] | None
"""Which checkpoint of a run: that of a step, the best, or the newest."""


@dataclass(frozen=True)
class Origin:
    """Where trained weights come from."""

    shape: Shape
    """Of the images that they were trained on."""
    form: Form
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
class Model(Origin):
    """A trained denoiser."""

    denoiser: Denoiser
    space: Space
    """Where the denoiser works."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the network is conditioned on, or None."""
        return self.denoiser.num_classes


@dataclass(frozen=True)
class Classifier(Origin):
    """A trained classifier of noised images."""

    classifier: NoisyClassifier


@dataclass(frozen=True)
class Autoencoder(Origin):
    """A trained autoencoder."""

    network: AutoencoderKL


class DamagedError(UsageError):
    """A checkpoint is not as it was written."""


CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OSError with the file and what to do where the disk is full or may not be written to."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise MachineError(
            f"{path}: cannot be written ({error.strerror}); make room for it, or take a folder that can be written to"
        ) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; at the end it takes the place of `path` in one move.

    Raises OSError as `writing`; `path` is left as it was.
    """
    temporary = temporary_path(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # as of a disk that became read-only
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _whole_checkpoint(path: Path) -> Iterator[Path]:
    """A `whole_file` that takes its place, durably, only once the disk gives back what was written."""
    with whole_file(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # to be read from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            _check_sums(temporary)
        except DamagedError as error:
            raise MachineError(
                f"{path}: does not read back as it was written; take a folder on another disk"
            ) from error
    if os.name == "posix":  # the move, too, should outlive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; what lies at `path` stays until the new one is whole; OSError as `whole_file`."""
    with _whole_checkpoint(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch hides what the file system said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the weights of a network as safetensors; OSError as `whole_file`."""
    from safetensors.torch import save as packed

    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(packed(state))


def duplicate(checkpoint: Path, path: Path) -> None:
    """Copy a checkpoint as `save` writes one: not a link, for what befalls one must not befall the other."""
    with _whole_checkpoint(path) as temporary:
        shutil.copyfile(checkpoint, temporary)


def _check_sums(path: Path) -> None:
    """Hold every byte of a checkpoint to the check sums in it, which torch does not; DamagedError if one is wrong."""
    try:
        with ZipFile(path) as archive:
            records = archive.infolist()
            # No record lies within another, to be read for ever; that none is packed has been checked.
            whole = sum(record.file_size for record in records) <= path.stat().st_size
            whole = whole and archive.testzip() is None
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged archives fail in many ways
        raise _damaged(path, reason(error)) from error
    if not whole:
        raise _damaged(path, "its check sums are wrong")


def _damaged(path: Path, why: str) -> DamagedError:
    return DamagedError(
        path, NO_VALUE, f"is not a whole checkpoint ({why})", "name another step= or another run"
    )


class Found(NamedTuple):
    """The newest whole checkpoint of a run."""

    path: Path
    checkpoint: dict[str, Any]
    remark: str | None
    """Why it is not the last one, and what it is."""


def newest(run: Path, sums: bool = True) -> Found | None:
    """The last checkpoint of a run, or the newest numbered one where that is damaged or missing; None if it has none.

    Raises ValueError if none is whole, or as `read`, with or without `sums`.
    """
    last = run / LAST
    earlier = sorted(last.parent.glob("step_*.ckpt"), reverse=True)
    why = "is not a whole checkpoint" if last.is_file() else "is missing"
    for path in (last, *earlier):
        try:
            checkpoint = read(path, sums)
        except (DamagedError, FileNotFoundError):
            continue
        step = checkpoint["global_step"]
        return Found(
            path,
            checkpoint,
            None if path == last else f"{last}: {why}; going on from step {step}, {path.name}",
        )
    if not earlier and not last.is_file():
        return None
    raise DamagedError(
        last,
        NO_VALUE,
        f"{why}, and no other one of the run is whole",
        "put a copy there, or take another run",
    )


def recover(run: Path) -> None:
    """Make a run's last checkpoint a whole one, the damaged one kept beside it, and remove what was never finished.

    For the holder of the run's lock. Raises ValueError as `newest` and `own_folder`, OSError as `whole_file`.
    """
    for name in WRITTEN:
        own_folder(run, name)
    unfinished = ("checkpoints/.*.tmp", "previews/.*.tmp", ".config.yaml.*.tmp", ".metrics.csv.*.tmp")
    for pattern in unfinished:  # the files that only the holder writes
        for left in run.glob(pattern):
            left.unlink(missing_ok=True)
    found = newest(run)
    if found is None or found.remark is None:
        return
    last = run / LAST
    kept = ""
    if last.is_file():
        kept = f"; the damaged one is {set_aside(last).name} now"
    duplicate(found.path, last)
    print(f"diffuse: {found.remark}{kept}", file=sys.stderr)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to a free name that ends in `.damaged`, or with a number, and return that."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in count())
    aside = next(name for name in names if not name.exists())
    return path.rename(aside)


def read(path: Path, sums: bool = True) -> dict[str, Any]:
    """Read a checkpoint as tensors and plain data; DamagedError if it is not whole, ValueError if it is not ours.

    Without `sums` the bytes of its tensors are not read, only mapped.
    """
    try:
        size = regular(path)
    except FormatError as error:
        raise _damaged(path, reason(error)) from error
    try:
        check_tensors(path)
        if sums:
            _check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DamagedError:
        raise
    except Exception as error:  # parsers of ZIP and pickle meet damaged files with errors of many types
        raise _damaged(path, reason(error)) from error
    about = checkpoint.get("diffuse") if isinstance(checkpoint, dict) else None
    # A tensor in its place would be compared number by number, however many it says that it has.
    if not isinstance(about, dict) or type(about.get("format")) is not int or about["format"] != FORMAT:
        raise UsageError(
            path,
            NO_VALUE,
            f"is not a checkpoint of this version of diffuse (format {FORMAT})",
            "name another run, or train anew",
        )
    try:
        mistakes = [*map(str, _mistakes(checkpoint, size))]
    except ValueError as error:
        mistakes = [str(error)]
    if mistakes:
        raise UsageError(
            path, NO_VALUE, f"is no checkpoint of diffuse: {'; '.join(mistakes)}", "name another run"
        )
    return checkpoint


def _mistakes(checkpoint: Mapping[str, Any], size: int) -> list[Problem]:
    """What is wrong with what every command reads of a checkpoint of `size` bytes, one line each."""
    about = checkpoint["diffuse"]
    mistakes = check_stored(about)
    if not mistakes:
        form_of(about["form"])
    step, version = checkpoint.get("global_step"), checkpoint.get("pytorch-lightning_version")
    mistakes += (
        []
        if type(step) is int and 0 <= step < 2**63
        else [Problem("global_step", NO_VALUE, "is no number of steps")]
    )
    readable = isinstance(version, str) and VERSION.fullmatch(version)
    mistakes += (
        []
        if readable
        else [Problem("pytorch-lightning_version", NO_VALUE, "should be a version from 2.0 on")]
    )
    return mistakes + (
        []
        if _are_whole(checkpoint, "ema", size)
        else [Problem("its weights", NO_VALUE, "are not there, or not whole")]
    )


def _are_whole(checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"], size: int) -> bool:
    """Whether a checkpoint of `size` bytes has weights, and the bytes for them.

    A few bytes can be said to be the numbers of a tensor of any size, and of any number of tensors.
    """
    try:
        state = _network_state(checkpoint, weights)
        usable = all(isinstance(key, str) and not value.is_neg() for key, value in state.items())
        return usable and 0 < sum(value.numel() * value.element_size() for value in state.values()) <= size
    except (LookupError, TypeError, AttributeError):
        return False


def find_run(run: str | None, output_dir: str, key: str = "run") -> Path:
    """The folder of a run by path or name, or that of the newest denoiser under `output_dir`.

    Raises ValueError, about the option called `key`, if there is none.
    """
    root = Path(output_dir)
    dates = {
        folder: max(file.stat().st_mtime for file in _checkpoints(folder))
        for folder in root.glob("*")
        if _checkpoints(folder)
    }
    runs = sorted(dates, key=lambda folder: (dates[folder], folder.name))
    if run is None:
        for folder in reversed(runs):
            # A run of which nothing is whole is said, not passed over; all bytes are looked at once it is loaded.
            found = newest(folder, sums=False)
            if found is not None and found.checkpoint["diffuse"]["task"] == Denoiser.task:
                if dates[folder] > time.time() + 3600 and Ranks().first:
                    print(
                        f"diffuse: {folder} is the newest, by a date to come; run= names another",
                        file=sys.stderr,
                    )
                return folder
        raise UsageError("output_dir", output_dir, "holds no run", "make one with: diffuse train")
    for folder in (Path(run), root / run):
        if _checkpoints(folder):
            return folder
    known = ", ".join(folder.name for folder in reversed(runs[-5:])) or "none"
    raise UsageError(key, run, f"holds no {LAST}", f"the newest runs in {output_dir} are: {known}")


def task_of(run: Path) -> str:
    """What a run trains: `diffusion`, `classifier` or `autoencoder`; ValueError as `newest`, or if it has nothing."""
    found = newest(run, sums=False)
    if found is None:
        raise UsageError(run, NO_VALUE, f"holds no {LAST}")
    return found.checkpoint["diffuse"]["task"]


def is_run(folder: Path) -> bool:
    """Whether a folder holds checkpoints, whole or not."""
    return bool(_checkpoints(folder))


def _checkpoints(run: Path) -> list[Path]:
    """The files of a run that it can be taken up from."""
    found = [run / LAST, *run.glob(str(LAST.with_name("step_*.ckpt")))]
    return [file for file in found if file.is_file()]


def load_model(run: Path, weights: Literal["ema", "raw"], device: torch.device, step: Step = None) -> Model:
    """Build the denoiser of a run again from its newest checkpoint, or another one, in evaluation mode."""
    checkpoint, origin = _origin(run, step, weights, Denoiser.task)
    denoiser = _restored(Denoiser, checkpoint, weights, device)
    return Model(
        **origin, denoiser=denoiser, space=_space(run, checkpoint["diffuse"], origin["shape"], device)
    )


def load_classifier(run: Path, device: torch.device) -> Classifier:
    """Build the classifier of a run again, with its averaged weights, in evaluation mode."""
    checkpoint, origin = _origin(run, None, "ema", NoisyClassifier.task)
    return Classifier(**origin, classifier=_restored(NoisyClassifier, checkpoint, "ema", device))


def load_autoencoder(
    run: Path, device: torch.device, weights: Literal["ema", "raw"] = "ema", step: Step = None
) -> Autoencoder:
    """Build the autoencoder of a run again from its newest checkpoint, or another one, in evaluation mode."""
    checkpoint, origin = _origin(run, step, weights, AutoencoderKL.task)
    network = _network(checkpoint, weights)
    if not isinstance(network, AutoencoderKL):
        raise UsageError(run, NO_VALUE, "its model is no autoencoder", "give a run of task=autoencoder")
    return Autoencoder(**origin, network=network.to(device).eval().requires_grad_(False))


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
        if remark is not None and Ranks().first:
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
    if not _are_whole(checkpoint, weights, path.stat().st_size):
        raise UsageError(
            path, NO_VALUE, f"weights={weights}: are not there, or not whole", "name another run"
        )
    _check_fit(path, about, _network_state(checkpoint, weights))
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
        "digest": digest(_network_state(checkpoint, weights)),
    }


def _shape(path: Path, checkpoint: Mapping[str, Any]) -> Shape:
    """The shape of the images that the weights of a checkpoint were trained on, said where others are to come."""
    about = checkpoint["diffuse"]
    whole = tuple(about["shape"])
    if about["stages"] is None:
        return whole
    stage = Stages.stored(about["stages"]).after(checkpoint["global_step"])
    if stage.shape != whole and Ranks().first:
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


Kind = TypeVar("Kind", bound=NoiseConditioned)


def _restored(
    kind: type[Kind], checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"], device: torch.device
) -> Kind:
    config = checkpoint["diffuse"]["config"]
    network = _network(checkpoint, weights)
    model = kind(network, build(config["schedule"]), build(config["parameterization"]))
    return model.to(device).eval().requires_grad_(False)


def _network(checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"]) -> nn.Module:
    """The network of a checkpoint, built and filled."""
    about = checkpoint["diffuse"]
    network = build(about["config"]["model"], _seen_shape(about), about["num_classes"])
    network.load_state_dict(_network_state(checkpoint, weights))
    return network


def _seen_shape(about: Mapping[str, Any]) -> Shape:
    """The shape of what the network is shown: images, or their latents."""
    return tuple(about["latent"]["shape"] if about["latent"] else about["shape"])


def _space(run: Path, about: Mapping[str, Any], shape: Shape, device: torch.device) -> Space:
    """Where the network of a run works on images of a shape."""
    return Pixels(shape) if about["latent"] is None else load_latents(run, about, device)


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


def numbered(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step_{step:08d}.ckpt"


def _network_state(checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"]) -> dict[str, Tensor]:
    if weights == "ema":
        return checkpoint["callbacks"]["EMA"]["network"]
    prefix = "model.network."
    state = checkpoint["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for key, value in sorted(state.items()):
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
