"""Install the wheel in fresh environments, and run the commands with the lowest and the newest dependencies.

    python scripts/matrix.py                                  # each python3.11 to python3.14 of PATH
    python scripts/matrix.py --python python3.12 /opt/python  # these interpreters
    python scripts/matrix.py --dependencies lowest            # the lower bounds of pyproject.toml only
    python scripts/matrix.py --extras hf wandb --tests        # with these extras; also the fast tests

The first Python installs both the lowest and the newest versions; the others install the newest, because old releases
have no wheels for a later Python. An environment takes up to 7 GB of disk (2 GB with the CPU build of torch), and is
removed before the next is made. pip reads its settings, such as PIP_EXTRA_INDEX_URL, from the environment. The exit
code is 1 if a command fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
Dependencies = Literal["lowest", "newest"]
COMMANDS = (
    ("train", "name=smoke", "max_steps=20", "log_every=5", "preview_steps=2", "preview_every=10"),
    ("sample", "run=smoke", "steps=2", "num_samples=4"),
    ("edit", "run=smoke", "edit=inpaint", "input=val", "num_images=2", "steps=2", "output=edits"),
    ("eval", "run=smoke", "steps=2", "num_samples=70", "cache_dir=cache", "features.steps=20"),
    ("report", "run=smoke"),
)
"""Arguments of `diffuse` that use the whole program in a minute."""
HELP = """import sys
from diffusion_cli import cli
sys.exit(cli.run(["train", "--help"]) or "torch" in sys.modules)"""
"""Program that shows the help, and fails if torch was imported."""
LIMIT = 3600  # seconds of a command


@dataclass(frozen=True)
class Cell:
    """An interpreter, and the versions of its dependencies."""

    python: str
    dependencies: Dependencies


def cells(pythons: Sequence[str], dependencies: Sequence[Dependencies]) -> Iterator[Cell]:
    """Yield the lowest versions for the first interpreter, and the newest for each."""
    if "lowest" in dependencies:
        yield Cell(pythons[0], "lowest")
    if "newest" in dependencies:
        yield from (Cell(python, "newest") for python in pythons)


def works(python: str) -> bool:
    """Return whether an interpreter starts; a name on PATH may lead to none, as those of pyenv do."""
    path = shutil.which(python)
    return path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0


def read_project() -> dict[str, Any]:
    """Return the table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(project: dict[str, Any], extras: Iterable[str] | None = None) -> list[Requirement]:
    """Return the dependencies of a project and of some extras, or of all, but for the project itself."""
    optional = project["optional-dependencies"]
    chosen = optional if extras is None else extras
    words = [*project["dependencies"], *(word for extra in chosen for word in optional[extra])]
    return [found for word in words if (found := Requirement(word)).name != project["name"]]


def lower_bounds(project: dict[str, Any], extras: Iterable[str] | None = None) -> dict[str, str]:
    """Return the lowest version that a project and some extras, or all, accept of each package.

    Raises:
        ValueError: a package has no lower bound, or two.
    """
    bounds: dict[str, str] = {}
    for requirement in requirements(project, extras):
        lowest = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        if len(lowest) != 1 or bounds.setdefault(requirement.name, lowest[0]) != lowest[0]:
            raise ValueError(f"{requirement}: a package needs one lower bound, the same in every extra")
    return bounds


def call(words: Sequence[str | Path], folder: Path) -> str:
    """Run a command in a folder, without the packages and caches of this process, and return what it printed.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if key not in own}
    env |= {"PYTHONSAFEPATH": "1", "XDG_STATE_HOME": str(folder / "state")}
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=env, timeout=LIMIT, check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout as an installation from a package index would."""
    call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(cell: Cell, wheel: Path, extras: Sequence[str], tests: bool, folder: Path) -> str:
    """Make an environment in a folder, run the commands in it, and return its versions of Python, torch and NumPy."""
    environment, work = folder / "environment", folder / "work"
    work.mkdir()
    call([cell.python, "-m", "venv", environment], folder)
    python = environment / "bin" / "python"
    wanted = [*extras, *(["test"] if tests else [])]
    constraints = folder / "constraints.txt"
    if cell.dependencies == "lowest":
        bounds = lower_bounds(read_project(), wanted)
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in bounds.items()))
    else:
        constraints.touch()
    named = f"{wheel}[{','.join(wanted)}]" if wanted else wheel
    call([python, "-m", "pip", "install", "--quiet", "-c", constraints, named], folder)
    call([python, "-c", HELP], work)
    for words in COMMANDS:
        call([environment / "bin" / "diffuse", *words], work)
    if tests:
        call(
            [
                environment / "bin" / "pytest",
                "-q",
                "-n",
                "2",
                "--dist",
                "loadfile",
                "-m",
                "not slow",
                ROOT / "tests",
            ],
            work,
        )
    show = "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"
    return "Python {}, torch {}, NumPy {}".format(*call([python, "-c", show], work).split())


def main(words: Sequence[str] | None = None) -> int:
    """Check each environment, and print one line for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=None, help="interpreters (default: those of PATH)")
    parser.add_argument(
        "--dependencies", nargs="+", choices=("lowest", "newest"), default=("lowest", "newest"),
        help="versions of the dependencies (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--extras",
        nargs="+",
        default=(),
        choices=tuple(read_project()["optional-dependencies"]),
        help="extras to install",
    )
    parser.add_argument("--tests", action="store_true", help="run of the fast tests, with the extra test")
    given = parser.parse_args(words)
    pythons = given.python or [name for name in PYTHONS if works(name)]
    if missing := [name for name in pythons if not works(name)]:
        parser.error(f"--python: {', '.join(missing)} does not start")
    if not pythons:
        parser.error(f"no Python found; put one of {', '.join(PYTHONS)} on PATH, or give --python")
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build_wheel(Path(temporary))
        for cell in cells(pythons, given.dependencies):
            started = time.monotonic()
            with tempfile.TemporaryDirectory(dir=temporary) as folder:
                try:
                    outcome = check(cell, wheel, given.extras, given.tests, Path(folder))
                except subprocess.CalledProcessError as error:
                    failed += 1
                    print(error.stdout)
                    outcome = f"failed: {' '.join(error.cmd)}"
            print(
                f"{cell.dependencies} dependencies, {cell.python}: {outcome} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
