"""C code of the package, compiled on the user's machine for its processor; never required."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from diffusion_cli.errors import MachineError
from diffusion_cli.system.files import atomic_write

FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=gnu11",
)  # fmt: skip
CACHE = "~/.cache/diffuse/native"
PROCESSOR = frozenset({
    "flags", "Features", "model", "model name", "cpu family", "vendor_id", "CPU part", "CPU implementer", "cpu", "isa",
    "uarch",
})  # fmt: skip
"""Lines of /proc/cpuinfo that `-march=native` may depend on."""
TIMEOUT = 60
"""Longest time of a compilation in seconds."""


@cache
def library(source: Path, *macros: str) -> ctypes.CDLL | None:
    """Return the functions of a C file, compiled with macros defined; None if this machine cannot compile it.

    The compiler is `$CC`, or `cc`. It takes about a second, once: the cache keeps the library for this source and
    processor, also for machines without a compiler that share the home folder. Import torch before, whose OpenMP the
    library then uses; on Windows it is not that of any compiler named `cc`, so there is no library.
    """
    if os.name == "nt":
        return None
    with suppress(subprocess.SubprocessError, ValueError):  # quotes in $CC that are not closed
        return _cached(source, macros) or _temporary(source, macros)
    return None


def _cached(source: Path, macros: tuple[str, ...]) -> ctypes.CDLL | None:
    """Return the library in the cache, compiled if it is missing; None without a compiler or a usable cache."""
    # The home folder may be full, read-only, writable by others, without programs (noexec), or unknown (RuntimeError).
    with suppress(OSError, MachineError, RuntimeError):
        path = _own_folder(Path(CACHE).expanduser()) / _name(source, macros)
        found = _loaded(path)
        if found is None and _has_compiler():
            with atomic_write(path) as temporary:
                _compile(source, macros, temporary)
            found = _loaded(path)
        return found
    return None


def _temporary(source: Path, macros: tuple[str, ...]) -> ctypes.CDLL | None:
    """Return the library from a folder that is removed at once; None without a compiler."""
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:
        if _has_compiler():
            path = Path(folder) / f"{source.stem}.so"
            _compile(source, macros, path)
            return _loaded(path)
    return None


def _own_folder(folder: Path) -> Path:
    """Create and return a folder that only this user can write; PermissionError if others can."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder}: others can write here")
    return folder


def _name(source: Path, macros: tuple[str, ...]) -> str:
    facts = [source.read_text(encoding="utf-8"), *FLAGS, *macros, platform.machine(), platform.processor()]
    with suppress(OSError):  # machines of a cluster may share the cache
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts += sorted({line for line in lines if line.partition(":")[0].strip() in PROCESSOR})
    return f"{source.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"


def _loaded(path: Path) -> ctypes.CDLL | None:
    """Return the functions of a library; None if the file is missing or damaged."""
    with suppress(OSError):
        return ctypes.CDLL(str(path))
    return None


def _command() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def _has_compiler() -> bool:
    return shutil.which(_command()[0]) is not None


def _compile(source: Path, macros: tuple[str, ...], path: Path) -> None:
    """Raises SubprocessError if the compiler fails, as one without OpenMP."""
    defined = [f"-D{macro}" for macro in macros]
    command = [*_command(), *FLAGS, *defined, str(source), "-o", str(path), "-lm"]
    silent = subprocess.DEVNULL
    subprocess.run(command, check=True, stdin=silent, stdout=silent, stderr=silent, timeout=TIMEOUT)
