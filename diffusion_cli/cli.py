"""`diffuse <command> [group=option] [key=value]`: parse the command line, print help, run the command.

This module does not import torch, so help and error messages are fast.
"""

import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from diffusion_cli import __version__, config
from diffusion_cli.commands.execution import execute
from diffusion_cli.commands.sweep import sweep
from diffusion_cli.config import COMMANDS, FIRST_WORDS, GRIDS, UNSWEPT, did_you_mean, plugins
from diffusion_cli.errors import (
    INTERNAL_ERROR,
    NO_VALUE,
    USER_ERROR,
    MachineError,
    Problem,
    UsageError,
    lines_of,
)
from diffusion_cli.system import fork_server
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
    ignored: list[Problem] = field(default_factory=list)
    """Problems of the words that a page of help leaves out."""
    multirun: bool = False
    cfg: str | None = None
    """Part of the configuration to print: a value of `--cfg`."""
    resolve: bool = False
    package: str | None = None
    info: str | None = None
    """Information of Hydra to print: a value of `--info`."""


def main() -> None:
    """The `diffuse` entry point."""
    end_at_signals()
    open_closed_streams()
    fork_server.allow()
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
            return _report(_culprit(error), code=INTERNAL_ERROR)
        lost = lost_output()
        return _report(lost) if lost else code


def _culprit(error: Exception) -> str:
    """Return the line about an error that is no mistake of the command: it is one of ours, or of a plugin."""
    if place := plugins.place_of(error):
        return f"{place}: error in a plugin, see above"
    if names := plugins.in_use():
        return f"plugins=[{','.join(names)}] or diffuse {__version__}: error, see above; try it without the plugin"
    return BUG


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
    asked = config.groups_asked(command, request.overrides, request.dirs)
    if asked or request.help:
        pages = [config.group_help(command, group, request.overrides, request.dirs) for group in asked]
        print("\n\n".join(pages or [config.command_help(command, request.overrides, request.dirs)]))
        for problem in (*request.ignored, *config.ignored_words(command, request.overrides, request.dirs)):
            print(f"diffuse: {printable(str(problem))}", file=sys.stderr)
        return 0
    for line in config.overridden(command, request.overrides):
        print(f"diffuse: {printable(line)}", file=sys.stderr)
    if request.multirun and command in GRIDS:
        raise UsageError(
            "--multirun", NO_VALUE, f"{command} takes lists of values", "leave it out and write key=[...]"
        )
    if request.multirun and command in UNSWEPT:
        raise UsageError("--multirun", NO_VALUE, f"{command} has no sweeps", "leave it out")
    if request.info is not None:
        print(config.info_text(command, request.overrides, request.dirs, request.info), end="")
        return 0
    if request.cfg is not None:
        text = config.config_text(
            command, request.overrides, request.dirs,
            cfg=request.cfg, resolve=request.resolve, package=request.package, multirun=request.multirun,
        )  # fmt: skip
        print(text, end="")
        return 0
    if request.multirun:
        return sweep(command, request.overrides, request.dirs)
    if command in GRIDS:
        return execute(command, config.load_grid(command, request.overrides, request.dirs)).code
    return execute(command, config.load(command, request.overrides, request.dirs)).code


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
    rest = deque(config.without_plugins(words))
    while rest:
        word = rest.popleft()
        flag, _, value = word.partition("=")
        if word in ("--help", "-h"):
            request.help = True
        elif word in ("--multirun", "-m", "hydra.mode=MULTIRUN"):
            request.multirun = True
        elif flag in ("--cfg", "-c"):
            request.cfg = value or _following(rest)
            problems += _not_among("--cfg", request.cfg, config.CFG)
        elif flag in ("--info", "-i"):
            request.info = value or _following(rest) or "all"
            problems += _not_among("--info", request.info, config.INFO)
        elif word == "--resolve":
            request.resolve = True
        elif flag in ("--package", "-p"):
            request.package = value or _following(rest)
            if not request.package:
                problems.append(Problem(flag, NO_VALUE, "no key given", "write --package model"))
        elif flag in ("--config-dir", "-cd"):
            given = value or (rest.popleft() if rest else "")
            request.dirs.append(Path(given).expanduser())
            if not given or not request.dirs[-1].is_dir():
                problem = "no such folder" if given else "no folder given"
                remedy = "give a folder with <group>/<option>.yaml files"
                problems.append(Problem(f"--config-dir {given}".strip(), NO_VALUE, problem, remedy))
        else:
            others.append(word)
    request.overrides, misspelt = config.sort_words(command, others)
    (request.ignored if request.help else problems).extend(misspelt)
    if request.cfg is None and (request.resolve or request.package is not None):
        flag = "--resolve" if request.resolve else "--package"
        problems.append(Problem(flag, NO_VALUE, "applies only with --cfg", "add --cfg job"))
    if problems:
        raise UsageError.several(problems)
    return request


def _following(rest: deque[str]) -> str:
    """Take the value of a flag from the words after it; empty if a flag or `key=value` follows."""
    is_value = rest and "=" not in rest[0] and not rest[0].startswith("-")
    return rest.popleft() if is_value else ""


def _not_among(flag: str, value: str, values: Sequence[str]) -> list[Problem]:
    """The problem of a flag with a value that it does not have."""
    if value in values:
        return []
    shown = f"{flag} {value}".strip()
    return [Problem(shown, NO_VALUE, "unknown value" if value else "no value", did_you_mean(value, values))]
