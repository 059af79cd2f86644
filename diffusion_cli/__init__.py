"""Train, sample and evaluate diffusion models from one configured command line, or from Python.

The names of the Python API are imported at their first use, because they import torch.
"""

from typing import TYPE_CHECKING, Any

from diffusion_cli.errors import UsageError

if TYPE_CHECKING:
    from diffusion_cli.model import Model, allow_plugins, evaluate, import_weights, load, option, train

__version__ = "0.2.0"
__all__ = [
    "Model",
    "UsageError",
    "__version__",
    "allow_plugins",
    "evaluate",
    "import_weights",
    "load",
    "option",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffusion_cli import model

        return getattr(model, name)
    raise AttributeError(f"module 'diffusion_cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
