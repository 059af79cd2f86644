"""Training, sampling, editing and evaluation of latent diffusion models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_cli.batch_size import network_call
from diffusion_cli.cli import run
from diffusion_cli.commands.guides import _same_latents
from diffusion_cli.config import CONF, build
from diffusion_cli.convert.diffusers_folder import WEIGHTS
from diffusion_cli.data import Digits
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.latents import Latents, measured_scale
from diffusion_cli.formats import HighDepthImage, Uint8Image
from diffusion_cli.generate import SamplingPipeline, class_condition, generate
from diffusion_cli.networks import AutoencoderKL, VQModel
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.load import AUTOENCODER, load_model
from diffusion_cli.runs.schema import LatentInfo
from diffusion_cli.samplers import DDIM
from diffusion_cli.training import latent_data
from helpers import TINY, assert_same
from helpers.autoencoders import PUBLISHED, SMALL
from helpers.latents import FEATURES, call, refused, train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def test_a_run_taken_up_again_equals_one_without_a_stop(latent_runs):
    told = ["model.class_conditional=true", "latent.run=ae"]
    assert train(latent_runs, "name=parts", *told, "max_steps=2") == 0
    assert train(latent_runs, "name=parts", *told, "max_steps=6") == 0
    whole, parts = (read(latent_runs / "o" / name / LAST).state for name in ("a", "parts"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[key], parts[key], key)
    assert whole["diffuse"]["latent"] == parts["diffuse"]["latent"]
    assert not any("autoencoder" in name for name in whole["state_dict"])


def test_what_a_run_works_in_are_the_standardised_latents_of_its_training_images(latent_runs):
    model = load_model(latent_runs / "o" / "a", "ema", torch.device("cpu"))
    assert isinstance(model.space, Latents)
    assert (model.shape, model.space.shape) == ((1, 8, 8), (3, 4, 4))
    given = Digits("", val_fraction=0.2, flip=False).load("train")
    moments = model.space.moments(given[torch.arange(len(given))].float() / 127.5 - 1)
    mean, std, _ = measured_scale([moments], 3)
    np.testing.assert_allclose(mean, model.space.mean, rtol=0, atol=1e-3)
    np.testing.assert_allclose(std, model.space.std, rtol=1e-3)


def test_samples_are_decoded_and_need_nothing_but_the_run_s_own_folder(latent_runs, tmp_path):
    words = ["steps=3", "num_samples=5", "strip=true", "gif=true", "precision=fp32"]
    assert call(latent_runs, "sample", *words, f"output={tmp_path}/here") == 0
    shutil.copytree(latent_runs / "o" / "a", tmp_path / "moved")
    there = [f"output={tmp_path}/there", "batch_size=2"]
    assert run(["sample", f"run={tmp_path}/moved", f"output_dir={tmp_path}/none", *words, *there]) == 0
    for name in ("000000.png", "000004.png", "strip.png", "denoising.gif"):
        assert (tmp_path / "here" / name).is_file()
    with (
        Image.open(tmp_path / "here" / "000003.png") as one,
        Image.open(tmp_path / "there" / "000003.png") as other,
    ):
        assert one.size == (8, 8)
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("sampler/*.yaml")))
def test_every_sampler_makes_images_of_latents(latent_runs, name):
    model = load_model(latent_runs / "o" / "a", "ema", torch.device("cpu"))
    node = yaml.safe_load((CONF / "sampler" / f"{name}.yaml").read_text())
    sampler = build(node, model.denoiser.schedule)
    pipeline = SamplingPipeline(
        model=model,
        sampler=sampler,
        steps=4,
        guidance=NoGuidance(),
        condition=class_condition([3]),
        clip=True,
        precision="fp32",
    )
    images = torch.cat([made.images for made in generate(pipeline, [0, 1], 2)])
    assert images.shape == (2, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    "words",
    [
        ["guidance=cfg", "guidance.scale=2"],
        ["guidance=auto", "guidance.run=b"],
        ["guidance=auto", "guidance.step=5"],
        ["guidance=classifier", "guidance.run=c"],
    ],
)
def test_every_guidance_guides_in_latents(latent_runs, words):
    assert call(latent_runs, "sample", "steps=3", "num_samples=2", *words) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["guidance=auto", "guidance.run=pixels"], "works on pixels, but the model works on latents"),
        (
            ["guidance=classifier", "guidance.run=pixel_classifier"],
            "works on pixels, but the model works on latents",
        ),
        (
            ["run=pixels", "guidance=classifier", "guidance.run=c"],
            "works on latents, but the model works on pixels",
        ),
        (
            ["run=pixels", "guidance=auto", "guidance.run=b"],
            "works on latents, but the model works on pixels",
        ),
        (
            ["guidance=cfg", "guidance.dynamic_threshold=0.9"],
            "guidance.dynamic_threshold=0.9: works on pixels, but the model works on latents; leave it null",
        ),
    ],
)
def test_what_does_not_guide_in_the_same_space_is_refused_in_a_line(latent_runs, capsys, words, line):
    words = words if words[0].startswith("run=") else ["run=a", *words]
    assert run(["sample", f"output_dir={latent_runs}/o", "steps=2", "num_samples=1", *words]) == 2
    refused(capsys, line)


def test_guides_of_other_latents_are_refused_but_not_for_rounding():
    mine = LatentInfo(
        shape=(3, 4, 4),
        mean=[1.0, 0.0, 0.0],
        std=[1.0, 2.0, 3.0],
        autoencoder={},
        sha256="a",
        source="",
        cache={},
    )
    assert _same_latents(mine, mine.model_copy(update={"mean": [1 + 1e-6, 1e-6, 0.0]}))
    assert _same_latents(None, None)
    for other in ({"sha256": "b"}, {"std": [1.0, 2.0, 3.1]}, {"shape": (3, 8, 8)}):
        assert not _same_latents(mine, mine.model_copy(update=other))
    assert not _same_latents(mine, None)


@pytest.mark.parametrize(
    "words",
    [
        ["edit=img2img"],
        ["edit=anomaly"],
        ["edit=reconstruct"],
        ["edit=interpolate", "edit.frames=3"],
        ["edit=attribute", "edit.source=1", "label=3"],
        ["edit=outpaint", "edit.left=2"],
        ["edit=super_resolution", "restoration=dps"],
        [
            "edit=inpaint",
            "restoration=dps",
            "guidance=classifier",
            "guidance.run=c",
            "label=3",
            "batch_size=auto",
        ],
    ],
)
def test_every_edit_works_in_latents(latent_runs, tmp_path, words):
    given = ["input=val", "num_images=2", "steps=3", f"output={tmp_path}/edit"]
    assert call(latent_runs, "edit", *given, *words) == 0
    assert (tmp_path / "edit" / "grid.png").is_file()


@pytest.mark.parametrize("gradient", [False, True])
def test_what_fits_counts_the_decoder_where_gradients_pass_through_it(latent_runs, monkeypatch, gradient):
    model = load_model(latent_runs / "o" / "a", "ema", torch.device("cpu"))
    decode, decoded = model.space.decode, []
    monkeypatch.setattr(model.space, "decode", lambda x: decoded.append(len(x)) or decode(x))
    sampler = DDIM(model.denoiser.schedule, eta=0.0, spacing="leading")
    pipeline = SamplingPipeline(
        model=model,
        sampler=sampler,
        steps=3,
        guidance=NoGuidance(),
        condition=None,
        clip=True,
        precision="fp32",
    )
    network_call(pipeline, each=2, gradient=gradient)(3)
    assert decoded == ([6] if gradient else [])


def test_noise_of_seeds_is_interpolated_between_what_they_are_sampled_to(latent_runs, tmp_path):
    steps = ["steps=3", "precision=fp32"]
    words = ["edit=interpolate", "edit.seeds=[0,1]", "edit.frames=3", "label=3", f"output={tmp_path}/way"]
    assert call(latent_runs, "edit", *steps, *words) == 0
    assert call(latent_runs, "sample", *steps, "num_samples=2", "label=3", f"output={tmp_path}/ends") == 0
    frames, ends = (sorted(tmp_path.glob(f"{name}/[0-9]*.png")) for name in ("way/*", "ends"))
    for frame, end in ((frames[0], ends[0]), (frames[2], ends[1])):
        with Image.open(frame) as one, Image.open(end) as other:
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize("method", ["replacement", "repaint", "dps"])
def test_known_pixels_stay_to_the_bit(latent_runs, tmp_path, method):
    image = Digits("", val_fraction=0.2, flip=False).load("val")[torch.tensor([7])][0, 0].numpy()
    Image.fromarray(image).save(tmp_path / "image.png")
    words = [
        "edit=inpaint",
        "edit.mask=[1,2,4,7]",
        f"restoration={method}",
        f"output={tmp_path}/edit",
        "steps=4",
    ]
    assert call(latent_runs, "edit", f"input={tmp_path}/image.png", *words) == 0
    with Image.open(tmp_path / "edit" / "image.png") as result:
        made = np.asarray(result)
    painted = np.zeros((8, 8), bool)
    painted[2:7, 1:4] = True
    assert (made[~painted] == image[~painted]).all()
    assert (made[painted] != image[painted]).any()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["edit=super_resolution"],
            "restoration=repaint with edit=super_resolution: works on pixels, but the model works on latents; use",
        ),
        (
            ["edit=super_resolution", "restoration=replacement"],
            "restoration=replacement with edit=super_resolution: works on pixels, but the model works on latents",
        ),
        (
            ["edit=outpaint", "edit.left=1"],
            "results have 9 x 8 pixels, but the autoencoder downsamples by 2",
        ),
    ],
)
def test_edits_that_latents_know_nothing_of_are_refused_before_anything_is_made(
    latent_runs, capsys, tmp_path, words, line
):
    given = ["input=val", "num_images=1", "steps=2", f"output={tmp_path}/edit"]
    assert call(latent_runs, "edit", *given, *words) == 2
    refused(capsys, line)
    assert not (tmp_path / "edit").exists()


def published(folder: Path, channels: int) -> Path:
    """A random autoencoder as diffusers writes it."""
    torch.manual_seed(0)
    network = AutoencoderKL((channels, 8, 8), None, **SMALL)
    about = json.loads((PUBLISHED / "config.json").read_text()) | {
        "in_channels": channels,
        "out_channels": channels,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    save_file(network.state_dict(), folder / WEIGHTS)
    return folder


def test_published_weights_give_the_space_and_training_measures_on_the_way(latent_runs, tmp_path):
    folder = published(tmp_path / "vae", 1)
    words = ["max_steps=2", "eval_every=2", "eval_samples=80", "eval_steps=2", "preview_every=2", *FEATURES]
    assert train(latent_runs, "name=published", f"latent.pretrained={folder}", *words) == 0
    model = load_model(latent_runs / "o" / "published", "ema", torch.device("cpu"))
    assert isinstance(model.space, Latents)
    weights = load_file(folder / WEIGHTS)
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in model.space.autoencoder.state_dict().items()
    )
    assert (latent_runs / "o" / "published" / "previews" / "step_00000002.png").is_file()
    shutil.rmtree(folder)
    assert train(latent_runs, "name=published", f"latent.pretrained={folder}", *words, "max_steps=3") == 0


def test_a_codebook_of_diffusers_gives_the_space(latent_runs, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.VQModel(1, 1, block_out_channels=[8], norm_num_groups=4, num_vq_embeddings=7).save_pretrained(
        tmp_path / "vqvae"
    )
    assert train(latent_runs, "name=codebook", f"latent.pretrained={tmp_path}", "max_steps=1") == 0
    model = load_model(latent_runs / "o" / "codebook", "ema", torch.device("cpu"))
    assert isinstance(model.space, Latents)
    assert isinstance(model.space.autoencoder, VQModel)
    assert model.space.decode(torch.randn(2, *model.space.shape)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-5]), "not fully covered"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-4] + b"abcd"),
            "is not the autoencoder that the run was trained",
        ),
        (lambda file: save_file({"a": torch.zeros(1)}, file), "more than the 1 stored tensors"),
    ],
    ids=["missing", "cut", "changed", "another"],
)
def test_a_run_without_its_own_autoencoder_is_refused_in_a_line(latent_runs, tmp_path, capsys, change, words):
    folder = Path(shutil.copytree(latent_runs / "o" / "a", tmp_path / "a"))
    change(folder / AUTOENCODER)
    assert run(["sample", f"run={folder}", "steps=2", "num_samples=1"]) == 2
    refused(capsys, f"{AUTOENCODER}: the autoencoder of the run cannot be read (")
    with pytest.raises(ValueError, match=words):
        load_model(folder, "ema", torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["latent.run=pixels"], "was trained with task=diffusion; give a run of task=autoencoder"),
        (["latent.run=none"], "latent.run=none: does not exist"),
        (
            ["latent.run=ae", "latent.pretrained=b"],
            "latent.pretrained=b: conflicts with latent.run",
        ),
        (
            [f"latent.pretrained={PUBLISHED}"],
            "encodes images with 2 channels, but those of digits have 1 (size 8x8); use another",
        ),
        (["latent.pretrained=nowhere"], "latent.pretrained=nowhere: does not exist; give a folder"),
        (["latent.run=ae", "progressive=[4,8]"], "progressive=[4, 8]: latents have one fixed size"),
        (["name=a", "model.class_conditional=true"], "latent.run=null: the run in"),
        (["name=a", "model.class_conditional=true", "latent.run=other"], "latent.run=other: the run in"),
        (
            ["latent.run=ae", "dataset=gaussian_mixture", "dataset.shape=[1,1,4]"],
            "latent.run=ae: downsamples by 2, which does not divide the image size 1x4",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(latent_runs, capsys, words, line):
    name = [] if words[0].startswith("name=") else ["name=wrong"]
    assert train(latent_runs, *name, *words, "max_steps=8") == 2
    refused(capsys, line)
    assert not (latent_runs / "o" / "wrong").exists()


class Reached(Exception):
    """The next check."""


def reach(*_: object) -> None:
    raise Reached


def test_an_autoencoder_for_other_values_is_refused_with_the_values(tmp_path, monkeypatch):
    form = HighDepthImage(dtype="float32", low=[0.0], high=[2.0], file="tiff")
    data: Any = SimpleNamespace(name="photos", form=replace(form, high=[1.0]))
    found = SimpleNamespace(info=SimpleNamespace(form=form), network=None, shape=(1,))
    monkeypatch.setattr(latent_data, "load_autoencoder", lambda *_: found)
    monkeypatch.setattr(latent_data, "_check_images", reach)  # files of other types are no reason
    line = r"^latent\.run=ae: was trained on images with high=\[2\.0\], but those of photos have high=\[1\.0\]; use"
    with pytest.raises(ValueError, match=line):
        latent_data.run_latents(tmp_path, "ae", data, torch.device("cpu"))
    data.form = replace(form, mode="LA")
    with pytest.raises(ValueError, match=r"on images with mode=None, but those of photos have mode=LA;"):
        latent_data.run_latents(tmp_path, "ae", data, torch.device("cpu"))
    data.form = replace(form, dtype="uint16", file="png")
    with pytest.raises(Reached):
        latent_data.run_latents(tmp_path, "ae", data, torch.device("cpu"))
    data.form = Uint8Image()
    with pytest.raises(
        ValueError, match=r"was trained on images with kind=.*, but those of photos have kind=picture;"
    ):
        latent_data.run_latents(tmp_path, "ae", data, torch.device("cpu"))


@pytest.mark.usefixtures("forked")
def test_processes_change_neither_the_latents_nor_what_is_learned(latent_runs, tmp_path):
    alone, shared = (tmp_path / name for name in ("one", "two"))
    for folder, more in ((alone, []), (shared, ["trainer.devices=2"])):
        words = [
            f"output_dir={folder}",
            f"cache_dir={folder}/cache",
            f"latent.run={latent_runs}/o/ae",
            "max_steps=6",
        ]
        assert run([*TINY, *words, *more]) == 0
    kept = [sorted(folder.glob("cache/latents-*/moments.npy")) for folder in (alone, shared)]
    assert [path.parent.name for path in kept[0]] == [path.parent.name for path in kept[1]]
    for one, other in zip(*kept, strict=True):
        np.testing.assert_allclose(np.load(one), np.load(other), rtol=0, atol=1e-5)
    weights = [read(folder / "tiny" / LAST).state["state_dict"] for folder in (alone, shared)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)
