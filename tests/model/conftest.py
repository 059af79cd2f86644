"""Tiny runs for the Python API."""

import shutil
import zipfile
from pathlib import Path

import pytest

STORED = Path(__file__).parents[1] / "stored_runs" / "format_4.zip"


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with zipfile.ZipFile(STORED) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def here(unpacked, tmp_path, monkeypatch, one_thread) -> Path:
    """A folder with tiny runs, which is the current one."""
    shutil.copytree(unpacked / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path
