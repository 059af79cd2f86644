"""`diffuse <command> [group=option] [key=value]`: parse the command line, print help, run the command.

This module does not import torch, so help and error messages are fast.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import yaml

from diffusion_cli import __version__, config
from diffusion_cli.commands.execution import execute
from diffusion_cli.commands.sweep import sweep
from diffusion_cli.config import COMMANDS, FIRST_WORDS, GRIDS, UNSWEPT, Config, did_you_mean
from diffusion_cli.errors import (
    INTERNAL_ERROR,
    NO_VALUE,
    USER_ERROR,
    MachineError,
    Problem,
    UsageError,
    lines_of,
)
from diffusion_cli.system.signals import end, end_at_signals
from diffusion_cli.system.terminal import guarded, lost_output, open_closed_streams, report
from diffusion_cli.system.untrusted import printable

BUG = (
    f"this is an error in diffuse {__version__}, not in your command; please report it with the lines above, the "
    "command, and the run's config.yaml"
)


@dataclass
class Request:
    """A parsed command line."""

    overrides: list[str] = field(default_factory=list)
    dirs: list[Path] = field(default_factory=list)
    help: bool = False
    show: bool = False
    multirun: bool = False


def main() -> None:
    """The `diffuse` entry point."""
    end_at_signals()
    open_closed_streams()
    code = run(sys.argv[1:])
    sys.stdout.flush()
    end_at_signals(code, line="")  # a signal during interpreter shutdown does not change the exit code
    if "RANK" in os.environ or "SLURM_STEP_ID" in os.environ:
        end(code)  # the launcher runs several processes
    sys.exit(code)


def run(words: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    0: done; 1: failed, or `data list` found a file missing or damaged; 2: invalid setting or file, or a machine
    failure; 75: stopped by a signal.
    """
    with guarded():
        try:
            code = _dispatch(list(words))
        except (UsageError, MachineError) as error:
            if os.environ.get("DIFFUSE_TRACEBACK"):
                raise
            return _report(*lines_of(error))
        except Exception as error:
            traceback.print_exc()
            place = config.place_of(error)
            return _report(f"{place}: error in a plugin, see above" if place else BUG, code=INTERNAL_ERROR)
        lost = lost_output()
        return _report(lost) if lost else code


def _report(*lines: str, code: int = USER_ERROR) -> int:
    """Print lines to stderr, and return an exit code."""
    report(*lines)
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(config.overview())
    elif words[0] == "--version":
        print(f"diffuse {__version__}")
    elif words[0] == "completion":
        asked = words[1:2] in (["--help"], ["-h"])
        print(config.COMPLETION_HELP if asked else config.completion_script("".join(words[1:2])))
    elif words[0] == "__complete":
        print("\n".join(config.complete(words[1:])))
    elif words[0] not in COMMANDS:
        raise UsageError(
            words[0], NO_VALUE, "unknown command", did_you_mean(words[0], [*COMMANDS, "completion"])
        )
    else:
        return _command(words[0], parse(words[0], _with_first_words(words[0], words[1:])))
    return 0


def _command(command: str, request: Request) -> int:
    if asked := config.groups_asked(command, request.overrides, request.dirs):
        pages = (config.group_help(command, group, request.overrides, request.dirs) for group in asked)
        print("\n\n".join(pages))
        return 0
    if request.help:
        print(config.command_help(command, request.overrides, request.dirs))
        return 0
    for line in config.overridden(command, request.overrides):
        print(f"diffuse: {printable(line)}", file=sys.stderr)
    if request.multirun and command in GRIDS:
        raise UsageError(
            "--multirun", NO_VALUE, f"{command} takes lists of values", "leave it out and write key=[...]"
        )
    if request.multirun and command in UNSWEPT:
        raise UsageError("--multirun", NO_VALUE, f"{command} has no sweeps", "leave it out")
    if request.multirun and request.show:
        swept = config.expand(command, request.overrides, request.dirs)
        config.load_sweep(swept, request.dirs)
        return _show([config.load(command, job, request.dirs) for job in swept.jobs])
    if request.multirun:
        return sweep(command, request.overrides, request.dirs)
    if command in GRIDS:
        variants = config.load_grid(command, request.overrides, request.dirs)
        return _show([variant.config for variant in variants]) if request.show else execute(command, variants)
    checked = config.load(command, request.overrides, request.dirs)
    return _show([checked]) if request.show else execute(command, checked)


def _show(configs: Sequence[Config]) -> int:
    print(
        yaml.safe_dump_all(
            [checked.model_dump() for checked in configs], sort_keys=False, allow_unicode=True
        ),
        end="",
    )
    return 0


def _with_first_words(command: str, words: list[str]) -> list[str]:
    """Expand the bare first words after a command to `key=value`."""
    keys = FIRST_WORDS.get(command, ())
    pairs = takewhile(
        lambda pair: not re.match(rf"-|{pair[0]}$|.*=", pair[1]), zip(keys, words, strict=False)
    )
    expanded = [f"{key}={word}" for key, word in pairs]
    return [*expanded, *words[len(expanded) :]]


def parse(command: str, words: Sequence[str]) -> Request:
    """Parse the words after a command.

    Raises UsageError for words that are neither flags nor `key=value`.
    """
    request = Request()
    problems: list[Problem] = []
    others: list[str] = []
    rest = iter(config.without_plugins(words))
    for word in rest:
        flag, _, value = word.partition("=")
        if word in ("--help", "-h"):
            request.help = True
        elif word in ("--multirun", "-m"):
            request.multirun = True
        elif flag == "--cfg":
            request.show = True
            if (value or next(rest, "")) != "job":
                problems.append(Problem(word, NO_VALUE, "its only value is job", "write --cfg job"))
        elif flag in ("--config-dir", "-cd"):
            given = value or next(rest, "")
            request.dirs.append(Path(given).expanduser())
            if not given or not request.dirs[-1].is_dir():
                problem = "no such folder" if given else "no folder given"
                remedy = "give a folder with <group>/<option>.yaml files"
                problems.append(Problem(f"--config-dir {given}".strip(), NO_VALUE, problem, remedy))
        else:
            others.append(word)
    request.overrides, misspelt = config.sort_words(command, others)
    problems += [] if request.help else misspelt
    if problems:
        raise UsageError.several(problems)
    return request
