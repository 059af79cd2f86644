"""The examples of docs/extending.md work: added to a copy of the package, every command of the page runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
SHORT = {
    "train": ["max_steps=2", "preview_steps=2", "batch_size=4"],
    "sample": ["num_samples=2", "steps=2"],
    "eval": ["num_samples=80", "steps=2"],
    "compare": ["num_samples=80"],
}
LAWS = """
import torch
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.schedules import Rectified
from diffusion_cli.samplers import DDIM, GradientEstimation
from diffusion_cli.samplers.base import integrate

schedule = Rectified()

def denoise(x, t):  # exact for data from N(0, 0.25)
    alpha, sigma = schedule(t)
    x0 = 0.25 * alpha * x / (0.25 * alpha**2 + sigma**2)
    return Prediction(x0, (x - alpha * x0) / sigma, sigma)

def end(sampler, steps):
    *_, x = integrate(sampler, denoise, torch.ones(1, dtype=torch.float64), sampler.grid(steps), lambda: None)
    return x.item()

assert end(GradientEstimation(schedule, gamma=1), 10) == end(DDIM(schedule), 10)
for steps in (10, 20, 40):
    assert abs(end(GradientEstimation(schedule), steps) - 0.5) < abs(end(DDIM(schedule), steps) - 0.5)
"""
COMMANDS = """
import shlex, sys
from diffusion_cli.cli import run
for line in sys.argv[1:]:
    print("command:", line, flush=True)
    assert run(shlex.split(line)) == 0, line
"""


def test_the_sampler_of_the_readme_is_that_of_the_page() -> None:
    (block,) = re.findall(r"```python\nclass [^\n]+\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = [line for line in block.splitlines() if line]
    assert len(code) == 11
    assert [line for line in code if line not in PAGE.splitlines()] == []


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the files of the page."""
    root = tmp_path_factory.mktemp("extended")
    for folder in ("diffusion_cli", "conf"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in re.findall(r"```(?:python|yaml)\n# ([\w/.]+)\n(.*?)```", PAGE, re.DOTALL):
        file = root / name
        assert file.is_file() == (file.name == "__init__.py"), f"{name} exists already"
        with file.open("a") as stream:
            stream.write(text)
    return root


def run(root: Path, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_every_command_of_the_page_runs(extended: Path) -> None:
    commands = [
        shlex.split(line, comments=True)
        for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) == 7
    lines = [shlex.join([*words, *SHORT[words[0]]]) for _, *words in commands]
    _, *outputs = run(extended, "-c", COMMANDS, *lines).stdout.split("command: ")
    assert len(outputs) == len(commands)
    assert "gradient_estimation" in outputs[1]
    assert re.search(r"sliced_wasserstein_classifier +\d", outputs[-1])


@pytest.mark.slow
def test_the_sampler_is_ddim_at_gamma_1_and_nearer_to_the_solution_at_2(extended: Path) -> None:
    run(extended, "-c", LAWS)


@pytest.mark.slow
def test_a_wrong_value_of_a_new_option_is_refused(extended: Path) -> None:
    done = run(extended, "-m", "diffusion_cli", "train", "model=mlp", "model.depth=0", code=2)
    assert "model.depth=0" in done.stderr
