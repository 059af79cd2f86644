"""Models of other programs in terms of this package, and the way back.

Each module maps one architecture or file format: configurations without torch, weights with it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from diffusion_cli.convert.base import PretrainedModel, UnknownSize
from diffusion_cli.convert.diffuse_folder import (
    WEIGHTS,
    export_files,
    is_described,
    is_export,
    read_export,
    read_exported_autoencoder,
)
from diffusion_cli.convert.diffusers_folder import (
    SAVED,
    autoencoder_files,
    folder_around,
    is_diffusers,
    model_files,
    read_autoencoder_folder,
    read_folder,
)
from diffusion_cli.convert.guided_diffusion import GuidedDiffusion
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.system.hub import commit_of, may_be_repository, repository_in, snapshot
from diffusion_cli.system.untrusted import reason

__all__ = ["HUB", "PUBLISHED", "is_model", "read_autoencoder", "read_source", "refusal", "refuse_run"]

HUB = "hub:"
"""Prefix of a source that is a repository of the Hugging Face Hub."""
PUBLISHED = "give a file of weights that its authors published, and the preset of its command"
"""Usual remedy of a file with a preset."""


def refusal(
    key: str, source: str, error: FormatError | OSError, usual: str = "choose another model"
) -> UsageError:
    """Return the error of a source that cannot be read, with the remedy of its cause or else the usual one."""
    remedy = error.remedy if isinstance(error, FormatError) else "check that its files can be read"
    return UsageError(key, source, reason(error), remedy or usual)


def is_model(folder: Path) -> bool:
    """Return whether a folder has the files of a model that `read_source` reads."""
    return is_diffusers(folder) or (folder / WEIGHTS).is_file()


def refuse_run(key: str, source: str) -> None:
    """Raise UsageError, about the option `key`, if a source is a run of this package."""
    if any(Path(source).expanduser().glob("checkpoints/*.ckpt")):
        other = "latent.run" if key == "latent.pretrained" else "init.run"
        command = "diffuse train " if key == "source" else ""
        raise UsageError(key, source, "is a run of diffuse already", f"use {command}{other}={source}")


def read_source(
    source: str, key: str, preset: GuidedDiffusion | None = None, sizes: Sequence[int] | None = None
) -> PretrainedModel:
    """Return the model that another program wrote; its weights are read when they are needed.

    Args:
        source: folder of diffusers or of our export as safetensors; or `hub:` and the name of a repository, whose files
            are downloaded once, where `@` and a branch, a tag or a commit may follow.
        key: option that names it, for errors.
        preset: flags of the network, for a source that is a file of weights.
        sizes: sizes of its images, for a network of diffusers that does not state them.

    Raises:
        UsageError: the source has no model that can be read, or its weights contradict a flag.
    """
    path = Path(source).expanduser()
    folder = path.parent if is_described(path) else folder_around(path)
    if path.is_file() and folder is not None:
        raise UsageError(key, source, "is a file of a folder that describes a model", f"give {key}={folder}")
    if preset is not None:
        try:
            if not path.exists():
                raise FormatError("does not exist")
            return preset.read(path)
        except (FormatError, OSError) as error:
            raise refusal(key, source, error, PUBLISHED) from error
    if path.is_file():
        remedy = f"name the flags of its network: diffuse import source={source} preset=<option>"
        raise UsageError(key, source, "is a file, which does not describe its network", remedy)
    return _read(source, key, lambda folder: read_folder(folder, sizes), read_export)


def read_autoencoder(source: str, key: str) -> PretrainedModel:
    """Return an autoencoder that another program wrote, or that of a pipeline, as `read_source`."""
    return _read(source, key, read_autoencoder_folder, read_exported_autoencoder, _autoencoder_files)


def _model_files(paths: Collection[str]) -> list[str]:
    """Return the files of a repository that `read_source` reads."""
    return export_files(paths) if is_export(paths) else model_files(paths)


def _autoencoder_files(paths: Collection[str]) -> list[str]:
    """Return the files of a repository that `read_autoencoder` reads."""
    return export_files(paths) if is_export(paths) else autoencoder_files(paths)


Reader = Callable[[Path], PretrainedModel]


def _read(
    source: str,
    key: str,
    reader: Reader,
    own: Reader,
    chosen: Callable[[Collection[str]], list[str]] = _model_files,
) -> PretrainedModel:
    """Return the model of a folder by one of two readers; `own` is that of our export."""
    refuse_run(key, source)
    try:
        is_remote = source.startswith(HUB)
        folder = snapshot(source.removeprefix(HUB), chosen) if is_remote else Path(source).expanduser()
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            name = None if folder.exists() or is_remote else repository_in(source)
            # A missing folder, whose parent is missing too, is more likely a repository.
            name = name or (source if may_be_repository(source) and not folder.parent.exists() else None)
            raise FormatError(problem, SAVED if name is None else f"give {key}={HUB}{name}")
        model = (own if is_export([path.name for path in folder.iterdir()]) else reader)(folder)
        return replace(model, commit=commit_of(folder) if is_remote else None)
    except UnknownSize as error:
        remedy = f"diffuse import source={source} dataset=<option> takes the size of a dataset"
        raise UsageError(key, source, reason(error), remedy) from error
    except (FormatError, OSError) as error:
        raise refusal(key, source, error) from error
