"""Weights go in and out in Python as with the commands."""

import sys
from pathlib import Path

import pytest
import torch

import diffusion_cli as diffuse
from diffusion_cli.cli import run

FP32 = ["precision=fp32"]


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder by name, without the model card."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_an_export_has_the_files_of_the_command(here):
    assert run(["export", "run=denoiser", "weights=raw", "output=command", "license=mit"]) == 0
    model = diffuse.load("denoiser", weights="raw")
    folder = model.export("python", license="mit")
    assert contents(folder) == contents(Path("command"))
    assert "license: mit" in Path("python/README.md").read_text()
    assert model.export(format="safetensors") == here / "outputs" / "denoiser" / "exports" / "safetensors"
    model.export("python", force=True)


def test_an_imported_export_samples_as_its_run(here):
    model = diffuse.load("denoiser")
    copy = diffuse.import_weights(model.export("exported"), name="copy")
    assert copy.folder == here / "outputs" / "copy"
    assert torch.equal(copy.sample(2, steps=3, overrides=FP32), model.sample(2, steps=3, overrides=FP32))
    named = diffuse.import_weights("exported", ["schedule=cosine"], "output_dir=more")
    assert named.folder == here / "more" / "exported"


@pytest.mark.parametrize(("name", "kind"), [("denoiser", "DDIMPipeline"), ("latents", "LDMPipeline")])
def test_a_pipeline_in_memory_is_that_of_the_export(here, name, kind):
    diffusers = pytest.importorskip("diffusers")
    model = diffuse.load(name)
    made, read = model.to_diffusers(), diffusers.DiffusionPipeline.from_pretrained(model.export("out"))
    assert type(made).__name__ == type(read).__name__ == kind
    version = {"_diffusers_version": read.scheduler.config["_diffusers_version"]}
    assert made.scheduler.config | version == read.scheduler.config
    for key, part in read.components.items():
        if isinstance(part, torch.nn.Module):
            other = getattr(made, key)
            assert not other.training
            assert other.state_dict().keys() == part.state_dict().keys()
            assert all(torch.equal(other.state_dict()[at], value) for at, value in part.state_dict().items())


def test_a_model_without_a_pipeline_becomes_a_denoiser(here):
    pytest.importorskip("diffusers")
    model = diffuse.load("class_conditional")
    made = model.to_diffusers("ddim")
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.25, 0.5]), torch.tensor([3, 1])
    with torch.no_grad():
        ours = model.denoiser.network(x, model.denoiser.schedule.timestep(t), y)
        theirs = made(x, model.denoiser.schedule.timestep(t), y).sample
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


MISUSES = {
    "m.export('out')": "output=out: exists already; choose another folder, or set force=true",
    "m.export('new', 'onx')": "format=onx: unknown option; did you mean onnx?",
    "m.export('new', 'safetensors', overrides=['step=3'])": "overrides=step: cannot be set for a loaded model",
    "m.to_diffusers('dimm')": "format.scheduler=dimm: must be",
    "m.to_diffusers('flow_match')": "format=diffusers: cannot express this model: ",
    "points.to_diffusers()": "format=diffusers: cannot express this model: ",
    "diffuse.import_weights('nothing')": "source=nothing: ",
    "diffuse.import_weights('out', name='denoiser')": "name=denoiser: outputs/denoiser exists already",
    "diffuse.import_weights('out', 'nme=x')": "nme=x: unknown key; did you mean name?",
}


def test_misuses_are_one_line_each(here):
    model, points = diffuse.load("denoiser"), diffuse.load("points")
    model.export("out")
    names = {"m": model, "points": points, "diffuse": diffuse}
    answers = {}
    for call in MISUSES:
        with pytest.raises(diffuse.UsageError) as caught:
            eval(call, names)
        answers[call] = str(caught.value)
    assert {call: line for call, line in answers.items() if MISUSES[call] not in line} == {}
    assert not Path("new").exists()


def test_a_missing_diffusers_is_named(here, monkeypatch):
    model = diffuse.load("denoiser")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(diffuse.UsageError) as caught:
        model.to_diffusers()
    assert str(caught.value) == "format=diffusers: needs diffusers; install it: pip install diffusers"
