"""Files of published weights: download and safe reading."""

import io
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.errors import UsageError
from diffusion_cli.system.downloads import DownloadError, WebFile
from diffusion_cli.system.tensors import load_checked
from diffusion_cli.system.untrusted import check_weights
from diffusion_cli.system.untrusted import read as read_file

LARGEST = 2**32
"""Maximum size of a weights file in bytes."""


def published(url: str, size: int | None = None) -> WebFile:
    """Return weights `<name>-<start of their SHA-256>.pth` at a URL; their place is torch's download folder."""
    name = url.rpartition("/")[2]
    digits = Path(name).stem.rpartition("-")[2]
    return WebFile(url, Path(torch.hub.get_dir(), "checkpoints", name), f"sha256 {digits}", size)


def locate(weights: str | None, file: WebFile, key: str, options: str, instead: str = "") -> Path:
    """Return the file of option `key`; for None, the published file, downloaded if necessary.

    Args:
        weights: path of the file, or None.
        file: published file.
        key: configuration key of `weights`, for errors.
        options: options of `diffuse data fetch` that name the file, for errors.
        instead: option that needs no weights, for errors.

    Raises:
        UsageError: the file is missing, or cannot be downloaded.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UsageError(key, weights, "no such file", "use null to download the published one")
        return path
    if not file.path.is_file():
        try:
            file.fetch()
        except DownloadError as error:
            raise UsageError(
                key,
                None,
                f"no published weights at {file.path}, and they cannot be downloaded ({error})",
                f"{f'use {instead}, or ' if instead else ''}get {file.source} and put it there; "
                f"where there is a network, diffuse data fetch {options} does",
            ) from error
    return file.path


def content_of(path: Path, key: str) -> bytes:
    """Return the bytes of a weights file; UsageError about option `key` if it is too large."""
    try:
        return read_file(path, LARGEST)
    except ValueError as error:
        raise wrong_weights(path, key, error) from error


def read(content: bytes, path: Path, key: str) -> Any:
    """Return the content of a weights file; UsageError about option `key` if it has anything but tensors."""
    try:
        check_weights(content)
        return load_checked(io.BytesIO(content))
    except Exception as error:  # the parsers of ZIP and pickle raise errors of many types
        raise wrong_weights(path, key, error) from error


def wrong_weights(path: Path, key: str, error: Exception) -> UsageError:
    """Return the error that a file does not have the weights of the network."""
    reason = str(error).partition("\n")[0]
    return UsageError(
        key,
        path,
        f"does not have the weights of this network ({reason})",
        "download the file again",
    )
