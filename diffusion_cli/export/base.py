"""Base class of export formats."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from diffusion_cli.errors import UsageError
from diffusion_cli.runs.load import LoadedAutoencoder, LoadedDenoiser

Exportable = LoadedDenoiser | LoadedAutoencoder


class ExportFormat(ABC):
    """Base class of the formats of `diffuse export`; the options of a format are arguments of its class."""

    name: ClassVar[str]
    """Option of `format=`."""
    library: ClassVar[str]
    """Program that loads the files, as model cards name it."""
    loads_repositories: ClassVar[bool] = False
    """Whether `example` takes repositories of the Hugging Face Hub too."""

    @abstractmethod
    def check(self, model: Exportable) -> None:
        """Raise UsageError, with the reason, for a model that the format cannot express."""

    def refuse_conditions(self, model: Exportable) -> None:
        """Raise UsageError for a denoiser with attributes, an image or a text, which the files cannot describe."""
        if isinstance(model, LoadedDenoiser) and not model.denoiser.conditions.only_classes:
            names = ", ".join(model.denoiser.conditions.names)
            raise self.refusal(
                f"the model is conditioned on {names}, and exports have class labels alone",
                "copy the folder of the run in place of an export",
            )

    @abstractmethod
    def write(self, model: Exportable, folder: Path) -> None:
        """Write a model that `check` accepts into an empty folder; OSError as `writing`."""

    @abstractmethod
    def example(self, model: Exportable, source: str) -> str:
        """Return Python code that loads the files from a folder or repository `source`, for the model card."""

    def remark(self, folder: Path) -> str:
        """Return what to note about an exported folder, after its path in a line; empty for nothing."""
        return ""

    def refusal(self, reason: str, remedy: str) -> UsageError:
        """Return the error of a model that the format cannot express."""
        return UsageError("format", self.name, reason, remedy)
