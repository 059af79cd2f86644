"""The Python API: the commands, on tensors.

    import diffusion_cli as diffuse

    model = diffuse.load("outputs/demo")
    images = model.sample(64, sampler="ddim", steps=50)

Settings have the names and the defaults of the command line. A mistake in one is a `UsageError`.
"""

from diffusion_cli.model.functions import allow_plugins, evaluate, import_weights, load, option, train
from diffusion_cli.model.loaded import Model

__all__ = ["Model", "allow_plugins", "evaluate", "import_weights", "load", "option", "train"]
