"""Trainings of few-step models: teachers in checkpoints, the start from another run, and their samples."""

from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.runs.checkpoint import LAST, read
from helpers import TINY, assert_same

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
OBJECTIVES = {
    "distilled": ["objective=consistency", "objective.guidance_scale=2", "objective.stage_steps=3"],
    "averaged": ["objective=consistency", "objective.target=ema"],
    "trajectories": ["objective=trajectory_distillation", "objective.steps=3"],
    "progressive": ["objective=progressive_distillation", "objective.steps=4", "objective.stage_steps=3"],
}
FEW = ["sampler=consistency", "preview_steps=2", "preview_every=2"]


def train(folder: Path, *words: str) -> int:
    return run([*TINY, f"output_dir={folder}", "model.class_conditional=true", "parameterization=v", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the run `start`, and one of eight steps for each of the objectives that begins from it."""
    folder = tmp_path_factory.mktemp("few")
    assert train(folder, "name=start", "max_steps=20") == 0
    for name, words in OBJECTIVES.items():
        assert train(folder, f"name={name}", "max_steps=8", f"init.run={folder / 'start'}", *words, *FEW) == 0
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stopped_run_continues_with_the_same_targets(folder, name) -> None:
    """Four of eight steps, in the middle of a stage: the weights and the teacher are those of eight at once."""
    start = [f"init.run={folder / 'start'}", *OBJECTIVES[name], *FEW]
    for steps in (4, 8):
        assert train(folder, f"name={name}_parts", f"max_steps={steps}", *start) == 0
    whole, parts = (read(folder / run / LAST).state for run in (name, f"{name}_parts"))
    for key in ("state_dict", "optimizer_states"):
        assert_same(whole[key], parts[key], key)
    for key in {"EMA", "Teacher"} & whole["callbacks"].keys():
        assert_same(whole["callbacks"][key], parts["callbacks"][key], key)
    assert ("Teacher" in whole["callbacks"]) == (name != "averaged")


def test_the_teacher_of_consistency_distillation_is_the_start(folder) -> None:
    start = read(folder / "start" / LAST).state["callbacks"]["EMA"]["network"]
    teacher = read(folder / "distilled" / LAST).state["callbacks"]["Teacher"]["network"]
    assert_same(dict(teacher), dict(start))


def test_few_steps_are_sampled_by_one_command(folder, capsys) -> None:
    words = ["sample", f"run={folder / 'distilled'}", "sampler=consistency", "num_samples=4", "label=all"]
    for steps in (1, 2):
        assert run([*words, f"steps={steps}"]) == 0
        assert f"{steps} network call" in capsys.readouterr().out
    assert run([*words, "steps=3", "sampler.levels=[1.0]"]) == 2
    assert "sampler.levels=[1.0]: has 1 level, but steps=3 needs 2" in capsys.readouterr().err


def test_a_sampler_that_does_not_suit_the_training_is_named(folder, capsys) -> None:
    def remarks(name: str, *words: str) -> str:
        assert run(["sample", f"run={folder / name}", "num_samples=1", "label=1", *words]) == 0
        return capsys.readouterr().err

    assert "the model was trained for sampler=consistency" in remarks("distilled", "sampler=ddim", "steps=2")
    assert "the model was not trained for it, as objective=trajectory_distillation does" in remarks(
        "start", "sampler=consistency", "steps=2"
    )
    assert "the model was distilled to take 1 to 4 steps" in remarks("progressive", "steps=5")
    assert "distilled" not in remarks("progressive", "steps=4")
    assert train(folder, "name=coupled", "coupling=ot", "max_steps=2", "preview_every=null") == 0
    assert "the model was trained with coupling=ot" in remarks("coupled", "sampler=ddpm", "steps=2")
    assert "coupling" not in remarks("coupled", "sampler=ddim", "steps=2")


def test_what_needs_the_mean_of_x0_is_refused_for_a_consistency_model(folder, capsys) -> None:
    assert run([*TINY, "task=classifier", "name=classifier", f"output_dir={folder}", "max_steps=1"]) == 0
    guidance = ["guidance=classifier", f"guidance.run={folder / 'classifier'}", "label=1"]
    mean = "needs the mean of x_0, but a consistency model predicts the end of a path"
    for words, line in (
        (["eval", "metric=flow_likelihood"], f"metric=flow_likelihood: {mean}"),
        (["eval", "metric=inversion"], f"metric=inversion: {mean}"),
        (["sample", "num_samples=1", *guidance], f"guidance=classifier: {mean}; use guidance=none"),
        (["edit", "edit=reconstruct", "input=val", "label=1"], f"edit=reconstruct: {mean}; use edit=img2img"),
        (["edit", "edit=interpolate", "input=val", "label=1"], f"edit=interpolate: {mean}"),
        (
            ["edit", "edit=anomaly", "edit.invert=true", "input=val", "label=1"],
            f"edit=anomaly: {mean}; set edit.invert=false",
        ),
        (["edit", "edit=attribute", "input=val", "label=1"], f"edit=attribute: {mean}"),
        (["edit", "edit=inpaint", "restoration=dps", "input=val", "label=1"], f"restoration=dps: {mean}"),
        (
            ["export", "format=diffusers", f"output={folder / 'out'}"],
            "format=diffusers: has no scheduler for consist",
        ),
    ):
        assert run([*words, f"run={folder / 'distilled'}"]) == 2
        assert line in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_edits_without_an_inversion_take_a_consistency_model(folder, capsys) -> None:
    words = [f"run={folder / 'distilled'}", "sampler=consistency", "steps=2", "label=1"]
    assert run(["edit", "edit=interpolate", "edit.seeds=[0,1]", "edit.frames=3", *words]) == 0
    for edit in ("edit=img2img", "edit=anomaly"):
        assert run(["edit", edit, "input=val", "num_images=1", *words]) == 0


def test_what_assumes_independent_noise_is_refused_with_a_coupling(folder, capsys) -> None:
    for words, line in {
        "objective=likelihood": "coupling=ot: the objective Likelihood assumes independent noise; use objective=",
        "sampler=ddpm": "coupling=ot: the sampler DDPM adds noise, which assumes independent noise; use a determ",
    }.items():
        assert run([*TINY, f"output_dir={folder}", "name=refused", "coupling=ot", words]) == 2
        assert line in capsys.readouterr().err


def test_models_without_a_fitting_teacher_are_refused(folder, capsys) -> None:
    def refused(*words: str) -> str:
        assert run([*TINY, f"output_dir={folder}", "name=refused", *words]) == 2
        return capsys.readouterr().err

    progressive, start = "objective=progressive_distillation", f"init.run={folder / 'start'}"
    assert "objective=progressive_distillation: distils a trained model; set init.run" in refused(
        progressive, "parameterization=v"
    )
    line = refused("objective=consistency", "objective.guidance_scale=2", start, "parameterization=flow")
    assert "parameterization: Flow is not that of the teacher, init.run=" in line
    assert "parameterization=eps: multiplies an error" in refused("objective=consistency")
    trajectories = ["objective=trajectory_distillation", "parameterization=v"]
    assert "trajectory_distillation: distils a trained model; set init.run" in refused(*trajectories)
    line = refused(*trajectories, start, "coupling=ot")
    assert "coupling=ot: distillation of paths uses no images; leave it out" in line
    assert not (folder / "refused").exists()


def test_a_trial_run_keeps_the_steps_of_the_levels(tmp_path) -> None:
    levels = ["sampler=consistency", "sampler.levels=[8.0,4.0,2.0,1.0,0.5]", "preview_steps=6"]
    assert train(tmp_path, "objective=consistency", *levels, "trainer.fast_dev_run=true") == 0
