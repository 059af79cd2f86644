"""The commands, one module each with a function `run(config)`, and the modules that they share."""

from diffusion_cli.system.compat import defer_torchmetrics

defer_torchmetrics()  # before a command imports Lightning
