"""`diffuse train run=NAME`: a run continues from its folder alone, and as with its whole command."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from diffusion_cli.cli import run
from diffusion_cli.config import TrainConfig, complete, load
from diffusion_cli.config.continued import may_change
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.system.locks import run_lock
from diffusion_cli.system.trusted_paths import remember_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of a run, as far as its configuration goes."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return written(tmp_path / "outputs" / "demo", ["max_steps=50", "seed=7", "trainer=cpu", "sampler=ddpm"])


def written(folder: Path, words: list[str]) -> Path:
    config = load("train", [*words, "name=demo", "output_dir=elsewhere"])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    return folder


def continued(*words: str) -> TrainConfig:
    config = load("train", words)
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize("by_path", [False, True])
def test_the_configuration_comes_from_the_folder(folder, by_path, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    config = continued("run=outputs/demo") if by_path else continued("run=demo")
    assert (config.name, config.output_dir) == ("demo", "outputs")
    assert (config.seed, config.max_steps) == (7, 50)
    assert config.trainer["accelerator"] == "cpu"
    assert config.sampler is not None
    assert config.sampler["_target_"].endswith("DDPM")
    assert config.run is None


def test_budgets_and_intervals_may_be_given_beside_it(folder):
    config = continued(
        f"run={folder}", "max_steps=90", "max_time=1h", "preview_every=5", "trainer.devices=2", "logger=csv",
        "keep_last=1", "accumulate_grad_batches=2",
    )  # fmt: skip
    assert (config.max_steps, config.max_time, config.preview_every) == (90, "1h", 5)
    assert (config.trainer["accelerator"], config.trainer["devices"]) == ("cpu", 2)
    assert list(config.logger) == ["csv"]
    assert config.lr_schedule["decay_steps"] == 90  # it was the whole budget
    assert continued(f"run={folder}", "max_epochs=3").lr_schedule["decay_steps"] == 50


def test_a_constant_rate_stays_constant(tmp_path):
    folder = written(tmp_path / "demo", ["lr_schedule=constant", "max_steps=5"])
    assert continued(f"run={folder}", "max_steps=9").lr_schedule["_target_"].endswith("ConstantRate")


@pytest.mark.parametrize(
    "word", ["seed=1", "optimizer.lr=0.1", "model=unet_small", "model.channels=8", "dataset=mnist", "name=other",
             "batch_size=8", "experiment=ddpm_cifar10"]
)  # fmt: skip
def test_what_would_make_it_another_run_is_refused(folder, word):
    with pytest.raises(UsageError) as mistakes:
        load("train", [f"run={folder}", word, "max_steps=60"])
    assert mistakes.value.lines == (
        f"{word}: cannot change for run={folder}; leave it out, or start a new run with name=",
    )


def test_the_keys_that_may_change_are_those_of_a_whole_command():
    assert all(
        map(may_change, ["max_steps", "trainer.devices", "eval_every", "lr_schedule.decay_steps", "logger"])
    )
    assert not any(
        map(may_change, ["optimizer", "optimizer.lr", "dataset.path", "ema.decay", "name", "nonsense"])
    )


def test_a_run_without_a_checkpoint_names_the_process_that_trains_it(tmp_path):
    with run_lock(tmp_path / "two"):
        with pytest.raises(UsageError) as error:
            load("train", ["run=two", f"output_dir={tmp_path}"])
        problem = "run=two: has no checkpoint yet, and is being trained by process"
        assert str(error.value).startswith(f"{problem} {os.getpid()} on host ")
        assert str(error.value).endswith("; wait for its first checkpoint")
    with pytest.raises(UsageError, match="run=two: no such run"):
        load("train", ["run=two", f"output_dir={tmp_path}"])


def test_wrong_words_are_said_as_ever(folder, tmp_path):
    with pytest.raises(UsageError, match="max_stesp=3: "):
        load("train", [f"run={folder}", "max_stesp=3"])
    with pytest.raises(UsageError, match=r"trainer.device=3: unknown key; did you mean trainer.devices\?"):
        load("train", [f"run={folder}", "trainer.device=3"])
    with pytest.raises(UsageError, match="max_steps=0: must be greater than 0"):
        load("train", [f"run={folder}", "max_steps=0"])
    with pytest.raises(UsageError, match="run=nowhere: no such run, here or in outputs"):
        load("train", ["run=nowhere"])
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UsageError, match="has no checkpoint yet; repeat the command that started it"):
        load("train", [f"run={tmp_path / 'early'}"])
    (folder / "config.yaml").unlink()
    with pytest.raises(UsageError, match="No such file or directory; repeat its full"):
        load("train", [f"run={folder}"])


def test_the_paths_of_a_stranger_s_run_are_not_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    data = ["dataset=array", f"dataset.path={tmp_path}/private.npy", f"cache_dir={tmp_path}/bin"]
    measured = ["metric=[fid,mmd,clip_score]", f"metric.mmd.weights={tmp_path}/clip"]
    folder = written(tmp_path / "gift", [*data, *measured])
    with pytest.raises(UsageError) as mistakes:
        load("train", [f"run={folder}"])
    assert mistakes.value.lines == (
        f"cache_dir={tmp_path}/bin: path from the config of {folder}, which you did not train on this machine; "
        "add cache_dir=<path>",
        f"dataset.path={tmp_path}/private.npy: path from the config of {folder}, which you did not "
        f"train on this machine; "
        "repeat its full training command with name=gift",
        f"metric.mmd.weights={tmp_path}/clip: path from the config of {folder}, which you did not train "
        f"on this machine; "
        "add metric.mmd.weights=<path>",
    )
    remember_run(folder)
    assert continued(f"run={folder}").cache_dir == f"{tmp_path}/bin"


def test_a_stranger_s_run_starts_no_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = written(tmp_path / "gift", ["trainer.devices=1000000", "trainer.num_nodes=9"])
    given = continued(f"run={folder}")
    assert (given.trainer["devices"], given.trainer["num_nodes"]) == (None, None)
    assert continued(f"run={folder}", "trainer.devices=2").trainer["devices"] == 2
    remember_run(folder)
    assert continued(f"run={folder}").trainer["devices"] == 1_000_000


def test_it_is_a_key_like_others():
    assert "run=" in complete(["train", "ru"])
    config = load("train", ["run=null"])
    assert isinstance(config, TrainConfig)


def test_it_continues_as_with_the_whole_command(tmp_path, capsys):
    words = ["train", "name=tiny", "model.channels=4", "model.channel_mult=[1]", "model.num_res_blocks=1",
             "model.norm_groups=2", "model.num_heads=1", "model.head_channels=null", "model.attention_resolutions=[]",
             "batch_size=8", "trainer=cpu", "logger=csv", "precision=fp32"]  # fmt: skip
    for place in ("whole", "alone"):
        assert run([*words, f"output_dir={tmp_path / place}", "max_steps=2"]) == 0
    assert run([*words, f"output_dir={tmp_path / 'whole'}", "max_steps=4"]) == 0
    assert run(["train", "run=tiny", f"output_dir={tmp_path / 'alone'}", "max_steps=4"]) == 0
    whole, alone = (read(tmp_path / place / "tiny" / LAST).state for place in ("whole", "alone"))
    assert alone["global_step"] == 4
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, alone["state_dict"][key]), key
    assert run([*words, f"output_dir={tmp_path / 'whole'}", "seed=3"]) == 2
    line = f"continue with: diffuse train run={tmp_path / 'whole' / 'tiny'}, or choose another name"
    assert line in capsys.readouterr().err
