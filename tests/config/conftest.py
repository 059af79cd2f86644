"""Machines with and without a GPU, and a working folder with a plugin."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_cli.config import plugins, recipe
from helpers.plugins import EXAMPLE, forget_modules

FILES = {
    "bars/extra.py": """
from os import system
from diffusion_cli.samplers import DDIM

class Renamed(DDIM):
    \"\"\"DDIM by another name.\"\"\"
""",
    "bars/conf/sampler/renamed.yaml": """# DDIM by another name.
_target_: bars.extra.Renamed
""",
}


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: True)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: False)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working folder with the package of the docs and two more files, which nothing allows yet."""
    shutil.copytree(EXAMPLE / "bars", tmp_path / "bars")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(plugins.VARIABLE, "")
    forget_modules()
    yield tmp_path
    forget_modules()
