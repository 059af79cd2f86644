"""`diffuse export`: folders of other programs that read back as they were, and their model cards."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.config import build
from diffusion_cli.generate import SeededNoise
from diffusion_cli.runs.load import load_model
from helpers.exports import DIT, KL, UNET, denoiser, imported, option

CPU = torch.device("cpu")
SKIPS = {
    "embedding_layout": "fourier", "scale_by_sigma": True, "centered": False, "middle_attention": False,
}  # fmt: skip
MODELS = {
    "pixels": lambda: denoiser(),
    "classes": lambda: denoiser(classes=3),
    "learned variance": lambda: denoiser(UNET | {"learn_variance": True}),
    "flow": lambda: denoiser(schedule=option("schedule", "rectified"), parameterization="flow"),
    "latents": lambda: denoiser(DIT, classes=3, latent=KL),
    "pixels of DiT": lambda: denoiser(DIT),
    "exploding": lambda: denoiser(
        UNET | SKIPS, (3, 8, 8), schedule=option("schedule", "ve"), parameterization="score"
    ),
}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    """The files of an export by name, without the model card."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_that_is_imported_is_exported_with_the_same_bytes(kind, capsys):
    folder = imported(MODELS[kind]())
    assert run(["export", "run=x", "output=out"]) == 0
    shown = capsys.readouterr().out
    assert "diffusers of x, step 0, ema weights: out" in shown
    has_pipeline = Path("out/model_index.json").is_file()
    assert ("out (parts only, see README.md in the folder)" in shown) == (not has_pipeline)
    assert files(Path("out")) == files(Path("sources", "x"))
    names = load_model(folder, "ema", CPU).info.class_names
    assert names == (("class 0", "class 1", "class 2") if kind in ("classes", "latents") else None)


def card(folder: str = "out") -> str:
    return Path(folder, "README.md").read_text()


def result(digest: str, value: float, name: str = "fid", **protocol) -> dict:
    sampling = {
        "weights_sha256": digest, "step": 0, "weights": "ema", "steps": 50,
        "sampler": {"_target_": "diffusion_cli.samplers.DDIM"},
    }  # fmt: skip
    about = {
        "samples": 5000,
        "reference": {"name": "digits/train", "images": 1438},
        "features": {"name": "inception"},
    }
    return {
        "name": name,
        "value": value,
        "details": {},
        "protocol": {**about, **protocol, "sampling": sampling},
    }


def test_the_numbers_of_the_card_are_the_stored_results_of_these_weights():
    folder = imported(denoiser())
    digest = load_model(folder, "ema", CPU).digest
    old, other = result(digest, 99.0), result("0" * 64, 77.0)
    new = [result(digest, 4.02958281), result(digest, 0.0086998653, "kid", samples=200)]
    history = [{"results": [old], "notes": ["an old note"]}, {"results": new, "notes": ["a <note>"]},
               {"results": [other], "notes": ["of other weights"]}]  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(history))
    assert run(["export", "run=x", "output=out"]) == 0
    rows = [line.split("|")[1:-1] for line in card().splitlines() if "DDIM, 50 steps" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["fid", "4.0296", "5000", "DDIM, 50 steps", "digits/train, 1438 images", "inception"],
        ["kid", "0.0086999", "200", "DDIM, 50 steps", "digits/train, 1438 images", "inception"],
    ]
    assert r"- a \<note\>" in card()
    assert "of other weights" not in card()
    assert "an old note" not in card()


def test_the_card_has_metadata_a_picture_of_these_weights_and_the_licence():
    folder = imported(denoiser(classes=3))
    assert run(["sample", "run=x", "num_samples=2", "steps=2", "device=cpu"]) == 0
    assert run(["export", "run=x", "output=out", "license=apache-2.0"]) == 0
    fields = yaml.safe_load(card().split("---")[1])
    assert fields == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "tags": ["diffusion", "diffuse-cli"],
    }
    (grid,) = folder.glob("samples/*/grid.png")
    assert Path("out/samples.png").read_bytes() == grid.read_bytes()
    assert "no licence yet" not in card()
    assert "class 0, class 1, class 2" in card()
    assert "unknown: the weights were imported" in card()
    (row,) = [line for line in card().splitlines() if line.startswith("| model |")]
    assert re.match(r"\| model \| UNet, [\d,]+ parameters, input 1x8x8, channels=8, ", row)
    assert r"| norm\_groups | 4 |" in card()
    code = re.search("```python\n(.*?)```", card(), re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")
    assert run(["export", "run=x", "output=plain"]) == 0
    assert "`diffuse export license=apache-2.0`" in card("plain")
    # An import of this export keeps the licence.
    assert run(["import", "source=out", "name=y"]) == 0
    assert run(["export", "run=y", "output=again"]) == 0
    assert yaml.safe_load(card("again").split("---")[1])["license"] == "apache-2.0"


def test_a_wrong_licence_is_refused(capsys):
    assert run(["export", "license=a b"]) == 2
    line = "license=a b: must be an identifier of a licence (apache-2.0, cc-by-4.0, other) or null"
    assert capsys.readouterr().err == f"diffuse: {line}\n"


def test_names_of_a_run_cannot_write_markdown():
    model = denoiser(classes=2)
    names = ("<script>alert(1)</script>", "a|b](http://x)\n# c")
    model = type(model)(
        model.info.model_copy(update={"class_names": names}),
        model.step,
        model.digest,
        model.denoiser,
        model.space,
    )
    imported(model)
    assert run(["export", "run=x", "output=out"]) == 0
    assert "<script>" not in card()
    assert r"\<script\>" in card()
    assert "\n# c" not in card()


def test_a_folder_is_replaced_only_if_it_is_an_export(capsys):
    imported(denoiser())
    assert run(["export", "run=x"]) == 0
    output = Path("outputs/x/exports/diffusers")
    assert run(["export", "run=x"]) == 2
    assert (
        f"output={output}: exists already; choose another folder, or set force=true"
        in capsys.readouterr().err
    )
    (output / "unet/config.json").write_text("")
    assert run(["export", "run=x", "force=true"]) == 0
    assert (output / "unet/config.json").stat().st_size > 0
    assert run(["export", "run=x", f"output={output}", "format=safetensors", "force=true"]) == 0
    assert list(files(output)) == ["model.safetensors"]
    assert [path.name for path in output.parent.iterdir()] == ["diffusers"]


def test_a_folder_of_another_program_is_not_replaced(capsys):
    imported(denoiser())
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("x")
    Path("mine/README.md").write_text("<!-- diffusers docs -->")
    capsys.readouterr()
    assert run(["export", "run=x", "output=mine", "force=true"]) == 2
    line = "diffuse: output=mine: is no export of diffuse; choose another folder\n"
    assert capsys.readouterr().err == line
    assert Path("mine/thesis.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["notes.txt", ".git/HEAD", "unet/notes.txt"])
def test_an_export_with_other_files_is_not_replaced(name, capsys):
    imported(denoiser())
    assert run(["export", "run=x", "output=out"]) == 0
    Path("out", name).parent.mkdir(exist_ok=True)
    Path("out", name).write_text("x")
    capsys.readouterr()
    assert run(["export", "run=x", "output=out", "force=true"]) == 2
    problem = f"has {name}, which the export did not write; move this file, or choose another folder"
    assert capsys.readouterr().err == f"diffuse: output=out: {problem}\n"
    assert Path("out", name).read_text() == "x"


@pytest.mark.parametrize("target", ["out", "missing", "link"])
def test_a_link_is_not_replaced(target, capsys):
    imported(denoiser())
    assert run(["export", "run=x", "output=out"]) == 0
    Path("link").symlink_to(target)
    before = sorted(path.name for path in Path().iterdir())
    capsys.readouterr()
    assert run(["export", "run=x", "output=link", "force=true"]) == 2
    line = "diffuse: output=link: is a link; choose the folder that it points to\n"
    assert capsys.readouterr().err == line
    assert Path("link").is_symlink()
    assert sorted(path.name for path in Path().iterdir()) == before


def test_the_working_folder_is_replaced_by_its_own_name(monkeypatch):
    imported(denoiser())
    assert run(["export", "run=x", "output=out"]) == 0
    root = Path().resolve()
    monkeypatch.chdir("out")
    words = [f"run={root}/outputs/x", "output=.", "format=safetensors", "force=true"]
    assert run(["export", *words]) == 0
    assert list(files(root / "out")) == ["model.safetensors"]


def test_nothing_is_left_of_an_export_that_fails(monkeypatch, capsys):
    imported(denoiser())

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffusion_cli.export.diffusers.save_weights", full)
        assert run(["export", "run=x", "output=out"]) == 2
    assert "free some space" in capsys.readouterr().err
    assert run(["export", "run=x", "output=out", "format.scheduler=flow_match"]) == 2
    assert "format=diffusers: cannot express this model" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["outputs", "sources"]


def test_the_example_of_safetensors_builds_the_network(monkeypatch):
    folder = imported(denoiser(DIT, classes=3, latent=KL))
    assert run(["export", "run=x", "format=safetensors", "output=out"]) == 0
    assert {"model.safetensors", "autoencoder.safetensors"} == set(files(Path("out")))
    found: dict = {}
    code = re.search("```python\n(.*?)```", card(), re.DOTALL)
    assert code is not None
    exec(code[1], found)
    ours = load_model(folder, "ema", CPU).denoiser.network
    for name, tensor in ours.state_dict().items():
        assert found["network"].state_dict()[name].equal(tensor), name
    assert "private" not in json.dumps(found["model"])
    assert build(found["model"]["config"]["schedule"]).equals(
        load_model(folder, "ema", CPU).denoiser.schedule
    )


def test_a_classifier_is_not_exported(edit_runs, capsys):
    assert run(["export", "run=judge", f"output_dir={edit_runs}", "output=out"]) == 2
    assert "run=judge: is a classifier, which is not exported" in capsys.readouterr().err


ALONE = """
import sys
import numpy as np
import torch
from diffusers import DDIMPipeline
pipeline = DDIMPipeline.from_pretrained("out")
x = torch.from_numpy(np.load("noise.npy"))
pipeline.scheduler.set_timesteps(20)
with torch.no_grad():
    for t in pipeline.scheduler.timesteps:
        x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
assert "diffusion_cli" not in sys.modules
np.save("images.npy", x.numpy())
"""


@pytest.mark.slow
def test_diffusers_samples_an_export_without_this_package():
    imported(denoiser())
    assert run(["export", "run=x", "output=out"]) == 0
    assert (
        run(["sample", "run=x", "num_samples=2", "steps=20", "precision=fp32", "device=cpu", "output=ours"])
        == 0
    )
    np.save("noise.npy", SeededNoise([0, 1], (1, 8, 8), CPU).noise().numpy())
    subprocess.run([sys.executable, "-I", "-c", ALONE], check=True, timeout=300)
    theirs = ((np.load("images.npy")[:, 0] / 2 + 0.5).clip(0, 1) * 255).round().astype(int)
    ours = np.stack([np.asarray(Image.open(f"ours/{seed:06d}.png")) for seed in range(2)]).astype(int)
    assert theirs.std() > 10
    assert abs(ours - theirs).max() <= 1
