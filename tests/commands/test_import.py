"""`diffuse import`: a run that every command reads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffusion_cli.cli import run
from diffusion_cli.commands import import_run
from diffusion_cli.config import CONF, build
from diffusion_cli.convert import diffusers_scheduler
from diffusion_cli.convert.base import Autoencoder, Network, PretrainedModel, Weights
from diffusion_cli.runs.load import load_model


def option(name: str, **words: Any) -> dict[str, Any]:
    """The node of an option of `model=`, with other values."""
    return yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) | words


DIT = option("dit_tiny", hidden_size=16, depth=1, num_heads=2)
KL = option("kl_tiny", channels=8, channel_mult=[1, 2], num_res_blocks=1, latent_channels=2, norm_groups=4)
CPU = torch.device("cpu")


def random_weights(network: Network) -> Weights:
    """Random values for every weight, so that no layer is switched off."""
    generator = torch.Generator().manual_seed(0)
    state = build(network.node, network.shape, network.num_classes).state_dict()
    return {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def pretrained(
    file: Path, shape: tuple[int, ...] = (1, 8, 8), classes: int | None = None, **words: Any
) -> PretrainedModel:
    """A small pretrained denoiser."""
    network = Network(node=DIT | {"class_conditional": classes is not None}, shape=shape, num_classes=classes)
    file.write_bytes(b"weights")
    return PretrainedModel(
        kind="DDPMPipeline of tests",
        network=network,
        weights=lambda: random_weights(network),
        process=diffusers_scheduler.read({"_class_name": "DDIMScheduler", "clip_sample": False}),
        files={"unet/weights": file},
        licence="mit",
        **words,
    )


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Makes the command read a given model."""

    def give(model: PretrainedModel) -> None:
        monkeypatch.setattr(import_run, "read_source", lambda *_: model)

    give(pretrained(tmp_path / "file"))
    monkeypatch.chdir(tmp_path)
    return give


def test_an_imported_run_has_the_weights_and_the_process_of_its_source(source, tmp_path, capsys):
    assert run(["import", "source=some/cats"]) == 0
    shown = capsys.readouterr().out
    assert (
        "outputs/cats: DDPMPipeline of tests, images 1x8x8, no classes, schedule=linear, parameterization=eps"
        in shown
    )
    assert "diffuse sample run=cats sampler=ddim sampler.spacing=leading clip_x0=false" in shown
    for kind in ("ema", "raw"):
        loaded = load_model(Path("outputs/cats"), kind, CPU)
        network = Network(node=DIT, shape=(1, 8, 8))
        for name, tensor in random_weights(network).items():
            assert torch.equal(loaded.denoiser.network.state_dict()[name], tensor)
    origin = loaded.info.origin
    assert origin is not None
    assert (origin.source, origin.kind, origin.licence) == ("some/cats", "DDPMPipeline of tests", "mit")
    assert [*origin.sha256] == ["unet/weights"]


def test_every_command_reads_an_imported_run(source, tmp_path, capsys):
    assert run(["import", "source=cats"]) == 0
    small = ["steps=2", "device=cpu"]
    assert run(["sample", "run=cats", "num_samples=3", "output=samples", *small]) == 0
    image = "samples/000000.png"
    assert run(["edit", "run=cats", "edit=inpaint", f"input={image}", *small]) == 0
    words = ["dataset=digits", "num_samples=80", "metric=[fid]", "cache_dir=cache"]
    assert run(["eval", "run=cats", *words, *small]) == 0
    assert run(["report", "run=cats"]) == 0
    assert run(["runs"]) == 0
    assert "cats  imported cats  diffusion  0" in capsys.readouterr().out
    (report,) = json.loads(Path("outputs/cats/metrics.json").read_text())
    protocol = report["results"][0]["protocol"]
    assert protocol["sampling"]["origin"]["source"] == "cats"
    assert "imported from cats" in Path("outputs/cats/report.html").read_text()


def refused(capsys: Any, *words: str) -> str:
    """The one line that a command prints before it fails."""
    capsys.readouterr()
    assert run([*words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("diffuse: ")


def test_what_needs_a_dataset_or_a_training_answers_in_one_line(source, capsys):
    assert run(["import", "source=cats"]) == 0
    before = sorted(Path("outputs").rglob("*"))
    line = refused(capsys, "edit", "run=cats", "edit=inpaint", "input=val", "num_images=2", "device=cpu")
    assert (
        line == "outputs/cats: was imported without a dataset; import it again with dataset=, or give files"
    )
    line = refused(capsys, "eval", "run=cats", "metric=bits_per_dim", "device=cpu", "cache_dir=cache")
    assert line == (
        "outputs/cats: was imported without a dataset; set dataset=, or import it again with dataset="
    )
    line = refused(capsys, "train", "run=cats")
    assert line.startswith("run=cats: was imported from cats, so it has no training to continue")
    assert "diffuse train init.run=cats" in line
    line = refused(capsys, "train", "name=cats", "trainer=cpu")
    assert line == "name=cats: is an imported model; choose another name; init.run= starts from its weights"
    line = refused(capsys, "import", "source=cats")
    assert line == "name=cats: outputs/cats exists already; choose another name"
    assert sorted(Path("outputs").rglob("*")) == before


def test_the_dataset_gives_the_names_of_the_classes(source, tmp_path, capsys):
    source(pretrained(tmp_path / "file", classes=10))
    assert run(["import", "source=x", "name=digits", "dataset=digits"]) == 0
    loaded = load_model(Path("outputs/digits"), "ema", CPU)
    assert loaded.info.class_names == tuple(map(str, range(10)))
    assert loaded.info.config.dataset is not None
    words = ["num_images=2", "steps=2", "device=cpu"]
    assert run(["edit", "run=digits", "edit=inpaint", "input=val", "label=all", *words]) == 0


def test_classes_without_names_are_numbered(source, tmp_path):
    source(pretrained(tmp_path / "file", classes=3))
    assert run(["import", "source=x", "name=x"]) == 0
    info = load_model(Path("outputs/x"), "ema", CPU).info
    assert (info.class_names, info.stated_class_names) == (("0", "1", "2"), None)
    source(pretrained(tmp_path / "file", classes=3, class_names=("a", "b", "c")))
    assert run(["import", "source=x", "name=named"]) == 0
    assert load_model(Path("outputs/named"), "ema", CPU).info.stated_class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("shape", "classes", "line"),
    [
        ((1, 16, 16), None, "dataset=digits: its images have shape [1, 8, 8], but those of the model have [1, 16, 16]"),
        ((1, 8, 8), 7, "dataset=digits: has 10 classes, but the model has 7"),
    ],
)  # fmt: skip
def test_another_dataset_is_refused(source, tmp_path, capsys, shape, classes, line):
    source(pretrained(tmp_path / "file", shape, classes))
    assert refused(capsys, "import", "source=x", "dataset=digits").startswith(line)
    assert not Path("outputs").exists()


def test_a_latent_model_brings_its_autoencoder(source, tmp_path):
    network = Network(node=KL, shape=(3, 16, 16))
    autoencoder = Autoencoder(
        network=network, weights=lambda: random_weights(network), mean=(0.0, 0.1), std=(2.0, 3.0)
    )
    source(pretrained(tmp_path / "file", (2, 8, 8), autoencoder=autoencoder))
    assert run(["import", "source=x"]) == 0
    space: Any = load_model(Path("outputs/x"), "ema", CPU).space
    assert (space.mean, space.std) == ([0.0, 0.1], [2.0, 3.0])
    for name, tensor in random_weights(network).items():
        assert torch.equal(space.autoencoder.state_dict()[name], tensor)
    assert run(["sample", "run=x", "num_samples=1", "steps=2", "device=cpu"]) == 0


def test_schedule_and_parameterization_of_the_command_replace_those_of_the_source(source):
    words = ["schedule=cosine", "schedule.num_timesteps=50", "parameterization=v"]
    assert run(["import", "source=x", *words]) == 0
    config = yaml.safe_load(Path("outputs/x/config.yaml").read_text())
    assert config["schedule"]["num_timesteps"] == 50
    assert config["parameterization"]["_target_"].endswith(".V")


def test_a_process_that_contradicts_itself_is_refused_unless_the_command_changes_it(source, tmp_path, capsys):
    model = pretrained(tmp_path / "file")
    assert model.process is not None
    betas = {
        "_target_": "diffusion_cli.diffusion.schedules.Betas",
        "betas": [0.1, 1.0],
        "zero_terminal_snr": True,
    }
    source(replace(model, process=replace(model.process, schedule=betas)))
    line = refused(capsys, "import", "source=x")
    assert line.startswith("source=x: parameterization=eps: undefined where alpha = 0: ")
    assert not Path("outputs").exists()
    assert run(["import", "source=x", "parameterization=v"]) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state | {"extra": torch.zeros(1)}, "extra is not part of the network"),
        (lambda state: {name: value[:1] for name, value in state.items()}, "has shape"),
        (lambda state: dict(list(state.items())[1:]), "is missing"),
    ],
)
def test_weights_of_another_network_are_refused_and_leave_nothing(source, tmp_path, capsys, change, reason):
    model = pretrained(tmp_path / "file")
    source(replace(model, weights=lambda: change(random_weights(model.network))))
    line = refused(capsys, "import", "source=x")
    assert line.startswith("source=x: ")
    assert reason in line
    assert not Path("outputs").exists()


def test_a_network_of_any_size_takes_no_memory(source, tmp_path, capsys):
    model = pretrained(tmp_path / "file")
    huge = replace(model.network, node=DIT | {"hidden_size": 2**14, "depth": 1000})
    source(replace(model, network=huge))
    assert "cannot be built" in refused(capsys, "import", "source=x")


def test_a_run_is_no_source(source, tmp_path, capsys):
    assert run(["import", "source=x"]) == 0
    capsys.readouterr()
    line = refused(capsys, "import", "source=outputs/x")
    assert line == "source=outputs/x: is a run of diffuse already; use diffuse train init.run=outputs/x"


def test_a_failure_while_writing_leaves_nothing(source, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("diffusion_cli.runs.imported.save", full)
    assert run(["import", "source=x"]) == 2
    assert list(Path("outputs").rglob("*")) == []
