"""Files of the Hugging Face Hub: its server, and copies of repositories in the cache of huggingface_hub."""

import importlib
import re
from pathlib import Path
from typing import Any

from diffusion_cli.errors import FormatError, first_line
from diffusion_cli.system.downloads import STALL

SAFE_FILES = ("*.json", "*.safetensors", "README.md")
"""Files of a repository that are downloaded: no pickles, which could run code."""
REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def connect() -> None:
    """Raise OSError at once if the hub cannot be reached: its own functions repeat their requests for half a minute."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=STALL)
    except Exception as error:  # the classes of the HTTP library, which differs between versions
        raise OSError(
            f"{huggingface_hub.constants.ENDPOINT} cannot be reached ({first_line(error)})"
        ) from error


def snapshot(repository: str) -> Path:
    """Return the folder with the safe files of a repository, downloaded once into the cache of huggingface_hub.

    Raises:
        FormatError: huggingface_hub is not installed, or the repository cannot be downloaded and is not in the cache.
    """
    if not REPOSITORY.fullmatch(repository):
        raise FormatError("is not the name of a repository, owner/name")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise FormatError("needs huggingface_hub: pip install 'diffuse-cli[hub]'") from error
    try:
        connect()
    except OSError as offline:
        try:
            return Path(hub.snapshot_download(repository, local_files_only=True))
        except Exception as error:  # the classes of the hub
            raise FormatError(f"is not in the cache, and {offline}") from error
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=[*SAFE_FILES]))
    except Exception as error:  # the classes of the HTTP library and of the hub
        raise FormatError(f"cannot be downloaded ({first_line(error)})") from error
