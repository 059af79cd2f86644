"""A project of plugins outside of the checkout: it trains, survives a kill, samples and is evaluated and reported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.training import kill_training

PARTS = {
    "dataset": "squares", "model": "stack", "sampler": "memory", "metric": "brightness", "optimizer": "signs",
}  # fmt: skip
"""The options of the package `squares`, by group."""
TRAIN = [
    "train", "dataset=squares", "model=stack", "model.width=8", "model.depth=1", "sampler=memory", "optimizer=signs",
    "optimizer.lr=0.001",    "batch_size=16", "trainer=cpu", "checkpoint_every=5", "preview_steps=2", "name=run",
]  # fmt: skip
COMMANDS = """
import sys

from diffusion_cli import cli

for line in sys.argv[1:]:
    assert cli.run(line.split()) == 0, line
"""
"""Runs commands in one process."""
AUDIT = """
import sys

from diffusion_cli import cli
from diffusion_cli.commands import edit, eval, sample, train  # libraries import their own modules first

seen = []


def watch(event, arguments):
    if event in ("os.system", "subprocess.Popen", "os.exec") or (
        event == "import" and arguments[0].partition(".")[0] in ("squares", "stranger")
    ):
        seen.append((event, arguments[0]))


sys.addaudithook(watch)
for line in sys.argv[1:]:
    assert cli.run(line.split()) == 2, line
print("seen:", seen)
"""
"""Runs commands that are refused, and prints what they executed and imported of the modules that are not allowed."""


def diffuse(
    folder: Path, *words: str, code: int = 0, program: tuple[str, ...] = ("-m", "diffusion_cli")
) -> str:
    """Run `diffuse` in a process and return what it prints, errors included."""
    done = subprocess.run(
        [sys.executable, *program, *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder whose `diffuse.yaml` allows the package `squares`, with a run that was killed and continued."""
    folder = tmp_path_factory.mktemp("project")
    news = [f"new {group} {name}{' plugin=squares' * (name != 'squares')}" for group, name in PARTS.items()]
    diffuse(folder, *news, program=("-c", COMMANDS))
    (folder / "diffuse.yaml").write_text("plugins: [squares]\n")
    words = [*TRAIN, "plugins=[squares]", "max_steps=100000"]
    reached = kill_training(words, folder / "outputs" / "run", folder / "log")
    printed = diffuse(folder, *TRAIN, f"max_steps={reached + 10}")
    assert "10 of them now" in printed
    return folder


@pytest.mark.slow
def test_the_project_samples_is_evaluated_and_reported(project):
    commands = [
        "sample sampler=memory sampler.gamma=1.5 num_samples=4 steps=2",
        "eval metric=[brightness,is] features.steps=5 num_samples=80 steps=2",
        "report",
    ]
    assert "brightness" in diffuse(project, *commands, program=("-c", COMMANDS))
    page = (project / "outputs" / "run" / "report.html").read_text()
    assert "Stack" in page
    assert "brightness" in page
    assert "run" in diffuse(project, "runs")


@pytest.mark.slow
def test_without_the_plugin_the_line_says_what_to_allow(project, tmp_path):
    shutil.copytree(project / "outputs" / "run", tmp_path / "run")
    shutil.copytree(project / "squares", tmp_path / "squares")
    commands = ["sample run=run", "eval run=run", "edit run=run edit=img2img input=val"]
    printed = diffuse(tmp_path, *commands, program=("-c", AUDIT))
    refusal = "squares.stack.Stack is not a class of an allowed plugin; add plugins=[squares]"
    assert printed.count(refusal) == len(commands)
    assert "seen: []" in printed
    diffuse(tmp_path, "sample", "plugins=[squares]", "run=run", "steps=1", "num_samples=1")


@pytest.mark.slow
def test_a_checkpoint_of_a_stranger_runs_and_imports_nothing(project, tmp_path):
    shutil.copytree(project / "squares", tmp_path / "squares")
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')\n")
    commands = []
    for target in ("os.system", "subprocess.Popen", "stranger.Net", "squares.stack.nn.Linear"):
        shutil.copytree(project / "outputs" / "run", tmp_path / target)
        for path in (tmp_path / target).glob("checkpoints/*.ckpt"):
            checkpoint = torch.load(path, weights_only=True)
            checkpoint["diffuse"]["config"]["model"] = {"_target_": target, "command": "touch ran"}
            torch.save(checkpoint, path)
        commands += [f"{command} run={target}" for command in ("sample", "eval", "train")]
    printed = diffuse(tmp_path, *commands, program=("-c", AUDIT))
    assert "seen: []" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "ran").exists()
