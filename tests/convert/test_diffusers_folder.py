"""Folders of diffusers: what is read, and what is refused in one line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_cli.cli import run
from diffusion_cli.convert import read_source
from diffusion_cli.convert.diffusers_folder import autoencoder_files, model_files
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.runs.imported import weights_of
from diffusion_cli.runs.load import load_weights
from helpers.data import write_images
from helpers.pipelines import UNET, ddim_pipeline, dit_pipeline
from helpers.unets import unet

pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> Path:
    """Saved pipelines: `ddim` of pixels and `dit` of latents."""
    folder = tmp_path_factory.mktemp("pipelines")
    ddim_pipeline(folder / "ddim")
    dit_pipeline(folder / "dit")
    return folder


@pytest.fixture
def copied(pipelines, tmp_path, monkeypatch) -> Path:
    """A folder with copies of the pipelines, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipelines, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_pipeline_is_read_with_its_parts(pipelines):
    model = read_source(str(pipelines / "dit"), "source")
    assert model.kind == "DiTPipeline of diffusers"
    assert model.class_names == ("cat", "dog", "red fox")
    assert model.network.shape == (2, 8, 8)
    assert model.autoencoder is not None
    assert model.autoencoder.network.shape == (3, 16, 16)
    assert model.autoencoder.std == (2.0, 2.0)
    assert model.process is not None
    assert model.process.objective["_target_"].endswith(".Hybrid")
    assert model.process.objective["label_dropout"] > 0
    assert sorted(model.files) == [f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}"]


def test_statistics_that_the_pipeline_leaves_out_are_named(copied, capsys):
    assert read_source("dit", "source").remarks == ()
    edited("dit/vae/config.json", lambda value: value | {"shift_factor": 0.1, "latents_std": [2.0, 1.0]})()
    assert run(["import", "source=dit"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        f"diffuse: DiTPipeline leaves out {name} of its autoencoder, which is applied here"
        for name in ("shift_factor", "latents_std")
    ]


def test_a_model_alone_has_the_process_of_ddpm(tmp_path, capsys, monkeypatch):
    unet(UNET).save_pretrained(tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    assert run(["import", "source=x"]) == 0
    shown = capsys.readouterr()
    assert "UNet2DModel of diffusers" in shown.out
    assert shown.err.startswith("diffuse: the source has no scheduler: assumed is that of DDPM")
    assert run(["import", "source=x", "name=y", "schedule=cosine"]) == 0
    assert "assumed" not in capsys.readouterr().err
    assert run(["import", "source=x", "name=z", "schedule=flow_matching", "parameterization=flow"]) == 0
    assert "sample run=z sampler=ddim sampler.spacing=linspace clip_x0=false" in capsys.readouterr().out


def test_weights_in_several_files_and_in_half_precision_are_read(copied, monkeypatch):
    folder = copied / "ddim" / "unet"
    whole = read_source("ddim", "source").weights()
    unet(UNET).save_pretrained(folder, max_shard_size="10KB")
    (folder / WEIGHTS).unlink()
    assert (folder / f"{WEIGHTS}.index.json").is_file()
    parts = read_source("ddim", "source")
    assert len(parts.files) > 1
    assert all(torch.equal(tensor, whole[name]) for name, tensor in parts.weights().items())
    shutil.rmtree(folder)
    unet(UNET).half().save_pretrained(folder, variant="fp16")
    model = read_source("ddim", "source")
    half = weights_of(model, "ddim", "source")
    assert all(tensor.dtype is torch.float32 for tensor in half.values())
    torch.testing.assert_close(half, whole, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(torch.Tensor, "float", lambda _: pytest.fail("copied before the comparison"))
    other = replace(model, network=replace(model.network, node=model.network.node | {"channels": 16}))
    with pytest.raises(UsageError, match="has shape"):
        weights_of(other, "ddim", "source")


def test_a_repository_of_the_hub_is_read_and_names_the_run(copied, monkeypatch, capsys):
    folder, asked = copied / "snapshots" / ("0a" * 20), []
    (copied / "ddim").rename(folder.parent.mkdir() or folder)
    monkeypatch.setattr("diffusion_cli.convert.snapshot", lambda name, _: asked.append(name) or folder)
    assert run(["import", "source=hub:owner/cats@v1.0"]) == 0
    assert asked == ["owner/cats@v1.0"]
    assert "outputs/cats: DDIMPipeline of diffusers" in capsys.readouterr().out
    origin = load_weights(Path("outputs/cats"), "ema", None, "diffusion").info.origin
    assert origin is not None
    assert (origin.source, origin.commit) == ("hub:owner/cats@v1.0", "0a" * 20)


def test_no_file_of_a_repository_is_downloaded_in_vain():
    stem = "diffusion_pytorch_model"
    unet = ["unet/config.json", f"unet/{stem}-1-of-1.safetensors", f"unet/{stem}.safetensors.index.json"]
    vae = ["vae/config.json", f"vae/{WEIGHTS}"]
    vain = [
        "whole.safetensors", "images.png", f"unet/{stem}.fp16-1-of-1.safetensors", f"vae/{stem}.fp16.safetensors",
        f"vae/{stem}.bin", "text_encoder/model.safetensors",
    ]  # fmt: skip
    paths = ["README.md", "model_index.json", *unet, *vae]
    assert sorted(model_files([*paths, *vain])) == sorted(paths)
    assert autoencoder_files([*paths, *vain]) == vae
    half = ["config.json", f"{stem}.fp16.safetensors"]
    assert model_files(half) == autoencoder_files(half) == half


def test_pickled_weights_of_a_repository_are_refused_before_the_download():
    whole = ["config.json", "diffusion_pytorch_model.bin"]
    unet, vae = ([f"{part}/{name}" for name in whole] for part in ("unet", "vae"))
    safe = ["vae/config.json", f"vae/{WEIGHTS}"]
    for paths in (whole, [*unet, *safe], [*vae, "transformer/config.json"]):
        with pytest.raises(FormatError, match=r"^diffusion_pytorch_model\.bin is pickled") as refused:
            model_files(paths)
        assert "safe_serialization=True" in refused.value.remedy
    with pytest.raises(FormatError, match="is pickled"):
        autoencoder_files(vae)
    assert autoencoder_files([*unet, *safe]) == safe


def test_files_of_early_versions_in_one_folder_are_read(copied):
    whole = read_source("ddim", "source")
    for part in ("unet", "scheduler"):
        for file in (copied / "ddim" / part).iterdir():
            file.rename(copied / "ddim" / file.name)
        (copied / "ddim" / part).rmdir()
    flat = read_source("ddim", "source")
    assert (flat.network, flat.process, [*flat.files]) == (whole.network, whole.process, [WEIGHTS])


def test_images_without_a_size_have_that_of_the_dataset(copied, capsys):
    sized = {source: read_source(source, "source").network for source in ("ddim", "dit")}
    edited(UNET_CONFIG, lambda value: value | {"sample_size": None})()
    with pytest.raises(UsageError) as refused:
        read_source("ddim", "source")
    assert refused.value.lines == (
        "source=ddim: unet/config.json: sample_size is missing; diffuse import source=ddim dataset=<option> takes "
        "the size of a dataset",
    )
    assert read_source("ddim", "source", None, (8, 8)).network == sized["ddim"]
    assert read_source("dit", "source", None, (64, 64)).network == sized["dit"]  # which states its own
    assert (
        run(["import", "source=ddim", "dataset=folder", f"dataset.path={write_images(copied / 'photos', 3)}"])
        == 0
    )
    assert "images 3x8x8" in capsys.readouterr().out


def test_the_licence_of_a_model_card_is_read(copied):
    assert read_source("ddim", "source").licence is None
    (copied / "ddim" / "README.md").write_text(
        "---\ntags:\n- x\nlicense: apache-2.0\n---\n# A\nlicense: other\n"
    )
    assert read_source("ddim", "source").licence == "apache-2.0"


def edited(path: str, change: Callable[[Any], Any]) -> Callable[[], None]:
    """Changes a JSON file."""

    def edit() -> None:
        file = Path(path)
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return edit


def reshaped() -> None:
    file = f"ddim/unet/{WEIGHTS}"
    state = load_file(file)
    save_file(state | {"conv_in.weight": torch.zeros(9, 3, 3, 3)}, file)


def pickled() -> None:
    torch.save({}, "ddim/unet/diffusion_pytorch_model.bin")
    Path(f"ddim/unet/{WEIGHTS}").unlink()


def cut() -> None:
    file = Path(f"ddim/unet/{WEIGHTS}")
    file.write_bytes(file.read_bytes()[:-100])


def indexed(name: object) -> Callable[[], None]:
    """Replaces the weights by an index that names a file."""

    def write() -> None:
        Path(f"ddim/unet/{WEIGHTS}").unlink()
        Path(f"ddim/unet/{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

    return write


PLAIN = "weight_map must name .safetensors files of its folder"
UNET_CONFIG, DDIM_INDEX = "ddim/unet/config.json", "ddim/model_index.json"
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "pickled weights": (pickled, "diffusion_pytorch_model.bin is pickled and could run code"),
    "no weights": (Path(f"ddim/unet/{WEIGHTS}").unlink, f"unet contains no {WEIGHTS}"),
    "no part": (lambda: shutil.rmtree("ddim/scheduler"), "contains no scheduler/scheduler_config.json"),
    "no config": (Path(UNET_CONFIG).unlink, "contains no unet/config.json"),
    "cut weights": (cut, f"{WEIGHTS}: "),
    "other shapes": (reshaped, "has shape"),
    "other class": (
        edited(UNET_CONFIG, lambda value: value | {"_class_name": "UNet2DConditionModel"}),
        "unet/config.json: the class UNet2DConditionModel has no equivalent",
    ),
    "other part": (
        edited(DDIM_INDEX, lambda value: value | {"text_encoder": ["transformers", "CLIPTextModel"]}),
        "model_index.json: text_encoder of a DDIMPipeline has no equivalent",
    ),
    "no denoiser": (
        edited(DDIM_INDEX, lambda value: {key: part for key, part in value.items() if key != "unet"}),
        "model_index.json: must have a denoiser",
    ),
    "no denoiser and no index": (
        lambda: (Path(DDIM_INDEX).unlink(), shutil.rmtree("ddim/unet")),
        "ddim: must have a denoiser, a scheduler, and at most one autoencoder",
    ),
    "other scheduler": (
        edited("ddim/scheduler/scheduler_config.json", lambda value: value | {"_class_name": "LCMScheduler"}),
        "scheduler_config.json: the scheduler LCMScheduler has no equivalent",
    ),
    "not an object": (edited(UNET_CONFIG, lambda _: [1]), "config.json is not a JSON object"),
    "not JSON": (lambda: Path(UNET_CONFIG).write_text("{"), "config.json is not JSON"),
    "huge size": (
        edited(UNET_CONFIG, lambda value: value | {"block_out_channels": [10**9]}),
        "unet/config.json: block_out_channels",
    ),
    "many layers": (
        edited(UNET_CONFIG, lambda value: value | {"layers_per_block": 64}),
        "is missing",
    ),
    "text for a number": (edited(UNET_CONFIG, lambda value: value | {"sample_size": "8"}), "sample_size"),
    "path in an index": (indexed("../../x.safetensors"), PLAIN),
    "folder in an index": (indexed(".."), PLAIN),
    "null byte in an index": (indexed("a\0b"), PLAIN),
    "null byte in a name of an index": (indexed("a\0.safetensors"), PLAIN),
    "number in an index": (indexed(1), PLAIN),
    "list in an index": (indexed(["a"]), PLAIN),
    "pickle in an index": (indexed("a.bin"), PLAIN),
    "pixels in [0, 1] for a network of [-1, 1]": (
        lambda: Path("ddim/scheduler/scheduler_config.json").write_text(
            '{"_class_name": "ScoreSdeVeScheduler"}'
        ),
        "config.json: center_input_sample=false does not fit a ScoreSdeVeScheduler",
    ),
    "other class names": (
        edited("dit/model_index.json", lambda value: value | {"id2label": {"0": "cat"}}),
        "id2label does not name the 3 classes",
    ),
    "other latents": (
        edited("dit/vae/config.json", lambda value: value | {"latent_channels": 4}),
        "its 4 latent channels are not the 2 of the denoiser",
    ),
}
"""A change of the pipelines, and what is said about it."""


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_source_is_refused_in_one_line_and_leaves_nothing(what, copied, capsys):
    change, line = WRONG[what]
    change()
    source = "dit" if what.startswith("other") and what.endswith(("names", "latents")) else "ddim"
    assert run(["import", f"source={source}"]) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(f"diffuse: source={source}: ")
    assert line in shown
    assert not Path("outputs").exists()


def test_a_part_leads_to_the_pipeline_with_its_scheduler(copied, capsys):
    assert run(["import", "source=ddim/unet", "name=x"]) == 0
    assert "; source=ddim, the folder around it, has its scheduler" in capsys.readouterr().err


REMEDIES = {
    "pickled weights": "save the model again with safe_serialization=True",
    "no config": "copy the whole folder, as save_pretrained wrote it",
    "cut weights": "copy or download it again",
    "not JSON": "copy or download it again",
    "other class": "models with text are not supported: choose one with classes, or without conditions",
    "other part": "models with text are not supported: choose one with classes, or without conditions",
    "other scheduler": "with schedule= and parameterization=, or save another scheduler",
    "huge size": "choose another model",
}  # fmt: skip


@pytest.mark.parametrize("what", REMEDIES)
def test_each_cause_has_its_own_remedy(what, copied, capsys):
    WRONG[what][0]()
    assert run(["import", "source=ddim"]) == 2
    assert capsys.readouterr().err.endswith(f"{REMEDIES[what]}\n")


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        (f"ddim/unet/{WEIGHTS}", "ddim"),
        (DDIM_INDEX, "ddim"),
        ("ddim/scheduler/scheduler_config.json", "ddim"),
        ("alone/config.json", "alone"),
    ],
)
@pytest.mark.parametrize("words", [[], ["preset=guided"]])
def test_a_file_of_a_folder_leads_to_the_folder(file, folder, words, copied, capsys):
    shutil.copytree("ddim/unet", "alone")
    assert run(["import", f"source={file}", *words]) == 2
    line = f"source={file}: is a file of a folder that describes a model; give source={folder}"
    assert capsys.readouterr().err == f"diffuse: {line}\n"


def test_the_address_of_a_repository_leads_to_its_name(copied, capsys):
    assert run(["import", "source=https://hub.example/me/digits"]) == 2
    assert capsys.readouterr().err.endswith("does not exist; give source=hub:me/digits\n")


def test_a_repository_without_a_folder_does_not_lead_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_cli.convert.snapshot", lambda *_: tmp_path / "none")
    with pytest.raises(UsageError, match="does not exist") as refused:
        read_source("hub:me/x", "source")
    assert "give source=" not in str(refused.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    for folder, reason in ((tmp_path, "contains neither"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UsageError, match=reason):
            read_source(str(folder), "source")
