"""The autoencoder against that of diffusers, in folders too, the laws of its latents, and its training."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import relu

from diffusion_cli.cli import run
from diffusion_cli.config import CONF, build
from diffusion_cli.data import Digits, to_model_range
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.formats import Uint8Image
from diffusion_cli.formats.uint8 import to_bytes
from diffusion_cli.metrics import FeatureBatch, ReconstructedSamples, SampleBatch, frechet_distance
from diffusion_cli.metrics.reconstruction import ReconstructionState, structural_similarity
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.load import load_autoencoder
from diffusion_cli.runs.pretrained import WEIGHTS, from_diffusers
from diffusion_cli.training.autoencoder_loss import (
    Autoencoding,
    ReconstructionLoss,
    divergence,
    gradient_distance,
)
from diffusion_cli.training.autoencoding import AutoencodingModule
from diffusion_cli.training.optimizers import Adam
from helpers import assert_same, checkpoint_info

# A random network of diffusers 0.42.1, as `save_pretrained` wrote it, and what it makes of random images and latents:
#   AutoencoderKL(in_channels=2, out_channels=2, down_block_types=["DownEncoderBlock2D"] * 2,
#       up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 16], layers_per_block=1, latent_channels=3,
#       norm_num_groups=4), after torch.manual_seed(0); mean and logvar of encode(x).latent_dist; decode(z).sample
PUBLISHED = Path(__file__).parents[1] / "reference" / "autoencoder_kl"
SMALL = {
    "channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 3,
    "norm_groups": 4,
    "quant_conv": True,
    "gradient_checkpointing": False,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the published one, to be changed."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "vae"))


def small(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL((1, 8, 12), None, **SMALL | changes)


def option(name: str) -> dict:
    node = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    return {key: value for key, value in node.items() if key != "_target_"}


def test_encodes_and_decodes_as_diffusers_does():
    network, expected = from_diffusers(PUBLISHED, "key").network, np.load(PUBLISHED / "expected.npz")
    moments = network.moments(torch.from_numpy(expected["x"]))
    decoded = network.decode(torch.from_numpy(expected["z"]))
    np.testing.assert_allclose(moments.numpy(), expected["moments"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(decoded.numpy(), expected["decoded"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "layers", "latents", "groups", "quant_conv"),
    [((8, 16), 1, 3, 4, True), ((8,), 2, 1, 2, False), ((4, 8, 8), 2, 4, 4, True)],
)
def test_what_diffusers_saves_is_loaded_and_agrees(tmp_path, widths, layers, latents, groups, quant_conv):
    torch.manual_seed(0)
    diffusers = pytest.importorskip("diffusers")
    options = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": latents,
        "norm_num_groups": groups,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }
    theirs = diffusers.AutoencoderKL(**options).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_diffusers(tmp_path, "key").network
    side = 2 ** (len(widths) - 1)
    x, z = torch.randn(2, 3, 4 * side, 6 * side), torch.randn(2, latents, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.moments(x), theirs.encode(x).latent_dist.parameters, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=0, atol=1e-5)


def test_its_weights_have_the_names_of_diffusers_so_that_they_go_back_as_they_came():
    network, published = from_diffusers(PUBLISHED, "key").network, load_file(PUBLISHED / WEIGHTS)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in published.items()
    }
    assert all(torch.equal(tensor, published[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("name", "parameters"), [("kl_f4", 55_312_063), ("kl_f8", 83_653_863)])
def test_the_published_sizes_have_the_published_number_of_parameters(name, parameters):
    # The second is the one of Stable Diffusion; both counted in diffusers too.
    with torch.device("meta"):
        network = AutoencoderKL((3, 256, 256), None, **option(name))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_the_attention_of_older_files_is_found_by_its_older_names(folder):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor
    save_file(state, folder / WEIGHTS)
    old, new = (from_diffusers(path, "key").network.state_dict() for path in (folder, PUBLISHED))
    assert all(torch.equal(old[name], tensor) for name, tensor in new.items())


def test_the_autoencoder_of_a_pipeline_is_found(folder, tmp_path):
    folder.rename(tmp_path / "vae")
    found, given = (from_diffusers(path, "key").network.state_dict() for path in (tmp_path, PUBLISHED))
    assert_same(found, given, "weights")


def test_without_convolutions_beside_the_latents(folder):
    change(folder, use_quant_conv=False, use_post_quant_conv=False)
    state = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "quant_conv" not in name}
    save_file(state, folder / WEIGHTS)
    network, with_them = (from_diffusers(path, "key").network for path in (folder, PUBLISHED))
    x = torch.randn(1, 2, 8, 8)
    inner = with_them.encoder(x)
    assert torch.equal(network.encoder(x), inner)
    assert torch.equal(
        network.moments(x), inner
    )  # random weights: nothing reaches the ends of the log variance


def change(folder: Path, **fields: object) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"act_fn": "gelu"}, "act_fn=gelu: must be silu"),
        ({"_class_name": "VQModel"}, "_class_name=VQModel: must be AutoencoderKL"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=false: must be true"),
        ({"use_quant_conv": False}, "use_post_quant_conv=true contradicts the other fields"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "must be DownEncoderBlock2D"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types=.* contradicts the other fields"),
        ({"block_out_channels": [8, 12]}, "must be multiples of the first"),
        ({"norm_num_groups": 3}, "norm_groups=3: does not divide"),
        ({"block_out_channels": [8, 32]}, r"has shape \[\d+.*\], not \["),
        ({"layers_per_block": 2}, "is missing"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000: must be at most"),
    ],
)
def test_another_network_is_refused_in_a_line(folder, fields, words):
    change(folder, **fields)
    with pytest.raises(ValueError, match=rf"^latent.pretrained=[^;]*{words}[^;]*; give a folder[^;]*$"):
        from_diffusers(folder, "latent.pretrained")


def test_damaged_missing_and_pickled_weights_are_refused_in_a_line(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*give a folder"):
        from_diffusers(folder, "key")
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"\.bin is pickled and could run code\); give .* safe_serialization=True$"
    ):
        from_diffusers(folder, "key")
    with pytest.raises(ValueError, match=r"^key=nowhere: contains no readable AutoencoderKL \("):
        from_diffusers(Path("nowhere"), "key")


def test_the_log_variance_stays_within_its_published_bounds():
    network = small(quant_conv=True)
    with torch.no_grad():
        network.get_parameter("quant_conv.weight").zero_()
        network.get_parameter("quant_conv.bias").copy_(torch.tensor([-50.0, 0, 50, -50, 0, 50]))
    mean, log_variance = network.moments(torch.zeros(1, 1, 8, 12)).chunk(2, dim=1)
    assert mean[0, :, 0, 0].tolist() == [-50, 0, 50]
    assert log_variance[0, :, 0, 0].tolist() == [-30, 0, 20]


def test_what_is_decoded_is_drawn_from_the_moments():
    network, x, eps = small(), torch.randn(2, 1, 8, 12), torch.randn(2, 3, 4, 6)
    mean, log_variance = network.moments(x).chunk(2, dim=1)
    images, moments = network(x, eps)
    assert torch.equal(moments, torch.cat([mean, log_variance], dim=1))
    torch.testing.assert_close(images, network.decode(mean + log_variance.exp().sqrt() * eps))


def test_recomputing_activations_changes_no_gradient():
    def gradients(recompute: bool) -> list[Tensor]:
        network = small(gradient_checkpointing=recompute)
        images, moments = network(torch.ones(1, 1, 8, 12), torch.ones(1, 3, 4, 6))
        (images.square().mean() + moments.square().mean()).backward()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    assert len(gradients(True)) == len(list(small().parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_images_that_the_latents_do_not_divide_are_refused_at_construction():
    with pytest.raises(
        ValueError, match=r"image sizes must be multiples of 2, but images are 8x9; use fewer levels"
    ):
        AutoencoderKL((1, 8, 9), None, **SMALL)
    assert small().factor == 2
    assert small().latent_shape((1, 8, 12)) == (3, 4, 6)


# --- Training --------------------

RUN = [
    "train", "task=autoencoder", "dataset=digits", "name=tiny", "model.channels=8", "model.channel_mult=[1,2]",
    "model.norm_groups=4", "batch_size=16", "optimizer.decay_steps=null", "optimizer.warm_up_steps=3",
    "precision=fp32", "trainer=cpu", "logger=csv", "log_every=2", "checkpoint_every=50", "preview_every=50",
    "validate_every=50",
]  # fmt: skip
ADVERSARY = [
    "objective.discriminator_start=2", "objective.discriminator_channels=8", "objective.discriminator_layers=1",
]  # fmt: skip
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def train(folder: Path, *words: str) -> dict:
    """The checkpoint of a run that is trained."""
    assert run([*RUN, f"output_dir={folder}", *words]) == 0
    return read(folder / "tiny" / LAST).state


def rows(folder: Path) -> list[dict[str, str]]:
    """The log of a run."""
    with (folder / "tiny" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def objective(**changes) -> ReconstructionLoss:
    node = yaml.safe_load((CONF / "objective" / "autoencoder.yaml").read_text())
    return build(node | changes)


@pytest.fixture
def adversarial() -> tuple[ReconstructionLoss, Autoencoding, Tensor, Tensor]:
    """An objective with a discriminator, a model of it, and images with noise for their latents."""
    made = objective(discriminator_start=2, discriminator_channels=8, discriminator_layers=1)
    return made, made.model(small(), (1, 8, 12)), torch.randn(4, 1, 8, 12), torch.randn(4, 3, 4, 6)


def gradients(loss: Tensor, module: torch.nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, materialize_grads=True)
    return list(found)


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_divergence_is_that_of_normal_distributions():
    moments = torch.randn(3, 4, 2, 2)
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = Normal(mean, torch.exp(log_variance / 2))
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(divergence(moments), expected)


def test_the_distance_of_gradients_is_blind_to_brightness_and_sees_each_edge():
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(gradient_distance(x + 0.5, x), torch.zeros(2), atol=1e-6)
    ramp = torch.arange(8.0).expand(
        1, 1, 8, 8
    )  # a slope of 1, 2 and 4 a pixel at the three scales, one axis of two
    torch.testing.assert_close(gradient_distance(ramp, 0 * ramp), torch.tensor([(1 + 2 + 4) / 6]))


def test_the_terms_sum_to_the_published_loss_over_pixels():
    made = objective(kl_weight=0.01, perceptual="gradient", perceptual_weight=2.0)
    network, x, eps = small(), torch.randn(2, 1, 8, 12), torch.randn(2, 3, 4, 6)
    images, moments = network(x, eps)
    terms = made(made.model(network, (1, 8, 12)), x, eps, 0).terms
    pixels = 8 * 12
    summed = (images - x).abs().flatten(1).sum(1) + 0.01 * divergence(moments)
    torch.testing.assert_close(pixels * (terms["loss"] - 2 * gradient_distance(images, x)), summed)


def test_in_one_step_each_of_the_two_gets_the_gradient_of_its_own_loss(adversarial):
    made, model, x, eps = adversarial
    losses = made(model, x, eps, 2)
    discriminator = model.discriminator
    images, moments = model.network(x, eps)
    own = made.terms(images, moments, x)["loss"].mean()
    verdict = -discriminator(images).mean()
    last = model.network.decoder.conv_out.weight
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (own, verdict)]
    weight = 0.5 * (norms[0] / (norms[1] + 1e-4)).detach()
    hinge = 0.5 * (relu(1 - discriminator(x)).mean() + relu(1 + discriminator(images.detach())).mean())
    assert_close(gradients(losses.total, model.network), gradients(own + weight * verdict, model.network))
    assert_close(gradients(losses.total, discriminator), gradients(hinge, discriminator))
    torch.testing.assert_close(losses.terms["discriminator"].mean(), hinge)


def test_the_weight_of_the_discriminator_is_at_most_the_published_one(adversarial):
    made, model, x, eps = adversarial
    with torch.no_grad():
        for parameter in model.discriminator.parameters():
            parameter.mul_(1e-3)
    terms = made(model, x, eps, 2).terms
    # 10^4 beside a sum over the pixels; this loss is a mean of them.
    assert terms["generator_weight"].tolist() == pytest.approx([1e4 / (8 * 12)] * 4)


def test_before_its_start_the_discriminator_changes_nothing_and_learns_nothing(adversarial):
    made, model, x, eps = adversarial
    losses, alone = made(model, x, eps, 1), objective()(Autoencoding(model.network, None), x, eps, 1)
    assert torch.equal(losses.total, alone.total)
    assert not any(gradient.any() for gradient in gradients(losses.total, model.discriminator))


def test_autoencoder_and_discriminator_are_clipped_apart(adversarial):
    made, model, _, _ = adversarial
    settings = {"lr": 1.0, "betas": [0.9, 0.999], "eps": 1e-8, "warm_up_steps": 0, "decay_steps": None}
    module = AutoencodingModule(model, made, Adam(**settings, clip_norm=1.0), 0, checkpoint_info())
    for part, norm in ((model.network, 0.5), (model.discriminator, 40.0)):
        weights = list(part.parameters())
        count = sum(weight.numel() for weight in weights)
        for weight in weights:
            weight.grad = torch.full_like(weight, norm / math.sqrt(count))
    module.configure_gradient_clipping(torch.optim.SGD(module.parameters(), 1.0))
    for part, norm in ((model.network, 0.5), (model.discriminator, 1.0)):
        found = torch.nn.utils.get_total_norm([weight.grad for weight in part.parameters()])
        assert found.item() == pytest.approx(norm, rel=1e-4)


def test_a_run_with_a_discriminator_taken_up_again_equals_one_without_a_stop(tmp_path):
    whole = train(tmp_path / "whole", *ADVERSARY, "max_steps=6")
    train(tmp_path / "parts", *ADVERSARY, "max_steps=4")
    parts = train(tmp_path / "parts", *ADVERSARY, "max_steps=6")
    assert any(name.startswith("model.discriminator.") for name in whole["state_dict"])
    assert not any("discriminator" in name for name in whole["callbacks"]["EMA"]["network"])
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[key], parts[key], key)
    assert_same(whole["callbacks"]["EMA"], parts["callbacks"]["EMA"])
    assert [row["generator_weight"] != "" for row in rows(tmp_path / "whole")] == [False, True, True]


def test_a_run_too_short_for_its_discriminator_says_so(tmp_path, capsys):
    train(tmp_path, *ADVERSARY, "max_steps=2")
    said = "diffuse: objective.discriminator_start=2: is not reached, because the run ends at step 2"
    assert said in capsys.readouterr().err
    train(tmp_path, *ADVERSARY, "max_steps=3")
    assert "is not reached" not in capsys.readouterr().err


# The discriminator's weight is measured on one part of an accumulated batch: without one, all parts agree.
@pytest.mark.parametrize(
    ("extra", "words"),
    [pytest.param("trainer.devices=2", ADVERSARY, marks=pytest.mark.slow), ("accumulate_grad_batches=2", [])],
)
def test_neither_processes_nor_parts_change_what_is_learned(tmp_path, extra, words):
    alone = train(tmp_path / "one", *words, "max_steps=4")
    shared = train(tmp_path / "two", *words, "max_steps=4", extra)
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(shared["state_dict"][name], weight, rtol=1e-3, atol=1e-4)
    losses = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_loss_falls_and_the_averaged_weights_are_those_that_load(tmp_path):
    checkpoint = train(tmp_path, "max_steps=60", "optimizer.lr=0.005")
    logged = rows(tmp_path)
    assert float(logged[-1]["loss"] or logged[-2]["loss"]) < 0.6 * float(logged[0]["loss"])
    assert any(row.get("val_loss") for row in logged)
    assert (tmp_path / "tiny" / "previews" / "step_00000050.png").is_file()
    loaded = load_autoencoder(tmp_path / "tiny", torch.device("cpu"))
    assert loaded.shape == (1, 8, 8)
    assert not loaded.network.training
    assert_same(dict(loaded.network.state_dict()), dict(checkpoint["callbacks"]["EMA"]["network"]))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["schedule=cosine"], "schedule: does not apply to task=autoencoder"),
        (["sampler=ddim", "time_sampling=uniform"], "time_sampling, sampler: does not apply"),
        (["objective=simple"], "objective=simple: is for task=diffusion; set task=diffusion"),
        (["model=unet_tiny"], "model=unet_tiny: is for task=diffusion; set task=diffusion"),
        (["model.channel_mult=[1,1,1,1,1]"], "image sizes must be multiples of 16, but images are 8x8"),
        (["progressive=[4,8]"], "progressive=[4, 8]: not supported for task=autoencoder"),
        (["eval_every=2"], "eval_every=2: an autoencoder makes no samples"),
        (["objective.discriminator_start=1"], "discriminator_layers=3: needs at least 24 pixels"),
        (
            ["objective.perceptual=lpips", "objective.lpips_weights=nowhere"],
            "objective.lpips_weights=nowhere: no such",
        ),
        (
            ["task=diffusion", "model=kl_tiny"],
            "model=kl_tiny: is for task=autoencoder",
        ),
        (["task=diffusion", "objective=autoencoder"], "objective=autoencoder: is for task=autoencoder"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(tmp_path, capsys, words, line):
    others = any(word.startswith(("model=", "task=")) for word in words)
    base = [word for word in RUN if not others or "model." not in word]
    assert run([*base, f"output_dir={tmp_path}", "max_steps=2", *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said


def test_an_autoencoder_is_no_denoiser_to_sample_from(tmp_path, capsys):
    train(tmp_path, "max_steps=1")
    assert run(["sample", "run=tiny", f"output_dir={tmp_path}"]) == 2
    assert "was trained with task=autoencoder; give a run of task=diffusion" in capsys.readouterr().err
    assert run(["sample", f"output_dir={tmp_path}"]) == 2
    assert "contains no runs" in capsys.readouterr().err


# --- Evaluation --------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs with a short autoencoder, `tiny`."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "max_steps=40", "optimizer.lr=0.005")
    return folder


def evaluate(folder: Path, *words: str) -> int:
    return run(
        ["eval", "run=tiny", f"output_dir={folder}", f"cache_dir={folder}/cache", "device=cpu", *words]
    )


@pytest.fixture(scope="module")
def pixels(runs) -> tuple[Tensor, Tensor]:
    """All validation digits, and what the run makes of them, as bytes in float64."""
    images = Digits("", val_fraction=0.2, flip=False).load("val")
    originals = images[torch.arange(len(images))]
    network = load_autoencoder(runs / "tiny", torch.device("cpu")).network
    return originals.double(), to_bytes(network.reconstruct(to_model_range(originals))).double()


def test_the_peak_signal_to_noise_ratio_is_the_mean_of_each_images_own(runs, pixels, capsys):
    assert evaluate(runs, "metric=reconstruction", "batch_size=77") == 0
    originals, made = pixels
    ratios = 10 * torch.log10(255**2 / (originals - made).square().flatten(1).mean(1))
    (report,) = json.loads((runs / "tiny" / "metrics.json").read_text())[-1:]
    (result,) = report["results"]
    assert result["name"] == "psnr"
    assert result["value"] == pytest.approx(ratios.mean().item())
    assert result["details"]["standard_error"] == pytest.approx((ratios.std() / len(ratios) ** 0.5).item())
    assert result["details"]["images"] == len(originals) == 359
    assert result["protocol"]["sampling"]["split"] == "val"
    said = capsys.readouterr().out
    assert "ssim: the images are smaller than its window of 11 pixels" in said
    assert "reconstructions of 359 images of digits/val, ema weights" in said
    assert list((runs / "tiny" / "pictures").glob("reconstructions-*.png"))


def test_numbers_of_deep_images_say_over_what_range_they_are(tmp_path, capsys):
    np.save(tmp_path / "deep.npy", np.random.RandomState(0).randint(0, 4096, (40, 8, 8, 1)).astype(np.uint16))
    data = [
        "dataset=array",
        f"dataset.path={tmp_path}/deep.npy",
        "dataset.range=[0,4095]",
        "dataset.val_fraction=0.2",
    ]
    checkpoint = train(tmp_path, *data, "max_steps=2")
    assert evaluate(tmp_path, "metric=reconstruction") == 0
    assert "note: metrics use previews with 256 gray values over the stated range" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "tiny" / "metrics.json").read_text())[-1]["results"]
    about = result["protocol"]["sampling"]
    assert about["form"] == checkpoint["diffuse"]["form"]
    assert (about["form"]["low"], about["form"]["high"]) == ([0], [4095])
    assert about["dataset"] == "deep"
    assert len(about["images_sha256"]) == 64


def test_the_frechet_distance_is_between_reconstructions_and_their_originals(runs, pixels):
    assert evaluate(runs, "metric=rfid", "features=classifier", "features.steps=20") == 0
    (result,) = json.loads((runs / "tiny" / "metrics.json").read_text())[-1]["results"]
    dataset = Digits("", val_fraction=0.2, flip=False)
    node = yaml.safe_load((CONF / "features" / "classifier.yaml").read_text()) | {"steps": 20}
    features = build(node, dataset, runs / "cache", torch.device("cpu"))
    features.prepare()
    seen = [features(part.to(torch.uint8)).features for part in pixels]
    assert result["name"] == "rfrechet_classifier"
    moments = [(values.double().mean(0), values.double().T.cov()) for values in seen]
    (mean, covariance), (other_mean, other_covariance) = moments
    expected = frechet_distance(mean, covariance, other_mean, other_covariance)
    assert result["value"] == pytest.approx(expected, rel=1e-3)


def test_reconstructions_do_not_depend_on_the_number_of_processes(runs):
    values = []
    for count in (1, 2):
        assert evaluate(runs, "metric=reconstruction", "batch_size=50", f"processes={count}") == 0
        (result,) = json.loads((runs / "tiny" / "metrics.json").read_text())[-1]["results"]
        values.append((result["value"], result["protocol"]["sampling"]["pixels_sha256"]))
    assert values[0] == values[1]


def test_bigger_images_have_a_structural_similarity():
    originals = (255 * torch.rand(4, 1, 16, 16)).to(torch.uint8)
    images = MemoryImages(originals, None)
    samples = ReconstructedSamples(small_of(16), images, Uint8Image(), {})
    measurement = ReconstructionState(samples)
    seen = FeatureBatch(torch.empty(4, 0), None)
    measurement.update(SampleBatch(originals, None, seen))  # as though the autoencoder were perfect
    found = {finding.name: finding for finding in measurement.compute()}
    assert found["ssim"].value == pytest.approx(1)
    assert found["psnr"].value is None
    assert found["psnr"].notes == ("psnr: 4 images are reconstructed exactly, and left out of the mean",)


def test_structural_similarity_is_as_published():
    """Wang et al. 2004, window by window: Gaussian weights of sigma 1.5, only windows that lie inside the image."""
    generator = np.random.RandomState(0)
    first = generator.randint(0, 256, (2, 3, 14, 17)).astype(float)
    second = np.clip(first + generator.normal(0, 40, first.shape), 0, 255)
    place = np.arange(-5, 6)
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = np.zeros((2, 3, 4, 7))
    for b, c, i, j in np.ndindex(expected.shape):
        x, y = (images[b, c, i : i + 11, j : j + 11] for images in (first, second))
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        both = (window * (x - mx) * (y - my)).sum()
        expected[b, c, i, j] = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    found = structural_similarity(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(found, expected.mean((1, 2, 3)), rtol=1e-10)


def small_of(size: int) -> AutoencoderKL:
    return AutoencoderKL((1, size, size), None, **SMALL)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["metric=fid"],
            "metric=fid: does not evaluate autoencoders, and run=tiny is one; use metric=[reconstruction,rfid]",
        ),
        (["metric=[reconstruction,inversion]"], "metric=inversion: does not evaluate autoencoders"),
        (
            ["metric=[reconstruction,rfid]", "metric.rfid.split=train"],
            "reconstruction.split=val, rfid.split=train",
        ),
        (
            ["metric=reconstruction", "num_samples=5"],
            "num_samples=5: applies only to denoisers, and run=tiny is an autoencoder; leave it out",
        ),
        (["metric=reconstruction", "reference.split=val"], "leave it out"),
        (
            ["metric=reconstruction", "run=null", "samples=there"],
            "metric=reconstruction: evaluates an autoencoder",
        ),
        (["metric=rfid", "run=null"], "set run= to a run of task=autoencoder"),
    ],
)
def test_what_is_not_measured_of_an_autoencoder_is_refused_in_a_line(runs, capsys, words, line):
    assert evaluate(runs, *words) == 2
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said
