"""`diffuse train init.run=RUN init.freeze=[...]`: the weights before, during and after training."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffusion_cli.cli import run
from diffusion_cli.commands.samples import weights_record
from diffusion_cli.commands.train import train
from diffusion_cli.commands.train_setup import TrainingSetup, set_up
from diffusion_cli.runs.checkpoint import LAST, Checkpoint, read
from diffusion_cli.runs.load import load_model
from helpers import TINY, assert_same
from helpers.latents import refused
from helpers.recipes import train_config

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SHORT = [word for word in TINY[1:] if not word.startswith(("name=", "model."))]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The folder of a run `tiny` of five steps, class-conditional."""
    folder = tmp_path_factory.mktemp("source")
    assert run([*TINY, f"output_dir={folder}", "max_steps=5", "model.class_conditional=true"]) == 0
    return folder


@pytest.fixture
def runs(source, tmp_path) -> Path:
    """A folder with a copy of the run."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path


def start(runs: Path, *words: str) -> TrainingSetup:
    config = train_config(*SHORT, f"output_dir={runs}", "init.run=tiny", *words)
    return set_up(config, runs / str(config.name), None)


def checkpoint(runs: Path, name: str) -> Checkpoint:
    return read(runs / name / LAST)


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_training_starts_from_exactly_the_weights_of_the_run(runs, kind):
    setup = start(runs, f"init.weights={kind}", "init.step=5")
    stored = checkpoint(runs, "tiny")
    assert_same(dict(setup.task.model.network.state_dict()), dict(stored.weights(kind)))
    init = setup.info.init
    assert init is not None
    assert (init.source, init.kind, init.step, init.weights) == ("tiny", "run", 5, kind)
    assert (init.taken, init.fresh) == (init.total, [])
    assert str(init) == f"init.run=tiny (step 5, {kind}): {init.total} of {init.total} tensors"


def test_other_data_keep_what_fits(runs):
    np.save(runs / "colour.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    setup = start(runs, "dataset=array", f"dataset.path={runs}/colour.npy", "model.class_conditional=false")
    init, network = setup.info.init, setup.task.model.network
    assert init is not None
    assert init.fresh == []
    stem = checkpoint(runs, "tiny").weights("ema")["stem.weight"]
    assert torch.equal(network.get_parameter("stem.weight"), stem.expand(-1, 3, 3, 3) / 3)


def test_attention_stays_at_its_level_for_images_of_another_size(runs, capsys):
    np.save(runs / "large.npy", np.zeros((20, 16, 16), dtype=np.uint8))
    words = [*SHORT, f"output_dir={runs}", "max_steps=1"]
    assert run(["train", *words, "name=seen", "model.attention_resolutions=[4]"]) == 0
    words += ["init.run=seen", "name=large", "dataset=array", f"dataset.path={runs}/large.npy"]
    capsys.readouterr()
    assert run(["train", *words]) == 0
    assert "of the weights come from it" not in capsys.readouterr().err
    stored = checkpoint(runs, "large").info
    assert stored.init is not None
    assert (stored.init.taken, stored.init.fresh) == (stored.init.total, [])
    assert stored.config.model["attention_resolutions"] == [8]
    assert yaml.safe_load((runs / "large" / "config.yaml").read_text())["model"] == stored.config.model
    assert run(["train", *words, "max_steps=2"]) == 0
    chosen = train_config(*words, "name=other", "model.attention_resolutions=[16]")
    assert set_up(chosen, runs / "other", None).config.model["attention_resolutions"] == [16]


def test_another_number_of_levels_keeps_those_that_both_have(runs):
    config = train_config(
        *SHORT, f"output_dir={runs}", "name=seen", "max_steps=1", "model.attention_resolutions=[8,4]"
    )
    assert train(config) == 0
    fewer = train_config(*SHORT, f"output_dir={runs}", "init.run=seen", "name=few", "model.channel_mult=[1]")
    assert set_up(fewer, runs / "few", None).config.model["attention_resolutions"] == [8]


def test_few_weights_of_the_source_are_a_warning_with_the_key(runs, capsys):
    start(runs, "name=wide", "model.channels=16")
    lines = [line for line in capsys.readouterr().err.splitlines() if "weights come" in line]
    assert len(lines) == 1
    assert lines[0].startswith("diffuse: init.run=tiny: only ")
    assert lines[0].endswith("% of the weights come from it; model.channels=16, the source has 8")
    start(runs, "name=dropout", "model.dropout=0.1")
    assert "of the weights come from it" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "optimizer", ["lion", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "muon"))]
)
def test_frozen_weights_stay_equal_also_after_a_resume_without_the_source(runs, optimizer, capsys):
    words = [*SHORT, f"output_dir={runs}", "init.run=tiny", "init.freeze=[time_mlp,'down.*']", "name=tuned"]
    words += [f"optimizer={optimizer}", "optimizer.weight_decay=0.1"]
    before = checkpoint(runs, "tiny").weights("ema")
    assert run(["train", *words, "max_steps=3"]) == 0
    assert " parameters trained, " in capsys.readouterr().err
    shutil.rmtree(runs / "tiny")
    assert run(["train", *words, "max_steps=5"]) == 0
    assert run(["train", f"run={runs}/tuned", "max_steps=6"]) == 0
    stored = checkpoint(runs, "tuned")
    assert stored.info.init is not None
    assert (stored.step, stored.info.init.source) == (6, "tiny")
    for kind in ("raw", "ema"):
        now = stored.weights(kind)
        equal = {name for name, weight in before.items() if torch.equal(weight, now[name])}
        assert equal == {name for name in before if name.startswith(("time_mlp.", "down."))}
    (state,) = stored.state["optimizer_states"]
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"])
    assert len(state["state"]) == len(before) - len(equal)
    record = weights_record(runs / "tuned", load_model(runs / "tuned", "ema", CPU), "ema")
    assert record["init"] == stored.info.init.model_dump(exclude={"taken", "total", "fresh", "adapted"})


def test_the_report_has_the_source_and_another_source_is_another_run(runs, capsys):
    words = [*SHORT, f"output_dir={runs}", "init.run=tiny", "name=tuned", "max_steps=1"]
    assert run(["train", *words]) == 0
    assert run(["report", f"run={runs}/tuned"]) == 0
    assert "init.run=tiny (step 5, ema): " in (runs / "tuned" / "report.html").read_text()
    shutil.copytree(runs / "tiny", runs / "other")
    assert run(["train", *words, "init.run=other"]) == 2
    refused(capsys, f"init.run=other: the run in {runs}/tuned has tiny")
    assert run(["train", *words, "init.freeze=[time_mlp,down.*]"]) == 2
    refused(capsys, f"init.freeze=[time_mlp,down.*]: the run in {runs}/tuned has no init.freeze")
    assert run(["train", *words, "name=tiny"]) == 2
    assert f"init.run=tiny: the run in {runs}/tiny has no init.run\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model=dit_tiny"], "init.run=tiny: none of its weights fits this network; leave out model="),
        (["init.step=3"], "init.step=3: {runs}/tiny has no such checkpoint; choose a step from: 5"),
        (["init.step=best"], "init.step=best: {runs}/tiny has no best checkpoint"),
        (["init.freeze=[steam]"], "init.freeze=steam: matches no parameter; did you mean stem"),
        (["init.freeze=[time_mlp,'*']"], "init.freeze=[time_mlp,*]: leaves nothing to train; freeze less"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line(runs, words, line, capsys):
    assert run(["train", *SHORT, f"output_dir={runs}", "init.run=tiny", "name=new", *words]) == 2
    refused(capsys, line.format(runs=runs))
    assert not (runs / "new" / "config.yaml").exists()


@pytest.mark.slow
def test_latents_and_their_scale_come_along(latent_runs, tmp_path, capsys):
    words = [
        *SHORT,
        f"output_dir={latent_runs}/o",
        f"cache_dir={latent_runs}/cache",
        "init.run=a",
        "name=tuned",
    ]
    assert run(["train", *words, "max_steps=2", "seed=3"]) == 0
    assert run(["train", *words, "max_steps=3", "seed=3"]) == 0
    theirs, ours = (checkpoint(latent_runs / "o", name).info.latent for name in ("a", "tuned"))
    assert theirs is not None
    assert ours is not None
    assert ours.source == "a"
    assert ours.model_copy(update={"source": theirs.source}) == theirs
    assert run(["train", *words, "name=new", "latent.run=pixels"]) == 2
    refused(capsys, "latent.run=pixels: was trained with task=diffusion; give a run of task=autoencoder")


@pytest.mark.slow
def test_a_discriminator_needs_its_layer(latent_runs, capsys):
    words = [*SHORT, f"output_dir={latent_runs}/o", "init.run=ae", "task=autoencoder"]
    words += ["objective.discriminator_start=0", "objective.discriminator_layers=1"]
    assert run(["train", *words, "init.freeze=[decoder]", "name=new"]) == 2
    refused(
        capsys, "init.freeze=decoder.conv_out: objective.discriminator_start needs gradients of this layer"
    )


def test_conditions_with_another_meaning_in_the_run_are_named(tmp_path):
    """A number of another range, and a condition image of another kind, whose tensors have equal shapes."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    for name, ages in {"young": np.arange(20.0), "old": np.arange(20.0, 40.0)}.items():
        np.savez(tmp_path / f"{name}.npz", images=pixels, age=ages)
    words = [*SHORT, f"output_dir={tmp_path}", "max_steps=1", "dataset=array", "dataset.label=age"]
    words += ["dataset.val_fraction=0"]
    blur = ["condition=image", "condition.of=blur", f"dataset.path={tmp_path}/young.npz"]
    model = [word for word in TINY if word.startswith("model.")]
    assert train(train_config(*words, *blur, *model, "name=first")) == 0
    words += ["init.run=first"]

    def fresh(*others: str) -> list[str]:
        config = train_config(*words, *others)
        init = set_up(config, tmp_path / str(config.name), None).info.init
        assert init is not None
        return init.fresh

    assert fresh(*blur, "condition.blur_sigma=1") == []
    assert fresh("condition=none", f"dataset.path={tmp_path}/young.npz") == []
    other = fresh("condition=image", "condition.of=edges", f"dataset.path={tmp_path}/old.npz")
    assert other[0] == "stem.weight (condition.of=blur in the source)"
    assert len(other) == 5
    for entry in other[1:]:
        assert entry.startswith("condition_embedding.attributes.number_age.mlp.")
        assert entry.endswith(" (0 to 19 in the source)")
