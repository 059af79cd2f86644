"""Runs that are finished or stopped, and a disk that fills up."""

import shutil

import pytest

from helpers import state, train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of 14 steps that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, "max_steps=14") == 0
    return state(folder)


@pytest.fixture(scope="session")
def half(tmp_path_factory):
    """A run stopped at step 10, with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("half")
    assert train(folder, "max_steps=10") == 0
    return folder


@pytest.fixture
def begun(half, tmp_path):
    """A copy of it, to be spoilt."""
    shutil.copytree(half, tmp_path / "outputs")
    return tmp_path / "outputs"
