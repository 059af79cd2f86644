"""Exports as safetensors are read back as they were, and damaged or hostile ones are refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_cli.cli import run
from diffusion_cli.commands.train_setup import set_up
from diffusion_cli.export import Safetensors
from diffusion_cli.runs.load import load_model
from helpers import TINY
from helpers.exports import DIT, KL, autoencoder, denoiser, option
from helpers.recipes import train_config

SHORT = [word for word in TINY[1:] if not word.startswith(("name=", "model."))]
CPU = torch.device("cpu")
OBJECTIVE = option("objective", "simple")
MODELS = {
    "pixels": lambda: denoiser(
        schedule=option("schedule", "cosine"), parameterization="v", objective=OBJECTIVE
    ),
    "six channels": lambda: denoiser(shape=(6, 8, 8), objective=OBJECTIVE),
    "classes": lambda: denoiser(classes=3, objective=OBJECTIVE),
    "latents": lambda: denoiser(DIT, classes=3, latent=KL, objective=OBJECTIVE),
}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def exported(model: Any, name: str = "st") -> Path:
    folder = Path(name)
    folder.mkdir()
    Safetensors().write(model, folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_that_is_imported_is_exported_with_the_same_bytes(kind, capsys):
    model = MODELS[kind]()
    folder = exported(model)
    assert run(["import", "source=st", "name=x"]) == 0
    assert f"{type(model.denoiser.network).__name__} of diffuse" in capsys.readouterr().out
    assert run(["export", "run=x", "format=safetensors", "output=again"]) == 0
    files = sorted(folder.iterdir())
    assert len(files) == (2 if kind == "latents" else 1)
    for file in files:
        assert Path("again", file.name).read_bytes() == file.read_bytes(), file
    loaded = load_model(Path("outputs/x"), "ema", CPU)
    assert loaded.info.form == model.info.form
    assert loaded.info.class_names == model.info.class_names
    assert loaded.denoiser.schedule.equals(model.denoiser.schedule)


def test_training_starts_from_the_weights_the_process_and_the_latents_of_an_export(tmp_path):
    model = denoiser(DIT, classes=10, latent=KL, parameterization="v", objective=OBJECTIVE)
    exported(model)
    words = [*SHORT, "output_dir=runs", "cache_dir=cache", "init.pretrained=st"]
    setup = set_up(train_config(*words), tmp_path / "runs" / "new", None)
    ours, theirs = setup.task.model.network.state_dict(), model.denoiser.network.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if "y_embedder" not in name)
    info = setup.info
    assert info.config.parameterization == option("parameterization", "v")
    assert info.latent is not None
    assert (info.latent.mean, info.latent.std) == ([0.5, -0.2], [1.5, 0.7])


def test_an_autoencoder_gives_its_latents(tmp_path):
    model = autoencoder()
    exported(model)
    assert run(["import", "source=st"]) == 0
    assert run(["export", "run=st", "format=safetensors", "output=again"]) == 0
    assert Path("again/model.safetensors").read_bytes() == Path("st/model.safetensors").read_bytes()
    words = [*SHORT, "model=dit_tiny", "output_dir=runs", "cache_dir=cache", "latent.pretrained=st"]
    setup = set_up(train_config(*words), tmp_path / "runs" / "new", None)
    assert setup.latent is not None
    ours = setup.latent.latents.autoencoder.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.network.state_dict().items())


def test_its_file_leads_to_the_folder(capsys):
    exported(denoiser(objective=OBJECTIVE))
    assert run(["import", "source=st/model.safetensors"]) == 2
    assert capsys.readouterr().err.endswith("is a file of a folder that describes a model; give source=st\n")


def test_a_dataset_of_another_format_is_refused(capsys):
    model = denoiser(objective=OBJECTIVE)
    form = {"kind": "raster", "dtype": "uint16", "low": [0.0], "high": [65535.0], "file": "png"}
    described(exported(model), lambda value: value | {"sample_format": form})
    assert run(["import", "source=st", "dataset=digits"]) == 2
    assert "dataset=digits: its images have " in capsys.readouterr().err


def described(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description of an export."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        value = json.loads(opened.metadata()["diffuse"])
    save_file(load_file(file), file, {"diffuse": json.dumps(change(value))})


def configured(**nodes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda value: value | {"config": value["config"] | nodes}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a class of another package": (configured(model={"_target_": "os.system", "command": "touch harmed"}), "os.system"),
    "a class of another group": (
        configured(schedule={"_target_": "diffusion_cli.samplers.DDIM"}),
        "schedule._target_=diffusion_cli.samplers.DDIM",
    ),
    "a table of any size": (
        configured(schedule=option("schedule", "linear", num_timesteps=10**12)),
        "model.safetensors: its description has a number larger than 1000000",
    ),
    "an image of any size": (lambda value: value | {"shape": [1, 10**6, 10**6]}, "shape is too large for an image"),
    "a network of any size": (configured(model=DIT | {"hidden_size": 2**14, "depth": 1000}), "cannot be built"),
    "another network": (configured(model=DIT), "is missing"),
    "no schedule": (
        lambda value: value | {"config": {"model": DIT, "objective": OBJECTIVE}},
        "config.schedule is missing",
    ),
    "another size of pixels": (lambda value: value | {"shape": [1, 4, 4]}, "progressive resolution was not finished"),
    "no object": (lambda _: [1], "its description is not a JSON object"),
    "an unknown format": (lambda value: value | {"sample_format": {"kind": "x"}}, "form.kind=x: no such format"),
    "no label dropout": (
        configured(objective={key: value for key, value in OBJECTIVE.items() if key != "label_dropout"}),
        "objective.label_dropout: missing; choose another model",
    ),
    "the objective of an autoencoder": (
        configured(objective=option("objective", "autoencoder")),
        "objective.label_dropout: missing; choose another model",
    ),
    "another task": (configured(model=KL), "is for task=autoencoder, but its description has task=diffusion"),
    "other classes": (lambda value: value | {"num_classes": 3, "class_names": ["a"]}, "does not name as many classes"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_hostile_description_is_refused_in_one_line_and_leaves_nothing(what, capsys):
    change, line = WRONG[what]
    described(exported(denoiser(objective=OBJECTIVE)), change)
    # The schedule of the source is built to check this parameterization.
    assert run(["import", "source=st", "parameterization=x0"]) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith("diffuse: source=st: ")
    assert line in shown
    assert sorted(path.name for path in Path().iterdir()) == ["st"]


def test_a_denoiser_is_no_autoencoder(capsys):
    described(exported(denoiser(objective=OBJECTIVE)), lambda value: value | {"task": "autoencoder"})
    assert run(["import", "source=st"]) == 2
    line = "its network is for task=diffusion, but its description has task=autoencoder; choose another model"
    assert capsys.readouterr().err == f"diffuse: source=st: {line}\n"
    assert not Path("outputs").exists()


def test_weights_without_a_description_are_refused(capsys):
    exported(denoiser(objective=OBJECTIVE))
    save_file(load_file("st/model.safetensors"), "st/model.safetensors")
    assert run(["import", "source=st"]) == 2
    line = "model.safetensors has no description of a model; give a folder that diffuse export wrote"
    assert capsys.readouterr().err == f"diffuse: source=st: {line}\n"
