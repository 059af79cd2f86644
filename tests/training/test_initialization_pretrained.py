"""`diffuse train init.pretrained=FOLDER`: the weights and the process of a model of another program."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_cli.cli import run
from diffusion_cli.commands.first_weights import read_weights
from diffusion_cli.commands.train_setup import TrainingSetup, set_up
from diffusion_cli.convert import read_source
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.schema import InitInfo
from helpers import TINY, assert_same
from helpers.data import write_images
from helpers.latents import refused
from helpers.networks import randomised
from helpers.recipes import train_config

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = [word for word in TINY[1:] if not word.startswith(("name=", "model."))]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Path:
    """A pipeline of gray 8x8 images."""
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=down, up_block_types=up, norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    folder = tmp_path_factory.mktemp("pixels") / "cats"
    diffusers.DDIMPipeline(randomised(network), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """A pipeline of latents of gray 8x8 images, with the classes 9, 8, ..., 0."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.25,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("latents") / "digits"
    diffusers.DiTPipeline(
        randomised(network), randomised(autoencoder), diffusers.DDIMScheduler()
    ).save_pretrained(folder)
    index = folder / "model_index.json"  # as published pipelines have it
    names = {str(label): str(9 - label) for label in range(10)}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
    return folder


def start(folder: Path, source: Path, *words: str) -> TrainingSetup:
    config = train_config(
        *SHORT, f"output_dir={folder}", f"cache_dir={folder}/cache", f"init.pretrained={source}", *words
    )
    return set_up(config, folder / str(config.name), None)


def network_of(setup: TrainingSetup) -> nn.Module:
    return setup.task.model.network


def test_a_pipeline_gives_network_weights_and_process(pixels, tmp_path):
    config = train_config(*SHORT, f"init.pretrained={pixels}", "init.freeze=[stem]")
    model = read_source(str(pixels), "source")
    assert model.process is not None
    assert config.model == model.network.node
    assert (config.schedule, config.parameterization) == (
        model.process.schedule,
        model.process.parameterization,
    )
    assert config.name is not None
    assert "pretrained_cats" in config.name
    setup = start(tmp_path, pixels, "init.freeze=[stem]")
    for name, tensor in model.weights().items():
        assert torch.equal(network_of(setup).state_dict()[name], tensor), name
    init = setup.info.init
    assert init is not None
    assert (init.kind, init.step, init.fresh) == ("DDIMPipeline of diffusers", None, [])
    assert str(init).startswith(f"init.pretrained={pixels} (DDIMPipeline of diffusers): ")


def test_the_commit_of_a_repository_is_stored(pixels, tmp_path, monkeypatch):
    copy = shutil.copytree(pixels, tmp_path / "snapshots" / ("0a" * 20))
    monkeypatch.setattr("diffusion_cli.convert.snapshot", lambda *_: copy)
    config = train_config(*SHORT, "init.pretrained=hub:me/cats@v1.0")
    assert "@" not in str(config.name)
    source = read_weights(config, "diffusion")
    assert source is not None
    assert source.origin["commit"] == "0a" * 20
    info = InitInfo(source=source.named, **source.origin, taken=1, total=1, fresh=[])
    assert str(info).startswith("init.pretrained=hub:me/cats@v1.0 (DDIMPipeline of diffusers, commit 0a0a")


def test_images_of_another_size_keep_the_attention(pixels, tmp_path):
    np.save(tmp_path / "large.npy", np.zeros((20, 16, 16), dtype=np.uint8))
    setup = start(tmp_path, pixels, "dataset=array", f"dataset.path={tmp_path}/large.npy")
    assert setup.config.model["attention_resolutions"] == [8]
    assert setup.info.init is not None
    assert setup.info.init.fresh == []


def test_latents_have_the_scale_of_the_source_and_classes_are_matched_by_name(latents, tmp_path):
    setup = start(tmp_path, latents)
    assert isinstance(setup.space, Latents)
    assert (setup.space.mean, setup.space.std) == ([0.0, 0.0], [4.0, 4.0])
    assert setup.info.latent is not None
    assert setup.info.latent.std == [4.0, 4.0]
    rows = read_source(str(latents), "source").weights()["y_embedder.embedding_table.weight"]
    ours = network_of(setup).get_parameter("y_embedder.embedding_table.weight")
    assert torch.equal(ours, torch.cat([rows[:10].flip(0), rows[10:]]))
    assert getattr(network_of(setup), "learn_variance", False)


def test_a_started_run_does_not_read_the_source_again(latents, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(latents, source)
    words = [
        *SHORT,
        f"output_dir={tmp_path}",
        f"cache_dir={tmp_path}/cache",
        f"init.pretrained={source}",
        "name=new",
    ]
    assert run(["train", *words, "max_steps=2"]) == 0
    shutil.rmtree(source)
    assert run(["train", *words, "max_steps=3"]) == 0
    assert run(["train", f"run={tmp_path}/new", "max_steps=4"]) == 0
    assert read(tmp_path / "new" / LAST).step == 4


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["init.pretrained=nothing"], "init.pretrained=nothing: does not exist; give a folder written by "),
        (["init.pretrained={pixels}", "init.run=tiny"], "init.pretrained={pixels}: conflicts with init.run"),
        (["init.pretrained={pixels}", "init.step=3"], "init.step=3: applies only with init.run=; set init.run"),
        (["init.pretrained={pixels}/unet", "task=autoencoder"], "unet: was trained with task=diffusion; set task="),
        (["init.pretrained={latents}/vae"], "vae: was trained with task=autoencoder; set task=autoencoder"),
        (["init.pretrained={pixels}", "model.chanels=4"], "model.chanels=4: unknown key; did you mean model.channels?"),
        (["init.pretrained={pixels}", "model=dit_tiny"], "none of its weights fits this network; leave out model="),
        (["init.pretrained={damaged}"], "init.pretrained={damaged}: "),
    ],
)  # fmt: skip
def test_wrong_sources_are_refused_in_one_line(pixels, latents, tmp_path, words, line, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(pixels, damaged)
    file = next((damaged / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    places = {"pixels": pixels, "latents": latents, "damaged": damaged}
    words = [word.format(**places) for word in words]
    assert run(["train", *SHORT, f"output_dir={tmp_path}", "name=new", *words]) == 2
    refused(capsys, line.format(**places))
    assert not (tmp_path / "new" / "config.yaml").exists()


def test_an_imported_run_is_a_source_too(latents, tmp_path):
    assert run(["import", f"source={latents}", f"output_dir={tmp_path}", "name=dit"]) == 0
    words = [*SHORT, f"output_dir={tmp_path}", f"cache_dir={tmp_path}/cache", "init.run=dit", "name=new"]
    setup = set_up(train_config(*words), tmp_path / "new", None)
    direct = start(tmp_path, latents)
    assert direct.info.latent is not None
    assert setup.info.latent == direct.info.latent.model_copy(update={"source": "dit"})
    assert_same(dict(network_of(setup).state_dict()), dict(network_of(direct).state_dict()))


def test_unnamed_classes_of_an_imported_run_are_matched_by_number(latents, tmp_path):
    source = shutil.copytree(latents, tmp_path / "unnamed")
    index = source / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": None}))
    for name in "abcdefghij":
        write_images(tmp_path / "images" / name, 2)
    words = [
        *SHORT, f"output_dir={tmp_path}", f"cache_dir={tmp_path}/cache", "dataset=folder", "dataset.channels=1",
        f"dataset.path={tmp_path}/images", "dataset.resolution=8", "dataset.val_fraction=0", "name=new",
    ]  # fmt: skip
    assert run(["import", f"source={source}", f"output_dir={tmp_path}", "name=dit"]) == 0
    ours, direct = (
        set_up(train_config(*words, word), tmp_path / "new", None)
        for word in ("init.run=dit", f"init.pretrained={source}")
    )
    assert ours.info.class_names == tuple("abcdefghij")
    assert ours.info.init is not None
    assert ours.info.init.fresh == []
    assert_same(dict(network_of(ours).state_dict()), dict(network_of(direct).state_dict()))
