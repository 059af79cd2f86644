"""Folders that diffusers writes: a pipeline with its parts, or a model alone; weights as safetensors only."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from diffusion_cli.convert import diffusers_scheduler
from diffusion_cli.convert.base import (
    Autoencoder,
    Network,
    Node,
    PretrainedModel,
    Process,
    Weights,
    licence,
)
from diffusion_cli.errors import FormatError, format_value
from diffusion_cli.system.hub import CARD
from diffusion_cli.system.tensors import AGAIN, read_tensors, refuse_pickled
from diffusion_cli.system.untrusted import read_json, reason

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
SAFE = ".safetensors"
WEIGHTS = f"diffusion_pytorch_model{SAFE}"
PART = re.compile(rf"[\w.-]{{1,200}}\{SAFE}", re.ASCII)
"""Names of the files of weights that an index may name; a path would lead out of the folder."""
DENOISERS = {
    "UNet2DModel": "diffusers_unet",
    "DiTTransformer2DModel": "diffusers_dit",
    "Transformer2DModel": "diffusers_dit",
}
"""Module of each class of denoisers."""
AUTOENCODERS: dict[str, str] = dict.fromkeys(("AutoencoderKL", "VQModel"), "diffusers_autoencoder")
"""Module of each class of autoencoders."""
PARTS = {"unet": DENOISERS, "transformer": DENOISERS, "vae": AUTOENCODERS, "vqvae": AUTOENCODERS}
"""Parts of a pipeline with weights, by the name of their folder."""
TEXT = "UNet2DConditionModel"
"""Networks that are conditioned on text."""
UNIT_RANGE = "ScoreSdeVeScheduler"
"""Scheduler of models with pixels in [0, 1], and not in [-1, 1]."""
ASSUMED = {"_class_name": "DDPMScheduler"}
"""Scheduler of a model without one: that of Ho et al. 2020."""
LABELS = "id2label"
"""Names of the classes by number: of DiTPipeline, and with an underscore of denoisers that were exported here."""
FACTOR_ONLY = ("DiTPipeline", "LDMPipeline")
"""Pipelines that divide latents by scaling_factor, and have no other statistics."""
SAVED = "give a folder written by save_pretrained of diffusers, or hub:OWNER/NAME"
WHOLE = "copy the whole folder, as save_pretrained wrote it"
OTHER_SCHEDULER = (
    "give the folder of its network alone with schedule= and parameterization=, or save another scheduler"
)
NO_TEXT = "models with text are not supported: choose one with classes, or without conditions"


@dataclass(frozen=True)
class _Part:
    """A model of a folder."""

    name: str
    """Name of its folder."""
    module: ModuleType
    kind: str
    config: Node
    files: tuple[Path, ...]
    """Files with weights."""

    def network(self, sizes: Sequence[int] | None = None) -> Network:
        """Return the network of the configuration; FormatError, which names the file.

        Args:
            sizes: sizes of its images, for a configuration without them.
        """
        config = self.config
        if sizes is not None and config.get("sample_size") is None:
            config = config | {"sample_size": [*sizes]}
        try:
            return self.module.read(config)
        except FormatError as error:
            raise type(error)(f"{self.name}/{CONFIG}: {reason(error)}") from error

    @property
    def factor(self) -> int:
        """Pixels per latent along each side, of an autoencoder."""
        return self.module.factor(self.network().node)

    def weights(self, network: Network) -> Weights:
        """Return the weights by the names of the network; FormatError for other weights."""
        state: Weights = {}
        for path in self.files:
            tensors = read_tensors(path)
            if repeated := state.keys() & tensors.keys():
                raise FormatError(f"{path.name}: {min(repeated)} is also in another file")
            state |= tensors
        return self.module.weights(network, state)


def read_folder(folder: Path, sizes: Sequence[int] | None = None) -> PretrainedModel:
    """Return the model in a folder of diffusers; its weights are read when they are needed.

    Args:
        folder: folder of a pipeline, of its parts, or of a model alone.
        sizes: sizes of its images, for a denoiser that does not state them.

    Raises:
        UnknownSize: neither the folder nor `sizes` states them.
        FormatError: the folder has no model with an equivalent, or has pickled weights.
        OSError: a file cannot be read.
    """
    if (folder / INDEX).is_file():
        return _pipeline(folder, _json(folder / INDEX), sizes)
    if (folder / "scheduler" / SCHEDULER).is_file():
        parts = [name for name in (*PARTS, "scheduler") if (folder / name).is_dir()]
        return _pipeline(folder, {"_class_name": "parts", **{name: ["diffusers"] for name in parts}}, sizes)
    if (folder / CONFIG).is_file():
        return _alone(folder, sizes)
    raise FormatError(f"contains neither {INDEX} nor {CONFIG}", SAVED)


def is_diffusers(folder: Path) -> bool:
    """Return whether a folder has the files of a pipeline or a model of diffusers."""
    return any((folder / file).is_file() for file in (INDEX, Path("scheduler", SCHEDULER), CONFIG))


def folder_around(file: Path) -> Path | None:
    """Return the folder to read in place of a file that diffusers wrote: that of its pipeline; None for others."""
    if not file.name.startswith((INDEX, CONFIG, SCHEDULER, Path(WEIGHTS).stem)):
        return None
    outer = file.parent.parent
    inside = file.name != INDEX and ((outer / INDEX).is_file() or (outer / "scheduler" / SCHEDULER).is_file())
    return outer if inside else file.parent


def read_autoencoder_folder(folder: Path) -> PretrainedModel:
    """Return the autoencoder in a folder, or that of a pipeline with any other parts; errors as `read_folder`."""
    names = [name for name, kinds in PARTS.items() if kinds == AUTOENCODERS]
    inner = next((folder / name for name in names if (folder / name / CONFIG).is_file()), folder)
    part = _part(inner, AUTOENCODERS)
    network = part.network()
    return PretrainedModel(
        kind=f"{part.kind} of diffusers",
        network=network,
        weights=lambda: part.weights(network),
        process=None,
        files=_named(folder, [part]),
    )


def _alone(folder: Path, sizes: Sequence[int] | None) -> PretrainedModel:
    """Return the model of a folder without a pipeline."""
    part = _part(folder, DENOISERS | AUTOENCODERS)
    network = part.network(sizes if part.kind in DENOISERS else None)
    process = None
    if part.kind in DENOISERS:
        process = _process(ASSUMED, network)
        assumption = "the source has no scheduler: assumed is that of DDPM, linear betas and noise prediction"
        whole = folder.resolve().parent
        if (whole / "scheduler" / SCHEDULER).is_file():
            assumption += f"; source={whole.name}, the folder around it, has its scheduler"
        process = replace(process, assumptions=(assumption,))
    return PretrainedModel(
        kind=f"{part.kind} of diffusers",
        network=network,
        weights=lambda: part.weights(network),
        process=process,
        files=_named(folder, [part]),
        licence=licence(folder),
    )


def _pipeline(folder: Path, index: Node, sizes: Sequence[int] | None) -> PretrainedModel:
    """Return the denoiser of a pipeline, with its scheduler and its autoencoder if it has one."""
    kind = index.get("_class_name")
    names = {
        name
        for name, value in index.items()
        if isinstance(value, list) and any(item is not None for item in value)
    }
    for name in sorted(names - PARTS.keys() - {"scheduler"}):
        remedy = NO_TEXT if name.startswith(("text", "token")) else ""
        raise FormatError(f"{INDEX}: {name} of a {format_value(kind)[:80]} has no equivalent", remedy)
    parts = {name: _part(_inner(folder, name, CONFIG), PARTS[name]) for name in sorted(names & PARTS.keys())}
    described = INDEX if (folder / INDEX).is_file() else folder.name
    denoisers = [part for part in parts.values() if part.kind in DENOISERS]
    autoencoders = [part for part in parts.values() if part.kind in AUTOENCODERS]
    if len(denoisers) != 1 or len(autoencoders) > 1 or "scheduler" not in names:
        raise FormatError(f"{described}: must have a denoiser, a scheduler, and at most one autoencoder")
    (denoiser,) = denoisers
    if sizes is not None and autoencoders:
        sizes = [size // autoencoders[0].factor for size in sizes]
    network = denoiser.network(sizes)
    process = _process(_json(_inner(folder, "scheduler", SCHEDULER) / SCHEDULER), network)
    return PretrainedModel(
        kind=f"{format_value(kind)[:80]} of diffusers",
        network=network,
        weights=lambda: denoiser.weights(network),
        process=process,
        autoencoder=_autoencoder(autoencoders[0], network) if autoencoders else None,
        class_names=_class_names(index.get(LABELS, denoiser.config.get(f"_{LABELS}")), network),
        files=_named(folder, [*parts.values()]),
        licence=licence(folder),
        remarks=tuple(
            f"{kind} leaves out {name} of its autoencoder, which is applied here"
            for part in autoencoders
            if kind in FACTOR_ONLY
            for name in part.module.shifts(part.config)
        ),
    )


def _process(config: Node, network: Network) -> Process:
    """Return the process of a scheduler for a network, for pixels in [-1, 1]; FormatError, which names the file.

    In this range, the noise of a model with pixels in [0, 1] has twice the standard deviation.
    """
    try:
        process = diffusers_scheduler.read(
            config,
            learns_variance=bool(network.node.get("learn_variance")),
            label_dropout=0.1 if network.num_classes is not None and network.null_class else 0.0,
        )
    except FormatError as error:
        raise FormatError(f"{SCHEDULER}: {reason(error)}", OTHER_SCHEDULER) from error
    centers = network.node.get("centered") is False
    if centers != (config.get("_class_name") == UNIT_RANGE):
        raise FormatError(
            f"{CONFIG}: center_input_sample={format_value(centers)} does not fit a {config.get('_class_name')}"
        )
    if not centers:
        return process
    wider = {key: 2 * process.schedule[key] for key in ("sigma_min", "sigma_max")}
    return replace(process, schedule=process.schedule | wider)


def _autoencoder(part: _Part, denoiser: Network) -> Autoencoder:
    """Return the autoencoder of a denoiser, for the images of its latents."""
    network = part.network()
    mean, std = part.module.statistics(part.config)
    channels, *sizes = denoiser.shape
    if len(mean) != channels:
        raise FormatError(f"{CONFIG}: its {len(mean)} latent channels are not the {channels} of the denoiser")
    network = replace(network, shape=(network.shape[0], *(part.factor * size for size in sizes)))
    return Autoencoder(network=network, weights=lambda: part.weights(network), mean=mean, std=std)


def _class_names(names: Any, network: Network) -> tuple[str, ...] | None:
    """Return the names of `LABELS` in the order of the classes; None without them."""
    if names is None or network.num_classes is None:
        return None
    labels = [str(label) for label in range(network.num_classes)]
    if not isinstance(names, Mapping) or sorted(names) != sorted(labels):
        raise FormatError(f"{INDEX}: {LABELS} does not name the {network.num_classes} classes of the network")
    return tuple(str(names[label]) for label in labels)


def _inner(folder: Path, name: str, file: str) -> Path:
    """Return the folder of a part of a pipeline: early versions of diffusers wrote all files in one."""
    inner = folder / name
    return folder if (folder / file).is_file() and not inner.is_dir() else inner


def _part(folder: Path, modules: Mapping[str, str]) -> _Part:
    """Return the model of a folder with its files; FormatError for a class without an equivalent."""
    config = _json(folder / CONFIG)
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in modules:
        shown, known = format_value(kind)[:80], ", ".join(modules)
        remedy = NO_TEXT if shown == TEXT else f"choose a model of {known}"
        raise FormatError(f"{folder.name}/{CONFIG}: the class {shown} has no equivalent", remedy)
    module = import_module(f"{__package__}.{modules[kind]}")
    return _Part(folder.name, module, kind, config, _files(folder))


def _files(folder: Path) -> tuple[Path, ...]:
    """Return the files with the weights of a model: one, the parts that an index names, or one of a variant."""
    whole, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if whole.is_file():
        return (whole,)
    if index.is_file():
        named = _json(index).get("weight_map")
        names = [*named.values()] if isinstance(named, Mapping) else []
        if not names or not all(isinstance(name, str) and PART.fullmatch(name) for name in names):
            raise FormatError(f"{index.name}: weight_map must name .safetensors files of its folder")
        return tuple(folder / name for name in sorted({*names}))
    variants = sorted(folder.glob(f"{whole.stem}.*{whole.suffix}"))
    if len(variants) == 1:
        return (variants[0],)
    refuse_pickled(whole, folder.glob("*"))
    raise FormatError(f"{folder.name} contains no {WEIGHTS}", WHOLE)


def model_files(paths: Collection[str]) -> list[str]:
    """Return the files of a repository that `read_folder` reads: no pickles, and no second copy of weights.

    Args:
        paths: paths of all files of the repository.

    Raises:
        FormatError: the weights of a part are pickled only.
    """
    inner = [name for name in PARTS if any(path.startswith(f"{name}/") for path in paths)]
    return _chosen(paths, inner or [""])


def autoencoder_files(paths: Collection[str]) -> list[str]:
    """Return the files of a repository that `read_autoencoder_folder` reads, as `model_files`."""
    names = [name for name, kinds in PARTS.items() if kinds == AUTOENCODERS]
    inner = next((name for name in names if f"{name}/{CONFIG}" in paths), "")
    return [path for path in _chosen(paths, [inner]) if path.rpartition("/")[0] == inner]


def _chosen(paths: Collection[str], folders: Collection[str]) -> list[str]:
    """Return descriptions and weights among the paths; FormatError if one of some folders has pickled weights only.

    Pickled weights are not downloaded, so `_files` cannot find them.
    """
    weights = [path for path in paths if _is_read(path, paths)]
    for folder in folders:
        if not any(path.rpartition("/")[0] == folder for path in weights):
            refuse_pickled(PurePosixPath(folder, WEIGHTS), map(PurePosixPath, paths))
    return [path for path in paths if path.endswith(".json") or path == CARD] + weights


def _is_read(path: str, paths: Collection[str]) -> bool:
    """Return whether a path is that of weights which `_files` chooses."""
    folder, slash, name = path.rpartition("/")
    whole, stem = f"{folder}{slash}{WEIGHTS}", WEIGHTS.removesuffix(SAFE)
    if whole in paths:
        return path == whole
    is_part = name.startswith(f"{stem}-")
    return name.endswith(SAFE) and (
        is_part if f"{whole}.index.json" in paths else name.startswith(f"{stem}.")
    )


def _named(folder: Path, parts: list[_Part]) -> dict[str, Path]:
    """Return the files of some models by their path in the folder."""
    return {path.relative_to(folder).as_posix(): path for part in parts for path in part.files}


def _json(path: Path) -> Node:
    """Return a JSON object; FormatError, which names the file, for other content."""
    try:
        value = read_json(path, infinite=True)
    except FileNotFoundError as error:
        raise FormatError(f"contains no {path.parent.name}/{path.name}", WHOLE) from error
    except FormatError as error:
        raise FormatError(f"{path.name} {reason(error)}", AGAIN) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} is not a JSON object")
    return value
