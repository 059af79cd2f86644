"""Networks of Hugging Face transformers, from a folder or the hub: safetensors only, and no code of a repository."""

import hashlib
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_cli.errors import NO_VALUE, UsageError, first_line
from diffusion_cli.system.downloads import DownloadError, NoConnectionError, PublishedFile, State
from diffusion_cli.system.files import CANNOT_WRITE, file_digest
from diffusion_cli.system.hub import connect

NETWORK = ("config.json", "model.safetensors")
"""Files of a network."""
TOKENIZER = ("vocab.json", "merges.txt")
"""Files of the tokenizer of CLIP."""
OPTIONAL = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of the tokenizer that some repositories have."""
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""Names on the hub: owner/name, or the name of an early repository."""
NEEDS_TRANSFORMERS = ("needs transformers", "install it: pip install 'diffuse-cli[transformers]'")
"""Problem and remedy without the optional dependency, which includes huggingface_hub."""


class PublishedWeights(NamedTuple):
    """Weights that a configuration names, for loading and for messages."""

    group: str
    """Group of the option, such as features."""
    option: str
    """Name of the option, such as clip."""
    place: str
    """Folder with config.json and model.safetensors, or a name on the hub, downloaded once."""
    instead: str
    """Another choice without these weights."""

    def missing(self, files: str, error: Exception, option: str = "") -> UsageError:
        """Return the error that files are missing; `option` names them for `diffuse data fetch`."""
        return UsageError(
            f"{self.group}.weights",
            self.place,
            first_line(error).rstrip("."),
            f"{self.instead}, give a folder with {files} (not pickled), or run "
            f"diffuse data fetch {option or f'{self.group}={self.option}'} where there is a network and copy the cache",
        )

    def unfit(self, architecture: str, reason: str) -> UsageError:
        """Return the error that the weights do not fit a network."""
        return UsageError(
            f"{self.group}.weights",
            self.place,
            f"does not have the weights of a {architecture} ({reason})",
            "give other weights",
        )

    def transformers(self) -> Any:
        """Import transformers, an optional dependency."""
        try:
            return importlib.import_module("transformers")
        except ImportError as error:
            raise UsageError(self.group, self.option, *NEEDS_TRANSFORMERS) from error

    def network(self, architecture: str) -> Any:
        """Return a network of transformers with these weights, on the CPU.

        Args:
            architecture: class of transformers.

        Raises:
            UsageError: transformers or the weights are missing, or the weights are damaged or of another network.
        """
        transformers = self.transformers()
        transformers.logging.set_verbosity_error()  # missing weights are an error below, so its warning is not needed
        try:
            network, loaded = self.read(
                getattr(transformers, architecture), use_safetensors=True, output_loading_info=True
            )
        except OSError as error:
            raise self.missing(" and ".join(NETWORK), error) from error
        except Exception as error:  # damaged files raise errors of many types
            raise self.unfit(architecture, str(error).partition("\n")[0]) from error
        if loaded["missing_keys"]:
            raise self.unfit(architecture, f"it has no {min(loaded['missing_keys'])}")
        return network.requires_grad_(False).eval()

    def read(self, kind: Any, **options: Any) -> Any:
        """Return an object of a class of transformers, from a folder, the local cache of the hub, or the hub."""
        folder = Path(self.place).expanduser()
        if folder.is_dir():
            return kind.from_pretrained(str(folder), local_files_only=True, **options)
        if not HUB_NAME.fullmatch(self.place):
            raise FileNotFoundError("is neither a folder nor a name on the Hugging Face Hub")
        try:
            return kind.from_pretrained(self.place, local_files_only=True, **options)
        except OSError:
            connect()
            return kind.from_pretrained(self.place, **options)


@dataclass(frozen=True)
class HubFile(PublishedFile):
    """A file of a repository on the Hugging Face Hub, in the cache of huggingface_hub.

    Args:
        repository: name on the hub.
        name: file name.
        required: whether it is an error if the repository has no such file.
    """

    repository: str
    name: str
    required: bool = True
    size = None
    checksum = "checked by the hub"

    @property
    def source(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self._hub('constants').ENDPOINT}/{self.repository}/resolve/main/{self.name}"

    @property
    def path(self) -> Path:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._cached() or self.to_copy / self.name

    @property
    def by_hand(self) -> str:
        return "get the files of the repository by hand into a folder, and set weights= to it"

    @property
    def to_copy(self) -> Path:
        return Path(self._hub("constants").HF_HUB_CACHE, f"models--{self.repository.replace('/', '--')}")

    def state(self) -> State:
        path = self._cached()
        if path is None:
            return "absent" if self._known_absent() else "missing"
        return "present" if _has_its_checksum(path) else "damaged"

    def fetch(self) -> None:
        hub = self._hub()
        try:
            connect()
        except OSError as error:
            raise NoConnectionError(str(error)) from error
        try:
            hub.hf_hub_download(self.repository, self.name, force_download=self.state() == "damaged")
        except Exception as error:  # the classes of the HTTP library and of the hub
            if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
                raise
            if self._known_absent():
                return
            raise DownloadError(first_line(error)) from error
        if self.state() != "present":
            raise DownloadError("the content does not have the checksum of the hub")

    def _hub(self, module: str = "") -> Any:
        """Import huggingface_hub, or a module of it; UsageError if it is not installed."""
        try:
            hub = importlib.import_module("huggingface_hub")
            return importlib.import_module(f"huggingface_hub.{module}") if module else hub
        except ImportError as error:
            raise UsageError(self.repository, NO_VALUE, *NEEDS_TRANSFORMERS) from error

    def _cached(self) -> Path | None:
        found = self._known()
        return Path(found) if isinstance(found, str) else None

    def _known_absent(self) -> bool:
        """Whether the file is optional, and the cache records that the repository has none."""
        found = self._known()
        return not (self.required or found is None or isinstance(found, str))

    def _known(self) -> Any:
        """Return what the cache knows of the file: its path, an object that stands for no such file, or None."""
        return self._hub().try_to_load_from_cache(self.repository, self.name)


def _has_its_checksum(path: Path) -> bool:
    """Whether a file of the cache has the digest that names its blob: SHA-256, or SHA-1 as in git."""
    digits = path.resolve().name
    if len(digits) == 64:
        return file_digest(path) == digits
    if len(digits) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == digits
    return True  # a cache without links, on file systems that have none


def files(weights: str, names: Sequence[str], optional: Sequence[str] = ()) -> list[HubFile]:
    """Return files of weights by name on the hub; none for a folder."""
    if Path(weights).expanduser().is_dir():
        return []
    return [HubFile(weights, name, name not in optional) for name in (*names, *optional)]
