"""Machines with and without a GPU."""

import pytest

from diffusion_cli.config import recipe


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: True)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: False)
