"""Trainings with `ema.profile=power`: snapshots, resume, processes, and commands with weights of other lengths."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

import diffusion_cli as diffuse
from diffusion_cli.cli import run
from diffusion_cli.commands import train as command
from diffusion_cli.commands.train_callbacks import weight_averages
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.load import load_model
from diffusion_cli.runs.snapshots import FOLDER, StoredAverages
from diffusion_cli.system.tensors import read_tensors
from diffusion_cli.training.ema import EMA, PowerAverage
from helpers import TINY, assert_same, distance, state

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
POWER = ("ema.profile=power", "ema.snapshot_every=2")
DIRECT = (0.04, 0.075, 0.15)
"""Lengths that the fixture also tracks directly, without snapshots."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run `tiny` of 32 steps."""
    folder = tmp_path_factory.mktemp("power")

    def more(config, network, offload) -> list[EMA]:
        direct = [EMA(network, PowerAverage(length), offload, key=f"direct_{length}") for length in DIRECT]
        return [*weight_averages(config, network, offload), *direct]

    snapshots = command.snapshots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "weight_averages", more)
        patch.setattr(
            command, "snapshots", lambda config, averages, run: snapshots(config, averages[:2], run)
        )
        assert steps(folder, 32) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "tiny" / FOLDER).iterdir())}


def losses(folder: Path, name: str = "tiny") -> list[float]:
    with (folder / name / "metrics.csv").open(newline="") as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]


def steps(folder: Path, number: int, *words: str) -> int:
    """Train `tiny` for a number of steps."""
    kept = [word for word in TINY if not word.startswith(("optimizer.lr=", "validate_every="))]
    own = ("optimizer.lr=0.01", "validate_every=32", f"max_steps={number}", f"output_dir={folder}")
    return run([*kept, *POWER, *own, *words])


def test_a_length_from_snapshots_equals_the_average_of_the_training(made):
    checkpoint = read(made / "tiny" / LAST)
    stored = StoredAverages(made / "tiny", checkpoint)
    for length in DIRECT:
        direct = checkpoint.state["callbacks"][f"direct_{length}"]["network"]
        error = distance(direct, stored.reconstruct(length).state)
        assert error < 1e-3
        assert error < 0.05 * distance(direct, checkpoint.weights("ema"))


def test_a_run_taken_up_again_equals_one_without_a_stop(made, tmp_path):
    """A kill after the last checkpoint leaves later snapshots, which are written again."""
    assert steps(tmp_path, 15) == 0
    stale = tmp_path / "tiny" / FOLDER / "step_00000017.safetensors"
    shutil.copy(next(iter(stale.parent.iterdir())), stale)
    assert steps(tmp_path, 32) == 0
    assert files(tmp_path) == files(made)
    for key in ("EMA", "EMA_0.1"):
        assert_same(state(tmp_path)["callbacks"][key], state(made)["callbacks"][key])


@pytest.mark.parametrize("word", ["trainer.offload_ema=true", "trainer.strategy=fsdp"])
def test_two_processes_write_the_snapshots_of_one(made, tmp_path, monkeypatch, word):
    monkeypatch.setattr("diffusion_cli.system.machine.usable_cores", lambda: 4)
    assert steps(tmp_path, 4, "trainer.devices=2", word) == 0
    assert [*files(tmp_path)] == ["step_00000002.safetensors", "step_00000004.safetensors"]
    for name in files(tmp_path):
        one, other = (read_tensors(folder / "tiny" / FOLDER / name) for folder in (made, tmp_path))
        assert distance(one, other) < 1e-3


def test_the_command_prints_the_validation_loss_of_each_length(made, capsys):
    assert run(["ema", f"run={made / 'tiny'}", "length=[0.05,0.2]", "device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny at step 32: averages of lengths 0.05 and 0.1, 15 snapshots")
    assert lines[1].startswith("Lengths from 0.0")
    rows = {line.split()[0]: line.split()[2] for line in lines[3:]}
    assert rows["0.05"] == f"{losses(made)[-1]:.5f}"  # the one of the training
    assert rows["0.2"] > rows["0.05"]
    assert run(["ema", f"run={made / 'tiny'}", "length=0.001"]) == 2
    assert capsys.readouterr().err.startswith("diffuse: length=0.001: the snapshots of")


def test_a_run_without_snapshots_is_named_by_its_key(made, tmp_path, capsys):
    shutil.copytree(made / "tiny", tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / FOLDER)
    assert run(["ema", f"run={tmp_path / 'tiny'}", "device=cpu"]) == 2
    line = f"diffuse: run: {tmp_path / 'tiny'} has no snapshots of the averages before step 32; restore its folder ema"
    assert capsys.readouterr().err.startswith(line)


def test_averages_of_another_network_are_refused_in_one_line(made, tmp_path, capsys):
    shutil.copytree(made / "tiny", tmp_path / "tiny")
    foreign = state(made)
    foreign["callbacks"]["EMA"]["network"]["other"] = torch.zeros(1)
    torch.save(foreign, tmp_path / "tiny" / LAST)
    assert run(["ema", f"run={tmp_path / 'tiny'}", "length=0.05", "device=cpu"]) == 2
    line = "diffuse: the checkpoint of step 32: its weights do not fit the model; choose another run\n"
    assert capsys.readouterr().err.endswith(line)


def test_the_validation_loss_of_a_student_is_that_of_its_own_teacher(tmp_path, capsys):
    """The teacher of the last stage is in the checkpoint; it is not the student."""
    words = ("parameterization=v", f"output_dir={tmp_path}")
    assert steps(tmp_path, 4, *words) == 0
    distilled = (
        "objective=progressive_distillation",
        "objective.steps=2",
        "objective.stage_steps=4",
        "validate_every=8",
    )
    assert steps(tmp_path, 8, *words, *distilled, f"init.run={tmp_path / 'tiny'}", "name=student") == 0
    capsys.readouterr()
    assert run(["ema", f"run={tmp_path / 'student'}", "length=0.05", "device=cpu"]) == 0
    assert capsys.readouterr().out.split()[-1] == f"{losses(tmp_path, 'student')[-1]:.5f}"


def test_samples_are_of_the_length_and_record_it(made, tmp_path):
    shutil.copytree(made / "tiny", tmp_path / "tiny")
    words = [f"run={tmp_path / 'tiny'}", "num_samples=2", "steps=2"]
    for more in ([], ["ema_length=0.15"], ["ema_length=0.05"]):
        assert run(["sample", *words, *more]) == 0
    folders = [*(tmp_path / "tiny" / "samples").iterdir()]
    assert len(folders) == 3
    pixels = {
        length: diffuse.load(tmp_path / "tiny", ema_length=length).sample(2, steps=2)
        for length in (None, 0.15, 0.05)
    }
    assert torch.equal(pixels[None], pixels[0.05])  # pyright: ignore[reportArgumentType]
    assert not torch.equal(pixels[None], pixels[0.15])  # pyright: ignore[reportArgumentType]


def test_lengths_are_compared_with_each_other(made, tmp_path, capsys):
    shutil.copytree(made / "tiny", tmp_path / "tiny")
    words = [
        f"run={tmp_path / 'tiny'}",
        "num_samples=40",
        "steps=2",
        "features=classifier",
        "force=true",
        "batch_size=40",
    ]
    assert run(["compare", *words, "ema_length=[0.05,0.001]"]) == 2
    assert capsys.readouterr().err.startswith("diffuse: ema_length=0.001: the snapshots of")
    assert run(["compare", *words, "ema_length=[0.05,0.15]"]) == 0
    table = capsys.readouterr().out
    assert "| ema_length | frechet_classifier |" in table
    assert table.count("| 0.05 |") == table.count("| 0.15 |") == 1


def test_adapters_have_averages_of_any_length(made, tmp_path):
    pytest.importorskip("peft")
    chosen = ("name=", "model.", "optimizer.lr", "lr_schedule.warm")
    words = [word for word in TINY if not word.startswith(chosen)]
    words += [
        f"init.run={made / 'tiny'}",
        "name=tuned",
        "lora.rank=2",
        "optimizer.lr=0.01",
        f"output_dir={tmp_path}",
    ]
    assert run([*words, *POWER, "max_steps=12"]) == 0
    stored = read_tensors(tmp_path / "tuned" / FOLDER / "step_00000002.safetensors")
    assert all(".lora_" in name for name in stored)
    one, other = (
        load_model(tmp_path / "tuned", "ema", torch.device("cpu"), None, length).denoiser.network.state_dict()
        for length in (None, 0.1)
    )
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {f"{name.partition('/')[2].partition('.lora_')[0]}.weight" for name in stored}
