"""The package without the modules and calls that only Unix has, as on Windows."""

import subprocess
import sys

import pytest

from helpers import TINY, state

pytestmark = pytest.mark.slow

WITHOUT = r"""
import builtins, importlib, os, pkgutil, signal, sys, types

MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
CALLS = {
    "os": '''O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK chown fchmod fchown fork forkpty getegid geteuid getgid
        getloadavg getpgid getuid killpg mkfifo nice openpty posix_fadvise posix_fallocate pread pwrite
        register_at_fork sched_getaffinity setpgid setsid statvfs sync sysconf uname wait''',
    "signal": '''SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 SIG_BLOCK
        SIG_SETMASK SIG_UNBLOCK alarm pthread_kill pthread_sigmask setitimer sigwait''',
}


def reduced(module):
    copy = types.ModuleType(module.__name__)
    names = CALLS[module.__name__].split()
    vars(copy).update({name: value for name, value in vars(module).items() if name not in names})
    return copy


WINDOWS = {"os": reduced(os), "signal": reduced(signal)}
WINDOWS["os"].name = "nt"
real = builtins.__import__


def imported(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").startswith("diffusion_cli"):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in WINDOWS:
            return WINDOWS[name]
    return real(name, globals, locals, fromlist, level)


builtins.__import__ = imported
from diffusion_cli.system.signals import STOPPING

assert [number.name for number in STOPPING] == ["SIGINT", "SIGTERM"]
"""
MODULES = """
import diffusion_cli
for module in pkgutil.walk_packages(diffusion_cli.__path__, "diffusion_cli."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("imported", sum(name.startswith("diffusion_cli") for name in sys.modules))
"""
COMMANDS = """
from diffusion_cli.cli import run
for line in sys.argv[1:]:
    assert run(line.split()) == 0, line
"""


def output(code: str, *arguments: str) -> str:
    """The output of a process without the calls of Unix."""
    command = [sys.executable, "-c", WITHOUT + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_is_imported():
    assert int(output(MODULES).split()[1]) > 200


def test_a_run_is_trained_listed_and_sampled(tmp_path):
    tiny = " ".join([*TINY, f"output_dir={tmp_path}"])
    printed = output(
        COMMANDS,
        "--help",
        "train --help",
        f"{tiny} max_steps=3",
        f"{tiny} max_steps=5",  # continues
        f"runs output_dir={tmp_path}",
        f"sample run={tmp_path}/tiny num_samples=2 batch_size=auto",
    )
    assert "tiny" in printed
    assert state(tmp_path)["global_step"] == 5
    assert not (tmp_path / "tiny" / ".lock").exists()
