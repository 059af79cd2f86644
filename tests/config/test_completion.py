"""Completion follows the words before: their options, the values of a key, and lists."""

import subprocess
import sys

import pytest

from diffusion_cli.config import complete


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["train", "model=dit_tiny", "model.hidden"], "model.hidden_size="),
        (["train", "trainer.accelerator=c"], "trainer.accelerator=cuda"),
        (["train", "dataset.flip="], "dataset.flip=true"),
        (["train", "precision=b"], "precision=bf16"),
        (["sample", "clip_x0=f"], "clip_x0=false"),
        (["eval", "metric=["], "metric=[fid"),
        (["eval", "metric=[fid,k"], "metric=[fid,kid"),
        (["train", "-m", "schedule=linear,co"], "schedule=linear,cosine"),
        (["train", "-m", "hydra/launcher=l"], "hydra/launcher=local"),
        (["train", "-m", "hydra/sweeper="], "hydra/sweeper=basic"),
        (["train", "--in"], "--info"),
        (["train", "--cfg", ""], "hydra"),
        (["train", "--cfg=j"], "--cfg=job"),
        (["train", "-i", "def"], "defaults-tree"),
        (["train", "model=dit_tiny", "--cfg", "job", "-p", "model.hid"], "model.hidden_size"),
        (["train", "--cfg", "job", "sched"], "schedule="),
        (["train", "++see"], "++seed="),
        (["train", "++dataset.flip="], "++dataset.flip=true"),
        (["train", "-m", "hydra.sweep"], "hydra.sweeper."),
        (["train", "-m", "hydra.sweeper.max"], "hydra.sweeper.max_batch_size="),
        (["train", "-m", "launcher=slurm", "launcher.par"], "launcher.partition="),
        (["train", "-m", "hydra/launcher=slurm", "hydra.launcher."], "hydra.launcher.partition="),
    ],
)
def test_completion_follows_the_words_before(words, some):
    found = complete(words)
    assert some in found
    assert all(word.startswith(words[-1]) for word in found)


def test_keys_of_options_that_are_not_chosen_are_left_out():
    assert complete(["train", "model=dit_tiny", "model.channel_m"]) == []
    assert "metric=[fid,fid" not in complete(["eval", "metric=[fid,f"])


def test_options_in_folders_of_the_user_are_completed(tmp_path):
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text("_target_: diffusion_cli.samplers.DDIM\n")
    words = ["sample", "--config-dir", str(tmp_path)]
    assert "sampler=mine" in complete([*words, "sampler=mi"])
    assert "sampler.eta=" in complete([*words, "sampler=mine", "sampler.et"])


def test_installed_launchers_and_sweepers_are_completed():
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert "launcher=joblib" in complete(["train", "launcher=j"])
    assert "hydra/sweeper=optuna" in complete(["train", "hydra/sweeper=o"])
    assert "hydra/sweeper/sampler=random" in complete(["train", "hydra/sweeper/sampler=r"])


def test_settings_of_an_installed_sweeper_are_completed():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["train", "-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=nsgaii"]
    assert "hydra.sweeper.n_trials=" in complete([*words, "hydra.sweeper.n_"])
    assert "hydra.sweeper.sampler.population_size=" in complete([*words, "hydra.sweeper.sampler."])
    assert complete(["train", "-m", "launcher=joblib", "launcher.n_"]) == ["launcher.n_jobs="]


@pytest.mark.parametrize(
    "words", [["hydra/sweeper=nowhere", "hydra.sweeper."], ["launcher=nowhere", "launcher."]]
)
def test_an_unknown_sweeper_or_launcher_has_no_keys(words):
    assert [word for word in complete(["train", "-m", *words]) if word.endswith("=")] == []


def test_folders_follow_the_flag_for_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deeds.txt").touch()
    assert complete(["train", "--config-dir", "de"]) == ["deep/"]
    assert complete(["train", "-cd=de"]) == ["-cd=deep/"]


def test_words_in_quotes_are_read_without_them(project):
    assert "sampler=renamed" in complete(["sample", "'plugins=[bars]'", "sampler=ren"])
    assert "metric=[fid" in complete(["eval", "'metric=[f"])


def test_completion_imports_no_torch():
    code = (
        "import sys; from diffusion_cli.config import complete; complete(['train', 'optimizer=sgd', 'optimizer.']); "
        "complete(['train', 'optimizer=sgd', 'optimizer.nesterov=']); complete(['train', 'hydra/launcher=']); "
        "complete(['train', 'trainer.accelerator=']); complete(['train', '-m', 'hydra.sweeper.']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
