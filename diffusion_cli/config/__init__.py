"""From the words of a command line to a checked configuration, without importing torch.

The YAML files under `conf` are the reference: one file a command, one folder a group, one file an option.
Each option names a class by `_target_` and gives every keyword argument of it.
"""

from diffusion_cli.config.catalogue import CONF, HERE, defaults, did_you_mean, documented, options, summary
from diffusion_cli.config.check import build, check_node, shown, signature
from diffusion_cli.config.compose import Mistakes, compose, expand, load
from diffusion_cli.config.runs import brought_by, fingerprint, flatten, identity
from diffusion_cli.config.schema import (
    COMMANDS,
    Config,
    EditConfig,
    EvalConfig,
    SampleConfig,
    TrainConfig,
    seconds,
)

__all__ = [
    "COMMANDS", "CONF", "HERE", "Config", "EditConfig", "EvalConfig", "Mistakes", "SampleConfig", "TrainConfig",
    "brought_by", "build", "check_node", "compose", "defaults", "did_you_mean", "documented", "expand", "fingerprint",
    "flatten", "identity", "load", "options", "seconds", "shown", "signature", "summary",
]  # fmt: skip
