"""The Hugging Face Hub: its server, copies of repositories in the cache of huggingface_hub, and uploads."""

import glob
import importlib
import re
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_cli.errors import FormatError, first_line
from diffusion_cli.system.downloads import STALL

CARD = "README.md"
"""File with the model card of a repository."""
COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"\w[\w./-]{0,199}", re.ASCII)
REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


class Repository(NamedTuple):
    """A repository that exists on the hub."""

    private: bool
    """Whether only its owner can see it."""
    files: frozenset[str]
    """Paths of its files."""
    card: Path | None
    """Copy of its model card; None without one."""


def connect() -> None:
    """Raise OSError at once if the hub cannot be reached: its own functions repeat their requests for half a minute."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=STALL)
    except Exception as error:  # the classes of the HTTP library, which differs between versions
        raise OSError(
            f"{huggingface_hub.constants.ENDPOINT} cannot be reached ({first_line(error)})"
        ) from error


def check_name(repository: str) -> None:
    """Raise FormatError unless a text is the name of a repository, owner/name."""
    if not may_be_repository(repository):
        raise FormatError("is not the name of a repository, owner/name", "write for example hub:me/digits")


def may_be_repository(text: str) -> bool:
    """Return whether a text has the form of the name of a repository, owner/name."""
    return REPOSITORY.fullmatch(text) is not None


def repository_in(text: str) -> str | None:
    """Return the repository, owner/name, in its address or after `hub:`; None if there is none."""
    name = re.sub(r"^(hub:|https?://[^/]+/)", "", text).rstrip("/")
    return name if name != text and may_be_repository(name) else None


def _library() -> Any:
    """Return huggingface_hub; FormatError if it is not installed."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise FormatError(
            "needs huggingface_hub: pip install 'diffuse-cli[hub]'", "or give a folder"
        ) from error


@cache
def snapshot(named: str, chosen: Callable[[Collection[str]], list[str]]) -> Path:
    """Return the folder with files of a repository, downloaded once into the cache of huggingface_hub.

    A process gets the same commit each time, even if the repository changes.

    Args:
        named: owner/name, the newest commit of its main branch; or owner/name@revision: a branch, a tag or a commit.
        chosen: returns the files to download among the paths of all, or raises FormatError.

    Raises:
        FormatError: huggingface_hub is not installed, the repository has none of these files, or it cannot be
            downloaded and is not in the cache.
    """
    repository, at, version = named.partition("@")
    check_name(repository)
    if at and not REVISION.fullmatch(version):
        raise FormatError("names no revision after @", "give a branch, a tag or a commit")
    revision = version or None
    hub = _library()
    try:
        connect()
    except OSError as offline:
        try:
            return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
        except Exception as error:  # the classes of the hub
            remedy = "connect to the network, or give a folder"
            raise FormatError(f"is not in the cache, and {offline}", remedy) from error
    try:
        info = hub.HfApi().repo_info(repository, revision=revision)
        files = chosen([file.rfilename for file in info.siblings or ()])
        if not files:  # the library would return a folder that does not exist
            raise FormatError("has no model that can be read", "choose another repository")
        patterns = [glob.escape(path) for path in files]
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except FormatError:
        raise
    except Exception as error:  # the classes of the HTTP library and of the hub
        raise FormatError(
            f"cannot be downloaded ({first_line(error)})", "check its name, its revision, and your login"
        ) from error


def commit_of(folder: Path) -> str | None:
    """Return the commit of a snapshot; None for another folder."""
    return folder.name if COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots" else None


def check_login() -> None:
    """Raise FormatError unless the hub can be reached and huggingface_hub has a valid login, which it stores itself."""
    hub = _library()
    if not hub.get_token():
        raise FormatError("needs a login to the Hugging Face Hub: hf auth login")
    try:
        connect()
    except OSError as error:
        raise FormatError(first_line(error)) from error
    try:
        hub.HfApi().whoami()
    except Exception as error:  # the classes of the HTTP library and of the hub
        raise FormatError(f"the login to the Hugging Face Hub is refused ({first_line(error)})") from error


def published(name: str) -> Repository | None:
    """Return a repository that exists on the hub; None if there is none.

    Raises FormatError if it cannot be read.
    """
    api = _library().HfApi()
    try:
        if not api.repo_exists(name):
            return None
        info = api.repo_info(name)
        files = frozenset(file.rfilename for file in info.siblings or ())
        card = Path(api.hf_hub_download(name, CARD, revision=info.sha)) if CARD in files else None
    except Exception as error:  # the classes of the HTTP library and of the hub
        raise FormatError(f"cannot be read ({first_line(error)})") from error
    return Repository(bool(info.private), files, card)


def upload(
    folder: Path, repository: str, message: str, *, private: bool, outdated: Iterable[str] = ()
) -> str:
    """Upload the files of a folder to a repository, and return the address of the repository.

    Args:
        folder: folder with files.
        repository: owner/name; created if it does not exist.
        message: message of the commit.
        private: whether a new repository is visible to its owner only.
        outdated: paths of files of the repository that are removed, unless the folder has them too.

    Raises:
        FormatError: the repository cannot be created, or the upload fails.
    """
    api = _library().HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message,
            delete_patterns=[glob.escape(path) for path in outdated],
        )  # fmt: skip
    except Exception as error:  # the classes of the HTTP library and of the hub
        raise FormatError(f"cannot be written ({first_line(error)})") from error
    snapshot.cache_clear()
    return str(address)
