"""Published weights: where their file lies, fetched once, and what it holds, read as tensors and nothing else."""

import io
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.errors import UsageError
from diffusion_cli.system.untrusted import check_weights
from diffusion_cli.system.untrusted import read as read_file

LARGEST = 2**32
"""Bytes of a file of weights."""


def locate(weights: str | None, url: str, key: str) -> Path:
    """The file that the option called `key` names, or, for None, what is published at `url`.

    The latter lies in torch's download folder, and is fetched if it does not; a name that ends in `-<hash>.pth`
    gives the start of the SHA-256 that it must have.

    Raises UsageError if there is no such file and it cannot be fetched.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UsageError(key, weights, "no such file", "null fetches the published one")
        return path
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256_start = Path(name).stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_start)
        except (OSError, RuntimeError) as error:  # no network; or what came is not what was published
            raise UsageError(
                key,
                None,
                f"the published weights are not at {path} and could not be fetched ({error})",
                f"get {name} from {url.removesuffix(f'/{name}')} and put it there, or give its path as {key}",
            ) from error
    return path


def content_of(path: Path, key: str) -> bytes:
    """The bytes of a file of weights; UsageError, about the option called `key`, if there are too many."""
    try:
        return read_file(path, LARGEST)
    except ValueError as error:
        raise wrong_weights(path, key, error) from error


def read(content: bytes, path: Path, key: str) -> Any:
    """What a file of weights holds; UsageError, about the option called `key`, for anything but tensors."""
    try:
        check_weights(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways in the parsers of ZIP and pickle
        raise wrong_weights(path, key, error) from error


def wrong_weights(path: Path, key: str, error: Exception) -> UsageError:
    """The error that a file does not hold the weights of the network."""
    reason = str(error).partition("\n")[0]
    return UsageError(
        key, path, f"does not hold the weights of this network ({reason})", "fetch the file again"
    )
