"""`diffuse train init.run=RUN`: network and noise process come from the run, unless chosen."""

from pathlib import Path

import pytest
import yaml

from diffusion_cli.config import load
from diffusion_cli.config.continued import folder_of
from diffusion_cli.convert import read_autoencoder
from diffusion_cli.convert.diffusers_folder import SAVED
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.find import find_run
from helpers.recipes import train_config

CLASS = "_target_"


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A folder with the configuration of the run `demo`, and the working folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "outputs" / "demo", ["experiment=edm_digits", "model.channels=48"])
    return tmp_path / "outputs"


def written(folder: Path, words: list[str]) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(train_config(*words).model_dump()))
    return folder


@pytest.mark.parametrize("dataset", ["digits", "mnist", "points"])
def test_network_and_process_come_from_the_source(runs, dataset):
    config, source = (
        train_config("init.run=demo", f"dataset={dataset}"),
        yaml.safe_load((runs / "demo" / "config.yaml").read_text()),
    )
    for group in ("model", "schedule", "parameterization", "objective", "time_sampling", "sampler"):
        assert getattr(config, group) == source[group], group
    assert config.batch_size == train_config(f"dataset={dataset}").batch_size
    assert config.name == f"{dataset}-run_demo"


def test_keys_apply_on_top_and_are_named(runs):
    config = train_config("init.run=demo", "model.dropout=0.25", "objective.label_dropout=0.2", "max_steps=3")
    assert config.model["channels"] == 48
    assert (config.model["dropout"], config.objective["label_dropout"]) == (0.25, 0.2)
    assert config.name == "digits-run_demo-dropout_0.25-label_dropout_0.2"


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["model=dit_tiny", "schedule=linear"], {"model", "schedule"}),
        (["experiment=ddpm_digits"], {"schedule"}),
    ],
)
def test_options_of_the_user_come_first(runs, words, chosen):
    config, other = train_config("init.run=demo", *words), train_config(*words)
    source = train_config("init.run=demo")
    for group in ("model", "schedule", "parameterization", "objective", "time_sampling"):
        assert getattr(config, group) == getattr(other if group in chosen else source, group), group


@pytest.mark.parametrize("experiment", ["trajectory_distillation", "progressive_distillation"])
def test_a_student_has_the_process_of_its_teacher_and_times_of_its_own(runs, experiment):
    config, source = train_config("init.run=demo", f"experiment={experiment}"), train_config("init.run=demo")
    for group in ("model", "schedule", "parameterization"):
        assert getattr(config, group) == getattr(source, group), group
    assert config.time_sampling == train_config("time_sampling=uniform").time_sampling


def test_values_of_an_experiment_apply_on_top(runs):
    config = train_config("init.run=demo", "experiment=iddpm_digits", "parameterization=eps")
    assert (config.model["channels"], config.model["learn_variance"]) == (48, True)
    assert config.name == "digits-cosine-iddpm_digits-hybrid-run_demo-parameterization_eps"


def test_values_of_an_experiment_that_the_source_lacks_are_named(runs, tmp_path):
    written(runs / "dit", ["model=dit_tiny"])
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "wide.yaml").write_text(
        "# @package _global_\nmodel:\n  channels: 64\n"
    )
    with pytest.raises(UsageError) as error:
        load("train", ["init.run=dit", "experiment=wide"], [tmp_path / "own"])
    assert error.value.lines == (
        "experiment=wide: sets model.channels, which the source of the weights lacks; choose model= too",
    )


def test_chosen_defaults_are_named_because_the_source_may_have_others(runs):
    names = {
        train_config("init.run=demo", *words).name for words in ([], ["model=unet_tiny"], ["schedule=cosine"])
    }
    assert names == {"digits-run_demo", "digits-run_demo-model_unet_tiny", "digits-cosine-run_demo"}


def test_own_images_need_no_other_network(runs, tmp_path):
    (tmp_path / "photos").mkdir()
    config = train_config("init.run=demo", "dataset=folder", "dataset.path=photos", "dataset.resolution=16")
    assert train_config("init.run=demo", "model=auto").model == config.model
    assert config.model["channels"] == 48
    assert not any(entry.startswith("model=") for entry in config.derived)
    assert config.name == "folder-path_photos-resolution_16-run_demo"


def test_a_started_run_does_not_read_its_source_again(runs):
    words = ["init.run=demo", "model.dropout=0.25"]
    before = train_config(*words)
    written(runs / str(before.name), words)
    written(runs / "other", ["model=dit_tiny"])
    (runs / "demo").rename(runs / "moved")
    (runs / "other").rename(runs / "demo")
    assert train_config(*words) == before
    assert train_config("init.run=demo").model["_target_"].endswith("DiT")


def test_a_latent_source_shares_its_latents(runs):
    written(runs / "latents", ["latent.run=ae"])
    assert train_config("init.run=latents").latent.run == "latents"
    assert train_config("init.run=latents", "latent.run=other").latent.run == "other"
    assert train_config("init.run=demo").latent.run is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["init.run=dem"], "init.run=dem: no such run, here or in outputs; "
         "use the path of its folder, or set output_dir"),
        (["init.run=demo", "model.dropot=0.1"], "model.dropot=0.1: unknown key; did you mean model.dropout?"),
        (["init.run=demo", "task=classifier"], "init.run=demo: was trained with task=diffusion; set task=diffusion"),
        (["init.run=ae"], "init.run=ae: was trained with task=autoencoder; set task=autoencoder"),
        (["init.step=3"], "init.step=3: applies only with init.run=; set init.run"),
        (["init.weights=raw"], "init.weights=raw: applies only with init.run=; set init.run"),
        (["init.freeze=[stem]"], "init.freeze=[stem]: would freeze random weights; "
         "set init.run or init.pretrained, or leave it out"),
        (["init.freeze=[]", "init.run=demo"], "init.freeze=[]: must be a list of 1 or more values or null"),
        (["init.weigths=raw"], "init.weigths=raw: unknown key; did you mean init.weights?"),
        (["run=demo", "init.run=ae"], "init.run=ae: conflicts with run=demo, which continues that run; "
         "leave one of them out"),
        (["init.run=model"], "init.run=model: is a model, not a run; use init.pretrained=model"),
        (["run=model"], "run=model: is a model, not a run; use init.pretrained=model"),
        (["init.pretrained=outputs/demo"], "init.pretrained=outputs/demo: is a run of diffuse already; "
         "use init.run=outputs/demo"),
        (["init.pretrained=google/ddpm-cat-256"], "init.pretrained=google/ddpm-cat-256: does not exist; "
         "give init.pretrained=hub:google/ddpm-cat-256"),
        (["init.pretrained=outputs/dem"], "init.pretrained=outputs/dem: does not exist; " + SAVED),
    ],
)  # fmt: skip
def test_wrong_sources_are_refused_in_one_line(runs, words, line):
    written(runs / "ae", ["task=autoencoder"])
    Path("model").mkdir()
    Path("model", "config.json").touch()
    with pytest.raises(UsageError) as error:
        load("train", words)
    assert [found for found in error.value.lines if "init" in found or "model" in found] == [line]


def test_a_run_comes_before_a_model_of_the_same_name(runs):
    Path("demo").mkdir()
    Path("demo", "config.json").touch()
    assert train_config("init.run=demo").model["channels"] == 48
    assert find_run("demo", "outputs") == Path("outputs", "demo")


@pytest.mark.parametrize("file", ["model_index.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("run", "diffuse import source=model"),
        ("guidance.run", "diffuse import source=model"),
        ("latent.run", "latent.pretrained=model"),
    ],
)
def test_a_model_in_place_of_a_run_is_named(tmp_path, monkeypatch, key, remedy, file):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model", file).touch()
    with pytest.raises(UsageError) as error:
        find_run("model", "outputs", key)
    assert str(error.value) == f"{key}=model: is a model, not a run; use {remedy}"


def test_an_export_in_place_of_a_run_to_continue_is_named(tmp_path):
    Path(tmp_path, "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"is a model, not a run; use init\.pretrained="):
        folder_of(str(tmp_path), "outputs")


def test_an_autoencoder_of_a_run_is_named_too(runs):
    with pytest.raises(UsageError, match=r"is a run of diffuse already; use latent\.run=outputs/demo"):
        read_autoencoder("outputs/demo", "latent.pretrained")


def test_a_stranger_names_no_class_and_no_path(runs, tmp_path):
    folder = written(
        tmp_path / "theirs",
        ["task=autoencoder", "objective.perceptual=lpips", "objective.lpips_weights=secret.pt"],
    )
    with pytest.raises(UsageError) as error:
        load("train", [f"init.run={folder}", "task=autoencoder"])
    (line,) = error.value.lines
    assert line.startswith("objective.lpips_weights=secret.pt: path from the config of ")
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    stored["model"] = {CLASS: "evil.Network"}
    stored["objective"] = train_config().objective
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(UsageError, match=r"evil\.Network: is not a class of an allowed plugin; add plugins="):
        load("train", [f"init.run={folder}"])
