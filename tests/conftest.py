"""Shared fixtures: reference arrays, and a denoiser in closed form."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Workers share the cores, and their threads would wait for each other. Child processes inherit the variable.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.data import GaussianMixture
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.schedules import (
    VE,
    VP,
    Cosine,
    EDMSchedule,
    Linear,
    Rectified,
    ScaledLinear,
    Schedule,
    Sigmoid,
    SubVP,
)
from helpers.forked import start_forked

REFERENCE = Path(__file__).parent / "reference"
LONGEST = (
    "test_slurm.py", "test_distributed.py", "test_tracked_runs.py", "test_site.py", "test_plugin_project.py",
    "test_resume.py", "test_new.py", "test_damaged_checkpoints.py",
)  # fmt: skip
"""Files that take longest, by their waiting for processes; with few tests, `loadfile` would start them last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that none keeps one worker busy at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def no_allowed_plugins(monkeypatch) -> None:
    """Modules that one test allows are not those of the next; child processes inherit the variable."""
    monkeypatch.setenv("DIFFUSE_PLUGINS", "")


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Arrays of independent implementations; see tests/reference/README.md."""

    @cache
    def load(name: str) -> dict[str, Tensor]:
        with np.load(REFERENCE / f"{name}.npz") as arrays:
            return {
                key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "if"
            }

    return load


def pytest_addoption(parser):
    parser.addoption("--agreement", help="file for a table of the differences from the reference arrays")


@pytest.fixture(scope="session")
def agree(request) -> Iterator[Callable[[str, Tensor, Tensor, float], None]]:
    """Assert that arrays differ by at most a tolerance, absolute or `relative`; `--agreement` writes a table."""
    rows: dict[str, tuple[float, float, str]] = {}

    def check(name: str, mine: Tensor, theirs: Tensor, tolerance: float, relative: bool = False) -> None:
        difference = (mine - theirs.reshape(mine.shape)).abs()
        if relative:
            difference = difference / theirs.reshape(mine.shape).abs().clamp(min=1e-300)
        error = difference.max().item()
        rows[name] = (error, tolerance, "relative" if relative else "absolute")
        assert error <= tolerance, f"{name}: differs by {error:.3g}, allowed {tolerance:.3g}"

    yield check
    path = request.config.getoption("--agreement")
    if path:
        lines = [
            f"| `{name}` | {error:.1e} | {tolerance:.0e} | {kind} |"
            for name, (error, tolerance, kind) in sorted(rows.items())
        ]
        head = ["| array | largest difference | tolerance | kind |", "|---|---|---|---|"]
        Path(path).write_text("\n".join(head + lines) + "\n")


@pytest.fixture(scope="session", autouse=True)
def no_nohup() -> None:
    """Restore the default action of SIGHUP, which processes of the tests inherit as ignored under nohup."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory) -> Iterator[None]:
    """Record the data paths of the tests in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def forked(monkeypatch) -> None:
    """Fork the processes of a command from a server; their output is not captured."""
    monkeypatch.setattr("diffusion_cli.system.distributed.start_processes", start_forked)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: tiny networks run faster, also on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def mixture(reference) -> GaussianMixture:
    arrays = reference("gmm")
    means, stds, weights = (arrays[key].tolist() for key in ("means", "stds", "weights"))
    return GaussianMixture("", means=means, stds=stds, weights=weights, shape=[1, 2, 2], size=64, seed=0)


@pytest.fixture(scope="session")
def schedules() -> dict[str, Schedule]:
    return {
        "linear": Linear(),
        "scaled_linear": ScaledLinear(),
        "cosine": Cosine(),
        "sigmoid": Sigmoid(),
        "zero_snr": Linear(zero_terminal_snr=True),
        "vp": VP(),
        "subvp": SubVP(),
        "ve": VE(),
        "edm": EDMSchedule(),
        "rectified": Rectified(),
    }


@pytest.fixture(scope="session")
def exact(mixture) -> Callable:
    """The perfect denoiser of the mixture; `gain` scales its eps, so that clipping has an effect."""

    def build(schedule: Schedule, gain: float = 1.0) -> Callable[[Tensor, Tensor], Prediction]:
        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = schedule(t)
            x0 = mixture.denoise(x_t, alpha, sigma)
            eps = (x_t - alpha * x0) / sigma
            if gain != 1:
                eps = gain * eps
                x0 = (x_t - sigma * eps) / alpha
            return Prediction(x0, eps, sigma)

        return denoise

    return build
