"""The plugin of the docs, and Python's memory of it."""

import sys
from pathlib import Path

from diffusion_cli.config import option_keys, plugins
from diffusion_cli.config.signature import _definitions

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "plugin"


def forget_modules(package: str = "bars") -> None:
    """Let Python import a package anew, by default that of the example, and diffuse read its files anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    for function in (plugins._conf, plugins._read, _definitions, option_keys._described):
        function.cache_clear()
