"""Files of published weights: download and safe reading."""

import io
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.errors import UsageError
from diffusion_cli.system.untrusted import check_weights
from diffusion_cli.system.untrusted import read as read_file

LARGEST = 2**32
"""Maximum size of a weights file in bytes."""


def locate(weights: str | None, url: str, key: str) -> Path:
    """Return the file of option `key`; for None, the file published at `url`, downloaded if necessary.

    Downloads go to torch's download folder; if the name ends in `-<hash>.pth`, the SHA-256 must start with the hash.

    Raises:
        UsageError: the file is missing, or cannot be downloaded.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UsageError(key, weights, "no such file", "use null to download the published one")
        return path
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256_start = Path(name).stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_start)
        except (OSError, RuntimeError) as error:  # no network, or a wrong hash
            raise UsageError(
                key,
                None,
                f"the published weights are not at {path} and could not be downloaded ({error})",
                f"get {name} from {url.removesuffix(f'/{name}')} and put it there, or set {key} to its path",
            ) from error
    return path


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
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
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
