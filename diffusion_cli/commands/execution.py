"""Run the module of a command."""

import importlib
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from diffusion_cli import config
from diffusion_cli.config import Config, Variant
from diffusion_cli.config.at_hand import gpu
from diffusion_cli.errors import MachineError
from diffusion_cli.system import fork_server
from diffusion_cli.system.signals import STOPPED, UNFINISHED, handling

MODULES = {"import": "import_run"}
"""Modules of the commands with a name that Python reserves."""


class Outcome(NamedTuple):
    """What a command ended with."""

    code: int
    """Exit code."""
    values: Mapping[str, float] = {}
    """What it measured, by name."""


def execute(command: str, checked: Config | list[Variant]) -> Outcome:
    """Run a command; MachineError if the disk, the network or the memory fails."""
    first = checked[0].config if isinstance(checked, list) else checked
    try:
        name = f"diffusion_cli.commands.{MODULES.get(command, command)}"
        if _forks(first):
            fork_server.start([name])
        module = importlib.import_module(name)
        with handling(interrupt):
            result = module.run(checked)
        return Outcome(0, result) if isinstance(result, Mapping) else Outcome(result or 0)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return Outcome(UNFINISHED)
    except OSError as error:
        if os.environ.get("DIFFUSE_TRACEBACK") or isinstance(error, MachineError) or not error.errno:
            raise
        raise config.system_error(error, first.model_dump()) from error


def _forks(checked: Config) -> bool:
    """Return whether a command starts several processes on a machine without GPUs."""
    trainer = getattr(checked, "trainer", None)
    count = trainer["devices"] if trainer else getattr(checked, "processes", None)
    return count is not None and count > 1 and not gpu("auto")


def interrupt(number: int, frame: object) -> None:
    """Treat scheduler signals like Ctrl-C. Training replaces this handler once it can save."""
    raise KeyboardInterrupt
